"""Each limit of `ConnectionLimits`: what just fits, what is one too many, with which code, and that it is counted."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import msgspec
import pytest

from epp.errors import ConfigError
from epp.extproc.http2.connection import RESET_REMEMBERED
from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import PREFACE, Code
from tests.http2.peer import (
    ACK,
    CALL,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PATH,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    Site,
    call,
    data,
    frame,
    message,
    plain_block,
    python_calls,
    reset,
    settings,
    window_update,
    with_fields,
)


def ended(site: Site, limit: str, code: Code = Code.ENHANCE_YOUR_CALM) -> bool:
    """The connection has ended for a limit, and the breach is counted."""
    assert site.breaches == {limit: 1}
    return site.goaway().code == code


def open_and_reset(first: int, count: int) -> bytes:
    return b"".join(call(stream) + reset(stream) for stream in range(first, first + 2 * count, 2))


# -- streams -------------------------------------------------------------------------------------------------------


def test_streams_over_the_limit_are_refused_and_the_others_go_on() -> None:
    """Envoy opens them before it has seen our SETTINGS; a connection error would end all the others."""
    site = Site(ConnectionLimits(max_streams=2))
    said = b"".join(call(stream) + data(stream, message(b"m")) for stream in (1, 3, 5, 7))
    site.feed(said)
    assert site.reset_codes() == {5: Code.REFUSED_STREAM, 7: Code.REFUSED_STREAM}
    assert site.breaches == {"max_streams": 2}
    assert site.live == {1, 3}
    site.feed(data(5, b"under way", END_STREAM))
    site.end(1)
    assert site.feed(call(9)) == [CallStarted(9, PATH)]


def test_a_refused_stream_s_header_block_still_counts_for_hpack() -> None:
    site = Site(ConnectionLimits(max_streams=1))
    fields = [*dict(CALL_FIELDS).items(), ("x-indexed", "yes")]
    site.feed(call(1), call(3, site.encoder.encode(fields)))
    site.end(1)
    assert site.feed(call(5, site.encoder.encode(fields))) == [CallStarted(5, PATH)]


CALL_FIELDS = (
    (":method", "POST"),
    (":path", PATH),
    (":authority", "picker"),
    (":scheme", "http"),
    ("content-type", "application/grpc"),
)


def test_streams_that_are_refused_over_and_over_end_the_connection() -> None:
    site = Site(ConnectionLimits(max_streams=1, max_control_frames=100))
    site.feed(b"".join(call(stream) for stream in range(1, 204, 2)))
    assert site.connection.is_closed
    assert site.breaches["max_control_frames"] == 1


# -- header blocks -------------------------------------------------------------------------------------------------


def sized(size: int) -> bytes:
    """A gRPC header list of so many bytes, as section 6.5.2 counts: 32 more for each field."""
    used = sum(len(name) + len(value) + 32 for name, value in CALL_FIELDS)
    value = "x" * (size - used - 33)
    return plain_block(CALL_FIELDS) + b"\x00\x01a" + b"\x7f" + varint(len(value) - 127) + value.encode()


def varint(number: int) -> bytes:
    """RFC 7541 section 5.1, behind a full prefix."""
    tail = bytearray()
    while number >= 128:
        tail.append(number & 127 | 128)
        number >>= 7
    return bytes(tail) + bytes((number,))


def test_a_header_list_may_be_as_long_as_the_limit() -> None:
    site = Site(ConnectionLimits(max_header_bytes=1_000))
    assert site.feed(call(1, sized(1_000))) == [CallStarted(1, PATH)]
    assert site.feed(call(3, sized(1_001))) == []
    assert site.reset_codes() == {3: Code.ENHANCE_YOUR_CALM}
    assert site.breaches == {"max_header_bytes": 1}


def test_a_header_list_of_twice_the_limit_ends_the_connection() -> None:
    """HPACK bomb: short references to a large entry. What is unpacked is bounded."""
    site = Site(ConnectionLimits(max_header_bytes=10_000))
    entry = b"\x40\x01a\x7f" + varint(3_000 - 127) + b"x" * 3_000
    site.feed(call(1, CALL + entry + b"\xbe" * 2))
    assert site.reset_codes() == {}
    site.feed(call(3, CALL + b"\xbe" * 6))
    assert site.reset_codes() == {3: Code.ENHANCE_YOUR_CALM}
    site.breaches.clear()
    site.feed(call(5, CALL + b"\xbe" * 7))  # 21 of 20 KB
    assert ended(site, "max_header_bytes")


@pytest.mark.parametrize("said", [b"", b"\x00\x01a\x01b"], ids=["empty", "small"])
def test_a_header_block_has_at_most_eight_continuations(said: bytes) -> None:
    site = Site()
    site.feed(frame(HEADERS, 0, 1, CALL), *[frame(CONTINUATION, 0, 1, said)] * 7)
    assert site.feed(frame(CONTINUATION, END_HEADERS, 1, said)) == [CallStarted(1, PATH)]
    site.feed(frame(HEADERS, 0, 3, CALL), *[frame(CONTINUATION, 0, 3, said)] * 8)
    assert not site.connection.is_closed
    site.feed(frame(CONTINUATION, 0, 3, said))
    assert ended(site, "max_continuations")


def test_a_header_block_that_is_longer_than_any_list_is_not_collected() -> None:
    site = Site(ConnectionLimits(max_header_bytes=20_000))
    site.feed(frame(HEADERS, 0, 1, bytes(16_384)), frame(CONTINUATION, 0, 1, bytes(3_616)))
    assert site.connection.bytes_held == 20_000
    site.feed(frame(CONTINUATION, 0, 1, b"\0"))
    assert ended(site, "max_header_bytes")
    assert site.connection.bytes_held == 0


def test_a_header_block_that_does_not_end_is_given_up() -> None:
    site = Site()
    site.feed(frame(HEADERS, 0, 1, CALL))
    site.tick(9.9)
    assert not site.connection.is_closed
    site.feed(frame(CONTINUATION, 0, 1))
    site.tick(0.1)
    assert ended(site, "preface_timeout", Code.SETTINGS_TIMEOUT)


# -- resets --------------------------------------------------------------------------------------------------------


def test_rapid_resets_end_the_connection() -> None:
    """CVE-2023-44487."""
    site = Site()
    site.feed(open_and_reset(1, 500))
    assert not site.connection.is_closed
    site.feed(open_and_reset(1_001, 1))
    assert ended(site, "max_resets")


def test_answers_that_the_peer_s_window_keeps_back_are_none() -> None:
    """Else a peer has us work for nothing by a window of nothing."""
    site = Site()
    site.feed(settings(initial_window=0))
    for stream in range(1, 1_001, 2):
        site.feed(call(stream), data(stream, message(b"m")))
        site.connection.send(stream, b"reply")
        site.feed(reset(stream) if stream % 4 == 1 else window_update(stream, 0))
    assert not site.connection.is_closed
    site.feed(open_and_reset(1_001, 1))
    assert ended(site, "max_resets")


def test_what_time_ends_is_no_reset_of_the_peer_s() -> None:
    site = Site(ConnectionLimits(max_resets=5))
    site.feed(*(call(stream, with_fields(("content-type", "text/html"))) for stream in range(1, 41, 2)))
    site.tick(60.0)
    assert len(site.reset_codes()) == 20
    assert not site.connection.is_closed


def test_resets_are_counted_by_the_second() -> None:
    site = Site()
    for second in range(5):
        site.now = float(second)
        site.feed(open_and_reset(1 + second * 1_000, 500))
    assert not site.connection.is_closed


def test_resets_of_answered_calls_are_how_envoy_ends_them() -> None:
    site = Site()
    for stream in range(1, 4_001, 2):
        site.feed(call(stream), data(stream, message(b"m")))
        site.connection.send(stream, b"reply")
        site.feed(reset(stream))
    assert not site.connection.is_closed


def test_resets_of_calls_that_waited_for_a_second_are_no_attack() -> None:
    """Clients that give up in a queue do so by hundreds, and Envoy's connection has many others on it."""
    site = Site()
    site.feed(*(call(stream) for stream in range(1, 4_001, 2)))
    site.now = 1.0
    site.feed(*(reset(stream) for stream in range(1, 4_001, 2)))
    assert not site.connection.is_closed
    assert len(site.events) == 4_000


