"""A model server that says exactly what it was sent, and fails exactly as it is told.

In: requests over HTTP/1.1 or HTTP/2 (told apart by the preface, on one port). Out: `seen`, each request with its
headers in order, body and trailers; the answer is a list of steps, so that a test can hold, cut or trail it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from enum import Enum

import h2.config
import h2.connection
import h2.events
import h11
import msgspec

Pairs = tuple[tuple[str, bytes], ...]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Cut(Enum):
    """A step: the connection (HTTP/1.1) or the stream (HTTP/2) ends here, without a word."""

    CUT = 1


class Seen(msgspec.Struct, frozen=True):
    """One request as the model server got it."""

    version: str
    method: str
    path: str
    headers: Pairs
    """In order, duplicates kept, without pseudo-headers."""
    body: bytes = b""
    trailers: Pairs = ()

    def all(self, name: str) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.headers]


class Answer(msgspec.Struct, frozen=True):
    """What to answer: the head goes out with the first bytes (empty ones will do), an Event waits, CUT is death."""

    status: int = 200
    headers: Pairs = (("content-type", b"application/json"),)
    steps: tuple[bytes | asyncio.Event | Cut, ...] = (b'{"ok":true}',)
    trailers: Pairs = ()


class Upstream:
    """One model server. `load` is what its metrics page says; a smaller one is preferred by the picker."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self.address = ""
        self.scrapes = 0
        """Metrics pages asked for, ever."""
        self.reset()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None] | None] = set()

    def reset(self) -> None:
        self.seen: list[Seen] = []
        self.load = 0
        self.answer: Callable[[Seen], Answer] = lambda seen: Answer()
        self.started = asyncio.Event()
        """A request is being answered."""

    async def listen(self) -> None:
        """Listen on any port, or on the same one again."""
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = await asyncio.start_server(self._serve, self._host, port, backlog=4096)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    def deaf(self) -> None:
        """Refuse new connections; those that are open stay (so the picker goes on reading the metrics page)."""
        assert self._server is not None
        self._server.close()

    async def close(self) -> None:
        """Die: refuse new connections, cut those that are open."""
        self.deaf()
        connections = [task for task in self._connections if task is not None]
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())
        try:
            with contextlib.suppress(
                OSError, asyncio.IncompleteReadError, h11.RemoteProtocolError, asyncio.CancelledError
            ):
                first = await reader.readexactly(3)
                serve = self._serve_h2 if first == PREFACE[:3] else self._serve_h1
                await serve(first, reader, writer)
        finally:
            self._connections.discard(asyncio.current_task())
            writer.transport.abort()

    def _page(self) -> bytes:
        return (
            f"vllm:num_requests_waiting {self.load}\nvllm:num_requests_running 0\nvllm:kv_cache_usage_perc 0.0\n"
        ).encode()

    # -- HTTP/1.1 ------------------------------------------------------------------------------------------------

    async def _serve_h1(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(first)
        while (seen := await self._read_h1(connection, reader)) is not None:
            if seen.path == "/metrics":
                self.scrapes += 1
                answer = Answer(headers=(("content-type", b"text/plain"),), steps=(self._page(),))
            else:
                self.seen.append(seen)
                self.started.set()
                if seen.all("upgrade"):
                    await _echo(connection, reader, writer)
                    return
                answer = self.answer(seen)
            head = connection.send(h11.Response(status_code=answer.status, headers=_wire(answer))) or b""
            async for chunk in _steps(answer):
                if chunk is None:
                    writer.transport.abort()
                    return
                writer.write(head + (connection.send(h11.Data(data=chunk)) or b""))
                head = b""
                await writer.drain()
            writer.write(connection.send(h11.EndOfMessage(headers=_pairs(answer.trailers))) or b"")
            await writer.drain()
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()

    async def _read_h1(self, connection: h11.Connection, reader: asyncio.StreamReader) -> Seen | None:
        head: h11.Request | None = None
        body: list[bytes] = []
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                parts = head.method.decode(), head.target.decode(), _text(head.headers)
                return Seen("1.1", *parts, b"".join(body), _text(event.headers))
            else:
                return None

    # -- HTTP/2 --------------------------------------------------------------------------------------------------

    async def _serve_h2(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        requests: dict[int, Seen] = {}
        answering: set[asyncio.Task[None]] = set()
        data = first
        while data:
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    requests[event.stream_id] = _request(event)
                elif isinstance(event, h2.events.DataReceived):
                    requests[event.stream_id] = _with_data(requests[event.stream_id], event)
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.TrailersReceived):
                    trailers = tuple((str(name), str(value).encode()) for name, value in event.headers)
                    requests[event.stream_id] = msgspec.structs.replace(requests[event.stream_id], trailers=trailers)
                elif isinstance(event, h2.events.StreamEnded):
                    seen = requests.pop(event.stream_id)
                    task = asyncio.create_task(self._answer_h2(connection, writer, event.stream_id, seen))
                    answering.add(task)
                    task.add_done_callback(answering.discard)
            writer.write(connection.data_to_send())
            await writer.drain()
            data = await reader.read(1 << 16)

    async def _answer_h2(
        self, connection: h2.connection.H2Connection, writer: asyncio.StreamWriter, stream: int, seen: Seen
    ) -> None:
        self.seen.append(seen)
        answer = self.answer(seen)
        self.started.set()
        head = [(":status", str(answer.status)), *_named(answer.headers)]
        async for chunk in _steps(answer):
            if chunk is None:
                connection.reset_stream(stream)
                break
            if head:
                connection.send_headers(stream, head)
                head = []
            connection.send_data(stream, chunk)
            writer.write(connection.data_to_send())
        else:
            if answer.trailers:
                connection.send_headers(stream, _named(answer.trailers), end_stream=True)
            else:
                connection.end_stream(stream)
        writer.write(connection.data_to_send())


async def _echo(connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Switch protocols, then send back whatever comes."""
    headers = [("connection", "upgrade"), ("upgrade", "websocket")]
    writer.write(connection.send(h11.InformationalResponse(status_code=101, headers=headers)) or b"")
    data = bytes(connection.trailing_data[0])
    while data or (data := await reader.read(1 << 16)):
        writer.write(data)
        await writer.drain()
        data = b""


async def _steps(answer: Answer) -> AsyncIterator[bytes | None]:
    for step in answer.steps:
        if isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, Cut):
            yield None
            return
        else:
            yield step


def _wire(answer: Answer) -> list[tuple[bytes, bytes]]:
    """Headers of an HTTP/1.1 answer: a length where the whole answer is known, chunks elsewhere."""
    named = _pairs(answer.headers)
    if answer.trailers or len(answer.steps) != 1 or not isinstance(answer.steps[0], bytes):
        return [*named, (b"transfer-encoding", b"chunked")]
    return [*named, (b"content-length", str(len(answer.steps[0])).encode())]


def _pairs(headers: Pairs) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value) for name, value in headers]


def _named(headers: Pairs) -> list[tuple[str, str]]:
    return [(name, value.decode()) for name, value in headers]


def _text(headers: Iterable[tuple[bytes, bytes]]) -> Pairs:
    return tuple((bytes(name).decode(), bytes(value)) for name, value in headers)


def _request(event: h2.events.RequestReceived) -> Seen:
    headers = [(str(name), str(value)) for name, value in event.headers]
    pseudo = dict(headers[: sum(name.startswith(":") for name, _ in headers)])
    plain = tuple((name, value.encode()) for name, value in headers if not name.startswith(":"))
    return Seen("2", pseudo[":method"], pseudo[":path"], plain)


def _with_data(seen: Seen, event: h2.events.DataReceived) -> Seen:
    return msgspec.structs.replace(seen, body=seen.body + bytes(event.data))
