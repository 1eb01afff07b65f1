"""What many model servers cost, and how many requests fit: idle, under load, 1,000 candidates, rate against latency.

`python -m bench.fleet [--parts idle,load,many,curve] [--subjects wire,...] [--json FILE]`, behind a real Envoy with
SEND/NONE/SEND. Model servers are 100 listeners in one process (bench/servers.py), each with a metrics page of 57 KB
that is another one each time, scraped every 50 ms: 2,000 pages a second. All processes share the machine's cores, so
the table says how many of them each used: what the pages' servers, Envoy and the load take is gone for the picker.

- idle: nobody asks.
- load: 16 connections in a closed loop.
- many: 1,000 candidates: the same 100 listeners on ten addresses of loopback each, listed one by one in the file that
  file discovery reads. All of them are scraped, every second instead of every 50 ms, for 20,000 pages a second are
  more than two cores can serve.
- curve: an open loop over 64 connections, rates rising until the knee: the last rate at which p99 stays under 10 ms
  and answers keep up with what was asked. Then the latency at 70 % of the knee, for longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import aiohttp
import cyclopts
import msgspec
import uvloop

from bench import report
from bench.load import Answers, Ask, closed_loop, open_loop
from bench.subjects import GO, OURS, Others, Subject, chosen, cpu, model_servers, subject
from epp.demo import envoy
from epp.demo.child import Child
from epp.demo.envoy import Gateway, Picker

PARTS: Final = {"idle", "load", "many", "curve"}
PODS: Final = 100
ADDRESSES: Final = 10
"""Loopback addresses of each listener where there are many candidates."""
EVERY_SECOND: Final = ("--refresh-metrics-interval=1s", "--metrics-staleness-threshold=5s")
CONNECTIONS: Final = {"load": 16, "many": 16, "curve": 64}
SETTLE: Final = 2.0
"""Seconds before anything is measured: each server has been asked for its page many times."""
SLOWEST: Final = 0.010
"""Seconds of p99 that end the curve."""
KEEPS_UP: Final = 0.97
"""Share of what was asked that must be answered by the time of the last arrival."""
KNEE_SHARE: Final = 0.7


class Figures(msgspec.Struct, frozen=True):
    """One line: what was done, how many cores each process used, what came of it."""

    part: str
    subject: str
    rate: float
    """Requests a second that were asked for; 0: a closed loop, or none."""
    picker: float
    envoy: float
    servers: float
    load: float
    """Cores of the process that asks, this one."""
    others: float
    """Cores of whoever else runs on this machine."""
    took: float
    """Seconds that all this was measured over."""
    pages: float
    """Metrics pages that the picker read, a second."""
    answers: Answers | None = None

    @property
    def keeps_up(self) -> bool:
        answers = self.answers
        assert answers is not None
        return answers.p99 < SLOWEST and answers.answered >= KEEPS_UP * answers.came


def knee(points: Sequence[Figures]) -> float:
    """The highest rate that was kept up with; 0: none."""
    return max((point.rate for point in points if point.keeps_up), default=0.0)


Work = Callable[[], Awaitable[Answers | None]]


class Fleet:
    """One subject, its model servers, and Envoy in front."""

    def __init__(self, measured: Subject, servers: Child, server: str, gateway: envoy.Envoy) -> None:
        """
        Args:
            server: ip:port of one of the model servers.
        """
        self.name = measured.name
        self._pids = measured.process.pid, gateway.child.pid, servers.pid
        self._port = gateway.ports["pool"]
        self._server = server

    async def idle(self, seconds: float) -> Figures:
        return await self._measured("idle", 0.0, lambda: _nothing(seconds))

    async def load(self, part: str, seconds: float) -> Figures:
        await closed_loop(self._port, Ask(), 1.0, CONNECTIONS[part])
        return await self._measured(part, 0.0, lambda: closed_loop(self._port, Ask(), seconds, CONNECTIONS[part]))

    async def at(self, rate: float, seconds: float, part: str = "curve") -> Figures:
        return await self._measured(
            part, rate, lambda: open_loop(self._port, Ask(), rate, seconds, CONNECTIONS["curve"], seed=round(rate))
        )

    async def curve(self, first: float, step: float, seconds: float) -> list[Figures]:
        """Rates until one is too much for the second time (once may be somebody else's doing on this machine), and
        then 70 % of the last that was not."""
        await self.at(first, 2.0)
        points: list[Figures] = []
        rate = first
        while sum(not point.keeps_up for point in points) < 2:
            points.append(await self.at(rate, seconds))
            rate += step
        highest = knee(points)
        return [*points, await self.at(KNEE_SHARE * highest, 3 * seconds, "70 %")] if highest else points

    async def _measured(self, part: str, rate: float, work: Work) -> Figures:
        pages = await self._pages()
        others = Others(self._pids)
        before, own, began = [cpu(pid) for pid in self._pids], time.process_time(), time.monotonic()
        answers = await work()
        took = time.monotonic() - began
        picker, gateway, servers = (
            (cpu(pid) - earlier) / took for pid, earlier in zip(self._pids, before, strict=True)
        )
        own = (time.process_time() - own) / took
        pages = (await self._pages() - pages) / took
        return Figures(part, self.name, rate, picker, gateway, servers, own, others.cores(), took, pages, answers)

    async def _pages(self) -> float:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self._server}/served") as response:
            return float(await response.text())


async def _nothing(seconds: float) -> None:
    await asyncio.sleep(seconds)


@contextlib.asynccontextmanager
async def fleet(name: str, *, many: bool) -> AsyncIterator[Fleet]:
    """Start everything; ready and scraped when the block begins."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers, ports = await stack.enter_async_context(model_servers(PODS, folder, "0.0.0.0"))
        hosts = [f"127.0.0.{1 + at}" for at in range(ADDRESSES if many else 1)]
        addresses = [f"{host}:{port}" for host in hosts for port in ports]
        flags = EVERY_SECOND if many else ()
        measured = await stack.enter_async_context(subject(name, folder, addresses, *flags))
        envoy.write_endpoints(folder / "pool.json", addresses)
        asked = Picker(address=measured.address, response="SEND/NONE/SEND")
        gateways = [Gateway(name="pool", endpoints=folder / "pool.json", picker=asked)]
        gateway = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        await asyncio.sleep(SETTLE)
        yield Fleet(measured, servers, addresses[0], gateway)


async def measure(name: str, parts: set[str], seconds: float, first: float, step: float) -> list[Figures]:
    """All parts for one subject."""
    figures: list[Figures] = []
    if parts & {"idle", "load", "curve"}:
        async with fleet(name, many=False) as running:
            if "idle" in parts:
                figures.append(await running.idle(seconds))
            if "load" in parts:
                figures.append(await running.load("load", seconds))
            if "curve" in parts:
                figures += await running.curve(first, step, seconds)
    if "many" in parts:
        async with fleet(name, many=True) as running:
            figures.append(await running.load("many", seconds))
    return figures


def row(line: Figures) -> tuple[str, ...]:
    cores = [f"{used:.2f}" for used in (line.picker, line.envoy, line.servers, line.load, line.others)]
    rest = (f"{line.pages:.0f}", *cores)
    answers = line.answers
    if answers is None:
        return (line.part, line.subject, *["-"] * 6, *rest)
    asked = f"{line.rate:.0f}" if line.rate else "-"
    answered = f"{answers.answered / answers.seconds:.0f}"
    per_request = f"{1e6 * line.picker * line.took / answers.answered:.0f}"
    latencies = (f"{1000 * latency:.2f}" for latency in (answers.p50, answers.p90, answers.p99))
    return (line.part, line.subject, asked, answered, per_request, *latencies, *rest)


async def run(names: list[str], parts: set[str], seconds: float, first: float, step: float, json: Path | None) -> None:
    figures: list[Figures] = []
    for name in names:
        figures += await measure(name, parts, seconds, first, step)
    report.write(json, "fleet", figures)
    requests = ("asked/s", "done/s", "us each", "p50", "p90", "p99", "pages/s")
    cores = ("picker", "Envoy", "pods", "load", "others")
    table = report.table(f"{PODS} model servers", "part", "who", *requests, *cores, texts=2)
    for line in figures:
        table.add_row(*row(line))
    report.show(
        table,
        "us each: CPU of the picker per request, scraping included. p50 to p99: ms. The last five columns: cores used.",
        "The curve is an open loop, its latencies count from the time of arrival.",
    )
    for name in names:
        points = [each for each in figures if each.subject == name and each.part == "curve"]
        if points:
            print(f"Knee of {name}: {knee(points):.0f} requests a second.")


def main(
    *,
    parts: str = "idle,load,many,curve",
    subjects: str = ",".join((*OURS, GO)),
    seconds: float = 5.0,
    first: float = 500.0,
    step: float = 500.0,
    json: Path | None = None,
) -> None:
    """Measure what many model servers cost.

    Parameters
    ----------
    parts
        Which, separated by commas.
    subjects
        Whom, separated by commas; "go" needs EPP_GO, the path of the reference picker's binary.
    seconds
        Of each part, and of each rate.
    first
        Requests a second with which the curve begins.
    step
        By how many more each rate is.
    json
        File for the raw figures.
    """
    listed = set(parts.split(","))
    if unknown := listed - PARTS:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(sorted(PARTS))}")
    uvloop.run(run(chosen(subjects), listed, seconds, first, step, json))


if __name__ == "__main__":
    cyclopts.run(main)
