"""A client that sends exactly these bytes and reads exactly what comes back.

HTTP/1.1 requests are raw bytes (a library would refuse to send half of what is tried here) and answers are read by
h11; HTTP/2, for trailers, by h2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

import h2.config
import h2.connection
import h2.events
import h11
import msgspec

from tests.e2e.upstream import Pairs


class Got(msgspec.Struct, frozen=True):
    """An answer; `complete` False: the connection ended in the middle of it, status 0: before it."""

    status: int
    headers: Pairs = ()
    body: bytes = b""
    trailers: Pairs = ()
    complete: bool = True

    def all(self, name: str) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> object:
        return json.loads(self.body)


def chat(model: str = "m", **more: object) -> bytes:
    """The body of a chat request."""
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A POST with Content-Length; `headers` are whole lines."""
    lines = [f"POST {path} HTTP/1.1", "host: pool.example", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(path: str, pieces: Sequence[bytes], *headers: str, trailers: Sequence[str] = ()) -> bytes:
    """A POST in chunks, ended by the empty chunk and by `trailers`, which are whole lines."""
    lines = [f"POST {path} HTTP/1.1", "host: pool.example", "transfer-encoding: chunked", *headers, "", ""]
    head = "\r\n".join(lines).encode()
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + body + b"0\r\n" + "".join(f"{line}\r\n" for line in trailers).encode() + b"\r\n"


class Connection:
    """One HTTP/1.1 connection, read step by step."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        self._parser.send(h11.Request(method="GET", target="/", headers=[("host", "any")]))
        self._parser.send(h11.EndOfMessage())
        self.writer = writer

    async def head(self) -> Got:
        """Status and headers; status 0 when the connection ended instead."""
        while not isinstance(event := await self._event(), h11.Response):
            if event is None:
                return Got(0, complete=False)
        return Got(event.status_code, tuple((bytes(name).decode(), bytes(value)) for name, value in event.headers))

    async def data(self) -> bytes | None:
        """The next piece of the body; None at its end."""
        event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def rest(self, head: Got | None = None) -> Got:
        """The whole answer, or what follows its head."""
        got = head or await self.head()
        pieces: list[bytes] = []
        while isinstance(event := await self._event(), h11.Data):
            pieces.append(bytes(event.data))
        body = b"".join(pieces)
        if not isinstance(event, h11.EndOfMessage):
            return msgspec.structs.replace(got, body=body, complete=False)
        trailers = tuple((bytes(name).decode(), bytes(value)) for name, value in event.headers)
        return msgspec.structs.replace(got, body=body, trailers=trailers)

    async def raw(self, ending: bytes, size: int = 0) -> bytes:
        """Bytes as they come, to `ending` and at least `size` of them; instead of reading an answer."""
        data = b""
        while len(data) < size or not data.endswith(ending):
            more = await self._reader.read(1 << 16)
            assert more, f"the connection ended after {data!r}"
            data += more
        return data

    async def _event(self) -> object:
        while True:
            try:
                event = self._parser.next_event()
                if event is not h11.NEED_DATA:
                    return event if isinstance(event, h11.Event) else None
                self._parser.receive_data(await self._reader.read(1 << 16))
            except (ConnectionError, h11.RemoteProtocolError):
                return None


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[Connection]:
    """A connection to loopback, aborted at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


async def send(port: int, *pieces: bytes, within: float = 15.0) -> Got:
    """Send these bytes on a connection of their own and read one answer.

    Raises:
        TimeoutError: no whole answer within so many seconds.
    """
    async with asyncio.timeout(within), connection(port) as link:
        for piece in pieces:
            link.writer.write(piece)
            await link.writer.drain()
        return await link.rest()


async def send_h2(port: int, headers: Pairs, body: bytes = b"", trailers: Pairs = (), within: float = 15.0) -> Got:
    """One POST over HTTP/2 without TLS, ended by its last DATA frame or by trailers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    link = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    link.initiate_connection()
    named = [(name, value.decode()) for name, value in headers]
    pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", "pool.example")]
    link.send_headers(1, [*pseudo, *named])
    if body or not trailers:
        link.send_data(1, body, end_stream=not trailers)
    if trailers:
        link.send_headers(1, [(name, value.decode()) for name, value in trailers], end_stream=True)
    writer.write(link.data_to_send())
    got = Got(0, complete=False)
    try:
        async with asyncio.timeout(within):
            while not got.complete and (data := await reader.read(1 << 16)):
                for event in link.receive_data(data):
                    got = _taken(got, event)
                writer.write(link.data_to_send())
    finally:
        writer.transport.abort()
    return got


def _taken(got: Got, event: h2.events.Event) -> Got:
    if isinstance(event, h2.events.ResponseReceived):
        headers = tuple((str(name), str(value).encode()) for name, value in event.headers)
        return msgspec.structs.replace(got, status=int(dict(headers)[":status"]), headers=headers)
    if isinstance(event, h2.events.DataReceived):
        return msgspec.structs.replace(got, body=got.body + bytes(event.data))
    if isinstance(event, h2.events.TrailersReceived):
        trailers = tuple((str(name), str(value).encode()) for name, value in event.headers)
        return msgspec.structs.replace(got, trailers=trailers)
    if isinstance(event, h2.events.StreamEnded):
        return msgspec.structs.replace(got, complete=True)
    return got
