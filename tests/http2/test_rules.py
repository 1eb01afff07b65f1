"""What RFC 9113 and RFC 7541 forbid, each with the code that ends the stream or the connection."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from epp.extproc.http2.connection import ServerConnection
from epp.extproc.http2.frames import PREFACE, Code
from tests.http2.peer import (
    ACK,
    CALL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    GREETING,
    HEADERS,
    PADDED,
    PING,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
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

CONNECTION, STREAM = "connection", "stream"
MOST = 2**31 - 1


class Rule(NamedTuple):
    section: str
    situation: str
    said: bytes
    """Behind preface and SETTINGS."""
    ends: str
    code: Code
    stream: int = 1


def block(*fields: tuple[str, str]) -> bytes:
    return call(1, plain_block(fields))


def changed(*changes: tuple[str, str], drop: str = "no name") -> bytes:
    return call(1, with_fields(*changes, drop=drop))


RULES = [
    # -- frames
    Rule("4.2", "a frame over the largest size", frame(DATA, 0, 1, bytes(16_385)), CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("4.3", "a header block that HPACK cannot read", call(1, b"\xff\xff\xff\xff\xff\x7f"), CONNECTION,
         Code.COMPRESSION_ERROR),
    Rule("4.3", "a header block with an index of no entry", call(1, b"\xbe"), CONNECTION, Code.COMPRESSION_ERROR),
    Rule("4.3", "a header block cut short", call(1, CALL[:-1]), CONNECTION, Code.COMPRESSION_ERROR),
    Rule("4.3", "DATA within a header block", frame(HEADERS, 0, 1, CALL) + data(1, b"x"), CONNECTION,
         Code.PROTOCOL_ERROR),
    Rule("4.3", "PING within a header block", frame(HEADERS, 0, 1, CALL) + frame(PING, 0, 0, bytes(8)), CONNECTION,
         Code.PROTOCOL_ERROR),
    Rule("5.5", "an unknown frame within a header block", frame(HEADERS, 0, 1, CALL) + frame(99, 0, 1), CONNECTION,
         Code.PROTOCOL_ERROR),
    Rule("6.10", "CONTINUATION of another stream", frame(HEADERS, 0, 1, CALL) + frame(CONTINUATION, 4, 3), CONNECTION,
         Code.PROTOCOL_ERROR),
    Rule("6.10", "CONTINUATION behind END_HEADERS", call(1) + frame(CONTINUATION, 4, 1), CONNECTION,
         Code.PROTOCOL_ERROR),
    Rule("6.10", "CONTINUATION on stream 0", frame(CONTINUATION, 4, 0), CONNECTION, Code.PROTOCOL_ERROR),
    # -- streams
    Rule("5.1", "DATA on an idle stream", data(1, b"x"), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("5.1", "RST_STREAM on an idle stream", reset(1), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("5.1", "WINDOW_UPDATE on an idle stream", window_update(1, 1), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("5.1", "WINDOW_UPDATE on a server's stream", call(1) + window_update(2, 1), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("5.1", "DATA behind END_STREAM", call(1, end=True) + data(1, b"x"), STREAM, Code.STREAM_CLOSED),
    Rule("5.1", "HEADERS behind END_STREAM", call(1, end=True) + call(1), STREAM, Code.STREAM_CLOSED),
    Rule("5.1", "DATA behind RST_STREAM", call(1) + reset(1) + data(1, b"x"), STREAM, Code.STREAM_CLOSED),
    Rule("5.1", "HEADERS behind RST_STREAM", call(1) + reset(1) + call(1), CONNECTION, Code.STREAM_CLOSED),
    Rule("5.1.1", "HEADERS on an even stream", call(2), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("5.1.1", "HEADERS on a lower stream", call(5) + call(3), CONNECTION, Code.STREAM_CLOSED),
    Rule("6.1", "DATA on stream 0", data(0, b"x"), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.1", "DATA all padding and more", call(1) + data(1, b"\x05abcd", PADDED), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.1", "padded DATA without a length", call(1) + data(1, b"", PADDED), CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("6.2", "HEADERS on stream 0", call(0), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.2", "HEADERS all padding", frame(HEADERS, END_HEADERS | PADDED, 1, b"\x04abc"), CONNECTION,
         Code.PROTOCOL_ERROR),
    Rule("6.2", "HEADERS without room for its priority", frame(HEADERS, END_HEADERS | PRIORITIZED, 1, bytes(4)),
         CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("8.1", "HEADERS in the middle", call(1) + call(1, plain_block([("a", "b")])), STREAM, Code.PROTOCOL_ERROR),
    # -- PRIORITY, RST_STREAM
    Rule("5.3.1", "a stream that depends on itself (RFC 7540)",
         frame(HEADERS, END_HEADERS | PRIORITIZED, 1, b"\0\0\0\1\0" + CALL), STREAM, Code.PROTOCOL_ERROR),
    Rule("5.3.1", "PRIORITY on itself (RFC 7540)", call(1) + frame(PRIORITY, 0, 1, b"\0\0\0\1\0"), STREAM,
         Code.PROTOCOL_ERROR),
    Rule("6.3", "PRIORITY on stream 0", frame(PRIORITY, 0, 0, bytes(5)), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.3", "PRIORITY of four bytes", call(1) + frame(PRIORITY, 0, 1, bytes(4)), STREAM, Code.FRAME_SIZE_ERROR),
    Rule("6.3", "PRIORITY of four bytes on an idle stream, which no RST_STREAM may end",
         frame(PRIORITY, 0, 1, bytes(4)), CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("6.4", "RST_STREAM of three bytes", call(1) + frame(RST_STREAM, 0, 1, bytes(3)), CONNECTION,
         Code.FRAME_SIZE_ERROR),
    Rule("6.4", "RST_STREAM on stream 0", frame(RST_STREAM, 0, 0, bytes(4)), CONNECTION, Code.PROTOCOL_ERROR),
    # -- SETTINGS
    Rule("6.5", "SETTINGS on a stream", frame(SETTINGS, 0, 1), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.5", "SETTINGS of five bytes", frame(SETTINGS, 0, 0, bytes(5)), CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("6.5", "SETTINGS ACK with a payload", frame(SETTINGS, ACK, 0, bytes(6)), CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("6.5.2", "ENABLE_PUSH 2", settings(enable_push=2), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.5.2", "INITIAL_WINDOW_SIZE 2^31", settings(initial_window=2**31), CONNECTION, Code.FLOW_CONTROL_ERROR),
    Rule("6.5.2", "MAX_FRAME_SIZE 16,383", settings(max_frame=16_383), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.5.2", "MAX_FRAME_SIZE 2^24", settings(max_frame=2**24), CONNECTION, Code.PROTOCOL_ERROR),
    # -- PUSH_PROMISE, PING, GOAWAY
    Rule("8.4", "PUSH_PROMISE", call(1) + frame(PUSH_PROMISE, 4, 1, bytes(4)), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.7", "PING on a stream", frame(PING, 0, 1, bytes(8)), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.7", "PING of seven bytes", frame(PING, 0, 0, bytes(7)), CONNECTION, Code.FRAME_SIZE_ERROR),
    Rule("6.8", "GOAWAY on a stream", frame(GOAWAY, 0, 1, bytes(8)), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.8", "GOAWAY cut short", frame(GOAWAY, 0, 0, bytes(7)), CONNECTION, Code.FRAME_SIZE_ERROR),
    # -- windows
    Rule("6.9", "WINDOW_UPDATE of three bytes", frame(WINDOW_UPDATE, 0, 0, bytes(3)), CONNECTION,
         Code.FRAME_SIZE_ERROR),
    Rule("6.9", "WINDOW_UPDATE by 0", window_update(0, 0), CONNECTION, Code.PROTOCOL_ERROR),
    Rule("6.9", "WINDOW_UPDATE by 0 on a stream", call(1) + window_update(1, 0), STREAM, Code.PROTOCOL_ERROR),
    Rule("6.9.1", "a connection's window over 2^31-1", window_update(0, MOST), CONNECTION, Code.FLOW_CONTROL_ERROR),
    Rule("6.9.1", "a stream's window over 2^31-1", call(1) + window_update(1, MOST), STREAM, Code.FLOW_CONTROL_ERROR),
    Rule("6.9.2", "an initial window that lifts one over 2^31-1",
         settings(initial_window=100) + call(1) + window_update(1, MOST - 100) + settings(initial_window=101),
         CONNECTION, Code.FLOW_CONTROL_ERROR),
    # -- requests
    Rule("8.2.1", "a name in upper case", changed(("X-Upper", "1")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "an empty name", changed(("", "1")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a name with a space", changed(("a b", "1")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a name with a colon inside", changed(("a:b", "1")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a value with a line feed", changed(("a", "1\n2")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a value that ends with a line feed", changed(("a", "1\n")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a value with NUL", changed(("a", "1\0")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a value that begins with a space", changed(("a", " 1")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a value that ends with a tab", changed(("a", "1\t")), STREAM, Code.PROTOCOL_ERROR),
    *(Rule("8.2.2", f"the header {name}", changed((name, "x")), STREAM, Code.PROTOCOL_ERROR)
      for name in ("connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade")),
    Rule("8.2.2", "te with something but trailers", changed(("te", "gzip")), STREAM, Code.PROTOCOL_ERROR),
    *(Rule("8.3.1", f"a request without {name}", changed(drop=name), STREAM, Code.PROTOCOL_ERROR)
      for name in (":method", ":path", ":scheme")),
    Rule("8.3.1", "an empty :path", changed((":path", "")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.3", "a pseudo-header of responses", changed((":status", "200")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.3", "an unknown pseudo-header", changed((":protocol", "websocket")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.3", "a pseudo-header twice", block((":method", "GET"), (":method", "GET"), (":path", "/"),
                                               (":scheme", "http")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.3", "a pseudo-header behind others", block((":method", "GET"), (":path", "/"), ("a", "b"),
                                                       (":scheme", "http")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.1", "a pseudo-header in trailers", call(1) + call(1, plain_block([(":path", "/")]), end=True), STREAM,
         Code.PROTOCOL_ERROR),
    Rule("8.2.1", "a bad name in trailers", call(1) + call(1, plain_block([("A", "b")]), end=True), STREAM,
         Code.PROTOCOL_ERROR),
    Rule("8.5", "CONNECT with a path", block((":method", "CONNECT"), (":authority", "a:1"), (":path", "/")), STREAM,
         Code.PROTOCOL_ERROR),
    Rule("8.5", "CONNECT without :authority", block((":method", "CONNECT")), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.1.1", "less DATA than content-length",
         changed(("content-length", "9")) + data(1, message(b"abc"), END_STREAM), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.1.1", "more DATA than content-length", changed(("content-length", "7")) + data(1, message(b"abc")), STREAM,
         Code.PROTOCOL_ERROR),
    Rule("8.1.1", "a content-length and no DATA", call(1, with_fields(("content-length", "8")), end=True), STREAM,
         Code.PROTOCOL_ERROR),
    Rule("8.1.1", "a content-length and trailers instead of DATA",
         changed(("content-length", "8")) + call(1, plain_block([("a", "b")]), end=True), STREAM, Code.PROTOCOL_ERROR),
    Rule("8.1.1", "a content-length of no number", changed(("content-length", "-1")), STREAM, Code.PROTOCOL_ERROR),
    # -- HPACK (RFC 7541)
    Rule("RFC 7541 4.2", "a table size above what we allow", call(1, b"\x3f\xe2\x1f" + CALL), CONNECTION,
         Code.COMPRESSION_ERROR),
    Rule("RFC 7541 4.2", "a table size update behind a field", call(1, CALL + b"\x20"), CONNECTION,
         Code.COMPRESSION_ERROR),
    Rule("RFC 7541 6.1", "index 0", call(1, b"\x80"), CONNECTION, Code.COMPRESSION_ERROR),
    Rule("RFC 7541 5.2", "Huffman padding that is not EOS", call(1, CALL + b"\x00\x01a\x81\x00"), CONNECTION,
         Code.COMPRESSION_ERROR),
    Rule("RFC 7541 5.2", "Huffman with EOS in it", call(1, CALL + b"\x00\x01a\x84\xff\xff\xff\xff"), CONNECTION,
         Code.COMPRESSION_ERROR),
    Rule("RFC 7541 5.1", "an integer without an end", call(1, CALL + b"\x7f" + b"\xff" * 400), CONNECTION,
         Code.COMPRESSION_ERROR),
    Rule("RFC 7541 4.2", "a bad block on a stream that is refused for its trailers",
         call(1, end=True) + call(1, b"\xbe", end=True), CONNECTION, Code.COMPRESSION_ERROR),
]  # fmt: skip


def check(rule: Rule, site: Site) -> None:
    if rule.ends is CONNECTION:
        assert site.goaway().code == rule.code
    else:
        assert not site.connection.is_closed
        assert site.reset_codes() == {rule.stream: rule.code}
        assert not site.live
        site.feed(call(101), data(101, message(b"others do not notice")))
        assert site.messages(101) == [b"others do not notice"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.section}: {rule.situation}")
def test_what_breaks_a_rule_ends_what_the_rule_names(rule: Rule) -> None:
    site = Site()
    site.feed(rule.said)
    check(rule, site)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.section}: {rule.situation}")
def test_a_rule_holds_byte_by_byte(rule: Rule) -> None:
    site = Site()
    for byte in rule.said:
        site.feed(bytes((byte,)))
    check(rule, site)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.section}: {rule.situation}")
def test_a_rule_holds_with_more_behind_it(rule: Rule) -> None:
    site = Site()
    site.feed(rule.said, frame(PING, 0, 0, b"the tail"))
    pings = [each for each in site.out() if each.kind == PING]
    assert bool(pings) is (rule.ends is STREAM), "what follows a connection's end is not read"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (PREFACE + frame(PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS, ACK), Code.PROTOCOL_ERROR),
        (PREFACE + data(1, b"x"), Code.PROTOCOL_ERROR),
        (PREFACE + call(1), Code.PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS, 0, 0, bytes(16_385)), Code.FRAME_SIZE_ERROR),
    ],
    ids=["PING first", "an ACK first", "DATA first", "HEADERS first", "size"],
)
def test_a_connection_begins_with_the_preface_and_settings(said: bytes, code: Code) -> None:
    for pieces in ([said], [said[i : i + 1] for i in range(len(said))]):
        site = Site(greet=False)
        for piece in pieces:
            site.feed(piece)
        assert site.goaway().code == code


@pytest.mark.parametrize("said", [b"PRJ", PREFACE[:-1] + b"x", b"\x16\x03\x01", b"INVALID CONNECTION PREFACE\r\n\r\n"])
def test_a_wrong_preface_ends_the_connection_at_its_first_wrong_byte(said: bytes) -> None:
    """Section 3.4: a GOAWAY may be left out, for the peer would not understand it."""
    for pieces in ([said], [said[i : i + 1] for i in range(len(said))]):
        site = Site(greet=False)
        for piece in pieces:
            site.feed(piece)
        assert site.connection.is_closed
        assert (site.out(), site.plain) == ([], b"")


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"POST", b"O"])
def test_who_speaks_http1_is_told_so_in_http1(said: bytes) -> None:
    for pieces in ([said], [said[i : i + 1] for i in range(len(said))]):
        site = Site(greet=False)
        for piece in pieces:
            site.feed(piece)
        assert site.connection.is_closed
        assert site.out() == []
        head, _, body = site.plain.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert body == b"this port speaks HTTP/2, and gRPC on it\n"


def test_we_greet_with_our_limits_and_acknowledge_theirs() -> None:
    site = Site(greet=False)
    assert site.out() == []  # nothing before the client's preface: it may speak no HTTP/2
    site.feed(GREETING)
    mine, window, ack = site.out()
    assert mine.kind == SETTINGS
    values = dict(zip(mine.payload[1::6], (mine.payload[i + 2 : i + 6] for i in range(0, 24, 6)), strict=True))
    assert {name: int.from_bytes(value) for name, value in values.items()} == {
        3: 10_000,  # MAX_CONCURRENT_STREAMS
        4: 262_144,  # INITIAL_WINDOW_SIZE
        5: 16_384,  # MAX_FRAME_SIZE
        6: 61_440,  # MAX_HEADER_LIST_SIZE
    }
    assert (window.kind, window.stream) == (WINDOW_UPDATE, 0)
    assert int.from_bytes(window.payload) == 16 * 1024 * 1024 - 65_535
    assert (ack.kind, ack.flags, ack.payload) == (SETTINGS, ACK, b"")


HARMLESS = {
    "reserved bits of stream numbers": call(0x8000_0001) + data(0x8000_0001, message(b"m")),
    "unknown frames": frame(99, 0xFF, 1, b"?") + call(1) + frame(77, 0, 0) + data(1, message(b"m")),
    "flags without a meaning": frame(HEADERS, END_HEADERS | 0xD2, 1, CALL) + data(1, message(b"m"), 0xF6),
    "unknown settings": frame(SETTINGS, 0, 0, b"\x00\x99\x00\x00\x00\x01") + call(1) + data(1, message(b"m")),
    "all settings": settings(header_table_size=0, enable_push=0, max_streams=1, max_frame=2**24 - 1, max_header_list=9)
    + call(1)
    + data(1, message(b"m")),
    "padding": frame(HEADERS, END_HEADERS | PADDED, 1, b"\x03" + CALL + bytes(3))
    + data(1, b"\x02" + message(b"m") + bytes(2), PADDED),
    "padding of nothing": frame(HEADERS, END_HEADERS | PADDED, 1, b"\x00" + CALL)
    + data(1, b"\x00" + message(b"m"), PADDED),
    "padding and priority": frame(HEADERS, END_HEADERS | PADDED | PRIORITIZED, 1, b"\x02\0\0\0\0\x10" + CALL + bytes(2))
    + data(1, message(b"m")),
    "PRIORITY of idle and closed streams": frame(PRIORITY, 0, 9, bytes(5))
    + call(1)
    + data(1, message(b"m"))
    + call(3)
    + reset(3)
    + frame(PRIORITY, 0, 3, bytes(5)),
    "a block in pieces": frame(HEADERS, 0, 1, CALL[:7])
    + frame(CONTINUATION, 0, 1, CALL[7:8])
    + frame(CONTINUATION, 0, 1)
    + frame(CONTINUATION, END_HEADERS, 1, CALL[8:])
    + data(1, message(b"m")),
    "one empty DATA": call(1) + data(1, b"") + data(1, message(b"m")) + data(1, b""),
    "WINDOW_UPDATE and RST_STREAM of a closed stream": call(1)
    + data(1, message(b"m"))
    + call(3)
    + reset(3)
    + window_update(3, 9)
    + reset(3),
    "GOAWAY of theirs": frame(GOAWAY, 0, 0, bytes(8) + b"bye") + call(1) + data(1, message(b"m")),
    "an ACK of a PING that was not sent": frame(PING, ACK, 0, b"draining") + call(1) + data(1, message(b"m")),
    "streams that are skipped": call(1) + data(1, message(b"m")) + call(2**31 - 1),
    "te: Trailers": call(1, with_fields(("te", "Trailers"))) + data(1, message(b"m")),
    "a content-length that holds": changed(("content-length", "6")) + data(1, message(b"m")),
    "an empty value and a space inside one": changed(("a", ""), ("b", "c d")) + data(1, message(b"m")),
    "two table size updates": call(1, b"\x20\x3f\xe1\x1f" + CALL) + data(1, message(b"m")),
}


@pytest.mark.parametrize("said", HARMLESS.values(), ids=HARMLESS)
def test_what_is_unusual_and_allowed_changes_nothing(said: bytes) -> None:
    whole, pieces = Site(), Site()
    whole.feed(said)
    for byte in said:
        pieces.feed(bytes((byte,)))
    for site in (whole, pieces):
        assert not site.connection.is_closed
        assert site.messages(1) == [b"m"]
        assert site.reset_codes() == {}
    assert whole.events == pieces.events


def test_ping_is_answered_with_its_payload() -> None:
    site = Site()
    site.feed(frame(PING, 0, 0, b"12345678"))
    (answer,) = site.out()
    assert (answer.kind, answer.flags, answer.payload) == (PING, ACK, b"12345678")


def test_an_error_that_quotes_much_fits_in_a_frame() -> None:
    site = Site()
    site.feed(frame(HEADERS, 0, 1, b"\x7f" + b"\xff" * 16_000), frame(CONTINUATION, END_HEADERS, 1, b"\xff" * 16_000))
    assert site.goaway().code == Code.COMPRESSION_ERROR


def test_nothing_happens_on_a_connection_that_is_closed() -> None:
    site = Site()
    site.feed(call(1), data(0, b""))
    assert site.connection.is_closed
    site.out()
    connection: ServerConnection = site.connection
    assert site.feed(call(3)) == site.tick(1000.0) == connection.close() == connection.lose() == []
    connection.send(1, b"late")
    connection.end(1)
    connection.drain(site.now)
    assert site.out() == []
