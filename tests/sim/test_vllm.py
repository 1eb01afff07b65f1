"""The engine, worked out by hand step by step, and what holds whatever comes."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from epp.errors import BadRequest
from epp.sim.profile import EngineProfile
from epp.sim.vllm import Engine, EngineRequest, Step


def engine(
    *,
    blocks: int = 100,
    budget: int = 64,
    seqs: int = 8,
    max_lora: int = 1,
    a0: float = 1.0,
    a1: float = 0.0,
    a2: float = 0.0,
    a3: float = 0.0,
    a4: float = 0.0,
    lora_load_s: float = 0.0,
) -> Engine:
    """Blocks of 4 tokens."""
    return Engine(EngineProfile("test", a0, a1, a2, a3, a4, blocks, budget, seqs, max_lora, lora_load_s, 4))


def request(name: str, prompt: int, output: int, *keys: int, adapter: str = "") -> EngineRequest:
    return EngineRequest(name, prompt, output, keys, adapter)


def step(served: Engine) -> Step:
    done = served.step()
    assert done is not None
    return done


def finish(served: Engine) -> list[Step]:
    """Step until there is nothing to do."""
    steps = []
    while (done := served.step()) is not None:
        steps.append(done)
        assert len(steps) < 10_000
    return steps


def test_an_idle_engine_has_no_step() -> None:
    assert engine().step() is None


def test_a_prompt_gives_its_first_token_with_its_last_part_and_one_a_step_after_it() -> None:
    served = engine(budget=8)
    served.submit(request("r", 20, 3))
    first, second, third, fourth, fifth = finish(served)
    assert (first.tokens, second.tokens) == ((), ())  # 8 + 8 of 20
    assert (third.tokens, third.first, third.finished) == (("r",), ("r",), ())
    assert (fourth.tokens, fourth.first, fourth.finished) == (("r",), (), ())
    assert (fifth.tokens, fifth.first, fifth.finished) == (("r",), (), ("r",))


def test_an_answer_of_one_token_ends_with_the_prefill() -> None:
    served = engine()
    served.submit(request("r", 5, 1))
    (only,) = finish(served)
    assert (only.first, only.finished) == (("r",), ("r",))
    assert len(served) == 0


def test_step_time_counts_prefill_decodes_context_and_pairs() -> None:
    served = engine(budget=8, a0=1000.0, a1=1.0, a2=100.0, a3=0.01, a4=0.5)
    served.submit(request("a", 10, 3))
    served.submit(request("b", 3, 1))
    durations = [done.duration for done in finish(served)]
    assert durations == pytest.approx(
        [
            1008 + 0.5 * 36,  # 8 of a: 1 + 2 … + 8 pairs
            1005 + 0.5 * (9 + 10 + 6),  # the last 2 of a see 9 and 10 tokens; 3 of b
            1100 + 0.11,  # a decodes: it reads 11 tokens
            1100 + 0.12,
        ]
    )


def test_running_requests_come_before_waiting_ones_and_decodes_before_prefills() -> None:
    served = engine(budget=8)
    served.submit(request("a", 4, 9))
    step(served)
    served.submit(request("b", 12, 1))
    served.submit(request("c", 4, 1))
    assert step(served).admitted == (("b", 0),)  # 1 for a, 7 of b, nothing left for c
    assert step(served).admitted == (("c", 0),)  # 1 for a, 5 of b, 2 of c
    assert step(served).first == ("c",)


def test_no_more_requests_run_than_there_are_places() -> None:
    served = engine(seqs=2)
    for name in "abc":
        served.submit(request(name, 4, 2))
    step(served)
    assert (served.stats().running, served.stats().waiting) == (2, 1)
    step(served)
    assert step(served).admitted == (("c", 0),)  # a and b got their last tokens in the second step


def test_the_second_request_finds_the_full_blocks_of_the_first() -> None:
    served = engine()
    served.submit(request("a", 10, 1, 1, 2))  # blocks 1 and 2 are full, 2 tokens stand in a third
    finish(served)
    served.submit(request("b", 10, 1, 1, 2))
    assert step(served).admitted == (("b", 8),)
    assert (served.stats().prefix_queries, served.stats().prefix_hits) == (20, 8)


def test_blocks_that_two_parts_of_a_prefill_fill_together_are_found() -> None:
    served = engine(budget=6, seqs=4)
    served.submit(request("a", 12, 1, 1, 2, 3))  # 6 + 6: the second block is half full in between
    finish(served)
    served.submit(request("b", 13, 1, 1, 2, 3))
    assert step(served).admitted == (("b", 12),)


def test_at_least_one_token_of_a_prompt_is_computed() -> None:
    served = engine(a0=0.0, a1=1.0, a2=1.0)
    served.submit(request("a", 8, 1, 1, 2))
    finish(served)
    served.submit(request("b", 8, 1, 1, 2))
    again = step(served)
    assert (again.admitted, again.duration) == ((("b", 4),), 4.0)


def test_two_requests_of_one_step_share_what_the_first_computes() -> None:
    served = engine()
    served.submit(request("a", 9, 1, 1, 2))
    served.submit(request("b", 9, 1, 1, 2))
    assert step(served).admitted == (("a", 0), ("b", 8))
    assert served.blocks.used == 4  # two shared ones, one of each for the ninth token


def test_the_next_turn_finds_the_answer_of_this_one() -> None:
    """6 of prompt and 7 of answer; the last token of an answer is never fed back, so 12 are in blocks 1, 2, 3."""
    served = engine()
    served.submit(request("a", 6, 7, 1, 2, 3))
    finish(served)
    served.submit(request("b", 16, 1, 1, 2, 3, 4))
    assert step(served).admitted == (("b", 12),)


def test_an_answer_takes_a_block_in_each_step_that_begins_one_the_last_step_too() -> None:
    served = engine()
    served.submit(request("a", 4, 6))
    used = []
    while served.step() is not None:
        used.append(served.blocks.used)
    assert used == [1, 2, 2, 2, 2, 3]  # 4 tokens in the first step, 5 in the second, 9 in the sixth


def test_an_answer_without_keys_takes_room_and_pushes_prefixes_out() -> None:
    served = engine(blocks=4)
    served.submit(request("a", 8, 1, 1, 2))
    finish(served)
    served.submit(request("b", 4, 9))  # 12 tokens in three blocks: the two blank ones and the leaf
    finish(served)
    assert served.blocks.match([1, 2])[0] == 1


def test_out_of_blocks_the_last_one_admitted_starts_again_from_the_head_of_the_queue() -> None:
    served = engine(blocks=4, seqs=2)
    served.submit(request("a", 7, 6))
    served.submit(request("b", 7, 4))
    served.submit(request("c", 1, 1))
    first = step(served)  # two blocks each: all four
    assert (first.tokens, served.stats().kv_usage) == (("a", "b"), 1.0)
    assert step(served).tokens == ("a", "b")  # 8 tokens each: full
    third = step(served)  # a needs a third block: b goes, c stays behind b, and nobody is let in
    assert (third.tokens, third.admitted) == (("a",), ())
    assert (served.stats().preemptions, served.stats().waiting) == (1, 2)
    steps = finish(served)
    assert Counter(name for done in [first, third, *steps] for name in done.tokens) == {"a": 5, "b": 3, "c": 1}
    # a ends in the sixth step; in the seventh b computes 9 tokens anew and gets its third, beside c
    assert [done.finished for done in steps] == [(), (), ("a",), ("c",), ("b",)]
    assert [done.first for done in steps if done.first] == [("c",)]  # b had its first token long ago


def test_nobody_is_let_in_by_the_step_that_preempts_and_a_half_done_prefill_loses_no_token() -> None:
    served = engine(blocks=4, budget=5, seqs=4)
    served.submit(request("a", 7, 6))
    served.submit(request("b", 8, 3))
    steps = [step(served) for _ in range(3)]  # 5 of a; 2 of a, 3 of b; a decodes, 4 of b: 8 and 7 tokens
    assert served.stats().kv_usage == 1.0
    steps.append(step(served))  # a grows, b goes; one block is free, enough for the first part of b
    assert (served.stats().running, served.stats().waiting, served.stats().preemptions) == (1, 1, 1)
    steps.append(step(served))
    assert served.stats().running == 2
    steps += finish(served)
    assert Counter(name for done in steps for name in done.tokens) == {"a": 6, "b": 3}
    assert [name for done in steps for name, _ in done.admitted] == ["a", "b"]  # the first time only


def test_tokens_of_a_preempted_request_are_computed_anew_but_not_given_twice() -> None:
    served = engine(blocks=4, a0=0.0, a1=1.0, a2=1.0)
    served.submit(request("a", 7, 6))
    served.submit(request("b", 7, 4))
    durations = [done.duration for done in finish(served)]
    # 14 of prompt; 2 decodes; 1; 1; 1; 1 (a ends: 7 + 5 tokens); b: 7 of prompt and its 2 tokens; 1 decode
    assert durations == [14.0, 2.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0]


def test_a_request_that_lacks_blocks_holds_the_queue_and_keeps_what_others_cached() -> None:
    served = engine(blocks=4)
    served.submit(request("a", 12, 3))
    step(served)
    served.submit(request("b", 8, 1))
    served.submit(request("c", 1, 1))
    assert step(served).admitted == ()  # first come first served: c does not overtake
    step(served)
    assert step(served).admitted == (("b", 0), ("c", 0))


def test_an_adapter_without_a_slot_waits_and_others_pass() -> None:
    served = engine(max_lora=1)
    served.submit(request("a", 4, 2, adapter="x"))
    served.submit(request("b", 4, 1, adapter="y"))
    served.submit(request("c", 4, 1, adapter="x"))
    served.submit(request("d", 4, 1))
    assert step(served).admitted == (("a", 0), ("c", 0), ("d", 0))
    assert (served.stats().running_adapters, served.stats().waiting_adapters) == (("x",), ("y",))
    assert step(served).admitted == ()
    assert step(served).admitted == (("b", 0),)


def test_those_passed_over_keep_their_order_at_the_head_of_the_queue() -> None:
    served = engine(max_lora=1, seqs=2)
    served.submit(request("a", 4, 2, adapter="x"))
    served.submit(request("b", 4, 9, adapter="y"))
    served.submit(request("c", 4, 9, adapter="z"))
    for name in ("d", "e"):
        served.submit(request(name, 4, 9))
    assert step(served).admitted == (("a", 0), ("d", 0))
    step(served)
    assert step(served).admitted == (("b", 0),)  # before c, and before e that came after both


def test_an_adapter_is_loaded_when_it_is_not_on_the_gpu() -> None:
    served = engine(max_lora=2, lora_load_s=0.5)
    durations = []
    for number, adapter in enumerate(["x", "y", "x", "z", "x", "y"]):
        served.submit(request(str(number), 4, 1, adapter=adapter))
        durations += [done.duration for done in finish(served)]
    assert durations == [1.5, 1.5, 1.0, 1.5, 1.0, 1.5]  # z takes the place of y, used longest ago


def test_an_aborted_request_gives_its_blocks_back_wherever_it_is() -> None:
    served = engine(budget=8, seqs=2)
    for name in "abc":
        served.submit(request(name, 6, 9))
    step(served)  # a decodes, 2 of b's 6 are computed, c waits
    for name in ("c", "b", "a", "a", "never here"):
        served.abort(name)
    assert (len(served), served.blocks.used, served.stats().running) == (0, 0, 0)
    assert served.step() is None


def test_aborting_a_request_in_its_last_step_changes_nothing() -> None:
    served = engine()
    served.submit(request("a", 4, 1))
    assert step(served).finished == ("a",)
    served.abort("a")
    assert served.step() is None
    assert (len(served), served.blocks.used) == (0, 0)


def test_stats_show_a_request_until_its_last_step_is_over() -> None:
    served = engine()
    served.submit(request("a", 4, 1))
    step(served)
    assert served.stats().running == 1
    assert served.step() is None
    assert served.stats().running == 0


def test_what_pages_count_is_counted_when_the_step_is_over_and_prompts_at_their_first_token() -> None:
    served = engine(budget=8)
    served.submit(request("r", 10, 3))
    told = []
    while served.step() is not None:
        told.append(counted(served))
    # first tokens, steps with tokens, processed, generated: two steps for the prompt, of which the first brings nothing
    assert told == [(0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 11, 1), (1, 2, 12, 2)]
    for _ in range(2):  # an idle engine counts nothing, however often it is asked for a step
        assert counted(served) == (1, 3, 13, 3)
        assert served.step() is None


def test_what_was_cached_or_is_computed_anew_is_not_counted_as_computed() -> None:
    served = engine()
    served.submit(request("a", 10, 1, 1, 2))
    finish(served)
    served.submit(request("b", 10, 1, 1, 2))
    finish(served)
    assert served.stats().processed == (10 + 1) + (2 + 1)
    served = engine(blocks=4)
    served.submit(request("a", 7, 6))
    served.submit(request("b", 7, 4))
    finish(served)
    assert served.stats().preemptions == 1
    assert served.stats().processed == (7 + 6) + (7 + 4)


def counted(served: Engine) -> tuple[int, int, int, int]:
    stats = served.stats()
    return stats.first_tokens, stats.steps, stats.processed, stats.generated


@pytest.mark.parametrize(("prompt", "output"), [(0, 1), (1, 0), (397, 4)])
def test_what_can_never_run_is_refused(prompt: int, output: int) -> None:
    with pytest.raises(BadRequest):
        engine().submit(request("r", prompt, output))


def test_the_longest_request_that_fits_is_served_alone() -> None:
    served = engine(blocks=4, budget=8)
    served.submit(request("a", 9, 7))
    assert sum(len(done.tokens) for done in finish(served)) == 7


requests = st.tuples(
    st.lists(st.integers(0, 1), min_size=2, max_size=8),  # a path in a tree of blocks: prefixes are shared
    st.integers(0, 3),  # tokens of a last block
    st.integers(1, 9),
    st.sampled_from(["", "", "x", "y"]),
)
events = st.lists(st.one_of(requests, requests, st.none(), st.none(), st.integers(0, 20)), min_size=10, max_size=60)


@settings(deadline=None)
@given(events=events, blocks=st.integers(11, 15), budget=st.integers(3, 30), seqs=st.integers(1, 3))
def test_every_request_ends_once_and_blocks_are_neither_lost_nor_made(
    events: list[tuple[list[int], int, int, str] | int | None], blocks: int, budget: int, seqs: int
) -> None:
    """Submit, abort and step in any order: each request gets exactly its tokens, or less when it is aborted."""
    served = engine(blocks=blocks, budget=budget, seqs=seqs)
    wanted: dict[str, int] = {}
    aborted: set[str] = set()
    got: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    firsts: Counter[str] = Counter()

    def account(done: Step | None) -> None:
        stats = served.stats()
        assert served.blocks.used + served.blocks.free == blocks
        assert min(stats.waiting, stats.running, served.blocks.used, served.blocks.free) >= 0
        assert stats.running <= seqs
        assert len(stats.running_adapters) <= 1
        assert stats.prefix_hits <= stats.prefix_queries
        if done is not None:
            assert done.duration >= 1.0
            got.update(done.tokens)
            firsts.update(done.first)
            ends.update(done.finished)

    for event in events:
        match event:
            case None:
                account(served.step())
            case int():
                served.abort(str(event))
                aborted |= {str(event)} if str(event) in wanted and not ends[str(event)] else set()
            case path, rest, output, adapter:
                keys = tuple(int("1" + "".join(map(str, path[: n + 1])) + f"{len(adapter)}") for n in range(len(path)))
                name = str(len(wanted))
                wanted[name] = output
                served.submit(EngineRequest(name, 4 * len(path) + rest, output, keys, adapter))
    for done in finish(served):
        account(done)
    served.step()
    assert (len(served), served.blocks.used) == (0, 0)
    for name, output in wanted.items():
        if name in aborted:
            assert got[name] < output or ends[name] == 0
        else:
            assert (got[name], firsts[name], ends[name]) == (output, 1, 1)


def test_the_same_calls_give_the_same_steps() -> None:
    def run() -> list[Step]:
        served = engine(blocks=12, budget=9, max_lora=1)
        for number in range(20):
            served.submit(request(str(number), 5 + number % 7, 1 + number % 5, 1, 2, adapter="xy"[number % 2]))
        return finish(served)

    assert run() == run()
