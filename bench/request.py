"""What one request costs: CPU of our picker beside a bare grpc.aio server, behind the same Envoy, in the same run.

`python -m bench.request [SECONDS]`, or `make bench`. Each row is measured in turns (ours, bare, ours, bare) of
SECONDS each (default 3) with 16 connections in a closed loop, each request with a prompt of its own. CPU is utime and
stime of the whole process, so ours includes reading its servers' metrics pages every 50 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from epp.demo import envoy
from epp.demo.child import Child, child, free_ports
from epp.demo.envoy import Gateway, Picker, Response
from tests.e2e import serving

SERVERS = 4
SCORERS = {"queue-scorer": 2, "kv-cache-utilization-scorer": 2, "prefix-cache-scorer": 3}
"""The picker's default profile."""
CONNECTIONS = 16
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = Path(__file__).parents[1] / "tests" / "data" / "vllm-0.32.0" / "metrics-busy-0.txt"


class Case(msgspec.Struct, frozen=True):
    """One row of the table."""

    what: str
    response: Response
    prompt_bytes: int = 100
    stream: bool = False


CASES = (
    Case("100 B prompt", "SEND/NONE/SEND"),
    Case("100 B prompt", "SEND/FULL_DUPLEX_STREAMED/SEND"),
    Case("stream of 100 chunks", "SEND/NONE/SEND", stream=True),
    Case("stream of 100 chunks", "SEND/FULL_DUPLEX_STREAMED/SEND", stream=True),
    Case("100 KB prompt", "SEND/NONE/SEND", prompt_bytes=100_000),
)
RESPONSES: dict[str, Response] = {"light": "SEND/NONE/SEND", "duplex": "SEND/FULL_DUPLEX_STREAMED/SEND"}


class Cost(msgspec.Struct):
    """What some requests cost, in seconds of CPU."""

    requests: int = 0
    seconds: float = 0.0
    picker: float = 0.0
    envoy: float = 0.0


class Bench:
    """Both pickers behind one Envoy."""

    def __init__(self, ours: Child, bare: Child, gateway: envoy.Envoy) -> None:
        self._pickers = {"ours": ours, "bare": bare}
        self._gateway = gateway

    async def measure(self, case: Case, seconds: float) -> dict[str, Cost]:
        """Cost by "ours" and "bare", each measured twice."""
        costs = {who: Cost() for who in self._pickers}
        for turn in ("warm", "measured", "measured"):
            for who, process in self._pickers.items():
                cost = costs[who] if turn == "measured" else Cost()
                await self._turn(case, who, process, cost, seconds if turn == "measured" else 0.5)
        return costs

    async def idle(self, seconds: float) -> float:
        """Cores that our picker uses while nobody asks."""
        before = cpu(self._pickers["ours"])
        await asyncio.sleep(seconds)
        return (cpu(self._pickers["ours"]) - before) / seconds

    async def _turn(self, case: Case, who: str, process: Child, cost: Cost, seconds: float) -> None:
        mode = next(name for name, response in RESPONSES.items() if response == case.response)
        port = self._gateway.ports[f"{who}-{mode}"]
        before = cpu(process), cpu(self._gateway.child)
        cost.requests += await load(port, case, seconds)
        cost.seconds += seconds
        cost.picker += cpu(process) - before[0]
        cost.envoy += cpu(self._gateway.child) - before[1]


def cpu(process: Child) -> float:
    """Seconds of CPU that a process has used, all threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def load(port: int, case: Case, seconds: float) -> int:
    """Ask for so long on all connections; returns the number of answers. Raises on anything but a 200."""
    until = asyncio.get_running_loop().time() + seconds
    counts = await asyncio.gather(*(one_connection(port, case, until, at) for at in range(CONNECTIONS)))
    return sum(counts)


async def one_connection(port: int, case: Case, until: float, at: int) -> int:
    """Ask again and again; prompts share nothing, not even their beginning."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    done = 0
    try:
        while loop.time() < until:
            unique = b"%d %d %d " % (at, done, int(loop.time() * 1e6))
            prompt = (unique * (case.prompt_bytes // len(unique) + 1))[: case.prompt_bytes]
            writer.write(request(prompt, stream=case.stream))
            await answer(reader)
            done += 1
    finally:
        writer.transport.abort()
    return done


def request(prompt: bytes, *, stream: bool) -> bytes:
    streamed = b',"stream":true' if stream else b""
    body = b'{"model":"tiny","messages":[{"role":"user","content":"%b"}]%b}' % (prompt, streamed)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    return head % len(body) + body


async def answer(reader: asyncio.StreamReader) -> None:
    """Read one answer to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head + await reader.read(1 << 16)
    if b"transfer-encoding: chunked" in head:
        while (size := int(await reader.readline(), 16)) > 0:
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
    else:
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))


@contextlib.asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    """Start model servers, both pickers and Envoy."""
    async with contextlib.AsyncExitStack() as stack:
        command = (sys.executable, "-m", "bench.servers", str(SERVERS), str(PAGE))
        servers = await stack.enter_async_context(child("servers", *command, folder=folder))

        async def listening() -> bool:
            return servers.output().count(" ") == SERVERS - 1

        await servers.until(listening, "ports")
        addresses = [f"127.0.0.1:{port}" for port in servers.output().split()]
        flags = ("--secure-serving=false", "-v=0")
        ours = await stack.enter_async_context(serving.picker(folder, "picker", addresses, *flags, scorers=SCORERS))
        (port,) = free_ports(1)
        bare_address = f"127.0.0.1:{port}"
        command = (sys.executable, "-m", "bench.bare", bare_address, addresses[0])
        bare = await stack.enter_async_context(child("bare", *command, folder=folder))
        envoy.write_endpoints(folder / "pool.json", addresses)
        gateways = [
            Gateway(name=f"{who}-{mode}", endpoints=folder / "pool.json", picker=Picker(address=at, response=response))
            for who, at in (("ours", ours.address), ("bare", bare_address))
            for mode, response in RESPONSES.items()
        ]
        gateway = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        yield Bench(ours.process, bare, gateway)


async def main(seconds: float = 3.0) -> None:
    table = Table("request", "response", "ours us", "bare us", "ratio", "ours req/s", "bare req/s", "Envoy us")
    for column in table.columns[2:]:
        column.justify = "right"
    with tempfile.TemporaryDirectory() as folder:
        async with bench(Path(folder)) as running:
            idle = await running.idle(seconds)
            for case in CASES:
                costs = await running.measure(case, seconds)
                table.add_row(*row(case, costs["ours"], costs["bare"]))
    console = Console(width=120)
    console.print(table)
    console.print(
        f"CPU of the picker process, {CONNECTIONS} connections, {SERVERS} model servers. While nobody asks, ours uses "
        f"{idle:.3f} cores to read metrics pages; that is part of its figures. Goal: ratio <= 1.5 in the first row."
    )


def row(case: Case, ours: Cost, bare: Cost) -> tuple[str, ...]:
    per_request = [1e6 * cost.picker / cost.requests for cost in (ours, bare)]
    ratio = f"{per_request[0] / per_request[1]:.2f}"
    rates = [f"{cost.requests / cost.seconds:.0f}" for cost in (ours, bare)]
    envoy_us = f"{1e6 * ours.envoy / ours.requests:.0f}"
    response = case.response.replace("_STREAMED", "")
    return (case.what, response, *(f"{us:.0f}" for us in per_request), ratio, *rates, envoy_us)


if __name__ == "__main__":
    uvloop.run(main(*map(float, sys.argv[1:])))
