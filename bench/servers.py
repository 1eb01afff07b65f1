"""Model servers for measuring: raw asyncio, so that their own CPU leaves room for what is measured.

`python -m bench.servers COUNT PAGE [HOST]` listens on COUNT free ports of HOST (default 127.0.0.1), prints them on one
line, and serves the metrics page in the file PAGE (no two alike: waiting, running, KV usage and two counters change
each time, as in life) and canned answers: one piece of JSON, or 100 server-sent events when the body asks to stream.
`GET /served` answers with how many pages were served so far, over all ports.
HOST 0.0.0.0 answers on all of 127.0.0.0/8, so that a few ports make many endpoints.
"""

from __future__ import annotations

import asyncio
import sys
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
CHANGING = {
    b"\nvllm:num_requests_running{": (b"%d.0", 10, 90),
    b"\nvllm:num_requests_waiting{": (b"%d.0", 0, 5),
    b"\nvllm:kv_cache_usage_perc{": (b"0.%04d", 1000, 8000),
    b"\nvllm:prompt_tokens_total{": (b"%09d.0", 100_000_000, 800_000_000),
    b"\nvllm:generation_tokens_total{": (b"%08d.0", 10_000_000, 80_000_000),
}
"""Families whose value is another one each time: form, least, how many. All forms of one family are equally long."""
BLOCKS = b'num_gpu_blocks="200"', b'num_gpu_blocks="14418"'
"""The recorded engine was tiny. So many blocks of 32 tokens are a 70B model's on four H100 (epp/sim/profiles/), and a
prefix index that believes in 200 would forget each 100 KB prompt at once."""
STEP = 7919
"""A prime: values jump, as those of one page in fifty milliseconds do."""


class Page:
    """A recorded page, cut where values change, so that each answer copies none of it."""

    def __init__(self, text: bytes) -> None:
        text = text.replace(*BLOCKS)
        self._pieces: list[bytes] = []
        self._changing: list[tuple[bytes, int, int]] = []
        self.served = 0
        at = 0
        for place, family in sorted((text.index(family), family) for family in CHANGING):
            value = text.index(b"} ", place) + 2
            self._pieces.append(text[at:value])
            self._changing.append(CHANGING[family])
            at = text.index(b"\n", value)
        self._pieces.append(text[at:])
        size = sum(map(len, self._pieces)) + sum(map(len, self._values()))
        self._pieces[0] = OK % (size, self._pieces[0])

    def answer(self) -> list[bytes]:
        """The whole response, in pieces."""
        self.served += 1
        values = self._values()
        return [piece for pair in zip(self._pieces, values, strict=False) for piece in pair] + self._pieces[-1:]

    def _values(self) -> list[bytes]:
        number = self.served * STEP
        return [form % (least + number % many) for form, least, many in self._changing]


class Server(asyncio.Protocol):
    """One connection; requests follow one another, as Envoy and a scraper send them."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._data = bytearray()
        self._body_at = 0
        """Where the body of the request at hand begins; 0: its head is not whole."""
        self._ends_at: int | None = None
        """Where it ends; None: where its last chunk says so."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._body_at:
            self._read_head()
        if self._body_at and self._is_whole():
            self._answer()
            self._data.clear()
            self._body_at = 0

    def _read_head(self) -> None:
        head, found, _ = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        self._body_at = len(head) + len(found)
        if b"transfer-encoding: chunked" in head:
            self._ends_at = None
        else:
            _, _, length = head.partition(b"content-length: ")
            self._ends_at = self._body_at + int(length.split(b"\r\n")[0] or 0)

    def _is_whole(self) -> bool:
        return self._data.endswith(b"0\r\n\r\n") if self._ends_at is None else len(self._data) >= self._ends_at

    def _answer(self) -> None:
        if self._data.startswith(b"GET /metrics"):
            self._transport.writelines(self._page.answer())
        elif self._data.startswith(b"GET /served"):
            self._transport.write(OK % (len(b"%d" % self._page.served), b"%d" % self._page.served))
        elif self._data.find(b'"stream":true', -128) >= 0:  # the load says so last
            self._streaming = asyncio.get_running_loop().create_task(self._stream())
        else:
            self._transport.write(OK % (len(ANSWER), ANSWER))

    async def _stream(self) -> None:
        self._transport.write(STREAM)
        for _ in range(CHUNKS):
            self._transport.write(CHUNK)
            await asyncio.sleep(0.001)
        self._transport.write(b"0\r\n\r\n")


async def main(number: str, page: str, host: str = "127.0.0.1") -> None:
    loop, served = asyncio.get_running_loop(), Page(Path(page).read_bytes())
    servers = [await loop.create_server(lambda: Server(served), host, 0) for _ in range(int(number))]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
