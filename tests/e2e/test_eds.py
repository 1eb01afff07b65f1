"""Envoy learns its hosts from the picker itself: config/envoy/standalone-eds.yaml as it is, but for the ports.

The picker is in this process: its endpoints come from a file, and which of them is better is the test's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from epp.demo.child import child, free_ports
from epp.discovery.file import FileDiscovery
from epp.endpoints.table import EndpointTable, Page, address_text
from epp.extproc.conversation import PROCESS, Conversation
from epp.extproc.exchange import Limits
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.grpcio import GrpcioTransport
from epp.extproc.transport.options import Methods, Tls, Transport
from epp.extproc.transport.wire import WireTransport
from epp.telemetry.eds import Eds
from epp.telemetry.health import Health
from epp.telemetry.log import Problems
from epp.telemetry.tls import self_signed
from tests.contract.transport import picker_for
from tests.e2e import client
from tests.e2e.client import chat, post
from tests.e2e.serving import until, write_listing
from tests.e2e.upstream import Answer, Upstream
from tests.envoys import envoy_or_skip
from tests.watching import Watch

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
CONFIG = (ROOT / "config" / "envoy" / "standalone-eds.yaml").read_text()
PORTS = {"gateway": 8081, "admin": 19000, "ext_proc": 9002, "health": 9003}
"""As the file has them."""
KINDS = ["wire"]  # grpcio's threads in this process and the fork that starts Envoy do not go together


class Site:
    """Two model servers, a third that is not listed yet, a picker's two ports, and Envoy."""

    def __init__(self, folder: Path, kind: str, ports: dict[str, int]) -> None:
        self.a, self.b, self.c = Upstream(), Upstream(), Upstream("::1" if has_ipv6() else "127.0.0.1")
        self.ports = ports
        self.watch = Watch()
        self.picker = picker_for((), self.watch)
        self.table: EndpointTable = self.picker.table
        self.now = asyncio.get_running_loop().time
        self.kind = kind
        self._listing = folder / "endpoints.yaml"
        self.discovery = FileDiscovery(self._listing, True, self.table, self.now)

    async def discover(self, *upstreams: Upstream) -> None:
        """Change what the picker's file discovery reads, and wait until Envoy has heard of it."""
        self.write(*upstreams)
        await until(self.known, {upstream.address for upstream in upstreams})

    def write(self, *upstreams: Upstream) -> None:
        write_listing(self._listing, [upstream.address for upstream in upstreams])

    async def write_once_asked(self, eds: Eds, *upstreams: Upstream) -> None:
        """Nothing is listed until Envoy has asked."""
        while not eds.streams:
            await asyncio.sleep(0.02)
        self.write(*upstreams)

    async def listed(self) -> int:
        return len(self.table)

    def prefer(self, *upstreams: Upstream) -> None:
        """The picker's order from now on."""
        for waiting, upstream in enumerate(upstreams):
            slot = self.table.slot_at(upstream.address)
            assert slot is not None
            self.table.page_told(slot, self.table.generation(slot), Page(waiting=100.0 * waiting), self.now())

    async def served_by(self) -> str:
        """Who answered a request; else the status."""
        got = await client.send(self.ports["gateway"], post("/v1/chat/completions", chat()))
        return got.body.decode() if got.status == 200 else str(got.status)

    async def known(self) -> set[str]:
        """Hosts of Envoy's cluster, as the picker writes them."""
        statuses = json.loads(await self._page("clusters?format=json"))["cluster_statuses"]
        (pool,) = [status for status in statuses if status["name"] == "pool"]
        places = [host["address"]["socket_address"] for host in pool.get("host_statuses", ())]
        return {address_text(place["address"], place["port_value"]) for place in places}

    async def stat(self, name: str) -> int:
        line = await self._page(f"stats?filter=^{name}$")
        return int(line.rpartition(":")[2])

    async def live(self) -> bool:
        try:
            return await self._page("ready") == "LIVE\n"
        except aiohttp.ClientConnectionError:
            return False

    @contextlib.asynccontextmanager
    async def health_port(self) -> AsyncIterator[Eds]:
        """The picker's, with a service that begins now."""
        eds = Eds(self.table, Problems(logging.getLogger("epp.test")))
        transport = self._carrier({**Health().methods(), **eds.methods()})
        await transport.listen("127.0.0.1", self.ports["health"])
        following = asyncio.create_task(eds.run())
        try:
            yield eds
        finally:
            following.cancel()
            await transport.stop(0.0)

    @contextlib.asynccontextmanager
    async def ext_proc_port(self) -> AsyncIterator[None]:
        methods: Methods = {PROCESS: lambda peer, push, now: Conversation(self.picker, Limits(), peer, now)}
        transport = self._carrier(methods)
        await transport.listen("127.0.0.1", self.ports["ext_proc"], Tls(*self_signed()))
        following = asyncio.create_task(self.discovery.run())
        try:
            yield
        finally:
            following.cancel()
            await transport.stop(0.0)
        self.watch.check()

    def _carrier(self, methods: Methods) -> Transport:
        if self.kind == "wire":
            return WireTransport(methods, ConnectionLimits(), self.now)
        return GrpcioTransport(methods, self.now)

    async def _page(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.ports['admin']}/{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return await response.text()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def with_ports(ports: dict[str, int]) -> str:
    """The configuration file, on other ports."""
    text = CONFIG
    for name, was in PORTS.items():
        assert text.count(f"port_value: {was}}}") == 1
        text = text.replace(f"port_value: {was}}}", f"port_value: {ports[name]}}}")
    return text


def says_who_it_is(upstream: Upstream) -> None:
    upstream.answer = lambda seen: Answer(steps=(upstream.address.encode(),))


@contextlib.asynccontextmanager
async def envoy(folder: Path, site: Site) -> AsyncIterator[None]:
    from epp.demo.envoy import envoy_binary

    where = folder / "envoy.yaml"
    where.write_text(with_ports(site.ports))
    flags = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
    async with child("envoy", envoy_binary(), "-c", where, *flags, folder=folder) as process:
        await process.until(site.live, "LIVE from its admin page")
        yield


@pytest.fixture(scope="module", params=KINDS)
async def whole_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    envoy_or_skip()
    folder = tmp_path_factory.mktemp("eds")
    site = Site(folder, request.param, dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))
    async with contextlib.AsyncExitStack() as stack:
        for upstream in (site.a, site.b, site.c):
            await upstream.listen()
            stack.push_async_callback(upstream.close)
        site.write(site.a, site.b)
        await site.discovery.begin()
        await stack.enter_async_context(site.ext_proc_port())
        await stack.enter_async_context(site.health_port())
        await stack.enter_async_context(envoy(folder, site))
        yield site


