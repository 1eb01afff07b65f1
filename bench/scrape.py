"""What scraping costs: our scraper beside aiohttp's client doing the same, in the same run.

`python -m bench.scrape [SERVERS [INTERVAL [SECONDS]]]` starts that many model servers on loopback (default 100), each
with a recorded vLLM page of 57 KB, scrapes them every INTERVAL seconds (default 0.05) with one client after the other,
each in a process of its own on uvloop, and prints the CPU that each used. Both clients read the page and tell the
table. Then ours does the same over TLS. Below that: what reading one page costs beside a full parse by
prometheus_client.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Literal

import aiohttp
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench.servers import Page, Server
from epp.config.pages import MetricsSource
from epp.endpoints.table import Endpoint, EndpointTable
from epp.signals.page import VLLM, read_page
from epp.signals.scrape import Scraper
from epp.signals.sources import MetricsPages, way
from epp.telemetry.tls import self_signed

PAGE = Path(__file__).parents[1] / "tests" / "data" / "vllm-0.32.0" / "metrics-busy-3.txt"
WARM_UP = 1.0
"""Seconds before measuring: connections are opened."""

Count = Callable[[], int]
Running = tuple[Count, Awaitable[None]]
"""How many pages there were so far, and what fetches them."""
SERVE_TLS = "serve-tls"


async def ours(table: EndpointTable, interval: float, scheme: Literal["http", "https"] = "http") -> Running:
    scraper = Scraper(table, random.Random(0), (MetricsPages(way(MetricsSource(scheme=scheme), interval)),))
    return lambda: scraper.counts.pages, asyncio.create_task(scraper.run())


async def ours_over_tls(table: EndpointTable, interval: float) -> Running:
    return await ours(table, interval, "https")


async def with_aiohttp(table: EndpointTable, interval: float) -> Running:
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=1), auto_decompress=False
    )
    rng, pages = random.Random(0), 0

    async def follow(slot: int) -> None:
        nonlocal pages
        url = f"http://{table.endpoint(slot).address}/metrics"
        generation = table.generation(slot)
        await asyncio.sleep(rng.uniform(0, interval))
        while True:
            asked_at = time.monotonic()
            table.page_asked(slot)
            async with session.get(url) as response:
                body = await response.read()
            table.page_told(slot, generation, read_page(body, VLLM), asked_at)
            pages += 1
            await asyncio.sleep(max(0.0, asked_at + interval * rng.uniform(0.9, 1.1) - time.monotonic()))

    async def follow_all() -> None:
        async with session, asyncio.TaskGroup() as tasks:
            for slot in table.listed.tolist():
                tasks.create_task(follow(slot))

    return lambda: pages, asyncio.create_task(follow_all())


PLAIN = {"ours": ours, "aiohttp": with_aiohttp}
OVER_TLS = {"ours over TLS": ours_over_tls}
CLIENTS = {**PLAIN, **OVER_TLS}


async def measure(client: str, interval: float, seconds: float, ports: list[str]) -> None:
    """In the child: scrape for a while, print pages and CPU."""
    table = EndpointTable()
    table.replace([Endpoint(f"default/{port}", f"127.0.0.1:{port}") for port in ports], time.monotonic())
    count, running = await CLIENTS[client](table, interval)
    await asyncio.sleep(WARM_UP)
    pages, cpu, began = count(), time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    pages, cpu, took = count() - pages, time.process_time() - cpu, time.monotonic() - began
    fresh = int(table.candidates(time.monotonic()).fresh().sum())
    print(json.dumps({"pages": pages / took, "cores": cpu / took, "us": cpu / pages * 1e6, "fresh": fresh}))
    assert isinstance(running, asyncio.Task)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def serve_tls(number: str) -> None:
    """In a child: as `bench.servers`, over TLS."""
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = self_signed()
        file = Path(folder) / "both.pem"
        file.write_bytes(key + certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
    loop, served = asyncio.get_running_loop(), Page(PAGE.read_bytes())
    listening = [
        await loop.create_server(lambda: Server(served), "127.0.0.1", 0, ssl=context) for _ in range(int(number))
    ]
    print(*(server.sockets[0].getsockname()[1] for server in listening), flush=True)
    await asyncio.Event().wait()


def compare(servers: int, interval: float, seconds: float) -> None:
    """In the parent: the servers, and one client after the other."""
    costs = {
        **_costs(["bench.servers", str(servers), str(PAGE)], PLAIN, interval, seconds),
        **_costs(["bench.scrape", SERVE_TLS, str(servers)], OVER_TLS, interval, seconds),
    }
    print(f"{servers} servers, a page of {PAGE.stat().st_size} bytes every {interval * 1000:g} ms")
    for client, cost in costs.items():
        ratio = cost["us"] / costs["aiohttp"]["us"]
        print(
            f"  {client:13} {cost['pages']:6.0f} pages/s  {cost['cores']:.3f} cores  {cost['us']:4.0f} us a page "
            f"({ratio:.2f}x aiohttp's)  {cost['fresh']:g} endpoints fresh"
        )


def _costs(server: list[str], clients: Iterable[str], interval: float, seconds: float) -> dict[str, dict[str, float]]:
    with subprocess.Popen([sys.executable, "-m", *server], stdout=subprocess.PIPE, text=True) as backend:
        assert backend.stdout is not None
        ports = backend.stdout.readline().split()
        try:
            return {client: _run_client(client, interval, seconds, ports) for client in clients}
        finally:
            backend.terminate()


def _run_client(client: str, interval: float, seconds: float, ports: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.scrape", client, str(interval), str(seconds), *ports]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    cost: dict[str, float] = json.loads(done.stdout)
    return cost


def compare_reading() -> None:
    page = PAGE.read_bytes()
    mine = _best(lambda: read_page(page, VLLM), 1000)
    full = _best(lambda: list(text_string_to_metric_families(page.decode())), 3)
    print(f"reading one page: {mine:.0f} us, a full parse {full:.0f} us ({mine / full:.4f}x)")


def _best(work: Callable[[], object], times: int) -> float:
    """Microseconds a call, the best of five rounds."""
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times):
            work()
        rounds.append((time.perf_counter() - began) / times)
    return min(rounds) * 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE_TLS]:
        uvloop.run(serve_tls(sys.argv[2]))
    elif sys.argv[1:2] and sys.argv[1] in CLIENTS:
        uvloop.run(measure(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    else:
        chosen = [*map(float, sys.argv[1:]), *(100.0, 0.05, 5.0)[len(sys.argv) - 1 :]]
        compare(int(chosen[0]), chosen[1], chosen[2])
        compare_reading()
