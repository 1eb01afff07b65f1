"""Scorers that spread requests: tables worked out by hand, properties, and decisions that they change."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from epp.dialects import read
from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.errors import ConfigError
from epp.scheduling.load import endpoint_attribute, load_aware, no_hit_lru, token_load
from epp.scheduling.plugin import Context, Params, Plugin, Scorer
from epp.scheduling.scorers import queue
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler, winners, with_prefix


def given(plugin: Plugin[Any], parameters: dict[str, Any]) -> Params:
    params: Params = msgspec.convert(parameters, plugin.params)
    return params


def scores(plugin: Plugin[Scorer], candidates: Candidates, **parameters: Any) -> list[float]:
    got: list[float] = made(plugin, given(plugin, parameters)).score(ask(), candidates).tolist()
    return got


def prompt(blocks: int, first: str = "a") -> str:
    """So many blocks of 64 tokens, estimated at 4 bytes each."""
    return "".join(chr(ord(first) + i) * 256 for i in range(blocks))


# -- load-aware-scorer: 0.5 * (1 - waiting / threshold) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([0, 64, 128, 500], [0.5, 0.25, 0.0, 0.0]),  # 128 is the threshold
        ([32], [0.375]),  # one candidate
        ([5, 5], [0.48046875, 0.48046875]),  # a tie: 0.5 * 123 / 128
        ([None, 0, 64], [0.25, 0.5, 0.25]),  # unknown: halfway, below the mean of 0.375
        ([None, 128], [0.0, 0.0]),  # and never better than the known ones
        ([None, None], [0.25, 0.25]),
    ],
)
def test_short_queues_score_up_to_a_half(waiting: list[float | None], expected: list[float]) -> None:
    assert scores(load_aware, pool(*(Page(waiting=value) for value in waiting))) == expected


def test_the_threshold_is_where_the_score_ends() -> None:
    assert scores(load_aware, pool(Page(waiting=1), Page(waiting=4)), threshold=4) == [0.375, 0.0]


def test_length_alone_counts_and_not_the_longest_queue() -> None:
    candidates = pool(Page(waiting=0, kv_usage=0.0), Page(waiting=1, kv_usage=0.0))
    assert scores(queue, candidates) == [1.0, 0.0]
    assert scores(load_aware, candidates) == [0.5, 0.49609375]  # 0.5 * 127 / 128


def test_a_short_queue_decides() -> None:
    assert winners(profile((made(load_aware), 1.0)), pool(Page(waiting=5), Page(waiting=4)), ask(), 20) == [0, 20]


# -- token-load-scorer: 1 - (in flight + not held) / threshold ---------------------------------------------------------


def loaded(*tokens: float) -> Candidates:
    table = EndpointTable()
    pool(*[None] * len(tokens), table=table)
    for slot, amount in enumerate(tokens):
        table.admit(slot, amount)
    return table.candidates(NOW)


def test_tokens_in_flight_and_those_of_the_request() -> None:
    request = ask("x" * 40)  # 42 bytes of JSON: 42 // 4 + 1 = 11 tokens
    assert request.tokens == 11
    got = made(token_load, given(token_load, {"queueThresholdTokens": 100})).score(request, loaded(0, 50, 89, 500, 0))
    assert got.tolist() == pytest.approx([0.89, 0.39, 0.0, 0.0, 0.89])
    one = made(token_load).score(request, loaded(4_194_304 / 2))
    assert one.tolist() == pytest.approx([0.5 - 11 / 4_194_304])


def test_what_an_endpoint_holds_need_not_be_computed() -> None:
    producer, context = with_prefix()
    candidates = loaded(100, 0)
    assert producer.chosen is not None
    producer.chosen(ask(prompt(4)), candidates, np.array([0]))
    request = ask(prompt(4))  # 1,026 bytes of JSON: 257 tokens, of which 4 * 64 are held by the first
    scorer = made(token_load, given(token_load, {"queueThresholdTokens": 1000}), context)
    assert scorer.score(request, candidates).tolist() == pytest.approx([1 - 101 / 1000, 1 - 257 / 1000])
    alone = made(token_load, given(token_load, {"queueThresholdTokens": 1000}))
    assert alone.score(request, candidates).tolist() == pytest.approx([1 - 357 / 1000, 1 - 257 / 1000])


def test_a_body_that_is_not_read_weighs_by_its_size() -> None:
    request = read(((":path", b"/some/thing"),), b"x" * 400)
    scorer = made(token_load, given(token_load, {"queueThresholdTokens": 1010}))
    assert scorer.score(request, loaded(0)).tolist() == pytest.approx([1 - 101 / 1010])


def test_fewer_tokens_decide() -> None:
    assert winners(profile((made(token_load), 1.0)), loaded(5000, 10), ask(), 20) == [0, 20]


# -- no-hit-lru-scorer -------------------------------------------------------------------------------------------------


class Cold:
    """A pool in which cold requests go where they are told to."""

    def __init__(self, count: int, **parameters: Any) -> None:
        self.producer, context = with_prefix()
        self.scorer = made(no_hit_lru, given(no_hit_lru, parameters), context)
        self.table = EndpointTable()
        pool(*[None] * count, table=self.table)
        self.prompts = iter(range(1_000_000))

    def score(self, candidates: Candidates | None = None, text: str = "") -> list[float]:
        request = ask(text or f"{next(self.prompts):07d}" * 64)
        got: list[float] = self.scorer.score(request, candidates or self.table.candidates(NOW)).tolist()
        return got

    def use(self, slot: int, text: str = "") -> None:
        """A request is decided: the producer learns first."""
        request, candidates = ask(text or f"{next(self.prompts):07d}" * 64), self.table.candidates(NOW)
        self.scorer.score(request, candidates)
        for plugin in (self.producer, self.scorer):
            assert plugin.chosen is not None
            plugin.chosen(request, candidates, np.array([slot]))


def test_the_never_used_come_first_and_the_others_by_how_long_ago() -> None:
    cold = Cold(5)
    assert cold.score() == [1.0] * 5  # nobody was used: they tie
    cold.use(3)
    cold.use(0)
    # Three never used; 3 is the older of the two: 1 - 3/4; 0 is the latest: 1 - 4/4.
    assert cold.score() == [0.0, 1.0, 1.0, 0.25, 1.0]
    for slot in (1, 2, 4):
        cold.use(slot)
    assert cold.score() == [0.75, 0.5, 0.25, 1.0, 0.0]  # 3, 0, 1, 2, 4
    cold.use(3)
    assert cold.score() == [1.0, 0.75, 0.5, 0.0, 0.25]  # 0, 1, 2, 4, 3


def test_one_candidate_scores_one_used_or_not() -> None:
    cold = Cold(1)
    assert cold.score() == [1.0]
    cold.use(0)
    assert cold.score() == [1.0]


def test_a_prompt_that_somebody_holds_is_neutral_and_makes_nobody_used() -> None:
    cold = Cold(3)
    cold.use(1, prompt(4))
    assert cold.score(text=prompt(4)) == [0.5, 0.5, 0.5]
    cold.use(2, prompt(4))  # warm: 2 stays never used
    assert cold.score() == [1.0, 0.0, 1.0]


def test_who_is_no_candidate_takes_no_place_in_the_ranking() -> None:
    cold = Cold(5)
    for slot in (0, 1, 2, 3, 4):
        cold.use(slot)
    left = cold.table.candidates(NOW).keep(np.array([False, False, True, True, True]))
    assert cold.score(left) == [1.0, 0.5, 0.0]  # in the reference 0.0 for all: it ranks them 2, 3, 4 of three


def test_an_endpoint_that_comes_new_into_a_slot_was_never_used() -> None:
    cold = Cold(2)
    cold.use(0)
    cold.use(1)
    assert cold.scorer.forget is not None
    cold.scorer.forget(0)
    cold.scorer.forget(99)
    assert cold.score() == [1.0, 0.0]


def test_only_so_many_are_remembered() -> None:
    cold = Cold(4, lruSize=2)
    for slot in (0, 1, 2):
        cold.use(slot)
    # 0 is forgotten. Two never used; 1: 1 - 2/3, 2: 1 - 3/3.
    assert cold.score() == pytest.approx([1.0, 1 / 3, 0.0, 1.0])
    assert Cold(3, lruSize=0).score() == [1.0] * 3


def test_cold_requests_go_round() -> None:
    producer, context = with_prefix()
    choosing = scheduler(profile((made(no_hit_lru, None, context), 1.0)), producer)
    candidates = pool(*[Page(waiting=0)] * 4)
    rounds = [[choosing.schedule(ask(f"{n}.{i}" * 99), candidates).first for i in range(4)] for n in range(3)]
    assert sorted(rounds[0]) == [0, 1, 2, 3]
    assert rounds[1] == rounds[2] == rounds[0]


# -- endpoint-attribute-scorer -----------------------------------------------------------------------------------------

LOWER, HIGHER = {"type": "linear_lower_is_better"}, {"type": "linear_higher_is_better"}


def fixed(algorithm: dict[str, str], low: float, high: float) -> dict[str, Any]:
    return {**algorithm, "normalization": {"fixedRange": {"min": low, "max": high}}}


@pytest.mark.parametrize(
    ("algorithm", "values", "expected"),
    [
        (LOWER, [2, 4, 10], [1.0, 0.75, 0.0]),
        (HIGHER, [2, 4, 10], [0.0, 0.25, 1.0]),
        ({**LOWER, "normalization": {"adaptiveRange": {}}}, [2, 4, 10], [1.0, 0.75, 0.0]),
        (LOWER, [3, 3], [1.0, 1.0]),
        (HIGHER, [7], [1.0]),
        (LOWER, [None, 2, 4], [0.5, 1.0, 0.0]),
        (HIGHER, [None, 4], [0.5, 1.0]),
        (HIGHER, [None, None], [0.5, 0.5]),
        (fixed(LOWER, 0, 10), [0, 2.5, 10, 99], [1.0, 0.75, 0.0, 0.0]),
        (fixed(HIGHER, 4, 8), [1, 5, 8, 9], [0.0, 0.25, 1.0, 1.0]),
        (fixed(HIGHER, 0, 10), [2, 4, None], [0.2, 0.4, 0.3]),  # no better than the known ones' mean
        (fixed(HIGHER, 0, 10), [5], [0.5]),
    ],
)
def test_one_number_of_each_endpoint(algorithm: Any, values: list[float | None], expected: list[float]) -> None:
    candidates = pool(*(Page(running=value) for value in values))
    got = scores(endpoint_attribute, candidates, attribute="running", algorithm=algorithm)
    assert got == pytest.approx(expected)


def test_an_attribute_of_the_configuration_counts_as_long_as_it_is_fresh() -> None:
    table = EndpointTable(attributes={"GPUUtilization": 2.0})
    pool(None, None, None, table=table)
    for slot, value in ((0, 0.9), (1, 0.1)):
        table.attributes_told(slot, table.generation(slot), [("GPUUtilization", value)], NOW)
    context = Context(signals={"GPUUtilization"})
    for name in ({"attribute": "GPUUtilization"}, {"attributeKey": "GPUUtilization/dcgm-extractor"}):
        params = given(endpoint_attribute, {**name, "algorithm": fixed(LOWER, 0, 1)})
        scorer = made(endpoint_attribute, params, context)
        assert scorer.score(ask(), table.candidates(NOW)).tolist() == pytest.approx([0.1, 0.9, 0.5])
        assert scorer.score(ask(), table.candidates(NOW + 3)).tolist() == [0.5] * 3


def test_a_higher_number_decides() -> None:
    scorer = made(endpoint_attribute, given(endpoint_attribute, {"attribute": "kv_blocks", "algorithm": HIGHER}))
    assert winners(profile((scorer, 1.0)), pool(Page(kv_blocks=100), Page(kv_blocks=200)), ask(), 20) == [0, 20]


def test_tokens_in_flight_are_counted_because_an_attribute_asks_for_them() -> None:
    params = given(endpoint_attribute, {"attribute": "inflight_tokens", "algorithm": LOWER})
    decision = scheduler(profile((made(endpoint_attribute, params), 1.0))).schedule(ask("x" * 40), loaded(5, 0))
    assert (decision.first, decision.prompt_tokens) == (1, 11)


def test_a_page_too_old_is_unknown_in_the_decision_and_wins_nothing() -> None:
    table = EndpointTable(freshness=2.0)
    pool(Page(running=0), Page(running=9), table=table)
    table.page_told(1, table.generation(1), Page(running=9), NOW + 3)
    params = given(endpoint_attribute, {"attribute": "running", "algorithm": fixed(LOWER, 0, 10)})
    decision = scheduler(profile((made(endpoint_attribute, params), 1.0))).schedule(ask(), table.candidates(NOW + 3))
    assert decision.unknown.tolist() == [True, False]
    assert decision.totals.tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"algorithm": LOWER}, "attribute is needed"),
        ({"attribute": "a", "attributeKey": "a", "algorithm": LOWER}, "attribute is needed"),
        ({"attribute": "waiting"}, "algorithm"),
        ({"attribute": "waiting", "algorithm": {"type": "linear"}}, "Invalid enum value 'linear'"),
        ({"attribute": "waiting/x", "algorithm": LOWER}, "write attribute: waiting and producer: x"),
        ({"attribute": "waiting", "algorithm": fixed(LOWER, 2, 2)}, "2 is not below 2"),
        (
            {
                "attribute": "waiting",
                "algorithm": {**LOWER, "normalization": {"fixedRange": {"min": 0, "max": 1}, "adaptiveRange": {}}},
            },
            "exclude one another",
        ),
    ],
)
def test_parameters_that_mean_nothing_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        given(endpoint_attribute, parameters)


def test_an_attribute_that_nobody_provides_is_refused_with_those_that_there_are() -> None:
    params = given(endpoint_attribute, {"attribute": "wating", "algorithm": LOWER})
    with pytest.raises(ConfigError, match=r"no attribute is named 'wating' \(there are: .*waiting"):
        made(endpoint_attribute, params)


def test_parameters_without_effect_are_named() -> None:
    assert given(token_load, {}).idle(["inFlightLoadProducerName"]).keys() == {"inFlightLoadProducerName"}
    assert given(no_hit_lru, {}).idle(["lruSize", "prefixPluginType", "prefixPluginName"]).keys() == {
        "prefixPluginType",
        "prefixPluginName",
    }
    params = given(endpoint_attribute, {"attribute": "waiting", "producer": "x", "algorithm": LOWER})
    assert params.idle(["attribute", "producer"]).keys() == {"producer"}
    assert not given(token_load, {}).idle([])
    assert not given(no_hit_lru, {}).idle([])


# -- all of them -------------------------------------------------------------------------------------------------------


@examples(uses=st.lists(st.integers(0, 6), max_size=20), mask=st.lists(st.booleans(), min_size=7, max_size=7))
def test_cold_scores_are_those_of_the_formula_for_any_history(uses: list[int], mask: list[bool]) -> None:
    cold = Cold(7)
    for slot in uses:
        cold.use(slot)
    candidates = cold.table.candidates(NOW).keep(np.array(mask))
    if not len(candidates):
        return
    slots: list[int] = candidates.slots.tolist()
    recent = [slot for slot in reversed(list(dict.fromkeys(reversed(uses)))) if slot in slots]  # the latest last
    never, most = len(slots) - len(recent), max(1, len(slots) - 1)
    expected = [1 - (never + recent.index(slot)) / most if slot in recent else 1.0 for slot in slots]
    assert cold.score(candidates) == pytest.approx(expected if len(slots) > 1 else [1.0])
