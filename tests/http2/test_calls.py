"""A call from its header block to its end, whoever ends it; drain and keep-alive."""

from __future__ import annotations

import pytest

from epp.extproc.http2.connection import DRAIN_PING, KEEPALIVE_PING
from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import Code
from epp.extproc.http2.messages import Status
from tests.http2.peer import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    GREETING,
    GRPC,
    HEADERS,
    PATH,
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    Site,
    call,
    data,
    frame,
    message,
    plain_block,
    reset,
    settings,
    window_update,
    with_fields,
)

HEAD_ONLY = with_fields((":method", "HEAD"), ("content-type", "text/plain"))


def test_a_call_its_messages_and_its_reset_are_told_in_order() -> None:
    site = Site()
    said = (call(1), data(1, message(b"headers")), data(1, message(b"body")), data(1, b"", END_STREAM), reset(1))
    assert site.feed(*said) == [
        CallStarted(1, PATH),
        MessageReceived(1, b"headers"),
        MessageReceived(1, b"body"),
        CallEnded(1),
        CallLost(1),
    ]


def test_an_answer_is_headers_messages_trailers_and_a_reset_that_means_no_error() -> None:
    site = Site()
    site.feed(call(1), data(1, message(b"m")))
    site.connection.send(1, b"one")
    site.connection.send(1, b"two")
    site.end(1)
    head, one, two, trailers, end = site.out()
    assert (head.kind, head.flags, head.stream) == (HEADERS, END_HEADERS, 1)
    assert site.headers(head.payload) == {":status": "200", "content-type": "application/grpc"}
    assert (one, two) == (Frame(DATA, 0, 1, message(b"one")), Frame(DATA, 0, 1, message(b"two")))
    assert (trailers.kind, trailers.flags) == (HEADERS, END_HEADERS | END_STREAM)
    assert site.headers(trailers.payload) == {"grpc-status": "0"}
    assert (end.kind, end.code) == (RST_STREAM, Code.NO_ERROR)  # section 8.1: the client need not say more


def test_an_answer_to_a_peer_that_has_said_all_needs_no_reset() -> None:
    site = Site()
    site.feed(call(1), data(1, message(b"m"), END_STREAM))
    site.connection.send(1, b"one")
    site.end(1)
    assert [each.kind for each in site.out()] == [HEADERS, DATA, HEADERS]


def test_an_answer_without_messages_is_trailers_only_and_tells_the_encodings() -> None:
    site = Site()
    site.feed(call(1, end=True))
    site.end(1, Status.UNIMPLEMENTED, "no such method")
    (only,) = site.out()
    assert (only.kind, only.flags) == (HEADERS, END_HEADERS | END_STREAM)
    assert site.headers(only.payload) == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,gzip",
        "grpc-status": "12",
        "grpc-message": "no such method",
    }


def test_what_comes_after_we_ended_a_call_is_ignored() -> None:
    site = Site()
    site.feed(call(1))
    site.end(1)
    site.out()
    late = data(1, message(b"m")) + window_update(1, 5) + call(1, plain_block([("a", "b")]), end=True)
    assert site.feed(late) == []
    assert site.out() == []


def test_trailers_of_a_call_that_we_ended_come_once() -> None:
    site = Site()
    site.feed(call(1))
    site.end(1)
    trailers = call(1, plain_block([("a", "b")]), end=True)
    site.feed(trailers)
    assert not site.connection.is_closed
    site.feed(trailers)
    assert site.goaway().code == Code.STREAM_CLOSED


def test_a_reset_by_the_peer_within_the_owners_hearing_of_it_is_told_once() -> None:
    site = Site()
    site.feed(call(1), data(1, message(b"m")), reset(1))
    site.connection.send(1, b"late")
    site.connection.end(1)
    assert site.out() == []
    assert [type(event) for event in site.events] == [CallStarted, MessageReceived, CallLost]


