"""One stream, bytes in and bytes out: what breaks is contained."""

from __future__ import annotations

import tracemalloc

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep

from epp.errors import NoEndpoint, ProtocolError, Refusal
from epp.extproc.conversation import SILENT_EXCHANGES, Connection, Conversation
from epp.extproc.events import BodylessRequest, BodyMode, Modes, Part, RequestEnded, RequestStarted, ResponseStarted
from epp.extproc.exchange import Limits
from epp.picker import Picker
from epp.ticket import Outcome, Ticket
from tests.contract.transport import picker_for
from tests.extproc import oracle
from tests.extproc.transcripts import WORDS
from tests.watching import Watch

LIGHT = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE)
GET = oracle.message(BodylessRequest(WORDS["GET"]), LIGHT).SerializeToString()
OK = oracle.message(ResponseStarted(WORDS["OK"]), None).SerializeToString()


def inflight(picker: Picker) -> float:
    table = picker.table
    return float(table.column("inflight", table.listed, 0.0)[0].sum())


class Breaks(Watch):
    """An observer with a mistake of our own in one place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def decided(self, ticket: Ticket) -> None:
        super().decided(ticket)
        if self._where == "decided":
            raise RuntimeError("no")

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        super().finished(ticket, outcome, now)
        if self._where == "finished":
            raise RuntimeError("no")


def test_a_mistake_of_ours_in_a_decision_is_a_500_and_leaves_nothing_counted() -> None:
    watch = Breaks("decided")
    picker = picker_for(("10.0.0.1:8000",), watch)
    conversation = Conversation(picker, Limits(), Connection("test"), 0.0)
    (reply,) = conversation.receive(GET, 0.0)
    assert ep.ProcessingResponse.FromString(reply).immediate_response.status.code == 500
    assert conversation.closed
    assert inflight(picker) == 0
    assert [str(mistake) for mistake in watch.mistakes] == ["no"]


def test_a_mistake_of_ours_at_the_end_is_told_and_the_request_is_counted_out() -> None:
    watch = Breaks("finished")
    picker = picker_for(("10.0.0.1:8000",), watch)
    conversation = Conversation(picker, Limits(), Connection("test"), 0.0)
    conversation.receive(GET, 0.0)
    assert inflight(picker) == 1
    conversation.lose(1.0)
    conversation.lose(2.0)
    assert inflight(picker) == 0
    assert len(watch.mistakes) == len(watch.outcomes) == 1


def test_a_peer_that_breaks_the_protocol_has_its_request_counted_out() -> None:
    watch = Watch()
    picker = picker_for(("10.0.0.1:8000",), watch)
    conversation = Conversation(picker, Limits(), Connection("test"), 0.0)
    conversation.receive(GET, 0.0)
    with pytest.raises(ProtocolError):
        conversation.receive(GET, 0.0)
    assert inflight(picker) == 0
    watch.check()


def test_refusals_are_told_with_what_was_read_of_the_request() -> None:
    seen: list[tuple[str, Refusal, float]] = []

    class Refusals(Watch):
        def refused(self, request: object, refusal: Refusal, duration: float) -> None:
            seen.append((getattr(request, "model", "unread"), refusal, duration))

    conversation = Conversation(picker_for((), Refusals()), Limits(), Connection("test"), 10.0)
    conversation.receive(oracle.message(RequestStarted(WORDS["POST"]), LIGHT).SerializeToString(), 10.0)
    body = RequestEnded(Part.BODY, b'{"model":"m","prompt":"hi"}')
    conversation.receive(oracle.message(body, None).SerializeToString(), 12.0)
    ((model, refusal, duration),) = seen
    assert (model, type(refusal), duration) == ("m", NoEndpoint, 2.0)


def test_a_stream_is_told_to_have_ended_once_with_its_whole_length() -> None:
    watch = Watch()
    conversation = Conversation(picker_for(("10.0.0.1:8000",), watch), Limits(), Connection("test"), 1.0)
    conversation.receive(GET, 2.0)
    conversation.lose(4.5)
    conversation.lose(6.0)
    assert watch.streams == [3.5]


def test_a_stream_that_waits_for_its_model_holds_little() -> None:
    picker = picker_for(("10.0.0.1:8000",), Watch())
    headers = tuple((f"x-header-{n}", b"v" * 40) for n in range(20))
    start = oracle.message(RequestStarted((*WORDS["POST"], *headers)), LIGHT).SerializeToString()
    body = oracle.message(RequestEnded(Part.BODY, b'{"model":"m","prompt":"hi"}'), None).SerializeToString()
    waiting: list[Conversation] = []
    tracemalloc.start()
    try:
        for _ in range(200):
            waiting.append(Conversation(picker, Limits(), Connection("test"), 0.0))
            waiting[-1].receive(start, 0.0)
            assert len(waiting[-1].receive(body, 0.0)) == 2
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/epp/extproc/*")])
    finally:
        tracemalloc.stop()
    assert sum(trace.size for trace in ours.traces) / len(waiting) < 1024


def test_a_connection_that_shows_one_response_in_between_is_not_silent() -> None:
    watch = Watch()
    picker = picker_for(("10.0.0.1:8000",), watch)
    connection = Connection("test")
    for n in range(3 * SILENT_EXCHANGES):
        conversation = Conversation(picker, Limits(), connection, 0.0)
        conversation.receive(GET, 0.0)
        if n % SILENT_EXCHANGES == SILENT_EXCHANGES - 1:
            conversation.receive(OK, 0.0)
        conversation.lose(0.0)
    assert watch.silent == []
    watch.check()
