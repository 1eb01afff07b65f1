"""One HTTP/2 connection of a gRPC server: bytes in, calls out; replies in, bytes out.

In: `receive` for what the socket gave, `send` and `end` for replies, `tick` now and then, `lose` when the socket is
gone. Out: events, in order; and `output`, all that is to be written since it was asked last.
Rules here:
- `receive`, `tick` and `lose` raise nothing: what a peer does wrong ends its stream or its connection, with the code
  that RFC 9113 names, and other streams do not notice.
- Everything is bounded by `ConnectionLimits`; what passes one is counted by its name.
- A peer that does not read is not read for long: what waits for its windows is bounded, since a stream with waiting
  replies is granted no window, and the socket's own back-pressure is the transport's.
- No object per frame on the way of a message that came in one frame: one slice, one event.
- We end a stream with trailers and RST_STREAM(NO_ERROR), so none stays half closed by us (section 8.1).
Source: RFC 9113; h2 for the idea of a protocol without I/O, aioquic for `now` as an argument.
Rejected: h2 itself, which costs more a frame than this a request; draining by a timer of its own (`tick` suffices).
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from epp.extproc.http2 import frames
from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, Event, MessageReceived
from epp.extproc.http2.faults import ConnectionFault, ConnectionLimits, Fault, StreamFault
from epp.extproc.http2.frames import FRAME_BYTES, HEAD, LARGEST_WINDOW, MESSAGE_PREFIX, Code, Setting
from epp.extproc.http2.heads import HeadReader
from epp.extproc.http2.messages import (
    ANSWER_HEAD,
    OK_TRAILERS,
    CallFault,
    MessageReader,
    Status,
    trailers,
    trailers_only,
)
from epp.extproc.http2.outflow import Outflow, Stream
from epp.extproc.http2.pace import Pace

RESET_REMEMBERED: Final = 1024
"""Streams that we ended and whose frames may still be under way: they are ignored."""
PREMATURE: Final = 1.0
"""Age in seconds below which a stream that the peer resets may have been opened for that. Envoy:
overload.premature_reset_min_stream_lifetime_seconds 1."""
DEBUG_BYTES: Final = 200
"""Of the reason in GOAWAY, which is one frame whatever `close` is told."""
DRAIN_PING: Final = b"draining"
KEEPALIVE_PING: Final = b"are you?"
DRAIN_ROUND: Final = 1.0
"""Seconds for a peer to see GOAWAY, if it answers no PING. grpc-go waits for the PING alone."""
HTTP1_METHODS: Final = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ")
NOT_HTTP2: Final = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b\n"
NOT_GRPC: Final = b"This port speaks gRPC: the endpoint picker's ext_proc service, and health where it is asked for.\n"
NOT_GRPC_HEAD: Final = frames.header_block(
    (b":status", b"415"), (b"content-type", b"text/plain"), (b"content-length", b"%d" % len(NOT_GRPC))
)


class ServerConnection:
    """The peer is a client: Envoy, or any that speaks gRPC."""

    def __init__(self, limits: ConnectionLimits, breaches: Counter[str], now: float) -> None:
        """
        Args:
            breaches: where limits that are passed are counted by name; may be shared by connections.
            now: seconds, monotonic, as everywhere below.
        """
        self._limits = limits
        self._breaches = breaches
        self._heads = HeadReader(limits.max_header_bytes)
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._reset: dict[int, None] = {}
        """Ended by us, newest last."""
        self._events: list[Event] = []
        self._out = Outflow()
        self._rest = b""
        """An incomplete frame."""
        self._held = 0
        """Bytes of messages that are not whole, on all streams."""
        self._most_held = max(limits.max_held_bytes, limits.max_message_bytes + 5)
        self._untold = 0
        """Bytes of messages that are whole, came in pieces, and are not told yet."""
        self._receive_window = limits.connection_window
        self._taken = 0
        self._half_connection_window: Final = limits.connection_window >> 1
        self._half_stream_window: Final = limits.stream_window >> 1
        """What is taken is granted again by so much at once."""
        self._max_message: Final = limits.max_message_bytes
        self._greeting: Final = now + limits.preface_timeout
        self._is_greeted = False
        self._has_settings = False
        self._block: _Block | None = None
        """A header block that goes on in CONTINUATION."""
        self._awaited: dict[int, float] = {}
        """Until when a message must be there, on streams without a first one or with a part of one."""
        self._timed: dict[int, float] = {}
        """When each call that has a timeout passes it."""
        self._heard_at = now
        self._asked_at: float | None = None
        self._pace = Pace(limits, now)
        self._drain: float | None = None
        """When new streams are refused for good; None: we are not draining."""
        self._last_taken: int | None = None
        """Highest stream that we take, once GOAWAY has told."""
        self.is_closed = False
        """Write `output`, then close the socket."""

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "draining" if self._drain is not None else "open"
        return f"<ServerConnection {state}, {len(self._streams)} streams, {self._out.queued} bytes queued>"

    # -- what the transport calls --------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take what the socket gave, cut anywhere. Raises nothing."""
        if self.is_closed:
            return self._told()
        self._heard_at = now
        if now >= self._pace.ends:
            self._pace.turn(self._out.sent, now)
        if self._rest:
            data = self._rest + data
        try:
            read = self._read(data, now)
        except ConnectionFault as fault:
            self._fail(fault)
        else:
            self._rest = data[read:] if read < len(data) else b""
        return self._told()

    def send(self, number: int, message: bytes) -> None:
        """Queue a message of the answer; nothing happens if the call is over. Raises nothing.

        If too much waits then, the call is lost; the next `receive` or `tick` says so.
        """
        stream = self._streams.get(number)
        if stream is None or stream.end is not None:
            return
        if not stream.answered:
            stream.answered = True
            self._out.write(frames.frame(frames.HEADERS, frames.END_HEADERS, number, ANSWER_HEAD))
        self._out.message(number, stream, message)
        if stream.queue is not None and self._out.queued > self._limits.max_queued_bytes:
            try:
                fault = StreamFault(Code.ENHANCE_YOUR_CALM, "replies that nobody takes", "max_queued_bytes")
                self._reset_stream(number, fault)
            except ConnectionFault as last:
                self._fail(last)

    def end(self, number: int, status: Status = Status.OK, message: str = "") -> None:
        """End the answer, behind what is queued. No event of this call follows but those already given."""
        stream = self._streams.get(number)
        if stream is None or stream.end is not None:
            return
        if not stream.answered:
            stream.answered, block = True, trailers_only(status, message)
        else:
            block = OK_TRAILERS if status is Status.OK and not message else trailers(status, message)
        stream.end = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, number, block)
        if stream.reader is not None:
            self._forget_part(number, stream)
        if stream.queue is None:
            self._finish(number, stream)

    def output(self) -> bytes:
        """All that is to be written since the last call."""
        return self._out.take()

    def tick(self, now: float) -> list[Event]:
        """Look at what takes too long; a few times a second. Raises nothing."""
        if self.is_closed:
            return self._told()
        try:
            self._check_deadlines(now)
        except ConnectionFault as fault:
            self._fail(fault)
        return self._told()

    def drain(self, now: float) -> None:
        """Ask the peer for no more streams; those that it opens before it can know are still taken."""
        if self._drain is None and not self.is_closed:
            self._drain = now + DRAIN_ROUND
            if self._is_greeted:
                self._announce_drain()

    def close(self, why: str = "the endpoint picker stops", code: Code = Code.NO_ERROR) -> list[Event]:
        """End it now, whatever is open."""
        if not self.is_closed:
            self._fail(ConnectionFault(code, why))
        return self._told()

    def lose(self) -> list[Event]:
        """The socket is gone."""
        self.is_closed = True
        self._lose_all()
        return self._told()

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self, data: bytes, now: float) -> int:
        """Read all whole frames; returns how many bytes they had. Raises ConnectionFault."""
        at, end = 0, len(data)
        if not self._is_greeted:
            if not self._read_preface(data):
                return 0
            at = len(frames.PREFACE)
        largest = self._limits.max_frame_bytes
        while end - at >= frames.HEAD_BYTES:
            high, low, kind, flags, number = HEAD.unpack_from(data, at)
            size = high << 8 | low
            number &= LARGEST_WINDOW  # the reserved bit
            if size > largest:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes, where {largest} are allowed")
            start = at + frames.HEAD_BYTES
            stop = start + size
            if stop > end:
                break
            try:
                if kind == frames.DATA and self._block is None and self._has_settings:
                    self._data(number, flags, data, start, stop)
                else:
                    self._other(kind, flags, number, data[start:stop], now)
            except StreamFault as fault:
                self._reset_stream(number, fault)
            at = stop
        return at

    def _read_preface(self, data: bytes) -> bool:
        """Whether it is whole. Raises ConnectionFault as soon as it cannot become one."""
        if data[: len(frames.PREFACE)] != frames.PREFACE[: len(data)]:
            code = Code.HTTP_1_1_REQUIRED if _speaks_http1(data) else Code.PROTOCOL_ERROR
            raise ConnectionFault(code, "this port speaks HTTP/2, and gRPC on it")
        if len(data) >= len(frames.PREFACE):
            self._is_greeted = True
            self._greet()
        return self._is_greeted

    def _data(self, number: int, flags: int, data: bytes, start: int, stop: int) -> None:
        size = stop - start
        self._receive_window -= size
        if self._receive_window < 0:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more DATA than the connection's window allows")
        self._taken += size
        if self._taken >= self._half_connection_window:
            self._grant_connection()
        stream = self._streams.get(number)
        if stream is None:
            self._ignore_data(number, size)
            return
        if not stream.is_open:
            raise StreamFault(Code.STREAM_CLOSED, "DATA behind END_STREAM")
        stream.receive_window -= size
        if stream.receive_window < 0:
            raise StreamFault(Code.FLOW_CONTROL_ERROR, "more DATA than the stream's window allows")
        stream.taken += size
        if stream.taken >= self._half_stream_window:
            self._grant(number, stream)
        if flags & frames.PADDED:
            start, stop = _unpadded(data, start, stop)
        if stream.content_left is not None:
            self._count_content(stream, stop - start, flags)
        if stop > start:
            stream.empty_frames = 0
            if stream.end is None and stream.is_call:
                self._messages(number, stream, data, start, stop)
        elif not flags & frames.END_STREAM:
            self._empty_data(stream)
        if flags & frames.END_STREAM:
            self._ended_by_peer(number, stream)

    def _messages(self, number: int, stream: Stream, data: bytes, start: int, stop: int) -> None:
        """The gRPC messages in one piece of DATA: usually it is one, whole and not compressed."""
        if stream.reader is None and stop - start >= 5:
            flag, size = MESSAGE_PREFIX.unpack_from(data, start)
            if stop - start == size + 5 and not flag and size <= self._max_message:
                if number in self._awaited:
                    del self._awaited[number]
                self._events.append(MessageReceived(number, data[start + 5 : stop]))
                return
        self._parts(number, stream, memoryview(data)[start:stop])

    def _parts(self, number: int, stream: Stream, piece: memoryview) -> None:
        """The same for messages in several pieces, or several in a piece, or compressed."""
        reader = stream.reader
        if reader is None:
            stream.reader = reader = MessageReader(stream.encoding, self._limits.max_message_bytes)
        self._held -= reader.held
        try:
            for message in reader.feed(piece):
                self._awaited.pop(number, None)
                self._untold += len(message)
                self._check_held(reader.held)
                self._events.append(MessageReceived(number, message))
            self._check_held(reader.held)
        except CallFault as fault:
            stream.reader = None
            self._refuse(number, fault)
            return
        self._held += reader.held
        if reader.held:
            self._awaited.setdefault(number, self._heard_at + self._limits.message_timeout)
        else:
            stream.reader = None

    def _check_held(self, part: int) -> None:
        """Raises CallFault when a part of a message is one too many."""
        if self._held + part + self._untold > self._most_held:
            message = "too many messages at once that are not whole: open more connections"
            raise CallFault(Status.RESOURCE_EXHAUSTED, message, "max_held_bytes")

    def _other(self, kind: int, flags: int, number: int, payload: bytes, now: float) -> None:
        """Every frame but the usual DATA."""
        if self._block is not None and (kind != frames.CONTINUATION or number != self._block.number):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a header block that is interrupted")
        if not self._has_settings and (kind != frames.SETTINGS or flags & frames.ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a preface without SETTINGS")
        match kind:
            case frames.HEADERS:
                self._headers(flags, number, payload, now)
            case frames.RST_STREAM:
                self._rst_stream(number, payload)
            case frames.WINDOW_UPDATE:
                self._window_update(number, payload)
            case frames.CONTINUATION:
                self._continuation(flags, payload, now)
            case frames.PUSH_PROMISE:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
            case _:
                self._pace.control_frame(self._out.sent)
                if kind == frames.PING:
                    self._ping(flags, number, payload)
                elif kind == frames.SETTINGS:
                    self._settings(flags, number, payload)
                elif kind == frames.PRIORITY:
                    self._priority(number, payload)
                elif kind == frames.GOAWAY and number:
                    raise ConnectionFault(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
                elif kind == frames.GOAWAY and len(payload) < 8:
                    raise ConnectionFault(Code.FRAME_SIZE_ERROR, "GOAWAY cut short")

    # -- header blocks -------------------------------------------------------------------------------------------

    def _headers(self, flags: int, number: int, payload: bytes, now: float) -> None:
        if not number & 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"HEADERS on stream {number}, which is not a client's")
        start, stop = 0, len(payload)
        if flags & frames.PADDED:
            start, stop = _unpadded(payload, start, stop)
        depends_on = 0
        if flags & frames.PRIORITIZED:
            if stop - start < 5:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            depends_on = frames.U32.unpack_from(payload, start)[0] & LARGEST_WINDOW
            start += 5
        block = _Block(number, bool(flags & frames.END_STREAM), depends_on == number, payload[start:stop], now)
        if flags & frames.END_HEADERS:
            self._header_block(block, now)
        else:
            self._block = block

    def _continuation(self, flags: int, payload: bytes, now: float) -> None:
        block = self._block
        if block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION behind no open header block")
        block.pieces += 1
        block.data += payload
        if block.pieces > self._limits.max_continuations:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many CONTINUATION frames", "max_continuations")
        if len(block.data) > self._limits.max_header_bytes:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a header block that is too long", "max_header_bytes")
        if flags & frames.END_HEADERS:
            self._block = None
            self._header_block(block, now)

    def _header_block(self, block: _Block, now: float) -> None:
        stream = self._streams.get(block.number)
        if stream is not None:
            self._trailers(block, stream)
        elif block.number <= self._last_stream:
            self._heads.skip(block.data)
            if block.number not in self._reset:
                raise ConnectionFault(Code.STREAM_CLOSED, "HEADERS on a stream that has ended")
            del self._reset[block.number]  # those were its trailers, under way when we ended it; there are no others
        else:
            self._last_stream = block.number
            self._open(block, now)

    def _trailers(self, block: _Block, stream: Stream) -> None:
        if not stream.is_open:
            self._heads.skip(block.data)
            raise StreamFault(Code.STREAM_CLOSED, "HEADERS behind END_STREAM")
        self._heads.read_trailers(block.data)
        if not block.ends_stream:
            raise StreamFault(Code.PROTOCOL_ERROR, "HEADERS in the middle of a request")
        self._count_content(stream, 0, frames.END_STREAM)
        self._ended_by_peer(block.number, stream)

    def _open(self, block: _Block, now: float) -> None:
        number = block.number
        head = self._heads.read(block.data)
        if block.depends_on_itself:
            raise StreamFault(Code.PROTOCOL_ERROR, "a stream that depends on itself")
        if self._last_taken is not None:
            raise StreamFault(Code.REFUSED_STREAM, "the endpoint picker drains")
        if len(self._streams) >= self._limits.max_streams:
            raise StreamFault(Code.REFUSED_STREAM, "too many streams", "max_streams")
        stream = Stream(self._limits.stream_window, self._out.initial_window, head, now)
        stream.is_open = not block.ends_stream
        self._streams[number] = stream
        self._pace.opened += 1
        self._awaited[number] = now + self._limits.message_timeout
        if not head.is_grpc:
            stream.is_call = False
            stream.is_head = head.method == b"HEAD"
        elif head.refusal is not None:
            self.end(number, *head.refusal)
        else:
            self._events.append(CallStarted(number, head.path))
            if head.timeout is not None:
                self._timed[number] = now + head.timeout
        if block.ends_stream and number in self._streams:
            self._count_content(stream, 0, frames.END_STREAM)
            self._ended_by_peer(number, stream)

    # -- the other frames ----------------------------------------------------------------------------------------

    def _rst_stream(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "RST_STREAM of a wrong size")
        stream = self._streams.get(number)
        if stream is None:
            self._check_not_idle(number)
            self._pace.control_frame(self._out.sent)
            return
        if self._heard_at - stream.opened < PREMATURE:
            self._pace.reset(self._out.sent)
        self._drop(number, stream)

    def _window_update(self, number: int, payload: bytes) -> None:
        self._pace.window_update(self._out.sent)
        if len(payload) != 4:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong size")
        increment = frames.U32.unpack(payload)[0] & LARGEST_WINDOW
        if number == 0:
            if not increment:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            self._out.window += increment
            if self._out.window > LARGEST_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "a window over 2^31-1")
            while self._out.window > 0 and (blocked := self._out.next_blocked()) is not None:
                self._flush(*blocked)
            if self._taken >= self._half_connection_window:
                self._grant_connection()
            return
        stream = self._streams.get(number)
        if stream is None:
            self._check_not_idle(number)
            return
        if not increment:
            raise StreamFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        stream.send_window += increment
        if stream.send_window > LARGEST_WINDOW:
            raise StreamFault(Code.FLOW_CONTROL_ERROR, "a window over 2^31-1")
        if stream.queue is not None:
            self._flush(number, stream)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        if flags & frames.ACK:
            return
        self._pace.control_frame(self._out.sent, len(payload) // 6)
        self._has_settings = True
        self._out.write(frames.frame(frames.SETTINGS, frames.ACK, 0))  # before the DATA that a wider window lets go
        for name, value in frames.SETTING.iter_unpack(payload):
            self._setting(name, value)

    def _setting(self, name: int, value: int) -> None:
        """Take one; those that limit what a server pushes or compresses ask nothing of us."""
        if name == Setting.ENABLE_PUSH and value > 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        if name == Setting.MAX_FRAME_SIZE and not FRAME_BYTES <= value <= 0xFFFFFF:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
        if name == Setting.INITIAL_WINDOW_SIZE:
            if value > LARGEST_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "an initial window over 2^31-1")
            self._resize_windows(value - self._out.initial_window)
            self._out.initial_window = value

    def _resize_windows(self, difference: int) -> None:
        """Section 6.9.2. A walk over all streams: a peer may ask for few of them."""
        self._pace.control_frame(self._out.sent, len(self._streams) // 100)
        for number, stream in list(self._streams.items()):
            stream.send_window += difference
            if stream.send_window > LARGEST_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "an initial window that lifts a window over 2^31-1")
            if stream.queue is not None:
                self._flush(number, stream)

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "PING of a wrong size")
        if not flags & frames.ACK:
            self._out.write(frames.ping(payload, ack=True))
        elif payload == DRAIN_PING and self._drain is not None:
            self._stop_taking()

    def _priority(self, number: int, payload: bytes) -> None:
        """Checked and ignored (section 5.3.2)."""
        if not number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY on no stream")
        fault = StreamFault if number in self._streams else ConnectionFault  # else there is nothing to reset
        if len(payload) != 5:
            raise fault(Code.FRAME_SIZE_ERROR, "PRIORITY of a wrong size")
        if frames.U32.unpack_from(payload)[0] & LARGEST_WINDOW == number:
            raise fault(Code.PROTOCOL_ERROR, "a stream that depends on itself")

    # -- counting ------------------------------------------------------------------------------------------------

    def _empty_data(self, stream: Stream) -> None:
        stream.empty_frames += 1
        if stream.empty_frames > self._limits.max_empty_frames:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many empty DATA frames", "max_empty_frames")

    def _count_content(self, stream: Stream, size: int, flags: int) -> None:
        """A content-length must be kept (section 8.1.1)."""
        if stream.content_left is None:
            return
        stream.content_left -= size
        if stream.content_left < 0 or (flags & frames.END_STREAM and stream.content_left):
            raise StreamFault(Code.PROTOCOL_ERROR, "more or less DATA than content-length says")

    def _ignore_data(self, number: int, size: int) -> None:
        """DATA for no open stream: silence if we ended that stream, else a fault."""
        self._check_not_idle(number)
        if number not in self._reset:
            raise StreamFault(Code.STREAM_CLOSED, "DATA on a stream that has ended")
        if not size:  # no window bounds these
            self._pace.control_frame(self._out.sent)

    def _check_not_idle(self, number: int) -> None:
        if number > self._last_stream or not number & 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"a frame on stream {number}, which was never opened")

    # -- the end of streams --------------------------------------------------------------------------------------

    def _ended_by_peer(self, number: int, stream: Stream) -> None:
        """END_STREAM."""
        stream.is_open = False
        if stream.end is not None:
            return
        if not stream.is_call:
            self._answer_plainly(number, stream)
        elif stream.reader is not None:
            self._refuse(number, CallFault(Status.INTERNAL, "the call ended in the middle of a message"))
        else:
            self._events.append(CallEnded(number))

    def _refuse(self, number: int, fault: CallFault) -> None:
        """End a call with a status, and tell its owner."""
        if fault.limit:
            self._breaches[fault.limit] += 1
        self._events.append(CallLost(number))
        self.end(number, fault.status, str(fault))

    def _reset_stream(self, number: int, fault: Fault) -> None:
        """End a stream for what the peer did on it."""
        if fault.limit:
            self._breaches[fault.limit] += 1
        stream = self._streams.get(number)
        if stream is None and fault.code in (Code.REFUSED_STREAM, Code.STREAM_CLOSED):
            self._pace.control_frame(self._out.sent)  # no work is lost; and who has not seen our SETTINGS does no wrong
        elif fault.code is not Code.CANCEL:  # which time did
            self._pace.reset(self._out.sent)  # who makes us reset costs as much as who resets (CVE-2025-8671)
        self._out.write(frames.rst_stream(number, fault.code))
        self._remember_reset(number)
        if stream is not None:
            self._drop(number, stream)

    def _finish(self, number: int, stream: Stream) -> None:
        """All is said: the last frame, and no more of this stream."""
        assert stream.end is not None
        self._out.write(stream.end)
        self._out.sent += 1
        if stream.is_open:
            self._out.write(frames.rst_stream(number, Code.NO_ERROR))
            self._remember_reset(number)
        self._drop(number, stream)

    def _drop(self, number: int, stream: Stream) -> None:
        """Take it out of every table; its owner hears of it unless it has ended the call itself."""
        del self._streams[number]
        if number in self._awaited:
            del self._awaited[number]
        if self._timed:
            self._timed.pop(number, None)
        if stream.reader is not None:
            self._forget_part(number, stream)
        if stream.queue is not None:
            self._out.drop(number, stream)
        if stream.end is None and stream.is_call:
            self._events.append(CallLost(number))

    def _forget_part(self, number: int, stream: Stream) -> None:
        """Of a message that will not be told."""
        assert stream.reader is not None
        self._awaited.pop(number, None)
        self._held -= stream.reader.held
        stream.reader = None

    def _remember_reset(self, number: int) -> None:
        self._reset[number] = None
        if len(self._reset) > RESET_REMEMBERED:
            del self._reset[next(iter(self._reset))]

    def _fail(self, fault: Fault) -> None:
        """End the connection."""
        if fault.limit:
            self._breaches[fault.limit] += 1
        why = str(fault).encode(errors="replace")[:DEBUG_BYTES]
        if self._is_greeted:
            last = self._last_stream if self._last_taken is None else self._last_taken  # it may not grow (section 6.8)
            self._out.write(frames.goaway(last, fault.code, why))
        elif fault.code in (Code.HTTP_1_1_REQUIRED, Code.INADEQUATE_SECURITY):  # it speaks HTTP/1 (section 3.4)
            self._out.write(NOT_HTTP2 % (len(why) + 1, why))
        self.is_closed = True
        self._lose_all()

    def _lose_all(self) -> None:
        for number, stream in self._streams.items():
            if stream.end is None and stream.is_call:
                self._events.append(CallLost(number))
        self._streams.clear()
        self._awaited.clear()
        self._timed.clear()
        self._out.drop_all()
        self._rest, self._block, self._held = b"", None, 0

    # -- windows -------------------------------------------------------------------------------------------------

    def _grant_connection(self) -> None:
        """Give back what was taken, unless the peer has let its own window run dry with much waiting for it."""
        if self._out.window <= 0 and self._out.queued > self._limits.stream_window:
            return
        self._out.write(frames.window_update(0, self._taken))
        self._receive_window += self._taken
        self._taken = 0

    def _grant(self, number: int, stream: Stream) -> None:
        """The same for a stream, unless replies wait on it."""
        if stream.is_open and stream.queue is None:
            self._out.write(frames.window_update(number, stream.taken))
            stream.receive_window += stream.taken
            stream.taken = 0

    def _flush(self, number: int, stream: Stream) -> None:
        """A window has opened."""
        if not self._out.flush(number, stream):
            return
        if stream.end is not None:
            self._finish(number, stream)
        elif stream.taken >= self._half_stream_window:
            self._grant(number, stream)

    # -- time ----------------------------------------------------------------------------------------------------

    def _check_deadlines(self, now: float) -> None:
        limits = self._limits
        waits_for_block = self._block is not None and now >= self._block.began + limits.preface_timeout
        if waits_for_block or (not self._has_settings and now >= self._greeting):
            raise ConnectionFault(
                Code.SETTINGS_TIMEOUT, "a preface or header block that does not end", "preface_timeout"
            )
        for number in [number for number, deadline in self._awaited.items() if now >= deadline]:
            del self._awaited[number]
            self._give_up(number, f"no whole message within {limits.message_timeout:g} s", "message_timeout")
        for number in [number for number, deadline in self._timed.items() if now >= deadline]:
            del self._timed[number]
            self._give_up(number, "the call's grpc-timeout has passed")
        if self._drain is not None and now >= self._drain:
            self._stop_taking()
        if self._taken >= self._half_connection_window:
            self._grant_connection()  # withheld before: streams may have ended since
        self._keep_alive(now)

    def _give_up(self, number: int, why: str, limit: str = "") -> None:
        stream = self._streams[number]
        if stream.is_call and stream.end is None:
            self._refuse(number, CallFault(Status.DEADLINE_EXCEEDED, why, limit))
        else:
            self._reset_stream(number, StreamFault(Code.CANCEL, why, limit))

    def _keep_alive(self, now: float) -> None:
        if self._asked_at is not None and self._heard_at >= self._asked_at:
            self._asked_at = None
        if self._asked_at is None:
            if now - self._heard_at >= self._limits.keepalive:
                self._asked_at = now
                self._out.write(frames.ping(KEEPALIVE_PING, ack=False))
        elif now - self._asked_at >= self._limits.keepalive_timeout:
            raise ConnectionFault(Code.NO_ERROR, "no answer to PING", "keepalive_timeout")

    def _stop_taking(self) -> None:
        """The second half of draining (section 6.8): the peer knows, so the last stream is known too."""
        if self._last_taken is None:
            self._last_taken = self._last_stream
            if self._is_greeted:
                self._out.write(frames.goaway(self._last_stream, Code.NO_ERROR, b"draining"))

    # -- small ones ----------------------------------------------------------------------------------------------

    @property
    def bytes_held(self) -> int:
        """What is kept for the peer: parts of frames, header blocks and messages, and replies that wait for windows."""
        block = 0 if self._block is None else len(self._block.data)
        return len(self._rest) + block + self._held + self._out.queued

    @property
    def is_drained(self) -> bool:
        """Draining, and nothing is open any more."""
        return self._last_taken is not None and not self._streams

    def _told(self) -> list[Event]:
        self._untold = 0
        events = self._events
        if events:
            self._events = []
        return events

    def _greet(self) -> None:
        limits = self._limits
        values = {
            Setting.MAX_CONCURRENT_STREAMS: limits.max_streams,
            Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
            Setting.MAX_FRAME_SIZE: limits.max_frame_bytes,
            Setting.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        }
        self._out.write(frames.settings(values))
        if limits.connection_window > frames.DEFAULT_WINDOW:
            self._out.write(frames.window_update(0, limits.connection_window - frames.DEFAULT_WINDOW))
        if self._drain is not None:
            self._announce_drain()

    def _announce_drain(self) -> None:
        self._out.write(frames.goaway(LARGEST_WINDOW, Code.NO_ERROR, b"draining"))
        self._out.write(frames.ping(DRAIN_PING, ack=False))

    def _answer_plainly(self, number: int, stream: Stream) -> None:
        """Tell somebody who speaks no gRPC: a person with curl, or a misconfigured gateway."""
        stream.answered = True
        self._out.write(frames.frame(frames.HEADERS, frames.END_HEADERS, number, NOT_GRPC_HEAD))
        stream.end = frames.frame(frames.DATA, frames.END_STREAM, number)
        if not stream.is_head:
            self._out.data(number, stream, NOT_GRPC)
        if stream.queue is None:
            self._finish(number, stream)


class _Block:
    """A header block on its way."""

    __slots__ = ("began", "data", "depends_on_itself", "ends_stream", "number", "pieces")

    def __init__(self, number: int, ends_stream: bool, depends_on_itself: bool, data: bytes, now: float) -> None:
        self.number = number
        self.ends_stream = ends_stream
        self.depends_on_itself = depends_on_itself
        self.data = data
        self.began = now
        self.pieces = 0


def _speaks_http1(data: bytes) -> bool:
    """Whether it begins as a request of HTTP/1 does, as far as there is anything of it."""
    return any(data.startswith(method) or method.startswith(data) for method in HTTP1_METHODS)


def _unpadded(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """Where the payload of a padded frame begins and ends."""
    if start == stop:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a padded frame without its length")
    end = stop - data[start]
    if end <= start:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "more padding than frame")
    return start + 1, end