@pytest.mark.parametrize("how", ["reset", "timeout", "lose", "close", "connection fault"])
def test_a_call_that_is_ended_behind_queued_replies_is_never_lost(how: str) -> None:
    site = Site()
    site.feed(settings(initial_window=0), call(1, with_fields(("grpc-timeout", "5S"))), data(1, message(b"m")))
    site.connection.send(1, b"reply")
    site.end(1)
    assert [each.kind for each in site.out() if each.stream] == [HEADERS]
    match how:
        case "reset":
            site.feed(reset(1))
        case "timeout":
            site.tick(5.0)
            assert site.reset_codes() == {1: Code.CANCEL}
        case "lose":
            site.take(site.connection.lose())
        case "close":
            site.take(site.connection.close())
        case _:
            site.feed(data(0, b""))
    site.check()
    assert CallLost(1) not in site.events
    assert site.connection.bytes_held == 0


def test_a_call_that_is_ended_keeps_no_part_of_a_message() -> None:
    site = Site()
    site.feed(settings(initial_window=0), call(1), data(1, message(bytes(500))[:300]))
    site.connection.send(1, bytes(95))
    assert site.connection.bytes_held == 300 + 100
    site.end(1)
    assert site.connection.bytes_held == 100
    site.feed(data(1, bytes(200)))
    assert site.connection.bytes_held == 100
    site.tick(60.0)
    assert 1 not in site.reset_codes()
    site.feed(window_update(1, 100))
    assert [each.kind for each in site.out()] == [DATA, HEADERS, RST_STREAM]


@pytest.mark.parametrize("how", ["ended by us", "ended by the peer", "open"])
def test_trailers_keep_hpack_in_step(how: str) -> None:
    """Whether anybody reads them or not: what they add to the table moves what the next call refers to."""
    site = Site()
    site.feed(call(1, site.encoder.encode(GRPC)))
    if how == "ended by us":
        site.end(1)
    elif how == "ended by the peer":
        site.feed(data(1, b"", END_STREAM))
    site.feed(call(1, site.encoder.encode([("x-trailer", "value")]), end=True))
    again = site.encoder.encode([*GRPC, ("x-trailer", "value")])
    assert len(again) < 60
    assert site.feed(call(3, again)) == [CallStarted(3, PATH)]


def test_the_end_of_a_call_goes_out_behind_what_is_queued() -> None:
    site = Site()
    site.feed(settings(initial_window=6), call(1), data(1, message(b"m")))
    site.connection.send(1, b"12345")
    site.end(1)
    site.connection.send(1, b"nothing behind the end")
    assert site.out()[-1] == Frame(DATA, 0, 1, message(b"12345")[:6])
    site.feed(window_update(1, 100))
    rest, trailers, end = site.out()
    assert (rest.kind, rest.flags, rest.payload) == (DATA, 0, b"2345")
    assert (trailers.kind, trailers.flags, end.kind) == (HEADERS, END_HEADERS | END_STREAM, RST_STREAM)
    site.check()


@pytest.mark.parametrize("stops", ["lose", "close"])
def test_every_live_call_is_lost_with_its_connection(stops: str) -> None:
    site = Site()
    site.feed(call(1), call(3), call(5), data(5, message(b"part")[:7]), call(7)[:20])
    site.end(3)
    events = site.connection.lose() if stops == "lose" else site.connection.close()
    assert site.take(events) == [CallLost(1), CallLost(5)]
    assert site.connection.bytes_held == 0


def test_close_says_goaway_with_the_last_stream_and_the_reason() -> None:
    site = Site()
    site.feed(call(7))
    site.take(site.connection.close("so it is"))
    last = site.goaway()
    assert last.payload == b"\0\0\0\7" + b"\0\0\0\0" + b"so it is"


def test_the_last_stream_of_goaway_counts_refused_and_ended_ones() -> None:
    site = Site(ConnectionLimits(max_streams=1))
    site.feed(call(1), call(3))
    assert site.reset_codes() == {3: Code.REFUSED_STREAM}
    site.take(site.connection.close())
    assert site.goaway().payload[:4] == b"\0\0\0\3"


