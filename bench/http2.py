"""What HTTP/2 and gRPC cost by themselves: one ext_proc call through `ServerConnection`, beside the `h2` library.

`python -m bench.http2` feeds the bytes that Envoy sends (an indexed header block, a message a DATA frame, RST_STREAM)
and answers as the picker does; nothing is decoded, scheduled or written. Microseconds a call, best of many rounds,
both in turn in one process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.settings
from hpack import Encoder

from epp.extproc.http2 import frames
from epp.extproc.http2.connection import ServerConnection
from epp.extproc.http2.events import MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import Code, Setting

CALLS: Final = 200
"""In one round, one after another on one connection."""
ROUNDS: Final = 30
MESSAGE: Final = bytes(300)
REPLY: Final = bytes(250)
FIELDS: Final = (
    (":method", "POST"),
    (":path", "/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
    (":authority", "picker"),
    (":scheme", "http"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    ("x-envoy-internal", "true"),
    ("x-forwarded-for", "10.0.0.7"),
)
SHORT: Final = (2, 1)
"""Messages in one flight of the peer's, each answered: request headers and body, then response headers."""
CHUNKS: Final = (1,) * 100
"""A body in a hundred pieces, each answered before the next."""


class Envoy:
    """Writes what Envoy 1.40 writes."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._number = -1

    def greeting(self) -> bytes:
        settings = {Setting.ENABLE_PUSH: 0, Setting.INITIAL_WINDOW_SIZE: 16 << 20}
        return frames.PREFACE + frames.settings(settings) + frames.window_update(0, 24 << 20)

    def call(self, flights: tuple[int, ...]) -> tuple[int, list[bytes]]:
        """Its stream, and what is received at once each time; the last of it is the reset."""
        self._number += 2
        block = self._encoder.encode(FIELDS)
        head = frames.frame(frames.HEADERS, frames.END_HEADERS, self._number, block)
        size = len(MESSAGE) + 5
        piece = (
            frames.MESSAGE_HEAD.pack(size >> 8, size & 0xFF, frames.DATA, 0, self._number, 0, len(MESSAGE)) + MESSAGE
        )
        reset = frames.rst_stream(self._number, Code.INTERNAL_ERROR)
        return self._number, [head + piece * flights[0], *(piece * count for count in flights[1:]), reset]


def replenished(taken: int) -> bytes:
    """The window that the peer gives back."""
    return frames.window_update(0, taken)


class Ours:
    """The core as the transport drives it."""

    def __init__(self, envoy: Envoy) -> None:
        self._connection = ServerConnection(ConnectionLimits(), Counter(), 0.0)
        self.receive(envoy.greeting(), 0.0)

    def receive(self, data: bytes, now: float) -> int:
        """Returns the bytes that are to be written."""
        connection = self._connection
        for event in connection.receive(data, now):
            if isinstance(event, MessageReceived):
                connection.send(event.stream, REPLY)
        return len(connection.output())


class Library:
    """The same with h2, which knows no gRPC: a message is a slice behind five bytes."""

    def __init__(self, envoy: Envoy) -> None:
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self._connection.local_settings.initial_window_size = 1 << 24
        self._connection.initiate_connection()
        self._answered: set[int] = set()
        self.receive(envoy.greeting(), 0.0)

    def receive(self, data: bytes, now: float) -> int:
        connection = self._connection
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                assert event.flow_controlled_length is not None
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if event.stream_id not in self._answered:
                    self._answered.add(event.stream_id)
                    connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                connection.send_data(event.stream_id, frames.MESSAGE_PREFIX.pack(0, len(REPLY)) + REPLY)
            elif isinstance(event, h2.events.StreamReset):
                self._answered.discard(event.stream_id)
        return len(connection.data_to_send())


def rounds(make: Callable[[Envoy], Ours | Library], flights: tuple[int, ...], calls: int) -> Iterator[float]:
    """Seconds a call, for each round; what the peer says is made beforehand, and windows are given back between."""
    envoy = Envoy()
    subject = make(envoy)
    now = 0.0
    while True:
        said = [envoy.call(flights)[1] for _ in range(calls)]
        now += 1.0
        written = 0
        start = time.perf_counter()
        for flight in said:
            for data in flight:
                written += subject.receive(data, now)
        yield (time.perf_counter() - start) / calls
        subject.receive(replenished(written), now)


def measure(title: str, flights: tuple[int, ...], calls: int) -> None:
    ours, library = rounds(Ours, flights, calls), rounds(Library, flights, calls)
    best = [min(times) * 1e6 for times in zip(*((next(ours), next(library)) for _ in range(ROUNDS)), strict=True)]
    print(f"{title:<38}{best[0]:8.1f} us{best[1]:10.1f} us{best[1] / best[0]:8.1f}x")


def main() -> None:
    print(f"{'a call':<38}{'ours':>11}{'h2':>13}{'h2/ours':>9}")
    measure("headers, 2 in 2 out, 1 in 1 out, reset", SHORT, CALLS)
    measure("headers, 100 in 100 out, reset", CHUNKS, CALLS // 10)


if __name__ == "__main__":
    main()
