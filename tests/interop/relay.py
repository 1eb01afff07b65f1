"""A wire to look at: passes bytes between a client and a server without TLS, and notes every HTTP/2 frame.

What a peer really sent is seen by neither end's own counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from epp.extproc.http2 import frames

FROM_CLIENT: Final = "client"
FROM_SERVER: Final = "server"


class Frame(msgspec.Struct, frozen=True):
    """One that went by."""

    sender: str
    kind: int
    flags: int
    stream: int
    start: bytes
    """Its payload, the first 64 bytes."""


class Relay:
    """The listening port, and what went through it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = 0
        self.connections = 0
        self.seen: list[Frame] = []
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def frames(self, sender: str, kind: int) -> list[Frame]:
        return [frame for frame in self.seen if frame.sender == sender and frame.kind == kind]

    def pings(self, sender: str, *, ack: bool) -> int:
        return sum(frame.flags & frames.ACK == ack for frame in self.frames(sender, frames.PING))

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to the end of either side."""
        self.connections += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, back}
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass(FROM_CLIENT, reader, back, len(frames.PREFACE)))
                ways.create_task(self._pass(FROM_SERVER, there, writer, 0))
        except* OSError:
            pass
        finally:
            self.cut(writer, back)

    def cut(self, *writers: asyncio.StreamWriter) -> None:
        for writer in writers or tuple(self._open):
            writer.transport.abort()
            self._open.discard(writer)

    async def _pass(self, sender: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, skip: int) -> None:
        held = b""
        while data := await reader.read(1 << 16):
            held = self._note(sender, held + data, skip)
            skip = 0
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    def _note(self, sender: str, data: bytes, at: int) -> bytes:
        """Takes whole frames; returns the rest. A preface comes in one piece over loopback."""
        while len(data) - at >= frames.HEAD_BYTES:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(data, at)
            end = at + frames.HEAD_BYTES + (high << 8 | low)
            if end > len(data):
                break
            start = at + frames.HEAD_BYTES
            self.seen.append(Frame(sender, kind, flags, stream, data[start : min(end, start + 64)]))
            at = end
        return data[at:]


@asynccontextmanager
async def relay(target: int) -> AsyncIterator[Relay]:
    """Relay to a port of loopback for as long as the block runs."""
    between = Relay(target)
    server = await asyncio.start_server(between.join, "127.0.0.1", 0)
    between.port = server.sockets[0].getsockname()[1]
    try:
        yield between
    finally:
        server.close()
        between.cut()
