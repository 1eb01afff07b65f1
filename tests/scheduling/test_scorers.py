"""Each scorer's table, worked out by hand: values, unknown, ties, one candidate, and a decision that it changes."""

from __future__ import annotations

import numpy as np
import pytest

from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.scheduling.adapters import AdapterNames
from epp.scheduling.plugin import Params, Plugin, Scorer
from epp.scheduling.scorers import (
    ActiveRequestParams,
    LoadParams,
    PrefixParams,
    active_request,
    kv_cache,
    lora_affinity,
    prefix_cache,
    queue,
    running,
)
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler, winners, with_prefix


def scores(plugin: Plugin[Scorer], candidates: Candidates, params: Params | None = None) -> list[float]:
    got: list[float] = made(plugin, params).score(ask(), candidates).tolist()
    return got


# -- queue-scorer and running-requests-size-scorer: (most - value) / (most - fewest) -----------------------------------


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([3, 0, 10], [0.7, 1.0, 0.0]),  # (10-3)/10, 10/10, 0/10
        ([4, 4, 4], [1.0, 1.0, 1.0]),  # a tie
        ([7], [1.0]),  # one candidate
        ([None, 2, 6], [0.5, 1.0, 0.0]),  # unknown: neutral, and no bound for the others
        ([None, 5], [0.5, 1.0]),  # the only known one ties with itself
        ([None, None], [0.5, 0.5]),
    ],
)
def test_fewer_score_higher(waiting: list[float | None], expected: list[float]) -> None:
    assert scores(queue, pool(*(Page(waiting=value) for value in waiting))) == pytest.approx(expected)
    assert scores(running, pool(*(Page(running=value) for value in waiting))) == pytest.approx(expected)


def test_unknown_scores_what_the_operator_says() -> None:
    assert scores(queue, pool(None, Page(waiting=1)), LoadParams(unknown=0.2)) == [0.2, 1.0]
    assert scores(kv_cache, pool(None, Page(kv_usage=0.25)), LoadParams(unknown=0.2)) == [0.2, 0.75]


def test_a_page_too_old_is_unknown_whatever_it_said() -> None:
    table = EndpointTable(freshness=2.0)
    pool(Page(waiting=0, running=0, kv_usage=0.0), Page(waiting=9, running=9, kv_usage=0.9), table=table)
    table.page_told(1, table.generation(1), Page(waiting=9, running=9, kv_usage=0.9), NOW + 3)
    later = table.candidates(NOW + 3)  # the first page is 3 s old
    assert scores(queue, later) == [0.5, 1.0]
    assert scores(running, later) == [0.5, 1.0]
    assert scores(kv_cache, later) == pytest.approx([0.1, 0.1])  # 0.5, but no better than the known one


def test_the_queue_scorer_sees_what_was_sent_since_the_page() -> None:
    candidates = pool(Page(waiting=0), Page(waiting=1), inflight=[3, 0])
    assert scores(queue, candidates) == [0.0, 1.0]  # 0 + 3 sent, against 1 + 0


def test_the_queue_decides() -> None:
    request = ask()
    candidates = pool(Page(waiting=5, running=1), Page(waiting=1, running=5))
    assert winners(profile((made(queue), 1.0)), candidates, request, 20) == [0, 20]
    assert winners(profile((made(running), 1.0)), candidates, request, 20) == [20, 0]


# -- kv-cache-utilization-scorer: 1 - usage ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ([0.2, 0.1, 0.9], [0.8, 0.9, 0.1]),
        ([0.5, 0.5], [0.5, 0.5]),
        ([1.0], [0.0]),
        ([None, 0.0, 1.0], [0.5, 1.0, 0.0]),
    ],
)
def test_free_cache_scores_higher(usage: list[float | None], expected: list[float]) -> None:
    assert scores(kv_cache, pool(*(Page(kv_usage=value) for value in usage))) == pytest.approx(expected)


def test_free_cache_decides() -> None:
    candidates = pool(Page(kv_usage=0.9), Page(kv_usage=0.3))
    assert winners(profile((made(kv_cache), 1.0)), candidates, ask(), 20) == [0, 20]


# -- active-request-scorer: 1 up to the threshold, else (most - count) / most * maxBusyScore ---------------------------


