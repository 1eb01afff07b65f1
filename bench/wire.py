"""The other yardstick: HTTP/2 and gRPC over asyncio.Protocol without any logic, as small as it can be.

`python -m bench.wire LISTEN DESTINATION` answers as bench/bare.py does, by the same lines, so what the two differ by
is what grpc.aio costs. It is a measuring stick and never a server: no limits, no errors, no state of streams beyond
their bodies, no flow control (it gives windows that nobody fills and ignores its client's), no CONTINUATION, no
padding, one service. Every header block is decoded by the hpack library and then ignored: a server must know what it
was asked. That is half of its CPU per request; remembering blocks by their bytes is a trick of ours, not of the stick.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import Final, cast

import hpack
import uvloop

from bench.bare import Bare
from epp.pb.ext_proc_pb2 import ProcessingRequest

PREFACE: Final = 24
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
ACK = 1
END_HEADERS = 4
MAX_FRAME: Final = 16_384
"""Bytes of payload that any client takes."""
WINDOW: Final = 1 << 24
"""Of each stream: more than any body of the bench."""

HEAD: Final = b"\x88\x00\x0ccontent-type\x10application/grpc"
"""Header block: `:status 200` from the static table, and a literal."""
FRAME: Final = struct.Struct(">BHBBL")
"""Length in three bytes, kind, flags, stream."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


class Stream:
    """What is kept of one: bytes of an unfinished message, the request's body so far, whether we answered."""

    __slots__ = ("answered", "body", "rest")

    def __init__(self) -> None:
        self.rest = b""
        self.body: list[bytes] = []
        self.answered = False


class Wire(asyncio.Protocol):
    """One connection."""

    def __init__(self, bare: Bare) -> None:
        self._bare = bare
        self._rest = b""
        self._skip = PREFACE
        self._streams: dict[int, Stream] = {}
        self._decoder = hpack.Decoder()
        self._out: list[bytes] = []
        self._unreported = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it
        settings = struct.pack(">HLHL", 3, 100_000, 4, WINDOW)  # MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE
        self._transport.write(frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", 1 << 30)))

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        at, end = self._skip, len(data)
        self._skip = 0
        while end - at >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(data, at)
            after = at + 9 + (high << 16) + low
            if after > end:
                break
            self._frame(kind, flags, stream, data[at + 9 : after])
            at = after
        self._rest = data[at:]
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self._data(stream, payload)
        elif kind == HEADERS:
            self._decoder.decode(payload)
            self._streams[stream] = Stream()
        elif kind == RST_STREAM:
            self._streams.pop(stream, None)
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self._out.append(frame(kind, ACK, 0, payload if kind == PING else b""))

    def _data(self, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            return
        self._unreported += len(payload)
        if self._unreported > 1 << 20:
            self._out.append(frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._unreported)))
            self._unreported = 0
        data = stream.rest + payload if stream.rest else payload
        at = 0
        while len(data) - at >= 5:
            after = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            if after > len(data):
                break
            for reply in self._bare.replies(ProcessingRequest.FromString(data[at + 5 : after]), stream.body):
                self._send(number, stream, reply.SerializeToString())
            at = after
        stream.rest = data[at:]

    def _send(self, number: int, stream: Stream, message: bytes) -> None:
        if not stream.answered:
            stream.answered = True
            self._out.append(frame(HEADERS, END_HEADERS, number, HEAD))
        whole = b"\x00" + struct.pack(">L", len(message)) + message
        for at in range(0, len(whole), MAX_FRAME):
            self._out.append(frame(DATA, 0, number, whole[at : at + MAX_FRAME]))


async def main(listen: str, destination: str) -> None:
    bare = Bare(destination)
    host, _, port = listen.rpartition(":")
    server = await asyncio.get_running_loop().create_server(lambda: Wire(bare), host, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
