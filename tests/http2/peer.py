"""The other side of a connection for tests: frames as bytes, what came back as frames, and an owner who keeps count.

Nothing here uses the code under test but its constants and its events.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from struct import pack, unpack_from
from typing import Final, NamedTuple

from hpack import Decoder, Encoder

from epp.extproc.http2.connection import ServerConnection
from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, Event, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import PREFACE, Code
from epp.extproc.http2.messages import Status

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20
PATH: Final = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
GRPC: Final = (
    (":method", "POST"),
    (":path", PATH),
    (":authority", "picker"),
    (":scheme", "http"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of RST_STREAM or GOAWAY."""
        code: int = unpack_from(">I", self.payload, 0 if self.kind == RST_STREAM else 4)[0]
        return code


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return pack(">I", len(payload))[1:] + pack(">BBI", kind, flags, stream) + payload


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream, payload)


def message(content: bytes, flag: int = 0) -> bytes:
    """A gRPC message with its prefix."""
    return pack(">BI", flag, len(content)) + content


def settings(**values: int) -> bytes:
    names = ("header_table_size", "enable_push", "max_streams", "initial_window", "max_frame", "max_header_list")
    return frame(SETTINGS, 0, 0, b"".join(pack(">HI", names.index(name) + 1, value) for name, value in values.items()))


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, pack(">I", increment))


def reset(stream: int, code: int = 2) -> bytes:
    """Envoy's is 2, INTERNAL_ERROR."""
    return frame(RST_STREAM, 0, stream, pack(">I", code))


def plain_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Literals that touch no table."""
    texts = [text.encode("latin-1") for field in fields for text in field]
    return b"".join((b"" if i % 2 else b"\x00") + bytes((len(text),)) + text for i, text in enumerate(texts))


def with_fields(*changes: tuple[str, str], drop: str = "no name") -> bytes:
    """The header block of a gRPC call, changed: a known name is replaced, another added."""
    fields = {**dict(GRPC), **dict(changes)}
    return plain_block((name, value) for name, value in fields.items() if name != drop)


CALL: Final = plain_block(GRPC)
GREETING: Final = PREFACE + frame(SETTINGS)


def call(stream: int, block: bytes = CALL, *, end: bool = False) -> bytes:
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block)


def python_calls(work: Callable[[], object]) -> int:
    """How many functions it calls, built-in ones included: a cost that no other process changes."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def parse(out: bytes) -> Iterator[Frame]:
    """Frames of ours; all must be whole and of a size that any peer takes."""
    at = 0
    while at < len(out):
        size, kind, flags, stream = int.from_bytes(out[at : at + 3]), *unpack_from(">BBI", out, at + 3)
        assert size <= 16_384
        assert at + 9 + size <= len(out)
        yield Frame(kind, flags, stream, out[at + 9 : at + 9 + size])
        at += 9 + size


class Site:
    """A server's connection with an owner who checks the promise of events.py whatever happens."""

    def __init__(self, limits: ConnectionLimits | None = None, *, greet: bool = True, now: float = 0.0) -> None:
        self.limits = limits or ConnectionLimits()
        self.breaches: Counter[str] = Counter()
        self.connection = ServerConnection(self.limits, self.breaches, now)
        self.now = now
        self.live: set[int] = set()
        """Calls that have started, and are neither lost nor ended by us."""
        self.half_closed: set[int] = set()
        self.seen: set[int] = set()
        self.ended: set[int] = set()
        """Streams with our last frame written."""
        self.events: list[Event] = []
        self.plain = b""
        """What was answered to one who speaks no HTTP/2."""
        self.encoder, self.decoder = Encoder(), Decoder()
        if greet:
            self.feed(GREETING)
            self.out()

    def feed(self, *said: bytes) -> list[Event]:
        """All at once."""
        return self.take(self.connection.receive(b"".join(said), self.now))

    def tick(self, after: float = 0.0) -> list[Event]:
        self.now += after
        return self.take(self.connection.tick(self.now))

    def end(self, stream: int, status: Status = Status.OK, text: str = "") -> None:
        self.connection.end(stream, status, text)
        self.live.discard(stream)

    def take(self, events: list[Event]) -> list[Event]:
        for event in events:
            number = event.stream
            if isinstance(event, CallStarted):
                assert number not in self.seen
                self.seen.add(number)
                self.live.add(number)
                continue
            assert number in self.live, f"{event} of a call that is over"
            if isinstance(event, CallLost):
                self.live.remove(number)
            else:
                assert number not in self.half_closed, f"{event} behind the peer's end"
            if isinstance(event, CallEnded):
                self.half_closed.add(number)
        self.events += events
        if self.connection.is_closed:
            assert not self.live, "calls that nobody ended, on a connection that is closed"
        return events

    def out(self) -> list[Frame]:
        """What is to be written. On a stream that we have ended there is nothing but RST_STREAM."""
        said = self.connection.output()
        if said.startswith(b"HTTP/1.1"):
            self.plain += said
            return []
        written = list(parse(said))
        for each in written:
            assert each.stream == 0 or each.kind == RST_STREAM or each.stream not in self.ended
            if each.kind == RST_STREAM or (each.kind in (DATA, HEADERS) and each.flags & END_STREAM):
                self.ended.add(each.stream)
        return written

    def check(self) -> None:
        """What the connection keeps agrees with what is open, and is bounded."""
        connection, limits, queued = self.connection, self.limits, self.connection._out
        streams = connection._streams
        untold = {event.stream for event in connection._events}  # `send` may lose a call
        assert self.live - untold <= {
            number for number, stream in streams.items() if stream.is_call and stream.end is None
        }
        assert connection._held == sum(stream.reader.held for stream in streams.values() if stream.reader)
        assert queued.queued == sum(len(stream.queue) for stream in streams.values() if stream.queue is not None)
        assert queued._blocked.keys() <= {number for number, stream in streams.items() if stream.queue}
        assert (connection._awaited.keys() | connection._timed.keys()) <= streams.keys()
        assert len(streams) <= limits.max_streams
        assert len(connection._reset) <= 1024
        most_held = max(limits.max_held_bytes, limits.max_message_bytes + 5)
        part = limits.max_frame_bytes + 9 + limits.max_header_bytes + limits.max_frame_bytes
        assert connection.bytes_held <= part + most_held + limits.max_queued_bytes
        if not connection.is_closed:
            assert connection._receive_window + connection._taken == limits.connection_window
            assert all(stream.receive_window + stream.taken == limits.stream_window for stream in streams.values())

    def headers(self, block: bytes) -> dict[str, str]:
        """A header block of ours."""
        return {str(name): str(value) for name, value in self.decoder.decode(block)}

    def messages(self, stream: int = 1) -> list[bytes]:
        """Told of one call so far."""
        return [event.data for event in self.events if isinstance(event, MessageReceived) and event.stream == stream]

    def goaway(self) -> Frame:
        """How the connection ended: the last frame."""
        assert self.connection.is_closed
        last = self.out()[-1]
        assert last.kind == GOAWAY
        return last

    def status(self, frames: Iterable[Frame]) -> dict[str, str]:
        """The trailers among them."""
        (trailers,) = (each for each in frames if each.kind == HEADERS and each.flags & END_STREAM)
        return self.headers(trailers.payload)

    def reset_codes(self) -> dict[int, Code]:
        return {each.stream: Code(each.code) for each in self.out() if each.kind == RST_STREAM}
