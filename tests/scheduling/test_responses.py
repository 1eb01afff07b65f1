"""A Responses call goes to the server that keeps the response it goes on from."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest

from epp.config.build import build
from epp.config.load import load
from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Bools, Candidates, EndpointTable, Page
from epp.headers import Headers
from epp.picker import Picker, PickerOptions
from epp.scheduling.plugin import Context, Filter, NoParams, filter_
from epp.scheduling.responses import response_affinity
from epp.ticket import Outcome, Ticket
from tests.scheduling.builders import NOW, made, pool, profile, scheduler
from tests.watching import Watch

JSON: Headers = ((":status", b"200"), ("content-type", b"application/json"))
STREAM: Headers = ((":status", b"200"), ("content-type", b"text/event-stream"))
CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: response-affinity}, {type: queue-scorer}]
schedulingProfiles:
- {name: default, plugins: [{pluginRef: response-affinity}, {pluginRef: queue-scorer}]}
"""


def asking(previous: object = None) -> Request:
    body = {"model": "m", "input": "go on", "previous_response_id": previous}
    return read(((":method", b"POST"), (":path", b"/v1/responses")), json.dumps(body).encode())


def getting(path: str, method: bytes = b"GET") -> Request:
    return read(((":method", method), (":path", path.encode())), b"")


# -- the filter --------------------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> EndpointTable:
    table = EndpointTable()
    pool(None, None, None, table=table)
    return table


@pytest.fixture
def keep(table: EndpointTable) -> Filter:
    """Slot 1 keeps resp_1, slot 2 resp_2."""
    plugin = made(response_affinity)
    assert plugin.stored is not None
    plugin.stored("resp_1", 1, table, NOW)
    plugin.stored("resp_2", 2, table, NOW)
    return plugin


@pytest.mark.parametrize(
    ("request_", "slots"),
    [
        (asking("resp_1"), [1]),
        (asking("resp_2"), [2]),
        (asking("resp_9"), [0, 1, 2]),  # nobody is known to keep it
        (asking(), [0, 1, 2]),
        (asking(7), [0, 1, 2]),
        (getting("/v1/responses/resp_2"), [2]),
        (getting("/v1/responses/resp_2/input_items?limit=3"), [2]),
        (getting("/v1/responses/resp_1", b"DELETE"), [1]),
        (getting("/openai/v1/responses/resp_1/cancel", b"POST"), [1]),
        (getting("/v1/responses"), [0, 1, 2]),
        (getting("/v1/models/resp_1"), [0, 1, 2]),
    ],
)
def test_who_keeps_the_response_is_kept(
    keep: Filter, table: EndpointTable, request_: Request, slots: list[int]
) -> None:
    candidates = table.candidates(NOW)
    assert candidates.slots[keep.keep(request_, candidates)].tolist() == slots


def test_one_that_is_no_candidate_is_not_waited_for(keep: Filter, table: EndpointTable) -> None:
    left = table.candidates(NOW).keep(np.array([True, False, True]))
    assert keep.keep(asking("resp_1"), left).tolist() == [True, True]
    assert keep.keep(asking("resp_1"), left.keep(np.array([True, False]))).tolist() == [True]


def test_who_comes_new_into_a_slot_keeps_nothing_of_what_was_there(keep: Filter, table: EndpointTable) -> None:
    table.drop("default/pod1-rank-0")
    assert keep.keep(asking("resp_1"), table.candidates(NOW)).tolist() == [True, True]
    pool(None, None, None, table=table)  # the same address, and a server that began anew
    assert keep.keep(asking("resp_1"), table.candidates(NOW)).tolist() == [True, True, True]


# -- how it learns -----------------------------------------------------------------------------------------------------


@pytest.fixture
def picker() -> Picker:
    """Of three servers, the first has the shortest queue."""
    table = EndpointTable(freshness=1e9)
    pool(*(Page(waiting=10.0 * i) for i in range(3)), table=table)
    return Picker(
        table, build(load(CONFIG), Random(0)), Ejection(table, EjectionParams()), Watch(), lambda: 0.0, PickerOptions()
    )


def served(picker: Picker, request: Request, by: int, response: Headers, *pieces: bytes, end: bool = True) -> None:
    ticket = decide(picker, request)
    picker.response_started(ticket, response, f"192.168.1.{by + 1}:8000", NOW, bodies_seen=bool(pieces))
    for piece in pieces:
        picker.response_data(ticket, piece, NOW)
    if end:
        picker.response_ended(ticket)
    picker.finish(ticket, Outcome.COMPLETE if end else Outcome.CUT, NOW)


def decide(picker: Picker, request: Request) -> Ticket:
    return picker.decide(request, None, NOW, NOW)[0]


def test_the_next_turn_goes_to_the_server_that_answered_whoever_was_asked_first(picker: Picker) -> None:
    served(picker, asking(), 2, JSON, b'{"id":"resp_7",', b'"object":"response"}')
    ticket = decide(picker, asking("resp_7"))
    assert ticket.decision.endpoints == ("192.168.1.3:8000",)
    assert [(each.name, each.slots.tolist()) for each in ticket.decision.exclusions] == [("response-affinity", [0, 1])]
    assert decide(picker, asking("resp_8")).decision.endpoints == ("192.168.1.1:8000",)


def test_a_stream_that_the_client_leaves_after_its_last_event_is_learned_from_and_one_cut_before_is_not(
    picker: Picker,
) -> None:
    first = b'data: {"type":"response.created","response":{"id":"resp_7"}}\n\n'
    last = b'data: {"type":"response.completed","response":{"id":"resp_7","usage":{"input_tokens":1}}}\n\n'
    served(picker, asking(), 1, STREAM, first, end=False)
    assert decide(picker, asking("resp_7")).hold.slot == 0
    served(picker, asking(), 1, STREAM, first, last, end=False)
    assert decide(picker, asking("resp_7")).hold.slot == 1


def test_nothing_is_learned_where_bodies_are_not_seen(picker: Picker) -> None:
    served(picker, asking(), 1, JSON)
    assert decide(picker, asking("resp_7")).hold.slot == 0


class Forgetful:
    """Keep everybody."""

    def __init__(self, params: NoParams, context: Context) -> None:
        pass

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
        return np.ones(len(candidates), np.bool_)

    def stored(self, response: str, slot: int, table: EndpointTable, now: float) -> None:
        raise RuntimeError(f"cannot remember {response}")


def test_a_plugin_that_fails_to_learn_is_told_and_the_request_is_counted_out(table: EndpointTable) -> None:
    forgetful, watch = made(filter_("forgetful", params=NoParams)(Forgetful)), Watch()
    choosing = scheduler(profile(filters=[forgetful]))
    picker = Picker(table, choosing, Ejection(table, EjectionParams()), watch, lambda: 0.0, PickerOptions())
    served(picker, asking(), 1, JSON, b'{"id":"resp_7"}')
    assert list(map(str, watch.mistakes)) == ["cannot remember resp_7"]
    assert table.column("inflight", table.listed, NOW)[0].tolist() == [0, 0, 0]
