"""The model servers that benches measure against."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

from bench.servers import ANSWER, OK, Page, Server
from epp.endpoints import table
from epp.signals.page import VLLM, read_page

RECORDED = Path(__file__).parents[1] / "data" / "vllm-0.32.0" / "metrics-busy-0.txt"


def answer(page: Page) -> tuple[bytes, bytes]:
    """Head and body of one response."""
    head, _, body = b"".join(page.answer()).partition(b"\r\n\r\n")
    return head, body


def told(page: Page) -> table.Page:
    return read_page(answer(page)[1], VLLM)


def test_a_page_is_as_long_as_its_head_says() -> None:
    page = Page(RECORDED.read_bytes())
    for _ in range(100):
        head, body = answer(page)
        assert head.endswith(b"content-length: %d" % len(body))


def test_no_two_pages_following_each_other_say_the_same() -> None:
    page = Page(RECORDED.read_bytes())
    pages = [told(page) for _ in range(20)]
    assert all(this != after for this, after in pairwise(pages))


def test_what_a_page_says_stays_within_what_a_server_can_say() -> None:
    page = Page(RECORDED.read_bytes())
    for _ in range(200):
        said = told(page)
        assert said.waiting is not None
        assert 0 <= said.waiting < 5
        assert said.running is not None
        assert 10 <= said.running < 100
        assert said.kv_usage is not None
        assert 0.1 <= said.kv_usage < 0.9
        assert said.kv_blocks == 14418


@pytest.mark.anyio
async def test_a_request_in_pieces_is_answered_once() -> None:
    page = Page(RECORDED.read_bytes())
    listening = await asyncio.get_running_loop().create_server(lambda: Server(page), "127.0.0.1", 0)
    async with listening:
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        # As Envoy sends a body whose length the picker may have changed.
        head = b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
        whole = head + b'5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n'
        for at in range(len(whole)):
            writer.write(whole[at : at + 1])
            await asyncio.sleep(0)  # the loop delivers it before the next
        answer = OK % (len(ANSWER), ANSWER)
        assert await reader.readexactly(len(answer)) == answer
        writer.write(b"GET /served HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
