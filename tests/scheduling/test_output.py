"""How long answers are taken to be, and how that counts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.config.load import load
from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Endpoint, EndpointTable
from epp.picker import Picker
from epp.scheduling.output import MOST, OutputEstimate
from epp.ticket import Outcome
from tests.contract.transport import picker_for
from tests.watching import Watch

PLUGINS = "{apiVersion: llm-d.ai/v1alpha1, kind: EndpointPickerConfig, plugins: [%s]}"
COUNTED = PLUGINS % (
    "{type: inflight-load-producer, parameters: {addEstimatedOutputTokens: true, outputRatio: 2}}, "
    "{type: token-load-scorer}, {type: queue-scorer}"
)
BY_TOKENS = COUNTED.replace(", {type: queue-scorer}", "")
TOKENS = 11
"""Of the prompt below: 40 bytes at 4 bytes a token, and one."""


def asking(**fields: int) -> Request:
    body = {"model": "m", "prompt": "a" * 40, **fields}
    return read(((":path", b"/v1/completions"),), json.dumps(body).encode())


@pytest.mark.parametrize(
    ("estimate", "fields", "tokens"),
    [
        (OutputEstimate(1.5), {}, 16.5),
        (OutputEstimate(0.0), {}, 0.0),
        (OutputEstimate(1.5), {"max_tokens": 5}, 5.0),
        (OutputEstimate(1.5), {"max_tokens": 500}, 16.5),
        (OutputEstimate(1.5, most=7), {}, 7.0),
        (OutputEstimate(1.5, most=7), {"max_tokens": 5}, 5.0),
        (OutputEstimate(1.5, most=5), {"max_tokens": 7}, 5.0),
        (OutputEstimate(1.5), {"max_tokens": 5, "n": 3}, 15.0),
        (OutputEstimate(1.5), {"n": 10**15}, float(MOST)),
    ],
)
def test_an_answer_is_taken_to_be_as_long_as_its_prompt_says_and_no_longer_than_it_may_be(
    estimate: OutputEstimate, fields: dict[str, int], tokens: float
) -> None:
    assert asking().tokens == TOKENS
    assert estimate.tokens(asking(**fields)) == tokens


def inflight(picker: Picker) -> list[float]:
    tokens: list[float] = picker.table.column("inflight_tokens", picker.table.listed, 0.0)[0].tolist()
    return tokens


def test_it_counts_from_the_decision_to_the_end_of_the_answer() -> None:
    picker = picker_for(("10.0.0.1:1", "10.0.0.2:1"), Watch(), COUNTED)
    ticket, _ = picker.decide(asking(), None, 0.0, 0.0)
    assert ticket.decision.output_tokens == 22.0
    assert inflight(picker) == [33.0, 0.0]  # the prompt's 11, and twice as many
    picker.response_started(ticket, ((":status", b"200"),), None, 0.0, bodies_seen=True)
    picker.response_data(ticket, b"{", 0.0)
    assert inflight(picker) == [22.0, 0.0]
    picker.response_data(ticket, b"}", 0.0)
    assert inflight(picker) == [22.0, 0.0]
    picker.finish(ticket, Outcome.COMPLETE, 0.0)
    assert inflight(picker) == [0.0, 0.0]


def test_it_moves_with_its_request() -> None:
    picker = picker_for(("10.0.0.1:1", "10.0.0.2:1"), Watch(), COUNTED)
    ticket, _ = picker.decide(asking(), None, 0.0, 0.0)
    picker.response_started(ticket, ((":status", b"200"),), "10.0.0.2:1", 0.0, bodies_seen=True)
    assert inflight(picker) == [0.0, 33.0]
    picker.response_data(ticket, b"{", 0.0)
    assert inflight(picker) == [0.0, 22.0]
    picker.finish(ticket, Outcome.CUT, 0.0)
    assert inflight(picker) == [0.0, 0.0]


def test_unasked_it_does_not_count() -> None:
    picker = picker_for(("10.0.0.1:1",), Watch(), COUNTED.replace("true", "false"))
    picker.decide(asking(), None, 0.0, 0.0)
    assert inflight(picker) == [11.0]


@pytest.mark.parametrize(("text", "shared"), [(BY_TOKENS, 0), (BY_TOKENS.replace("true", "false"), 1)])
def test_an_answer_that_is_under_way_sends_the_next_request_elsewhere(text: str, shared: int) -> None:
    """Counted, the second request always finds the first one's answer; not counted, only by chance."""
    picker = picker_for(("10.0.0.1:1", "10.0.0.2:1"), Watch(), text)
    together = 0
    for _ in range(40):
        first, _ = picker.decide(asking(), None, 100.0, 100.0)
        picker.response_started(first, ((":status", b"200"),), None, 100.0, bodies_seen=True)
        picker.response_data(first, b"{", 100.0)
        second, _ = picker.decide(asking(), None, 100.0, 100.0)
        together += first.endpoint == second.endpoint
        for ticket in (first, second):
            picker.finish(ticket, Outcome.COMPLETE, 100.0)
    assert (together > 0) == shared


@pytest.mark.parametrize(
    ("parameters", "idle"),
    [
        ("addEstimatedOutputTokens: true, outputRatio: 2", []),
        ("outputRatio: 2", ["outputRatio has no effect: addEstimatedOutputTokens is false"]),
        ("maxEstimatedOutputTokens: 9", ["maxEstimatedOutputTokens has no effect: addEstimatedOutputTokens is false"]),
        ("outputRatio: 1.5", []),  # the default, spelled out
        ("syncCrossReplicaState: false", ["syncCrossReplicaState has no effect: replicas do not share their counts"]),
    ],
)
def test_what_changes_nothing_is_told(parameters: str, idle: list[str]) -> None:
    warnings = load(PLUGINS % f"{{type: inflight-load-producer, parameters: {{{parameters}}}}}").warnings
    assert [each.partition("inflight-load-producer: ")[2] for each in warnings] == idle


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e7), st.booleans()), max_size=30))
def test_whatever_is_counted_in_is_counted_out(requests: list[tuple[float, float, bool]]) -> None:
    table = EndpointTable()
    slot = table.put(Endpoint("a", "10.0.0.1:1"), 0.0)
    holds = [(table.admit(slot, prompt, output), first) for prompt, output, first in requests]
    for hold, first in holds:
        if first:
            table.prefill_done(hold)
            table.prefill_done(hold)
    assert table.column("inflight_tokens", table.listed, 0.0)[0][0] == sum(hold.tokens for hold, _ in holds)
    for hold, _ in reversed(holds):
        table.release(hold)
        table.prefill_done(hold)
    assert table.column("inflight_tokens", table.listed, 0.0)[0].tolist() == [0.0]