@pytest.fixture
async def site(whole_site: Site) -> Site:
    """The site as it was at first: a and b are listed, and each says who it is."""
    for upstream in (whole_site.a, whole_site.b, whole_site.c):
        upstream.reset()
        says_who_it_is(upstream)
    await whole_site.discover(whole_site.a, whole_site.b)
    return whole_site


async def test_the_endpoint_that_the_picker_chose_serves(site: Site) -> None:
    for first, second in ((site.a, site.b), (site.b, site.a)) * 3:  # round robin would alternate otherwise
        for _ in range(3):
            site.prefer(first, second)
            assert await site.served_by() == first.address


async def test_the_second_choice_serves_when_the_first_is_dead(site: Site) -> None:
    await site.discover(site.a, site.b, site.c)
    await site.c.close()
    try:
        for second, third in ((site.a, site.b), (site.a, site.b), (site.b, site.a), (site.b, site.a)):
            site.prefer(site.c, second, third)
            retries = await site.stat("cluster.pool.upstream_rq_retry")
            assert await site.served_by() == second.address
            decided = site.watch.tickets[-1].decision.endpoints
            assert decided == (site.c.address, second.address, third.address)
            assert await site.stat("cluster.pool.upstream_rq_retry") == retries + 1
    finally:
        await site.c.listen()


async def test_an_endpoint_that_discovery_adds_is_reached(site: Site) -> None:
    await site.discover(site.a, site.b, site.c)
    site.prefer(site.c, site.a, site.b)
    assert await site.served_by() == site.c.address


async def test_an_endpoint_that_discovery_removes_is_gone_and_what_runs_there_is_finished(site: Site) -> None:
    end = asyncio.Event()
    site.b.answer = lambda seen: Answer(steps=(b"one", end, b"two"))
    site.prefer(site.b, site.a)
    running = asyncio.create_task(site.served_by())
    await site.b.started.wait()
    await site.discover(site.a)
    assert await site.served_by() == site.a.address
    end.set()
    assert await running == "onetwo"


async def test_an_empty_pool_is_known_as_such(site: Site) -> None:
    await site.discover()
    assert await site.served_by() == "503"


async def test_an_envoy_waits_for_the_first_endpoint_and_keeps_its_hosts_while_the_picker_is_away(
    whole_site: Site, tmp_path: Path
) -> None:
    """Envoy and a health port of the test's own: the port opens before there is an endpoint, goes, and comes back."""
    site = Site(tmp_path, whole_site.kind, dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))
    async with contextlib.AsyncExitStack() as stack:
        for upstream in (site.a, site.b):
            await upstream.listen()
            stack.push_async_callback(upstream.close)
            says_who_it_is(upstream)
        site.write()
        await site.discovery.begin()
        await stack.enter_async_context(site.ext_proc_port())
        async with site.health_port() as eds:
            first = asyncio.create_task(site.write_once_asked(eds, site.a))
            await stack.enter_async_context(envoy(tmp_path, site))
            assert first.done()  # a listener without hosts would have opened before
            assert await site.served_by() == site.a.address
        site.write(site.a, site.b)
        await until(site.listed, 2)
        site.prefer(site.b, site.a)
        assert await site.served_by() == site.a.address  # the one host that Envoy knows
        async with site.health_port():
            await until(site.known, {site.a.address, site.b.address}, within=15.0)
            assert await site.served_by() == site.b.address


def test_the_clusters_that_the_documentation_shows_are_those_of_the_file() -> None:
    section = (ROOT / "docs" / "envoy.md").read_text().partition("## Hosts from the picker itself (EDS)")[2]
    shown = re.search(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert shown is not None
    clusters = {cluster["name"]: cluster for cluster in yaml.safe_load(CONFIG)["static_resources"]["clusters"]}
    for cluster in yaml.safe_load(shown[1]):
        told = clusters[cluster["name"]]
        assert {key: told[key] for key in cluster} == cluster