@pytest.mark.parametrize(
    ("inflight", "params", "expected"),
    [
        ([0, 2, 4], ActiveRequestParams(), [1.0, 0.5, 0.0]),
        ([4, 4], ActiveRequestParams(), [0.0, 0.0]),  # a tie among the busy
        ([0, 0], ActiveRequestParams(), [1.0, 1.0]),
        ([3], ActiveRequestParams(), [0.0]),  # one candidate: it is the busiest
        ([0, 1, 2, 8], ActiveRequestParams(idle_threshold=1), [1.0, 1.0, 0.75, 0.0]),
        ([0, 2, 4], ActiveRequestParams(max_busy_score=0.5), [1.0, 0.25, 0.0]),
        ([1, 2], ActiveRequestParams(idle_threshold=5, max_busy_score=0.0), [1.0, 1.0]),
    ],
)
def test_fewer_in_flight_score_higher(inflight: list[int], params: ActiveRequestParams, expected: list[float]) -> None:
    assert scores(active_request, pool(*[Page()] * len(inflight), inflight=inflight), params) == expected


def test_in_flight_is_known_without_any_page() -> None:
    assert scores(active_request, pool(None, None, inflight=[1, 0])) == [0.0, 1.0]


def test_in_flight_decides() -> None:
    candidates = pool(Page(waiting=0), Page(waiting=0), inflight=[2, 1])
    assert winners(profile((made(active_request), 1.0)), candidates, ask(), 20) == [0, 20]


# -- lora-affinity-scorer: running 1, free slot 0.8, waiting 0.6, full 0 -----------------------------------------------


def lora(*running: str, waiting: tuple[str, ...] = (), most: float | None = 2) -> Page:
    return Page(running_adapters=running, waiting_adapters=waiting, max_lora=most)


def test_adapters_by_residency_and_free_slots() -> None:
    candidates = pool(
        lora("a", "b"),  # running: 1
        lora("b"),  # not there, one of two slots free: 0.8
        lora("b", waiting=("a",)),  # waiting, full: 0.6
        lora(waiting=("a",)),  # waiting, a slot free: 0.8
        lora("b", "c"),  # full: 0
        lora("b", most=None),  # how many fit was never told: unknown
        lora("a", most=None),  # running all the same: 1
        None,  # no page: unknown
    )
    got = made(lora_affinity).score(ask(model="a"), candidates).tolist()
    assert got == [1.0, 0.8, 0.6, 0.8, 0.0, 0.5, 1.0, 0.5]


def test_an_adapter_on_a_page_too_old_is_unknown() -> None:
    table = EndpointTable()
    pool(lora("a"), lora("b"), table=table)
    assert made(lora_affinity).score(ask(model="a"), table.candidates(NOW + 3)).tolist() == [0.5, 0.5]


def test_one_candidate_with_the_adapter() -> None:
    assert made(lora_affinity).score(ask(model="a"), pool(lora("a"))).tolist() == [1.0]


def test_a_base_model_request_scores_the_same_everywhere() -> None:
    candidates = pool(lora("a"), lora(), lora("a", "b"), lora(most=0), None)
    assert made(lora_affinity).score(ask(model="base"), candidates).tolist() == [1.0] * 5


def test_base_model_requests_are_spread_and_not_pulled_to_where_adapters_are() -> None:
    candidates = pool(lora("a", most=4), lora(most=0), lora(most=0), lora(most=0))
    counts = winners(profile((made(lora_affinity), 1.0)), candidates, ask(model="base"), 48)
    assert sum(counts) == 48
    assert max(counts) <= 24  # the reference sends 48 of 48 to the first; 12 each is even, and 24 is 4 sigma away


def test_an_adapter_seen_once_still_looks_for_a_free_slot_when_nobody_runs_it() -> None:
    table = EndpointTable()
    scorer = made(lora_affinity)
    scorer.score(ask(model="a"), pool(lora("a"), lora("b", "c"), table=table))
    for slot in (0, 1):
        table.page_told(slot, table.generation(slot), lora(*(["b", "c"] if slot else [])), NOW)
    assert scorer.score(ask(model="a"), table.candidates(NOW)).tolist() == [0.8, 0.0]
    assert made(lora_affinity).score(ask(model="a"), table.candidates(NOW)).tolist() == [1.0, 1.0]  # never seen


