"""Model servers for measuring: raw asyncio, so that their own CPU leaves room for what is measured.

`python -m bench.servers COUNT PAGE` listens on COUNT free ports of loopback, prints them on one line, and serves the
metrics page in the file PAGE (no two alike, as in life) and canned answers: one piece of JSON, or 100 server-sent
events when the body asks to stream.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from pathlib import Path
from typing import cast

import uvloop

ANSWER = (
    b'{"id":"c","object":"chat.completion","created":1,"model":"tiny","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"hello"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":10,"total_tokens":30,"completion_tokens":20}}'
)
EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"tiny","choices":[{"index":0,"delta":'
    b'{"content":" word"},"finish_reason":null}]}\n\n'
)
CHUNKS = 100
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


class Server(asyncio.Protocol):
    """One connection; requests follow one another, as Envoy and a scraper send them."""

    pages = count(1)

    def __init__(self, page: bytes) -> None:
        self._page = page
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it

    def data_received(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data
        if (body := self._body()) is None:
            return
        if self._data.startswith(b"GET /metrics"):
            page = b"# TYPE bench_pages counter\nbench_pages %d\n%b" % (next(self.pages), self._page)
            self._transport.write(OK % (len(page), page))
        elif b'"stream":true' in body:
            self._streaming = asyncio.get_running_loop().create_task(self._stream())
        else:
            self._transport.write(OK % (len(ANSWER), ANSWER))
        self._data = b""

    def _body(self) -> bytes | None:
        """The body of the request at hand; None: it is not whole."""
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return None
        if b"transfer-encoding: chunked" in head:
            return body if body.endswith(b"0\r\n\r\n") else None
        _, _, length = head.partition(b"content-length: ")
        return body if len(body) >= int(length.split(b"\r\n")[0] or 0) else None

    async def _stream(self) -> None:
        self._transport.write(STREAM)
        for _ in range(CHUNKS):
            self._transport.write(CHUNK)
            await asyncio.sleep(0.001)
        self._transport.write(b"0\r\n\r\n")


async def main(number: str, page: str) -> None:
    loop, text = asyncio.get_running_loop(), Path(page).read_bytes()
    servers = [await loop.create_server(lambda: Server(text), "127.0.0.1", 0) for _ in range(int(number))]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
