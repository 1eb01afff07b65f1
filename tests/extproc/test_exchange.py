"""The exchange by itself: transcripts, every (state, event) pair, and properties over any order of events."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.errors import NoEndpoint, ProtocolError
from epp.extproc import events
from epp.extproc.actions import Action, AskDecision, Finished, SendImmediateResponse, SendRequestBody
from epp.extproc.events import (
    BodylessRequest,
    BodylessResponse,
    BodyMode,
    Decided,
    Event,
    Expired,
    Lost,
    Modes,
    Part,
    Refused,
    RequestData,
    RequestEnded,
    RequestStarted,
    ResponseData,
    ResponseEnded,
    ResponseStarted,
    TunnelRequested,
)
from epp.extproc.exchange import TRANSITIONS, Exchange, Limits, State
from tests.extproc.transcripts import ALL, LIMITS, WORDS, Transcript, seen

POST = WORDS["POST"]
GET = WORDS["GET"]
EVENTS = (
    RequestStarted(POST),
    BodylessRequest(GET),
    TunnelRequested(GET),
    RequestData(b"{"),
    RequestEnded(Part.BODY, b"}"),
    RequestEnded(Part.TRAILERS),
    Decided(("10.0.0.1:8000",)),
    Refused(NoEndpoint("none")),
    ResponseStarted(((":status", b"200"),)),
    BodylessResponse(((":status", b"204"),)),
    ResponseData(b"x"),
    ResponseEnded(Part.BODY, b"x"),
    ResponseEnded(Part.TRAILERS),
    Expired(),
    Lost(),
)


@pytest.mark.parametrize("transcript", ALL, ids=lambda transcript: transcript.name)
def test_transcript(transcript: Transcript) -> None:
    exchange = Exchange(LIMITS)
    for step in transcript.steps:
        if step.error is None:
            got = [seen(action) for action in exchange.receive(step.event, now=0.0)]
            assert got == list(step.expected), f"{transcript.name}.txt:{step.line}"
        else:
            with pytest.raises(ProtocolError) as raised:
                exchange.receive(step.event, now=0.0)
            assert step.error in str(raised.value)


def test_every_event_type_has_a_row_or_is_refused_in_every_state() -> None:
    for state in State:
        for event in EVENTS:
            exchange = Exchange(LIMITS)
            exchange.state = state
            try:
                exchange.receive(event, now=0.0)
            except ProtocolError:
                assert exchange.state is State.CLOSED
            else:
                assert (state, type(event)) in TRANSITIONS


def test_every_row_of_the_table_names_an_event() -> None:
    known = {type(event) for event in EVENTS}
    assert {event for _, event in TRANSITIONS} == known
    assert all(getattr(events, event.__name__) is event for event in known)


def test_a_lost_stream_is_allowed_everywhere() -> None:
    assert all((state, Lost) in TRANSITIONS for state in State)


def _run(sequence: list[Event], modes: Modes) -> Iterator[list[Action]]:
    """Feed events as Envoy and a picker might, in any order; stop at the first that is not allowed."""
    exchange = Exchange(Limits(max_body=10))
    for event in [*sequence, Lost()]:
        if isinstance(event, RequestStarted):
            event = type(event)(event.headers, modes)
        try:
            yield exchange.receive(event, now=0.0)
        except ProtocolError:
            yield exchange.receive(Lost(), now=0.0)
            return


@given(
    st.lists(st.sampled_from(EVENTS), max_size=12),
    st.builds(Modes, st.sampled_from(BodyMode), st.sampled_from(BodyMode)),
)
def test_whatever_comes_each_admitted_request_is_counted_out_once(sequence: list[Event], modes: Modes) -> None:
    actions = [action for step in _run(sequence, modes) for action in step]
    asked = sum(isinstance(action, AskDecision) for action in actions)
    finished = sum(isinstance(action, Finished) for action in actions)
    immediate = [n for n, action in enumerate(actions) if isinstance(action, SendImmediateResponse)]
    assert asked <= 1
    assert len(immediate) <= 1
    if immediate:  # nothing is said to Envoy after our own answer
        assert all(isinstance(action, Finished) for action in actions[immediate[0] + 1 :])
    # A Decided that nobody asked for is refused as a protocol error unless the exchange was closed: then it counts out.
    admitted = 0
    exchange = Exchange(Limits(max_body=10))
    for event in sequence:
        if isinstance(event, RequestStarted):
            event = type(event)(event.headers, modes)
        try:
            exchange.receive(event, now=0.0)
        except ProtocolError:
            break
        admitted += isinstance(event, Decided)
    assert finished == admitted


@given(st.binary(max_size=300_000), st.lists(st.integers(0, 300_000), max_size=6), st.sampled_from(Part))
def test_the_body_goes_on_byte_for_byte_however_it_was_cut(body: bytes, cuts: list[int], by: Part) -> None:
    exchange = Exchange(Limits(max_body=300_000))
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(edges)]
    exchange.receive(RequestStarted(POST), now=0.0)
    for piece in pieces[:-1]:
        assert exchange.receive(RequestData(piece), now=0.0) == []
    if by is Part.TRAILERS:
        exchange.receive(RequestData(pieces[-1]), now=0.0)
        ask = exchange.receive(RequestEnded(by), now=0.0)
    else:
        ask = exchange.receive(RequestEnded(by, pieces[-1]), now=0.0)
    assert ask == [AskDecision(POST, body, None)]
    sent = exchange.receive(Decided(("10.0.0.1:8000",)), now=0.0)[1:]
    replies = [action for action in sent if isinstance(action, SendRequestBody)]
    assert b"".join(reply.data for reply in replies) == body
    assert all(len(reply.data) <= 62_000 for reply in replies)
    assert [reply.last for reply in replies] == [False] * (len(replies) - 1) + [by is Part.BODY] * bool(replies)


@pytest.mark.parametrize(
    ("size", "pieces"), [(0, [0]), (62_000, [62_000]), (62_001, [62_000, 1]), (124_000, [62_000, 62_000])]
)
def test_a_body_is_cut_into_as_few_pieces_as_may_be(size: int, pieces: list[int]) -> None:
    exchange = Exchange(Limits())
    exchange.receive(RequestStarted(POST), now=0.0)
    exchange.receive(RequestEnded(Part.BODY, bytes(size)), now=0.0)
    sent = exchange.receive(Decided(("10.0.0.1:8000",)), now=0.0)[1:]
    replies = [(len(action.data), action.last) for action in sent if isinstance(action, SendRequestBody)]
    assert replies == [*((piece, False) for piece in pieces[:-1]), (pieces[-1], True)]


def test_a_client_that_stops_sending_is_answered_at_the_deadline() -> None:
    exchange = Exchange(Limits(body_timeout=60.0))
    exchange.receive(RequestStarted(POST), now=100.0)
    assert exchange.next_deadline() == 160.0
    exchange.receive(RequestData(b"{"), now=130.0)
    assert exchange.next_deadline() == 190.0
    (reply,) = exchange.receive(Expired(), now=190.0)
    assert isinstance(reply, SendImmediateResponse)
    assert reply.status == 408
    assert exchange.next_deadline() is None


def test_a_decision_that_does_not_come_is_answered_at_the_deadline() -> None:
    exchange = Exchange(Limits(decision_timeout=120.0))
    exchange.receive(RequestStarted(POST), now=100.0)
    exchange.receive(RequestEnded(Part.BODY, b"{}"), now=110.0)
    assert exchange.next_deadline() == 230.0
    (reply,) = exchange.receive(Expired(), now=230.0)
    assert isinstance(reply, SendImmediateResponse)
    assert reply.status == 503
    assert exchange.receive(Decided(("10.0.0.1:8000",)), now=231.0) == [Finished(WORDS["UNANSWERED"])]


def test_a_model_server_may_take_as_long_as_it_likes() -> None:
    exchange = Exchange(Limits())
    exchange.receive(BodylessRequest(GET), now=0.0)
    exchange.receive(Decided(("10.0.0.1:8000",)), now=0.0)
    assert exchange.next_deadline() is None


def test_an_eviction_counts_the_request_out() -> None:
    exchange = Exchange(Limits())
    exchange.receive(BodylessRequest(GET), now=0.0)
    exchange.receive(Decided(("10.0.0.1:8000",)), now=0.0)
    reply, finished = exchange.receive(Refused(NoEndpoint("evicted")), now=1.0)
    assert isinstance(reply, SendImmediateResponse)
    assert finished == Finished(WORDS["REFUSED"])


def test_repr_says_where_the_exchange_is_and_what_it_holds() -> None:
    exchange = Exchange(Limits())
    exchange.receive(RequestStarted(POST), now=0.0)
    exchange.receive(RequestData(b"12345"), now=0.0)
    assert repr(exchange) == "<Exchange [reading | 5 bytes held]>"
    exchange.receive(RequestEnded(Part.BODY, b""), now=0.0)
    assert repr(exchange) == "<Exchange [deciding | 5 bytes held]>"
    exchange.receive(Decided(("10.0.0.1:8000",)), now=0.0)
    assert repr(exchange) == "<Exchange [forwarded, counted | 0 bytes held]>"


@pytest.mark.parametrize(
    "last", [Refused(NoEndpoint("none")), Expired(), Lost(), ResponseStarted(((":status", b"504"),))]
)
def test_a_body_that_goes_nowhere_is_not_kept(last: Event) -> None:
    exchange = Exchange(Limits())
    exchange.receive(RequestStarted(POST), now=0.0)
    exchange.receive(RequestEnded(Part.BODY, b"12345"), now=0.0)
    exchange.receive(last, now=0.0)
    assert "| 0 bytes held" in repr(exchange)