# -- those who speak no gRPC ---------------------------------------------------------------------------------------


def test_a_person_with_curl_is_told_what_this_port_is() -> None:
    site = Site()
    get = with_fields((":method", "GET"), (":path", "/"), ("content-type", "text/plain"))
    assert site.feed(call(1, get, end=True)) == []
    head, text, end = site.out()
    fields = site.headers(head.payload)
    assert fields[":status"] == "415"
    assert int(fields["content-length"]) == len(text.payload)
    assert b"gRPC" in text.payload
    assert (end.kind, end.flags, end.payload) == (DATA, END_STREAM, b"")


def test_head_is_answered_without_a_body() -> None:
    site = Site()
    site.feed(call(1, HEAD_ONLY, end=True))
    assert [(each.kind, each.payload) for each in site.out()][1:] == [(DATA, b"")]


@pytest.mark.parametrize(
    ("content_type", "taken"),
    [
        ("application/grpc", True),
        ("application/grpc+proto", True),
        ("Application/GRPC;x=1", True),
        ("application/grpc-web", False),
        ("application/json", False),
    ],
)
def test_grpc_is_told_by_its_content_type(content_type: str, taken: bool) -> None:
    site = Site()
    events = site.feed(call(1, with_fields(("content-type", content_type))))
    assert events == ([CallStarted(1, PATH)] if taken else [])


def test_a_body_for_nobody_is_thrown_away_and_answered_at_its_end() -> None:
    site = Site()
    post = with_fields(("content-type", "application/json"))
    for _ in range(40):
        site.feed(call(1, post) if not site.connection._streams else b"", data(1, bytes(16_384)))
    site.check()
    assert site.connection.bytes_held == 0
    site.feed(data(1, b"{}", END_STREAM))
    assert site.headers(next(each for each in site.out() if each.kind == HEADERS).payload)[":status"] == "415"


def test_an_upload_for_nobody_does_not_last_for_ever() -> None:
    site = Site()
    site.feed(call(1, with_fields(("content-type", "application/json"))), data(1, b"x"))
    site.tick(60.0)
    assert site.reset_codes() == {1: Code.CANCEL}
    assert site.events == []


def test_connect_is_no_call() -> None:
    site = Site()
    connect = plain_block([(":method", "CONNECT"), (":authority", "a:1")])
    assert site.feed(call(1, connect)) == []
    assert site.out() == []
    site.tick(60.0)
    assert site.reset_codes() == {1: Code.CANCEL}


# -- drain ---------------------------------------------------------------------------------------------------------


def drain_frames(site: Site) -> list[tuple[int, bytes]]:
    return [(each.kind, each.payload[:8]) for each in site.out()]


def test_drain_asks_first_and_refuses_once_the_peer_knows() -> None:
    site = Site()
    site.feed(call(1))
    site.connection.drain(site.now)
    assert drain_frames(site) == [(GOAWAY, b"\x7f\xff\xff\xff\0\0\0\0"), (PING, DRAIN_PING)]
    site.feed(call(3), data(3, message(b"opened before the peer knew")))
    site.feed(frame(PING, ACK, 0, DRAIN_PING))
    assert drain_frames(site) == [(GOAWAY, b"\0\0\0\3\0\0\0\0")]
    site.feed(call(5))
    assert site.reset_codes() == {5: Code.REFUSED_STREAM}
    site.feed(data(1, message(b"still served")))
    assert (site.messages(1), len(site.messages(3))) == ([b"still served"], 1)
    assert not site.connection.is_drained
    site.end(1)
    site.end(3)
    assert site.connection.is_drained


