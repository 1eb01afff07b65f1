"""Who asks: chat completions over HTTP/1.1 on loopback, in a closed or an open loop.

In: a port, what to ask, for how long. Out: how many answers, and how late they came. Anything but a 200 ends the bench.
Closed: each connection asks again when it has its answer.
Open: requests come when they come, however slow the answers are (Poisson, seeded), and one that finds every connection
busy waits in line. Latency counts from when it came, so a stall is charged to all who met it. Arrivals fall on whole
milliseconds, what libuv's timers can do; a timer's own delay of up to a millisecond is not counted.
Rejected: wrk. It takes as much of the cores that are measured (17 to 18 us of CPU a request of 100 B, this 16 to 22,
in turns of one run), leaves its last requests unfinished, and has no open loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, cast

import msgspec
import numpy as np

GRID: Final = 0.001
"""Seconds between two arrivals that are not at once."""
PATIENCE: Final = 1.0
"""Seconds after the last arrival in which answers still count."""
HEAD: Final = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Ask(msgspec.Struct, frozen=True):
    """What every request asks."""

    prompt_bytes: int = 100
    stream: bool = False


class Answers(msgspec.Struct, frozen=True):
    """What came of it; latencies in seconds."""

    answered: int
    seconds: float
    p50: float
    p90: float
    p99: float
    came: int = 0
    """Requests of an open loop, answered or not."""


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, answered: Callable[[Client], None]) -> None:
        self.asked_at = 0.0
        self.failure: str | None = None
        self._answered = answered
        self._data = b""
        self._missing: int | None = None
        """Bytes still to come of the answer; None: its head is not whole; -1: it ends where its last chunk does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it

    def ask(self, request: bytes, came_at: float) -> None:
        self.asked_at, self._missing, self._data = came_at, None, b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._missing is None:
            self._data += data
            data = self._read_head()
        if self._missing is None:
            return
        if self._missing >= 0:
            self._missing -= len(data)
        else:
            self._data = self._data[-8:] + data
        if self._missing == 0 or (self._missing < 0 and self._data.endswith(b"\r\n0\r\n\r\n")):
            self._answered(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.failure = self.failure or f"connection lost: {exc}"

    def close(self) -> None:
        self._transport.abort()

    def _read_head(self) -> bytes:
        """What of the body came with it."""
        head, found, body = self._data.partition(b"\r\n\r\n")
        if found:
            if not head.startswith(b"HTTP/1.1 200"):
                self.failure = self._data[:1000].decode("utf-8", "replace")
            _, chunked, length = head.partition(b"content-length: ")
            self._missing = int(length.partition(b"\r\n")[0]) if chunked else -1
        return body


async def closed_loop(port: int, ask: Ask, seconds: float, connections: int) -> Answers:
    """Ask on all connections for so long. Raises RuntimeError on anything but a 200."""
    requests = _requests(ask)
    latencies: list[float] = []
    resting: list[Client] = []

    def answered(client: Client) -> None:
        now = time.monotonic()
        latencies.append(now - client.asked_at)
        if now < until:
            client.ask(next(requests), now)
        else:
            resting.append(client)

    clients = await _connect(port, connections, answered)
    began = time.monotonic()
    until = began + seconds
    for client in clients:
        client.ask(next(requests), began)
    await _until(lambda: len(resting) == connections or any(client.failure for client in clients), seconds + 60)
    _close(clients)
    if len(resting) < connections:
        raise RuntimeError(f"{connections - len(resting)} requests were not answered within a minute")
    return _answers(len(latencies), time.monotonic() - began, latencies)


async def open_loop(port: int, ask: Ask, rate: float, seconds: float, connections: int, seed: int = 0) -> Answers:
    """Ask `rate` times a second. `answered` counts until the end of the arrivals; who waits for longer than
    `PATIENCE` after that is counted as that late. Raises RuntimeError on anything but a 200."""
    loop = asyncio.get_running_loop()
    arrivals = np.random.default_rng(seed).poisson(rate * GRID, round(seconds / GRID)).tolist()
    latencies: list[float] = []
    line: deque[float] = deque()

    def answered(client: Client) -> None:
        latencies.append(time.monotonic() - client.asked_at)
        if line:
            client.ask(next(requests), line.popleft())
        else:
            free.append(client)

    requests = _requests(ask)
    free = await _connect(port, connections, answered)
    clients = list(free)
    began = (int(loop.time() / GRID) + 10) * GRID  # uvloop's clock is the monotonic one, in whole milliseconds
    for number, count in enumerate(arrivals):
        if not count:
            continue
        due = began + number * GRID
        if (delay := due - loop.time()) > GRID / 2:
            await asyncio.sleep(delay)
        came_at = min(time.monotonic(), due + GRID)
        for _ in range(count):
            if free:
                free.pop().ask(next(requests), came_at)
            else:
                line.append(came_at)
    in_time = len(latencies)
    await _until(lambda: len(free) == connections, PATIENCE)
    late = time.monotonic()
    busy = set(clients) - set(free)
    latencies += [late - client.asked_at for client in busy] + [late - came_at for came_at in line]
    line.clear()
    _close(clients)
    return _answers(in_time, seconds, latencies, came=sum(arrivals))


def _requests(ask: Ask) -> Iterator[bytes]:
    """Prompts that share nothing, not even their beginning."""
    ending = b'"}],"stream":true}' if ask.stream else b'"}]}'
    started = int(time.time() * 1000)

    def request(number: int) -> bytes:
        unique = b"%d %d " % (number, started)
        prompt = (unique * (ask.prompt_bytes // len(unique) + 1))[: ask.prompt_bytes]
        body = b'{"model":"tiny","messages":[{"role":"user","content":"' + prompt + ending
        return HEAD % len(body) + body

    return map(request, itertools.count())


async def _connect(port: int, connections: int, answered: Callable[[Client], None]) -> list[Client]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(lambda: Client(answered), "127.0.0.1", port))[1] for _ in range(connections)]


def _close(clients: list[Client]) -> None:
    failures = [client.failure for client in clients if client.failure]
    for client in clients:
        client.close()
    if failures:
        raise RuntimeError(failures[0])


async def _until(done: Callable[[], bool], within: float) -> None:
    deadline = time.monotonic() + within
    while not done() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


def _answers(answered: int, seconds: float, latencies: list[float], came: int = 0) -> Answers:
    p50, p90, p99 = np.percentile(latencies or [0.0], (50, 90, 99)).tolist()
    return Answers(answered, seconds, p50, p90, p99, came)
