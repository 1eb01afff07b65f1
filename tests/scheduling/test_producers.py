"""The approximate prefix producer: what an endpoint is believed to hold, and what pushes it out again.

A block is 64 tokens, 256 bytes. Capacity, limits and block size: test_scheduler.py.
"""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.scheduling.lineup import Lineup
from epp.scheduling.plugin import Context
from epp.scheduling.producers import ApproximateParams, ApproximatePrefix
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import PrefixParams, prefix_cache
from tests.scheduling.builders import NOW, ask, made, pool, profile, with_prefix

TEN = Page(kv_blocks=40, block_size=16)
"""Room for ten blocks."""


def text(name: str, blocks: float) -> str:
    """A prompt whose every block is its own, and no other name's."""
    whole = "".join(f"{name} {i}, ".ljust(256) for i in range(int(blocks) + 1))
    return whole[: int(256 * blocks)]


def made_with(params: ApproximateParams | None = None) -> ApproximatePrefix:
    return ApproximatePrefix(params or ApproximateParams(), Context())


def send(producer: ApproximatePrefix, request: Request, candidates: Candidates, *slots: int) -> None:
    producer.chosen(request, candidates, np.array(slots))


def held(producer: ApproximatePrefix, prompt: str, candidates: Candidates) -> list[int]:
    blocks: list[int] = producer.match(ask(prompt), candidates).blocks.tolist()
    return blocks


def test_the_prompt_goes_to_one_endpoint_and_everybody_is_asked_for_it() -> None:
    producer, candidates = made_with(), pool(TEN, TEN, TEN)
    send(producer, ask(text("a", 4)), candidates, 1)
    send(producer, ask(text("a", 2)), candidates, 2)
    match = producer.match(ask(text("a", 4.5)), candidates)
    assert (match.blocks.tolist(), match.total, match.block_tokens) == ([0, 4, 2], 4, 64)
    assert producer.match(ask(text("a", 4)), candidates.keep(np.array([False, False, True]))).blocks.tolist() == [2]


def test_both_stages_of_disaggregated_serving_hold_the_prompt() -> None:
    producer, candidates = made_with(), pool(TEN, TEN, TEN)
    send(producer, ask(text("a", 4)), candidates, 2, 0)
    assert held(producer, text("a", 4), candidates) == [4, 0, 4]


# -- age ---------------------------------------------------------------------------------------------------------------


def test_answers_push_out_what_is_old() -> None:
    """Room for ten blocks; after [a] was used, three are computed for [b] and then as many as answers take."""
    producer, candidates = made_with(), pool(TEN, TEN)
    send(producer, ask(text("a", 2)), candidates, 0)
    send(producer, ask(text("b", 3)), candidates, 0)
    producer.computed(candidates.table, 0, 6 * 64 + 40)
    assert held(producer, text("a", 2), candidates) == [2, 0]
    producer.computed(candidates.table, 0, 20)  # with the 40 before, not yet a block
    assert held(producer, text("a", 2), candidates) == [2, 0]
    producer.computed(candidates.table, 0, 20)
    assert held(producer, text("a", 2), candidates) == [0, 0]
    assert held(producer, text("b", 3), candidates) == [3, 0]


def test_computing_less_than_was_believed_is_held_against_what_comes() -> None:
    producer, candidates = made_with(), pool(TEN)
    send(producer, ask(text("a", 2)), candidates, 0)
    producer.computed(candidates.table, 0, -5 * 64)
    producer.computed(candidates.table, 0, 14 * 64)
    assert held(producer, text("a", 2), candidates) == [2]
    producer.computed(candidates.table, 0, 64)
    assert held(producer, text("a", 2), candidates) == [0]


def test_a_prompt_beyond_the_part_that_is_looked_at_pushes_out_too_but_not_when_it_was_held() -> None:
    params = ApproximateParams(max_prefix_tokens_to_match=2 * 64)
    producer, candidates = made_with(params), pool(TEN)
    send(producer, ask(text("a", 1)), candidates, 0)
    long = text("b", 7.9)
    assert ask(long).tokens == (7.9 * 256 + 2) // 4 + 1  # the quotes count: 506, of which 128 are two blocks
    for _ in range(20):
        send(producer, ask(long), candidates, 0)  # two blocks and 378 tokens once, which are five blocks more
    assert held(producer, text("a", 1), candidates) == [1]
    send(producer, ask(text("c", 2 + 3)), candidates, 0)
    assert held(producer, text("a", 1), candidates) == [0]


def test_short_prompts_hold_no_block_and_push_out_all_the_same() -> None:
    producer, candidates = made_with(), pool(TEN)
    send(producer, ask(text("a", 2)), candidates, 0)
    for i in range(10):
        assert held(producer, text("a", 2), candidates) == [2], i
        send(producer, ask(text(str(i), 0.96)), candidates, 0)  # 245 bytes and two quotes: 62 tokens
    send(producer, ask(text("x", 0.96)), candidates, 0)  # 11 * 62 = 682 tokens are ten blocks and a rest
    assert held(producer, text("a", 2), candidates) == [0]


def test_an_endpoint_that_nothing_was_sent_to_has_nothing_to_lose() -> None:
    producer, candidates = made_with(), pool(TEN)
    producer.computed(candidates.table, 0, 10_000)
    send(producer, ask(text("a", 2)), candidates, 0)
    assert held(producer, text("a", 2), candidates) == [2]


def test_a_forgotten_slot_owes_nothing() -> None:
    producer, candidates = made_with(), pool(TEN)
    send(producer, ask(text("a", 2)), candidates, 0)
    producer.computed(candidates.table, 0, 63)
    producer.forget(0)
    assert not producer._holders
    assert producer.blocks() == 0