def test_a_peer_that_answers_no_ping_is_drained_after_a_second() -> None:
    site = Site()
    site.feed(call(1))
    site.connection.drain(site.now)
    site.out()
    site.tick(0.9)
    assert drain_frames(site) == []
    site.tick(0.1)
    assert drain_frames(site) == [(GOAWAY, b"\0\0\0\1\0\0\0\0")]
    site.tick(5.0)
    site.feed(frame(PING, ACK, 0, DRAIN_PING))
    assert drain_frames(site) == []


def test_drain_is_asked_for_once() -> None:
    site = Site()
    site.connection.drain(site.now)
    site.out()
    site.connection.drain(site.now)
    assert site.out() == []
    assert not site.connection.is_drained
    site.feed(frame(PING, ACK, 0, DRAIN_PING))
    assert site.connection.is_drained


def test_the_last_stream_that_goaway_names_never_grows() -> None:
    """Section 6.8."""
    site = Site()
    site.feed(call(1))
    site.connection.drain(site.now)
    site.feed(frame(PING, ACK, 0, DRAIN_PING), call(9))
    site.take(site.connection.close())
    assert site.goaway().payload[:4] == b"\0\0\0\1"


def test_a_header_block_under_way_while_we_stop_taking_is_refused() -> None:
    site = Site()
    whole = call(1)
    site.connection.drain(site.now)
    site.feed(whole[:20])
    site.tick(1.0)
    site.feed(whole[20:])
    assert site.reset_codes() == {1: Code.REFUSED_STREAM}
    assert site.connection.is_drained


def test_a_connection_without_a_preface_drains_too() -> None:
    site = Site(greet=False)
    site.connection.drain(site.now)
    site.tick(1.0)
    assert site.connection.is_drained
    assert (site.out(), site.plain) == ([], b"")


def test_who_connects_while_we_drain_is_told_so_and_served() -> None:
    site = Site(greet=False)
    site.connection.drain(site.now)
    site.feed(GREETING, call(1), data(1, message(b"m")))
    assert [each.kind for each in site.out()] == [SETTINGS, WINDOW_UPDATE, GOAWAY, PING, SETTINGS]
    assert site.live == {1}


# -- keep-alive ----------------------------------------------------------------------------------------------------


def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    site = Site()
    site.feed(call(1), data(1, message(b"m")))
    site.out()
    site.tick(59.9)
    assert site.out() == []
    site.tick(0.1)
    (ping,) = site.out()
    assert (ping.kind, ping.flags, ping.payload) == (PING, 0, KEEPALIVE_PING)
    site.tick(19.9)
    assert site.out() == []
    assert site.tick(0.1) == [CallLost(1)]
    assert site.goaway().code == Code.NO_ERROR
    assert site.breaches == {"keepalive_timeout": 1}


def test_whatever_a_peer_says_shows_that_it_is_there() -> None:
    site = Site()
    site.tick(60.0)
    site.now += 10.0
    site.feed(frame(99))
    site.out()
    site.tick(10.0)
    site.tick(49.0)
    assert site.out() == []
    site.tick(1.0)
    assert [each.payload for each in site.out()] == [KEEPALIVE_PING]
    site.feed(frame(PING, ACK, 0, KEEPALIVE_PING))
    site.tick(20.0)
    assert not site.connection.is_closed


def test_repr_says_what_is_going_on() -> None:
    site = Site()
    site.feed(call(1))
    assert repr(site.connection) == "<ServerConnection open, 1 streams, 0 bytes queued>"
    site.connection.drain(0.0)
    assert "draining" in repr(site.connection)
    site.take(site.connection.lose())
    assert repr(site.connection) == "<ServerConnection closed, 0 streams, 0 bytes queued>"


def test_preface_settings_and_a_call_may_come_at_once() -> None:
    """As Envoy sends them, before it has seen anything of ours."""
    site = Site(greet=False)
    assert site.feed(GREETING, call(1), data(1, message(b"m"))) == [CallStarted(1, PATH), MessageReceived(1, b"m")]
    assert WINDOW_UPDATE in [each.kind for each in site.out()]
