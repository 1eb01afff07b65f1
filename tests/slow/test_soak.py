"""The demo's load while servers are killed, stalled, added and taken away every few seconds.

Allowed to fail: a request whose answer had already begun on a server that died (`truncated`, `reset`), or that a
stalled server held until Envoy's stated limit. Nothing else, and afterwards every count is back to zero.
EPP_SOAK_SECONDS sets the length (default 60; `make soak` takes 600).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest

from epp.demo import envoy
from epp.demo.child import Child, child, free_ports
from epp.load.client import Load, run_load
from epp.load.results import Result
from epp.sim.workload import DEMO
from tests.e2e import serving

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SECONDS = float(os.environ.get("EPP_SOAK_SECONDS", "60"))
FLEET = 5
HEALTHY = 3
"""Servers that are left alone at any time."""
STALLED_AFTER = 6.0
STALL = 3.0
RATE = 16.0
BEGUN = frozenset(("truncated", "reset"))
"""How a client sees an answer that had begun and did not end."""
SCORERS = {"queue-scorer": 2.0, "kv-cache-utilization-scorer": 2.0, "prefix-cache-scorer": 3.0}


class Server:
    """A model server in a process of its own, so that it can be killed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.is_well = False
        self.process: Child | None = None
        self._stack = contextlib.AsyncExitStack()

    async def start(self, folder: Path) -> None:
        options = [f"--port={self.port}", "--engine=demo", f"--model={DEMO.model}"]
        options += [f"--adapters={adapter}" for adapter in DEMO.adapters]
        command = (sys.executable, "-m", "epp", "model-server", *options)
        name = f"server-{self.port}"
        process = self.process = await self._stack.enter_async_context(child(name, *command, folder=folder))

        async def ready() -> bool:
            return "addresses" in process.output()

        await process.until(ready, "addresses")
        self.is_well = True

    async def kill(self) -> None:
        assert self.process is not None
        self.is_well = False
        self.process.kill()
        await self.process.process.wait()

    async def stop(self) -> None:
        self.is_well = False
        if self.process is not None:
            self.process.signal(signal.SIGCONT)
        await self._stack.aclose()


class Chaos:
    """What goes wrong next: one thing every two seconds, so that several are wrong at a time."""

    def __init__(self, folder: Path, rng: Random, servers: list[Server], listings: tuple[Path, Path]) -> None:
        self._folder = folder
        self._rng = rng
        self.servers = servers
        self._listings = listings
        self.done: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as tasks:
            while asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(2.0)
                well = [server for server in self.servers if server.is_well]
                if len(well) > HEALTHY:
                    what = self._rng.choice((self._die, self._stall, self._lose_metrics, self._leave))
                    tasks.create_task(what(self._rng.choice(well)))
                elif len(self.servers) < FLEET:
                    tasks.create_task(self._join())

    async def _die(self, server: Server) -> None:
        self.done["killed"] += 1
        await server.kill()
        await asyncio.sleep(3.0)
        await server.start(self._folder)

    async def _stall(self, server: Server) -> None:
        assert server.process is not None
        self.done["stalled"] += 1
        server.is_well = False
        server.process.signal(signal.SIGSTOP)
        await asyncio.sleep(STALL)
        server.process.signal(signal.SIGCONT)
        server.is_well = True

    async def _lose_metrics(self, server: Server) -> None:
        self.done["without metrics"] += 1
        server.is_well = False
        for fault in (self._rng.choice(("hang", "garbage", "die")), "none"):
            async with aiohttp.ClientSession() as session:
                await session.post(f"http://{server.address}/faults", json={"metrics": fault})
            await asyncio.sleep(3.0)
        server.is_well = True

    async def _leave(self, server: Server) -> None:
        """Leaves in good order: taken off the lists first, then asked to end once its requests are through."""
        self.done["left"] += 1
        server.is_well = False
        self.servers.remove(server)
        self.list_all()
        await asyncio.sleep(5.0)
        await server.stop()

    async def _join(self) -> None:
        self.done["joined"] += 1
        (port,) = free_ports(1)
        server = Server(port)
        self.servers.append(server)
        await server.start(self._folder)
        self.list_all()

    def list_all(self) -> None:
        addresses = [server.address for server in self.servers]
        envoy.write_endpoints(self._listings[0], addresses)
        serving.write_listing(self._listings[1], addresses)


@contextlib.asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[list[Server]]:
    servers = [Server(port) for port in free_ports(FLEET)]
    try:
        await asyncio.gather(*(server.start(folder) for server in servers))
        yield servers
    finally:
        await asyncio.gather(*(server.stop() for server in servers))


def unexpected(results: list[Result]) -> list[str]:
    """Failures that nothing excuses."""
    return [
        f"{result.error} (status {result.status}) from {result.served_by or 'nobody'} at {result.scheduled_at:.1f} s"
        for result in results
        if result.error
        and not (result.error in BEGUN and result.status == 200)
        and not (result.ended_at - result.sent_at >= STALLED_AFTER)
    ]


async def test_servers_may_die_and_nobody_notices_who_had_no_answer_yet(tmp_path: Path) -> None:
    rng = Random(1)
    async with fleet(tmp_path) as servers, contextlib.AsyncExitStack() as stack:
        addresses = [server.address for server in servers]
        flags = ("--secure-serving=false", "--seed=1")
        picker = await stack.enter_async_context(serving.picker(tmp_path, "picker", addresses, *flags, scorers=SCORERS))
        (tmp_path / "eds").mkdir()
        listing = tmp_path / "eds" / "pool.json"
        envoy.write_endpoints(listing, addresses)
        asked = envoy.Picker(address=picker.address)
        gateway = envoy.Gateway(name="pool", endpoints=listing, picker=asked, stalled_after=STALLED_AFTER, retries=4)
        running = await stack.enter_async_context(envoy.running(envoy.bootstrap([gateway]), tmp_path))
        chaos = Chaos(tmp_path, rng, servers, (listing, tmp_path / "picker.endpoints.yaml"))
        load = Load()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(chaos.run(SECONDS))
            tasks.create_task(run_load(DEMO.arrivals(1, SECONDS, RATE), running.url("pool"), load=load))
        print(f"{len(load.results)} requests, {dict(chaos.done)}, {Counter(r.error for r in load.results if r.error)}")
        assert unexpected(load.results) == []
        assert chaos.done["killed"] > 0
        await serving.until(picker.in_flight, {})
        running_gauge = await picker.metric("llm_d_epp_request_running")
        assert set(running_gauge.values()) <= {0.0}
