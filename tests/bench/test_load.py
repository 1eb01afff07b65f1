"""Who asks: every request counts, and a stall is charged to all who met it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from bench import load
from bench.load import Ask, closed_loop, open_loop

pytestmark = pytest.mark.anyio

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
LONG = Ask(prompt_bytes=10_000)


class Upstream:
    """A server that reads requests and answers as it is told."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[bytes] = []
        self.tasks: list[asyncio.Task[object]] = []
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.bodies.append(await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0])))
                await self._answer(writer)
        writer.close()


@contextlib.asynccontextmanager
async def upstream(answer: Answer) -> AsyncIterator[tuple[Upstream, int]]:
    made = Upstream(answer)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, limit=1 << 20)
    async with server:
        yield made, server.sockets[0].getsockname()[1]
        await asyncio.gather(*made.tasks)  # each ends when its client is gone


async def plain(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")


async def chunked_byte_by_byte(writer: asyncio.StreamWriter) -> None:
    # The data ends as the last chunk does, which must not be taken for it.
    for byte in b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nx0\r\n\r\n\r\n0\r\n\r\n":
        writer.write(bytes([byte]))
        await asyncio.sleep(0)  # the loop delivers it before the next


async def nothing(writer: asyncio.StreamWriter) -> None:
    pass


async def unavailable(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")


@pytest.mark.parametrize("answer", [plain, chunked_byte_by_byte])
async def test_a_closed_loop_counts_each_request_once(answer: Answer) -> None:
    async with upstream(answer) as (asked, port):
        answers = await closed_loop(port, LONG, seconds=0.1, connections=3)
    assert answers.answered == len(asked.bodies) >= 3


async def test_prompts_differ_from_their_first_byte_on_and_have_the_asked_length() -> None:
    async with upstream(plain) as (asked, port):
        await closed_loop(port, LONG, seconds=0.05, connections=1)
    prompts = [body.partition(b'"content":"')[2].partition(b'"')[0] for body in asked.bodies]
    assert {len(prompt) for prompt in prompts} == {LONG.prompt_bytes}
    assert len({prompt[:20] for prompt in prompts}) == len(prompts)


async def test_an_answer_that_is_no_200_ends_the_bench() -> None:
    async with upstream(unavailable) as (_, port):
        with pytest.raises(RuntimeError, match="503 Service Unavailable"):
            await closed_loop(port, LONG, seconds=0.05, connections=1)


async def test_an_open_loop_asks_all_that_came() -> None:
    async with upstream(plain) as (asked, port):
        answers = await open_loop(port, Ask(), rate=500.0, seconds=0.2, connections=4)
    # Poisson with mean 100: a seed that gives less than 60 or more than 140 is one in 10,000.
    assert 60 < answers.came < 140
    assert len(asked.bodies) == answers.came


async def test_who_waits_in_line_for_a_server_that_never_answers_is_late() -> None:
    async with upstream(nothing) as (asked, port):
        answers = await open_loop(port, Ask(), rate=500.0, seconds=0.2, connections=2)
    assert len(asked.bodies) == 2
    assert answers.answered == 0
    assert answers.p50 >= load.PATIENCE
