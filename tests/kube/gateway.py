"""The Envoy that operators are given, in front of pickers of a real cluster, model servers that come and go, and load.

In: config/envoy/standalone-eds.yaml, whose ports alone are changed. Out: a gateway whose hosts come from a picker, and
a count of what became of every request.
Rules here: model servers stand on addresses of loopback, all on one port, as pods do; each says who it is. A request
that does not end in a whole 200 is lost, and the test says which.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import yaml

from epp.demo.child import child, free_ports
from epp.demo.envoy import envoy_binary
from tests.e2e import client as http
from tests.e2e.client import chat, post
from tests.e2e.serving import Picker, until
from tests.e2e.test_eds import with_ports
from tests.e2e.upstream import Answer, Seen, Upstream

ASKED: Final = post("/v1/chat/completions", chat())
HELD: Final = post("/v1/chat/completions", chat(user="held"))
"""Answered in two halves, the second when `Servers.end` is set."""


class Servers:
    """Model servers on addresses of loopback, on one port."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.port = 0
        self.by_host: dict[str, Upstream] = {}
        self.end = asyncio.Event()
        self._stack = stack

    async def start(self, host: str) -> Upstream:
        server = self.by_host[host] = Upstream(host)
        if self.port:
            server.address = f"{host}:{self.port}"
        await server.listen()
        self.port = int(server.address.rpartition(":")[2])
        self._stack.push_async_callback(server.close)
        server.answer = lambda seen: self._answer(seen, host)
        return server

    def _answer(self, seen: Seen, host: str) -> Answer:
        who = host.encode()
        return Answer(steps=(who, self.end, b" held")) if b"held" in seen.body else Answer(steps=(who,))


class Load:
    """Clients who ask one request after another, until told to stop."""

    def __init__(self, port: int) -> None:
        self.served: Counter[str] = Counter()
        """Whole answers, by who gave them."""
        self.lost: list[http.Got] = []
        self._port = port
        self._done = asyncio.Event()

    async def ask(self) -> None:
        while not self._done.is_set():
            got = await http.send(self._port, ASKED)
            if got.status == 200 and got.complete:
                self.served[got.body.decode()] += 1
            else:
                self.lost.append(got)
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self._done.set()

    async def goes_on(self, requests: int = 50) -> None:
        """Wait until so many more are answered, or until one is lost."""
        enough = self.served.total() + requests

        async def seen() -> bool:
            return self.served.total() >= enough or bool(self.lost)

        await until(seen, True, within=30.0)
        assert self.lost == []


@asynccontextmanager
async def asking(port: int, clients: int = 6) -> AsyncIterator[Load]:
    """Load for as long as the block runs; afterwards none may be lost."""
    load = Load(port)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(load.ask())
        try:
            yield load
        finally:
            load.stop()
    assert load.lost == []
    assert load.served.total() > 0


class Gateway(msgspec.Struct, frozen=True):
    """A running Envoy."""

    port: int
    admin: int

    async def retries(self) -> int:
        """Requests that were tried again, ever."""
        url = f"http://127.0.0.1:{self.admin}/stats?filter=^cluster.pool.upstream_rq_retry$"
        async with aiohttp.ClientSession() as session, session.get(url) as page:
            return int((await page.text()).rpartition(":")[2])


@asynccontextmanager
async def envoy(folder: Path, pickers: Sequence[Picker]) -> AsyncIterator[Gateway]:
    """The shipped standalone Envoy. With several pickers it asks those in turn whose health service says that they
    serve, as a gateway does with the pods of a Service."""
    gateway, admin = free_ports(2)
    first = pickers[0]
    ports = {"gateway": gateway, "admin": admin, "ext_proc": _port(first.address), "health": _port(first.health)}
    config: dict[str, Any] = yaml.safe_load(with_ports(ports))
    if len(pickers) > 1:
        _share(config, pickers)
    where = folder / "envoy.yaml"
    where.write_text(yaml.safe_dump(config))
    flags = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
    async with child("envoy", envoy_binary(), "-c", where, *flags, folder=folder) as process:

        async def serves() -> bool:
            try:
                return (await http.send(gateway, ASKED)).status == 200
            except OSError:
                return False

        await process.until(serves, "answer through the gateway", within=30.0)
        yield Gateway(gateway, admin)


def _share(config: dict[str, Any], pickers: Sequence[Picker]) -> None:
    clusters = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
    for name, addresses in (
        ("picker", [picker.address for picker in pickers]),
        ("picker-eds", [picker.health for picker in pickers]),
    ):
        hosts = [_host(address) for address in addresses]
        if name == "picker":
            for host, picker in zip(hosts, pickers, strict=True):
                host["endpoint"]["health_check_config"] = {"port_value": _port(picker.health)}
        clusters[name]["load_assignment"]["endpoints"] = [{"lb_endpoints": hosts}]
        clusters[name]["health_checks"] = [
            {
                "timeout": "1s",
                "interval": "0.2s",
                "no_traffic_interval": "0.2s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {},
                **({"transport_socket_match_criteria": {"plain": True}} if name == "picker" else {}),
            }
        ]
    picker = clusters["picker"]
    picker["transport_socket_matches"] = [
        {
            "name": "plain",
            "match": {"plain": True},
            "transport_socket": {
                "name": "raw",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
                },
            },
        }
    ]


def _host(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