# -- the ratio of tokens -----------------------------------------------------------------------------------------------


def asked_at(ratio: float, prompt: str) -> Request:
    request = ask(prompt)
    request.token_ratio = ratio
    return request


def test_blocks_are_as_large_as_before_whatever_was_learned() -> None:
    producer, candidates = made_with(), pool(TEN)
    send(producer, ask(text("a", 4)), candidates, 0)
    for ratio, tokens in ((1.0, 64), (1.5, 96), (0.25, 16)):
        match = producer.match(asked_at(ratio, text("a", 4)), candidates)
        assert (match.blocks.tolist(), match.total, match.block_tokens) == ([4], 4, tokens)


@pytest.mark.parametrize(("ratio", "blocks"), [(1.0, 10), (2.0, 5), (0.5, 20), (1.5, 6)])
def test_as_many_blocks_fit_as_their_real_tokens_let(ratio: float, blocks: int) -> None:
    """160 * 4 = 640 tokens, 64 * ratio a block."""
    producer, candidates = made_with(), pool(TEN)
    send(producer, asked_at(ratio, text("a", 30)), candidates, 0)
    assert held(producer, text("a", 30), candidates) == [blocks]


def test_what_a_block_is_worth_follows_what_a_slot_computes() -> None:
    """Ten of ratio 1; then five of ratio 2 replace half of what it holds: 1.5 on average, so 6 fit."""
    producer, candidates = made_with(), pool(TEN)
    send(producer, ask(text("a", 10)), candidates, 0)
    send(producer, asked_at(2.0, text("b", 5)), candidates, 0)
    assert producer._holders[0].worth == 1.5
    send(producer, asked_at(2.0, text("b", 6)), candidates, 0)
    assert producer.index.held(0) == 6


def test_tokens_are_scaled_where_they_are_estimated_and_not_where_they_are_counted() -> None:
    def request(prompt: object) -> Request:
        found = read(((":path", b"/v1/completions"),), json.dumps({"model": "m", "prompt": prompt}).encode())
        found.token_ratio = 1.5
        return found

    words, ids = request("x" * 398), request([1, 2, 3])
    assert (words.tokens, words.estimate) == (152, 101)  # 400 bytes with the quotes; 151.5 to the even number
    assert (ids.tokens, ids.estimate) == (3, 0)


# -- side by side ------------------------------------------------------------------------------------------------------


def tiered() -> tuple[Scheduler, ApproximatePrefix, ApproximatePrefix]:
    """As in the reference's tiered-prefix-cache-cpu: what engines tell of their GPUs, and a fixed size for CPUs."""
    gpu, _ = with_prefix()
    cpu, _ = with_prefix(ApproximateParams(auto_tune=False, lru_capacity_per_server=1000, block_size_tokens=64))
    context = Context({"gpu": gpu, "cpu": cpu})
    scorers = [
        (made(prefix_cache, PrefixParams(prefix_match_info_producer_name=name), context), weight)
        for name, weight in (("gpu", 3.0), ("cpu", 2.0))
    ]
    first, second = (getattr(each.match, "__self__", None) for each in (gpu, cpu))
    assert isinstance(first, ApproximatePrefix)
    assert isinstance(second, ApproximatePrefix)
    return Scheduler(Lineup([profile(*scorers)], [gpu, cpu]), Random(1)), first, second


def test_what_left_the_gpu_is_still_sought_where_the_cpu_holds_it() -> None:
    choosing, gpu, cpu = tiered()
    candidates = pool(TEN, TEN, TEN)
    first = choosing.schedule(ask(text("a", 8)), candidates).first
    for slot in range(3):  # everybody's GPU is full of something else
        only = candidates.keep(candidates.slots == slot)
        choosing.schedule(ask(text(f"other {slot}", 10)), only)
    assert gpu.index.held(first) == 10
    assert cpu.index.held(first) == 18
    decision = choosing.schedule(ask(text("a", 8)), candidates)
    assert decision.first == first
    assert decision.raw[0].tolist() == [0, 0, 0]
    assert sorted(decision.raw[1].tolist()) == [0, 0, 1]
    assert decision.matched_tokens == 8 * 64


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_an_index_is_as_large_as_its_configuration_lets_it() -> None:
    params = ApproximateParams(auto_tune=False, max_index_size="1Mi", max_prefix_tokens_to_match=0)
    producer, candidates = made_with(params), pool(*[None] * 20)
    for i in range(400):
        send(producer, ask(text(f"{i}", 400)), candidates, i % 20)  # 8 bytes for each block and something more
    assert 1_000_000 < producer.index.size <= 1 << 20
    assert producer.blocks() > 120_000
    most = [producer.index.held(slot) for slot in range(20)]
    assert max(most) - min(most) <= 400


@pytest.mark.parametrize("size", ["1023Ki", 0, "1k"])
def test_an_index_has_at_least_a_mebibyte(size: int | str) -> None:
    with pytest.raises(ValueError, match="maxIndexSize must be at least 1Mi"):
        ApproximateParams(max_index_size=size)


def test_a_table_that_shrinks_and_grows_leaves_nothing_behind() -> None:
    producer = made_with()
    table = EndpointTable(on_forget=producer.forget)
    pool(TEN, TEN, table=table)
    send(producer, ask(text("a", 4)), table.candidates(NOW), 0)
    table.drop("default/pod0-rank-0")
    assert producer.blocks() == 0
    assert producer.index.size == 0