def test_an_adapter_that_runs_outside_the_candidates_is_an_adapter() -> None:
    everybody = pool(lora("a"), lora("b", "c"), lora("b"))
    rest = everybody.keep(np.array([False, True, True]))
    assert made(lora_affinity).score(ask(model="a"), rest).tolist() == [0.0, 0.8]


def test_adapter_names_remembered_are_bounded_and_come_from_pages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterNames, "MOST", 2)
    names = AdapterNames()
    table = EndpointTable()
    candidates = pool(lora("a", "b", "c", most=9), table=table)
    for name in ("a", "b", "c", "a client's fancy"):
        names.has(name, candidates)
    table.page_told(0, table.generation(0), lora(), NOW)
    known = [names.has(name, table.candidates(NOW)) for name in ("a", "b", "c", "a client's fancy")]
    assert known == [False, True, True, False]


def test_the_adapter_decides() -> None:
    candidates = pool(lora("b", "c"), lora("a"))
    assert winners(profile((made(lora_affinity), 1.0)), candidates, ask(model="a"), 20) == [0, 20]


# -- prefix-cache-scorer: w * min(1, matched tokens / scale)^2 + (1 - w) * matched / total -----------------------------


def prompt(blocks: int) -> str:
    return "".join(chr(ord("a") + i) * 256 for i in range(blocks))


def prefix_scores(params: PrefixParams) -> list[float]:
    """Of 8 blocks, slot 0 holds all, slot 1 holds 2, slot 2 none."""
    producer, context = with_prefix()
    scorer = made(prefix_cache, params, context)
    candidates = pool(None, None, None)
    assert producer.chosen is not None
    for slot, blocks in ((0, 9), (1, 2)):
        producer.chosen(ask(prompt(blocks)), candidates, np.array([slot]))
    got: list[float] = scorer.score(ask(prompt(8)), candidates).tolist()
    return got


def test_the_share_of_the_prompt_that_is_held() -> None:
    assert prefix_scores(PrefixParams()) == [1.0, 0.25, 0.0]


def test_long_matches_may_count_for_more() -> None:
    # 8 blocks of 64 tokens: 512 / 1024 tokens, squared 0.25; 2 blocks: 128 / 1024, squared 1/64.
    params = PrefixParams(match_length_weight=0.5, match_length_scale_tokens=1024)
    assert prefix_scores(params) == [0.5 * 0.25 + 0.5, 0.5 / 64 + 0.5 * 0.25, 0.0]
    whole = PrefixParams(match_length_weight=1.0, match_length_scale_tokens=128)
    assert prefix_scores(whole) == [1.0, 1.0, 0.0]  # min(1, ...)


def test_a_prompt_shorter_than_one_block_scores_nothing_anywhere() -> None:
    _, context = with_prefix()
    assert made(prefix_cache, None, context).score(ask("short"), pool(None, None)).tolist() == [0.0, 0.0]
    assert made(prefix_cache, None, context).score(ask("short"), pool(None)).tolist() == [0.0]


def test_the_prefix_decides_and_later_turns_follow_the_first() -> None:
    producer, context = with_prefix()
    choosing = scheduler(profile((made(prefix_cache, None, context), 1.0)), producer, seed=5)
    candidates = pool(*[Page(waiting=0)] * 8)
    first = choosing.schedule(ask(prompt(4)), candidates)
    for turn in range(5, 12):
        assert choosing.schedule(ask(prompt(turn)), candidates).first == first.first
    assert first.matched_tokens == 0


def test_endpoints_that_hold_the_same_tie() -> None:
    producer, context = with_prefix()
    candidates = pool(None, None, None)
    assert producer.chosen is not None
    for slot in (0, 2):
        producer.chosen(ask(prompt(2)), candidates, np.array([slot]))
    assert made(prefix_cache, None, context).score(ask(prompt(4)), candidates).tolist() == [0.5, 0.0, 0.5]


def test_two_requests_before_the_same_candidates_are_told_apart() -> None:
    producer, context = with_prefix()
    scorer, candidates = made(prefix_cache, None, context), pool(None)
    assert producer.chosen is not None
    producer.chosen(ask(prompt(2)), candidates, np.array([0]))
    assert [float(scorer.score(ask(text), candidates)[0]) for text in (prompt(2), "ab c" * 64, prompt(4))] == [
        1,
        0,
        0.5,
    ]