def test_answers_earn_resets() -> None:
    site = Site(ConnectionLimits(max_resets=5))
    site.feed(*(call(stream) for stream in range(1, 21, 2)))
    for stream in range(1, 21, 2):
        site.end(stream)
    site.feed(open_and_reset(101, 15))
    assert not site.connection.is_closed
    site.feed(open_and_reset(201, 1))
    assert ended(site, "max_resets")


def test_what_was_earned_is_forgotten_two_seconds_later() -> None:
    site = Site(ConnectionLimits(max_resets=5))
    site.feed(*(call(stream) for stream in range(1, 21, 2)))
    for stream in range(1, 21, 2):
        site.end(stream)
    for second in (1.0, 2.0, 3.0):
        site.now = second
        site.feed()
    site.feed(open_and_reset(101, 6))
    assert ended(site, "max_resets")


@pytest.mark.parametrize(
    "fault",
    [
        lambda stream: call(stream) + window_update(stream, 0),
        lambda stream: call(stream) + call(stream, plain_block([("a", "b")])),
        lambda stream: call(stream, end=True) + data(stream, b"x", PADDED),
        lambda stream: call(stream, with_fields(("A", "b"))),
    ],
    ids=["WINDOW_UPDATE by 0", "HEADERS in the middle", "DATA behind the end", "a malformed request"],
)
def test_a_peer_that_makes_us_reset_is_one_that_resets(fault: Callable[[int], bytes]) -> None:
    """CVE-2025-8671, MadeYouReset."""
    site = Site(ConnectionLimits(max_resets=5))
    for stream in range(1, 11, 2):
        site.feed(fault(stream))
    assert not site.connection.is_closed
    site.feed(fault(11))
    assert ended(site, "max_resets")


