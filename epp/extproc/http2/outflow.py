"""What goes out: frames in order, and messages that wait for the peer's windows.

In: frames to write at once, messages of streams, windows as the peer opens them. Out: `take`, all that may be written.
Rules here:
- DATA never passes a window of the peer's; what does not fit waits on its stream, in order.
- Streams that wait for the connection's window alone are served in turn, longest waiting first.
- No frame is larger than 16,384 bytes, whatever the peer would take: Envoy announces nothing else.
Source: RFC 9113 sections 5.2, 6.9.
"""

from __future__ import annotations

from collections import OrderedDict

from epp.extproc.http2 import frames
from epp.extproc.http2.frames import FRAME_BYTES, HEAD, MESSAGE_HEAD, MESSAGE_PREFIX
from epp.extproc.http2.heads import Head
from epp.extproc.http2.messages import MessageReader


class Stream:
    """One stream while either side may still say something on it."""

    __slots__ = (
        "answered",
        "content_left",
        "empty_frames",
        "encoding",
        "end",
        "is_call",
        "is_head",
        "is_open",
        "opened",
        "queue",
        "reader",
        "receive_window",
        "send_window",
        "taken",
    )

    def __init__(self, receive_window: int, send_window: int, head: Head, now: float) -> None:
        self.is_call = True
        """It has an owner, who is told of it; else it is answered here, for it is no gRPC."""
        self.is_head = False
        """It is answered without a body."""
        self.is_open = True
        """The peer may still send: it has not ended its side."""
        self.answered = False
        """Our header block has gone out."""
        self.end: bytes | None = None
        """The frame that ends it, once the answer is whole; it goes out behind what is queued."""
        self.receive_window = receive_window
        self.taken = 0
        """Bytes received and not granted again."""
        self.send_window = send_window
        self.queue: bytearray | None = None
        """Payload of DATA that waits for a window. One buffer, so that small replies that wait take what they are
        counted as."""
        self.reader: MessageReader | None = None
        """Only while a message came in pieces and is not whole."""
        self.encoding = head.encoding
        self.content_left = head.content_length
        self.empty_frames = 0
        self.opened = now


class Outflow:
    """The writing side of one connection."""

    def __init__(self) -> None:
        self._out: list[bytes | bytearray | memoryview] = []
        self.window = frames.DEFAULT_WINDOW
        """Bytes of DATA that the peer takes on the connection."""
        self.initial_window = frames.DEFAULT_WINDOW
        """The same on a stream that is new."""
        self.queued = 0
        """Bytes that wait on all streams."""
        self.sent = 0
        """Frames with an answer in them."""
        self._blocked: OrderedDict[int, Stream] = OrderedDict()
        """Streams that wait only for the connection's window."""

    def take(self) -> bytes:
        """All that is to be written since the last call."""
        if not self._out:
            return b""
        out = b"".join(self._out)
        self._out.clear()
        return out

    def write(self, frame: bytes) -> None:
        """A frame that waits for no window."""
        self._out.append(frame)

    def message(self, number: int, stream: Stream, message: bytes) -> None:
        """A gRPC message: now, or when the windows allow."""
        length = len(message)
        size = length + 5
        if stream.queue is None and size <= FRAME_BYTES and size <= stream.send_window and size <= self.window:
            stream.send_window -= size
            self.window -= size
            self.sent += 1
            self._out.append(MESSAGE_HEAD.pack(size >> 8, size & 0xFF, frames.DATA, 0, number, 0, length))
            self._out.append(message)
        else:
            self.data(number, stream, MESSAGE_PREFIX.pack(0, length) + message)

    def data(self, number: int, stream: Stream, payload: bytes) -> None:
        """Bytes of DATA."""
        if stream.queue is not None:
            stream.queue += payload
            self.queued += len(payload)
            return
        view = memoryview(payload)
        sent = self._send(number, stream, view)
        if sent < len(payload):
            stream.queue = bytearray(view[sent:])
            self.queued += len(payload) - sent
            if stream.send_window > 0:
                self._blocked[number] = stream

    def flush(self, number: int, stream: Stream) -> bool:
        """Send what the windows allow; whether nothing waits any more."""
        queue = stream.queue
        if queue is None:
            return True
        sent = self._send(number, stream, queue)
        del queue[:sent]
        self.queued -= sent
        if queue and stream.send_window > 0:
            self._blocked[number] = stream
            return False
        self._blocked.pop(number, None)
        if queue:
            return False
        stream.queue = None
        return True

    def _send(self, number: int, stream: Stream, payload: bytearray | memoryview) -> int:
        """As much as the windows allow; returns the bytes sent."""
        sent = 0
        while (size := min(stream.send_window, self.window, FRAME_BYTES, len(payload) - sent)) > 0:
            self._out += (HEAD.pack(size >> 8, size & 0xFF, frames.DATA, 0, number), payload[sent : sent + size])
            self.sent += 1
            self.window -= size
            stream.send_window -= size
            sent += size
        return sent

    def next_blocked(self) -> tuple[int, Stream] | None:
        """Who has waited longest for the connection's window alone."""
        return next(iter(self._blocked.items()), None)

    def drop(self, number: int, stream: Stream) -> None:
        """A stream has ended; what waited on it is not sent."""
        self.queued -= len(stream.queue or b"")
        self._blocked.pop(number, None)

    def drop_all(self) -> None:
        """The connection has ended."""
        self.queued = 0
        self._blocked.clear()
