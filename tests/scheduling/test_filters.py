"""Filters by load, attribute, prefix and length, with literal tables."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.errors import ConfigError, NoEndpoint, Saturated
from epp.scheduling.filters import (
    ContextLengthParams,
    context_length,
    endpoint_attribute,
    prefix_affinity,
    utilization,
)
from epp.scheduling.plugin import Context, Filter, Instance, Params, Plugin, Producer, Scorer
from epp.scheduling.profile import Profile
from epp.scheduling.scorers import queue
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler, with_prefix


def given(plugin: Plugin[Any], parameters: dict[str, Any]) -> Params:
    params: Params = msgspec.convert(parameters, plugin.params)
    return params


def kept(
    plugin: Plugin[Filter],
    parameters: dict[str, Any],
    candidates: Candidates,
    request: Request | None = None,
    context: Context | None = None,
) -> list[int]:
    """Slots that stay."""
    mask = made(plugin, given(plugin, parameters), context).keep(request or ask(), candidates)
    assert mask.dtype == np.bool_
    slots: list[int] = candidates.slots[mask].tolist()
    return slots


# -- utilization-filter ------------------------------------------------------------------------------------------------

LOADED = [
    Page(waiting=2, running=8, kv_usage=0.5),
    Page(waiting=3, running=4, kv_usage=0.9),
    Page(waiting=9, running=0, kv_usage=0.1),
]


def caps(*conditions: tuple[str, float], fallback: bool = False) -> dict[str, Any]:
    listed = [{"metric": metric, "maxValue": value} for metric, value in conditions]
    return {"conditions": listed, "fallbackOnEmpty": fallback}


@pytest.mark.parametrize(
    ("conditions", "slots"),
    [
        ([("waiting-queue", 3)], [0, 1]),  # at the cap is under it
        ([("waiting-queue", 2.5)], [0]),
        ([("running-requests", 4)], [1, 2]),
        ([("kv-cache-utilization", 0.5)], [0, 2]),
        ([("waiting-queue", 3), ("kv-cache-utilization", 0.8)], [0]),
    ],
)
def test_who_is_over_any_cap_is_left_out(conditions: list[tuple[str, float]], slots: list[int]) -> None:
    assert kept(utilization, caps(*conditions), pool(*LOADED)) == slots


def test_requests_in_flight_are_our_own_count_and_a_burst_counts_as_waiting() -> None:
    table = EndpointTable()
    candidates = pool(Page(waiting=0), Page(waiting=0), inflight=[3, 0], table=table)
    assert kept(utilization, caps(("active-requests", 2)), candidates) == [1]
    assert kept(utilization, caps(("waiting-queue", 2)), candidates) == [1]  # three were sent since the page


def test_nobody_under_the_caps_is_a_429_that_says_which_or_everybody_with_a_fallback() -> None:
    with pytest.raises(Saturated, match=r"over a cap \(waiting-queue 1, kv-cache-utilization 0.2\)") as caught:
        kept(utilization, caps(("waiting-queue", 1), ("kv-cache-utilization", 0.2)), pool(*LOADED))
    assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
    assert caught.value.reason == "rejected-saturated"
    assert kept(utilization, caps(("waiting-queue", 1), fallback=True), pool(*LOADED)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pages", "slots"),
    [
        ([Page(waiting=1), None], [0]),  # unknown is not idle
        ([Page(waiting=9), Page()], [1]),  # a server that never tells its queue is not held to it
        ([None, None], [0, 1]),  # blind: the traffic goes on
        ([None], [0]),
        ([Page(waiting=1)], [0]),
    ],
)
def test_what_is_unknown_counts_against_an_endpoint_while_others_are_known(
    pages: list[Page | None], slots: list[int]
) -> None:
    assert kept(utilization, caps(("waiting-queue", 5)), pool(*pages)) == slots


def test_a_page_that_is_too_old_is_no_page() -> None:
    table = EndpointTable(freshness=2.0)
    pool(Page(waiting=0), Page(waiting=0), table=table)
    table.page_told(1, table.generation(1), Page(waiting=4), NOW + 3)
    assert kept(utilization, caps(("waiting-queue", 5)), table.candidates(NOW + 3)) == [1]
    with pytest.raises(Saturated):
        kept(utilization, caps(("waiting-queue", 3)), table.candidates(NOW + 3))


def test_a_cap_changes_where_a_request_goes() -> None:
    candidates = pool(Page(waiting=0, kv_usage=0.99), Page(waiting=3, kv_usage=0.5))
    by_queue = (made(queue), 1.0)
    assert scheduler(profile(by_queue)).schedule(ask(), candidates).first == 0
    capped = made(utilization, given(utilization, caps(("kv-cache-utilization", 0.9))))
    decision = scheduler(profile(by_queue, filters=[capped])).schedule(ask(), candidates)
    assert decision.first == 1
    assert [(each.name, each.slots.tolist()) for each in decision.exclusions] == [("utilization-filter", [0])]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "conditions"),
        ({"conditions": []}, "length >= 1"),
        ({"conditions": [{"metric": "gpu", "maxValue": 1}]}, "Invalid enum value 'gpu'"),
        ({"conditions": [{"metric": "waiting-queue"}]}, "maxValue"),
        ({"conditions": [{"metric": "waiting-queue", "maxValue": -1}]}, ">= 0"),
        ({"conditions": [{"metric": "kv-cache-utilization", "maxValue": 80}]}, "at most 1, not 80"),
    ],
)
def test_caps_that_mean_nothing_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        given(utilization, parameters)


# -- endpoint-attribute-filter -----------------------------------------------------------------------------------------


def attribute(name: str, operator: str, value: float, **more: Any) -> dict[str, Any]:
    threshold = {"operator": operator, "value": value}
    return {"attribute": name, "algorithm": {"type": "threshold", "threshold": threshold}, **more}


@pytest.mark.parametrize(
    ("operator", "slots"),
    [
        ("LessThan", [0]),
        ("LessThanOrEqual", [0, 1]),
        ("GreaterThan", [2]),
        ("GreaterThanOrEqual", [1, 2]),
        ("Equal", [1]),
        ("NotEqual", [0, 2]),
    ],
)
def test_each_operator_compares_the_endpoints_value(operator: str, slots: list[int]) -> None:
    assert kept(endpoint_attribute, attribute("waiting", operator, 3), pool(*LOADED)) == slots


@pytest.mark.parametrize(("on_missing", "slots"), [("Pass", [0, 2]), ("Fail", [0])])
@pytest.mark.parametrize("operator", ["LessThan", "NotEqual"])
def test_a_missing_value_passes_or_fails_as_the_operator_says(on_missing: str, slots: list[int], operator: str) -> None:
    pages = [Page(waiting=1), Page(waiting=5), None]
    value = 5.0
    assert kept(endpoint_attribute, attribute("waiting", operator, value, onMissing=on_missing), pool(*pages)) == slots


def test_nobody_left_is_a_429_for_load_a_503_for_what_a_server_is_or_a_fallback() -> None:
    pages = [Page(waiting=5, max_lora=2)]
    with pytest.raises(Saturated, match="of no endpoint that may serve this request is waiting LessThan 3"):
        kept(endpoint_attribute, attribute("waiting", "LessThan", 3), pool(*pages))
    few = made(endpoint_attribute, given(endpoint_attribute, attribute("max_lora", "GreaterThan", 4)))
    with pytest.raises(NoEndpoint, match="endpoint-attribute-filter left out 1"):
        scheduler(profile(filters=[few])).schedule(ask(), pool(*pages))
    for name in ("waiting", "max_lora"):
        parameters = attribute(name, "LessThan", 1, fallbackOnEmpty=True)
        assert kept(endpoint_attribute, parameters, pool(*pages)) == [0]


def test_an_attribute_that_nobody_provides_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        made(endpoint_attribute, given(endpoint_attribute, attribute("gpu", "LessThan", 1)))
    assert caught.value.message == (
        "no attribute is named 'gpu' (there are: block_size, inflight, inflight_tokens, kv_blocks, kv_usage, max_lora, "
        "running, waiting)"
    )
    with pytest.raises(msgspec.ValidationError, match="write attribute: GPU and producer: dcgm"):
        given(endpoint_attribute, attribute("GPU/dcgm", "LessThan", 1))


def test_an_attribute_changes_where_a_request_goes() -> None:
    candidates = pool(Page(waiting=0, running=50), Page(waiting=3, running=1))
    quiet = made(endpoint_attribute, given(endpoint_attribute, attribute("running", "LessThan", 10)))
    assert scheduler(profile((made(queue), 1.0), filters=[quiet])).schedule(ask(), candidates).first == 1


# -- prefix-cache-affinity-filter --------------------------------------------------------------------------------------

BLOCK = "ab c" * 64
"""256 bytes, 64 tokens."""


def held(blocks: list[int], tokens: list[float], draws: float = 0.5) -> tuple[Context, Producer, Candidates]:
    """Endpoints that hold so many of the five blocks of a prompt, and have so many prompt tokens in flight."""
    producer, context = with_prefix()
    assert producer.chosen is not None
    table = EndpointTable()
    candidates = pool(*[Page()] * len(blocks), table=table)
    for slot, count in enumerate(blocks):
        producer.chosen(ask(BLOCK * count or "short"), candidates, np.array([slot]))
        table.admit(slot, tokens[slot])

    class Draws(Random):
        def random(self) -> float:
            return draws

    return Context(context.producers, rng=Draws()), producer, table.candidates(NOW)


PROMPT = BLOCK * 5


@pytest.mark.parametrize(
    ("blocks", "slots"),
    [
        ([5, 4, 3, 0], [0, 1]),  # 4 of 5 blocks are 0.8
        ([3, 3, 0, 0], [0, 1, 2, 3]),  # nobody is sticky
        ([5, 5, 5, 5], [0, 1, 2, 3]),
        ([5], [0]),
        ([0], [0]),
    ],
)
def test_who_holds_nearly_all_of_the_prompt_is_kept(blocks: list[int], slots: list[int]) -> None:
    context, _, candidates = held(blocks, [0.0] * len(blocks))
    assert kept(prefix_affinity, {}, candidates, ask(PROMPT), context) == slots


@pytest.mark.parametrize(
    ("tokens", "parameters", "slots"),
    [
        # 1000 tokens a second and a second of penalty: 1000 tokens.
        ([1000.0, 0.0], {"maxTTFTPenaltyMs": 1000, "peakPrefillThroughput": 1000}, [0]),
        ([1001.0, 0.0], {"maxTTFTPenaltyMs": 1000, "peakPrefillThroughput": 1000}, [0, 1]),
        ([1501.0, 500.0], {"maxTTFTPenaltyMs": 1000, "peakPrefillThroughput": 1000}, [0, 1]),
        # 18 s of 15,928 tokens are 286,704.
        ([286_704.0, 0.0], {}, [0]),
        ([286_705.0, 0.0], {}, [0, 1]),
        ([9e9, 0.0], {"maxTTFTPenaltyMs": 0}, [0]),
    ],
)
def test_an_endpoint_that_is_too_busy_loses_its_requests(
    tokens: list[float], parameters: dict[str, Any], slots: list[int]
) -> None:
    context, _, candidates = held([5, 0], tokens)
    assert kept(prefix_affinity, parameters, candidates, ask(PROMPT), context) == slots


@pytest.mark.parametrize(("draw", "slots"), [(0.09, [0, 1]), (0.1, [0])])
def test_some_requests_go_elsewhere_to_explore(draw: float, slots: list[int]) -> None:
    context, _, candidates = held([5, 0], [0.0, 0.0], draw)
    assert kept(prefix_affinity, {"explorationProbability": 0.1}, candidates, ask(PROMPT), context) == slots


def test_a_prompt_shorter_than_a_block_sticks_to_nobody() -> None:
    context, _, candidates = held([5, 0], [0.0, 0.0])
    assert kept(prefix_affinity, {}, candidates, ask("short"), context) == [0, 1]


def test_affinity_changes_where_a_request_goes() -> None:
    context, producer, _ = held([5, 0], [0.0, 0.0])
    candidates = pool(Page(waiting=5), Page(waiting=0))
    sticky = made(prefix_affinity, None, context)
    by_queue = (made(queue), 1.0)
    assert scheduler(profile(by_queue), producer).schedule(ask(PROMPT), candidates).first == 1
    context, producer, _ = held([5, 0], [0.0, 0.0])
    sticky = made(prefix_affinity, None, context)
    assert scheduler(profile(by_queue, filters=[sticky]), producer).schedule(ask(PROMPT), candidates).first == 0


# -- context-length-aware ----------------------------------------------------------------------------------------------


def meant_for(*ranges: str | None) -> list[dict[str, str]]:
    return [{} if text is None else {"llm-d.ai/context-length-range": text} for text in ranges]


def roles(**parameters: Any) -> tuple[Scorer, Filter]:
    params = ContextLengthParams(**parameters)
    made_all: list[Instance] = [made(role, params) for role in context_length.roles]
    score, keep = made_all
    assert isinstance(score, Scorer)
    assert isinstance(keep, Filter)
    return score, keep


def tokens_of(count: int) -> Request:
    """A prompt of so many tokens."""
    request = ask(PROMPT)
    request._tokens = count
    return request


@pytest.mark.parametrize(
    ("ranges", "tokens", "scores"),
    [
        # In range: 0.3 + 0.7 * (0.7 / (1 + width / 10000) + 0.3 * (high - n) / width).
        (["0-10000"], 5000, [0.3 + 0.7 * (0.7 / 2 + 0.3 * 0.5)]),  # 0.65
        (["0-2000", "0-10000"], 1000, [0.3 + 0.7 * (0.7 / 1.2 + 0.15), 0.3 + 0.7 * (0.35 + 0.27)]),
        (["1000-1000"], 1000, [1.0]),
        # Outside: 0.3 / (1 + distance / 1000).
        (["0-2000", "4000-8000"], 3000, [0.15, 0.15]),
        (["0-2000"], 5000, [0.3 / 4]),
        ([None, "many", "5", "9-3", "1-x"], 1000, [0.5, 0.0, 0.0, 0.0, 0.0]),
        ([" 0 - 2000 "], 2000, [0.3 + 0.7 * (0.7 / 1.2)]),
    ],
)
def test_context_length_scores_as_the_formula_says(ranges: list[str | None], tokens: int, scores: list[float]) -> None:
    candidates = pool(*[Page()] * len(ranges), labels=meant_for(*ranges))
    score, _ = roles()
    assert score.score(tokens_of(tokens), candidates).tolist() == pytest.approx(scores)


@pytest.mark.parametrize(
    ("enabled", "tokens", "slots"),
    [(True, 1000, [0, 2]), (True, 2000, [0, 1, 2]), (True, 2001, [1, 2]), (False, 1000, [0, 1, 2, 3])],
)
def test_context_length_leaves_out_who_is_meant_for_others_where_it_filters(
    enabled: bool, tokens: int, slots: list[int]
) -> None:
    candidates = pool(*[Page()] * 4, labels=meant_for("0-2000", "2000-8000", None, "bad"))
    _, keep = roles(enable_filtering=enabled)
    assert candidates.slots[keep.keep(tokens_of(tokens), candidates)].tolist() == slots


def test_context_length_changes_where_a_request_goes_and_nobody_for_it_is_a_503() -> None:
    candidates = pool(Page(), Page(), labels=meant_for("0-2000", "2000-8000"))
    score, keep = roles(enable_filtering=True)
    choosing = scheduler(Profile("default", [keep], [(score, 1.0)], profile().picker))
    assert choosing.schedule(tokens_of(100), candidates).first == 0
    assert choosing.schedule(tokens_of(7000), candidates).first == 1
    with pytest.raises(NoEndpoint, match="context-length-aware left out 2"):
        choosing.schedule(tokens_of(9000), candidates)
    assert {role.kind for role in context_length.roles} == {Scorer, Filter}
