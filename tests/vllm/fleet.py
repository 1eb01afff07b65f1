"""Two real vLLM servers, a real `epp serve` over them, a real Envoy with two gateways: the picker's, and round robin.

In: the command that serves on $PORT. Out: addresses, URLs, the picker, and a server's own page when it is asked for.
Rules here: the picker runs the shipped config/picker/file-discovery.yaml, with one plugin more: vLLM does not name
itself in its answers, so the picker does it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import yaml
from prometheus_client.parser import text_string_to_metric_families

from epp.demo import envoy
from epp.demo.child import child, free_ports
from tests.e2e import serving
from tests.e2e.serving import Picker

SAMPLE: Final = Path(__file__).parents[2] / "config" / "picker" / "file-discovery.yaml"
VERIFIER: Final = "destination-endpoint-served-verifier"
SERVED_BY: Final = "x-conformance-test-served-endpoint"
"""What VERIFIER adds to an answer: the endpoint that gave it."""
START_WITHIN: Final = 240.0
"""Seconds that vLLM has for its start; a model on a GPU that compiles takes that long."""
SERVERS: Final = 2


class Row(msgspec.Struct, frozen=True):
    """What the picker says of one endpoint; None: it does not know."""

    name: str
    address: str
    page_age: float | None
    waiting: float | None
    running: float | None
    kv_usage: float | None
    kv_blocks: float | None
    block_size: float | None
    inflight: float | None


class Fleet:
    """All that the tests look at."""

    def __init__(self, addresses: list[str], model: str, picker: Picker, gateway: envoy.Envoy) -> None:
        self.addresses = addresses
        self.model = model
        """What the servers call their base model."""
        self.picker = picker
        self.picked = gateway.url("picked")
        self.round_robin = gateway.url("round-robin")

    async def page(self, address: str) -> bytes:
        """A server's own page."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
            assert answer.status == 200
            return await answer.read()

    async def told(self, address: str) -> Told:
        return Told(await self.page(address))

    async def rows(self) -> list[Row]:
        """The picker's view, in the order of `addresses`."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.picker.pages}/debug/endpoints") as answer:
            rows = msgspec.json.decode(await answer.read(), type=list[Row])
        return sorted(rows, key=lambda row: self.addresses.index(row.address))

    async def ask(self, url: str, path: str, body: dict[str, Any]) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and JSON of an answer."""
        async with aiohttp.ClientSession() as session, session.post(f"{url}{path}", json=body) as answer:
            return answer.status, answer.headers, await answer.json()

    async def idle(self) -> None:
        """Wait until neither the servers nor the picker know of a request."""

        async def loads() -> list[float | None]:
            own = [(await self.told(address)).sum("vllm:num_requests_running") for address in self.addresses]
            rows = await self.rows()
            return own + [value for row in rows for value in (row.waiting, row.running, row.inflight)]

        await serving.until(loads, [0.0] * (4 * SERVERS), within=30.0)


class Told:
    """A page as prometheus_client reads it, which is not how the picker does."""

    def __init__(self, page: bytes) -> None:
        families = text_string_to_metric_families(page.decode())
        self._samples = [sample for family in families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Of all series of this name with these labels, of which there must be one."""
        found = [each.value for each in self._samples if each.name == name and labels.items() <= each.labels.items()]
        assert found, f"{name} {labels} is not on the page"
        return sum(found)

    def text(self, name: str, label: str) -> str:
        """A label's value in the one series of this name."""
        (found,) = (each.labels[label] for each in self._samples if each.name == name)
        return found


@asynccontextmanager
async def fleet(folder: Path, command: str) -> AsyncIterator[Fleet]:
    """Run it all.

    Raises:
        ConfigError: a server does not start; with its last words.
    """
    async with AsyncExitStack() as stack:
        servers = [server(folder, f"vllm-{number}", command) for number in range(SERVERS)]
        addresses = await asyncio.gather(*(stack.enter_async_context(each) for each in servers))
        picker = await stack.enter_async_context(_picker(folder, addresses))
        listing = folder / "pool.json"
        envoy.write_endpoints(listing, addresses)
        asked = envoy.Picker(address=picker.address)
        gateways = [
            envoy.Gateway(name="picked", endpoints=listing, picker=asked),
            envoy.Gateway(name="round-robin", endpoints=listing),
        ]
        gateway = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        made = Fleet(addresses, await _warm(addresses), picker, gateway)
        await made.idle()
        yield made


@asynccontextmanager
async def server(folder: Path, name: str, command: str) -> AsyncIterator[str]:
    """One vLLM; its address."""
    (port,) = free_ports(1)
    shell = ("sh", "-c", f"exec {command}")  # signals are for vLLM, not for a shell before it
    async with child(name, *shell, folder=folder, env={"PORT": str(port)}, grace=20.0) as process:

        async def healthy() -> bool:
            try:
                async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/health") as answer:
                    return answer.status == 200
            except aiohttp.ClientConnectionError:
                return False

        await process.until(healthy, "answer to /health", START_WITHIN)
        yield f"127.0.0.1:{port}"


async def _warm(addresses: list[str]) -> str:
    """Ask every server once, as its first answer takes longer. Returns what they call their base model."""
    async with aiohttp.ClientSession() as session:
        for address in addresses:
            async with session.get(f"http://{address}/v1/models") as answer:
                model: str = (await answer.json())["data"][0]["id"]
            body = {"model": model, "prompt": "warm up", "max_tokens": 8}
            async with session.post(f"http://{address}/v1/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
    return model


@asynccontextmanager
async def _picker(folder: Path, addresses: list[str]) -> AsyncIterator[Picker]:
    listing, config = folder / "endpoints.yaml", folder / "picker.yaml"
    serving.write_listing(listing, addresses)
    document = yaml.safe_load(SAMPLE.read_text())
    (discovery,) = (plugin for plugin in document["plugins"] if plugin["type"] == "file-discovery")
    discovery["parameters"]["path"] = str(listing)
    document["plugins"].append({"type": VERIFIER})
    config.write_text(yaml.safe_dump(document))
    ports = free_ports(3)
    options = ("--grpc-port", "--grpc-health-port", "--metrics-port")
    flags = [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
    flags += ["--pool-name=pool", f"--config-file={config}", "--secure-serving=false", "--drain-timeout=100ms"]
    async with child("picker", sys.executable, "-m", "epp", "serve", *flags, folder=folder) as process:
        made = Picker(process, *ports)

        async def ready() -> bool:
            return await made.serving() == "SERVING"

        await process.until(ready, "SERVING from its health service")
        yield made
        log = process.output(lines=10_000)
    assert "Traceback" not in log, log
    assert '"level": "error"' not in log, log