# -- floods --------------------------------------------------------------------------------------------------------

FLOODS = {
    "PING": frame(PING, 0, 0, bytes(8)),
    "PING ACK": frame(PING, ACK, 0, bytes(8)),
    "SETTINGS": frame(SETTINGS),
    "SETTINGS ACK": frame(SETTINGS, ACK),
    "PRIORITY": frame(PRIORITY, 0, 9, bytes(5)),
    "WINDOW_UPDATE": window_update(0, 1),
    "WINDOW_UPDATE of a stream": window_update(1, 1),
    "WINDOW_UPDATE of a closed stream": window_update(3, 1),
    "RST_STREAM of a closed stream": reset(3),
    "GOAWAY": frame(7, 0, 0, bytes(8)),
    "unknown": frame(99, 0, 0, bytes(100)),
    "empty DATA of a stream that we ended": data(5, b""),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_frames_without_work_end_the_connection_when_there_are_too_many(flood: bytes) -> None:
    site = Site(ConnectionLimits(control_frames_per_data=0))
    site.feed(call(1), call(3), reset(3), call(5))
    site.end(5)
    site.now = 1.0
    for _ in range(1_000):
        site.feed(flood)
    assert not site.connection.is_closed
    site.now = 2.0
    site.feed(flood * 1_000)
    assert not site.connection.is_closed
    site.feed(flood)
    assert ended(site, "max_control_frames")


def test_data_of_an_ended_stream_again_and_again_ends_the_connection() -> None:
    site = Site(ConnectionLimits(max_control_frames=100, control_frames_per_data=0))
    said = b"".join(call(stream) + reset(stream) for stream in range(1, 203, 2))
    site.feed(said)
    site.now = 1.0
    site.feed(*(data(stream, b"x") for stream in range(1, 201, 2)))
    assert not site.connection.is_closed
    site.feed(data(201, b"x"))
    assert ended(site, "max_control_frames")


def test_each_setting_counts_as_a_frame() -> None:
    """CVE-2020-11080: few frames of many settings."""
    site = Site()
    site.now = 1.0
    many = frame(SETTINGS, 0, 0, b"\0\4\0\0\0\1" * 499)
    site.feed(many, many)
    assert not site.connection.is_closed
    site.feed(frame(SETTINGS, 0, 0, b"\0\4\0\0\0\1"))
    assert ended(site, "max_control_frames")


def test_a_new_initial_window_costs_more_the_more_streams_it_changes() -> None:
    site = Site()
    site.feed(*(call(stream) for stream in range(1, 10_001, 2)))
    for window in range(18):
        site.feed(settings(initial_window=window))
    assert not site.connection.is_closed
    assert all(stream.send_window == 17 for stream in site.connection._streams.values())
    site.feed(settings(initial_window=50), settings(initial_window=51))
    assert ended(site, "max_control_frames")


def test_work_earns_control_frames() -> None:
    """A peer that gets a lot updates windows and pings a lot."""
    site = Site(ConnectionLimits(max_control_frames=20))
    site.feed(call(1))
    for _ in range(100):
        site.feed(data(1, message(b"m")), *[window_update(1, 1)] * 10)
        site.connection.send(1, b"reply")
    assert not site.connection.is_closed


def test_who_reads_late_may_open_the_windows_of_all_streams_at_once() -> None:
    """grpcio's client sends WINDOW_UPDATE for each stream when it is read, 3,000 of them if it has so many."""
    site = Site()
    for stream in range(1, 6_001, 2):
        site.feed(call(stream), data(stream, message(b"m")))
        site.connection.send(stream, b"reply")
    site.now = 60.0
    site.feed(*(window_update(stream, 5) for stream in range(1, 6_001, 2)))
    assert not site.connection.is_closed


def test_empty_data_in_a_row_ends_the_connection() -> None:
    """CVE-2019-9518."""
    site = Site()
    site.feed(call(1), *[data(1, b"") + data(1, message(b"m"))] * 50)
    assert not site.connection.is_closed
    site.feed(data(1, b"") + data(1, b"\x03" + bytes(3), PADDED))
    assert ended(site, "max_empty_frames")


# -- messages ------------------------------------------------------------------------------------------------------


def test_messages_that_are_not_whole_are_bounded_over_all_streams() -> None:
    site = Site(ConnectionLimits(max_message_bytes=1_000, max_held_bytes=2_000))
    part = message(bytes(1_000))[:700]
    site.feed(*(call(stream) + data(stream, part) for stream in (1, 3)))
    assert site.connection.bytes_held == 1_400
    assert site.feed(call(5), data(5, part)) == [CallStarted(5, PATH), CallLost(5)]
    trailers = site.status(each for each in site.out() if each.stream == 5)
    assert trailers["grpc-status"] == "8"
    assert site.breaches == {"max_held_bytes": 1}
    assert site.feed(data(1, bytes(305))) == [MessageReceived(1, bytes(1_000))]
    site.check()
    site.feed(call(7), data(7, part))
    assert site.live == {1, 3, 7}


def test_one_message_always_has_room() -> None:
    site = Site(ConnectionLimits(max_message_bytes=1_000, max_held_bytes=0))
    whole = message(bytes(1_000))
    assert site.feed(call(1), data(1, whole[:-1]), data(1, whole[-1:]))[1:] == [MessageReceived(1, bytes(1_000))]


def test_what_is_unpacked_at_once_is_bounded() -> None:
    """4 KB unpack to 4 MB: what one read of the socket brings may not become gigabytes before its owner sees it."""
    site = Site(ConnectionLimits(max_message_bytes=1_000_000, max_held_bytes=2_500_000))
    bomb = message(gzip.compress(bytes(1_000_000)), flag=1)
    site.feed(*(call(stream, with_fields(("grpc-encoding", "gzip"))) for stream in (1, 3)))
    events = site.feed(*[data(1, bomb)] * 3, data(3, message(b"m")))
    assert [type(event) for event in events] == [MessageReceived, MessageReceived, CallLost, MessageReceived]
    assert site.breaches == {"max_held_bytes": 1}
    for _ in range(5):
        site.feed(data(3, bomb))
    assert len(site.messages(3)) == 6


def test_a_byte_at_a_time_takes_no_more_memory_than_bytes() -> None:
    site = Site()
    site.feed(call(1), data(1, message(bytes(10_000))[:5]))
    for _ in range(5_000):
        site.feed(data(1, b"x"))
    assert site.connection.bytes_held == 5_005


# -- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", PREFACE[:5], PREFACE, PREFACE + frame(SETTINGS)[:5]])
def test_a_preface_that_does_not_end_is_given_up(said: bytes) -> None:
    site = Site(greet=False)
    site.feed(said)
    site.tick(9.9)
    assert not site.connection.is_closed
    site.tick(0.1)
    assert "closed" in repr(site.connection)
    assert site.breaches == {"preface_timeout": 1}
    # Before the preface is whole nothing says that the peer would understand us.
    assert [each.kind for each in site.out()[-1:]] == ([GOAWAY] if said.startswith(PREFACE) else [])


@pytest.mark.parametrize(
    "said",
    [call(1), call(1) + data(1, message(b"abc")[:1]), call(1) + data(1, message(b"abc")[:-1]), call(1, end=True)],
    ids=["nothing", "a byte", "all but a byte", "an end without a message"],
)
def test_a_call_that_says_nothing_whole_is_given_up(said: bytes) -> None:
    site = Site()
    site.feed(said)
    site.tick(59.0)
    assert site.live == {1}
    site.feed(frame(PING, 0, 0, bytes(8)))
    assert site.tick(1.0) == [CallLost(1)]
    assert site.status(site.out())["grpc-status"] == "4"
    assert site.breaches == {"message_timeout": 1}
    site.check()


def test_each_message_has_its_own_time() -> None:
    site = Site()
    whole = message(b"abc")
    site.feed(call(1))
    site.now = 50.0
    site.feed(data(1, whole + whole[:2]))
    site.now = 109.0
    site.feed(data(1, whole[2:] + whole[:3]))
    site.tick()
    site.now = 168.0
    site.feed(data(1, whole[3:5]))
    site.tick()
    assert site.live == {1}
    assert len(site.messages()) == 2
    site.tick(1.0)
    assert site.live == set()


def test_a_call_between_messages_may_wait_as_long_as_it_takes() -> None:
    """It waits for a model's answer."""
    site = Site()
    site.feed(call(1), data(1, message(b"abc")[:3]), data(1, message(b"abc")[3:]))
    for _ in range(100):
        site.tick(50.0)
        site.feed(frame(PING, ACK, 0, bytes(8)))
    assert site.live == {1}


def test_a_timeout_of_the_peers_ends_the_call() -> None:
    site = Site()
    site.feed(call(1, with_fields(("grpc-timeout", "250m"))), data(1, message(b"m")))
    site.tick(0.2)
    assert site.live == {1}
    assert site.tick(0.05) == [CallLost(1)]
    assert site.status(site.out())["grpc-status"] == "4"
    assert site.breaches == {}


def test_a_timeout_of_an_answered_call_still_ends_it() -> None:
    site = Site()
    site.feed(call(1, with_fields(("grpc-timeout", "1S"))), data(1, message(b"m"), END_STREAM))
    site.connection.send(1, b"reply")
    assert site.tick(1.0) == [CallLost(1)]
    assert site.status(site.out())["grpc-status"] == "4"


def silent(calls: int) -> int:
    """What it costs to give up so many calls at once."""
    site = Site()
    site.feed(*(call(stream) for stream in range(1, 2 * calls, 2)))
    cost = python_calls(lambda: site.tick(60.0))
    assert len([event for event in site.events if isinstance(event, CallLost)]) == calls
    return cost


def test_thousands_of_silent_calls_cost_thousands_of_times_one() -> None:
    assert silent(2_000) < 11 * silent(200)


# -- what is remembered --------------------------------------------------------------------------------------------


def test_only_so_many_ended_streams_are_remembered() -> None:
    site = Site()
    for stream in range(1, 2 * RESET_REMEMBERED + 3, 2):
        site.feed(call(stream), data(stream, message(b"m")))
        site.end(stream)
        site.out()
    site.feed(data(3, b"late"))
    assert site.reset_codes() == {}
    site.feed(data(1, b"too late"))
    assert site.reset_codes() == {1: Code.STREAM_CLOSED}
    site.check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream_window": 65_534},
        {"connection_window": 65_534},
        {"stream_window": 2**31},
        {"max_frame_bytes": 16_383},
        {"max_frame_bytes": 2**24},
        {"max_message_bytes": 2**32},
        {"max_streams": -1},
    ],
)
def test_limits_that_http2_does_not_allow_cannot_be_chosen(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ConnectionLimits(**wrong)
    with pytest.raises(ConfigError):
        msgspec.convert(wrong, ConnectionLimits)


def test_the_smallest_windows_work() -> None:
    site = Site(ConnectionLimits(stream_window=65_535, connection_window=65_535), greet=False)
    site.feed(PREFACE)
    assert [each.kind for each in site.out()] == [SETTINGS]


def test_ended_calls_leave_nothing() -> None:
    site = Site()
    for stream in range(1, 601, 2):
        site.feed(call(stream), data(stream, message(b"m")), data(stream, message(b"part")[:7]))
        match stream % 3:
            case 0:
                site.end(stream)
            case 1:
                site.feed(reset(stream))
            case _:
                site.feed(data(stream, b"", END_STREAM))
    site.out()
    site.check()
    assert site.connection.bytes_held == 0
    assert CallEnded not in {type(event) for event in site.events}
    assert RST_STREAM not in {each.kind for each in site.out()}
