"""Everything that the demo runs, started in order and stopped in the reverse of it.

In: nothing but a folder. Out: two equal fleets of simulated model servers, a picker over the left one, one Envoy with
a gateway for each fleet.
Rules: every part is a child process (`epp.demo.child`), so that nothing outlives the demo and its CPU is its own;
ports are free ones, but for the gateways, whose numbers a person types.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import yaml

from epp.demo import envoy
from epp.demo.child import Child, child, free_ports
from epp.sim.workload import Workload

FLEET = 4
"""Model servers a fleet."""
GATEWAY_PORTS = {"picker": 8080, "round_robin": 8081}
STALLED_AFTER = 20.0
"""Seconds without a byte from a model server after which Envoy gives it up."""

SCORERS = {
    "queue-scorer": 2.0,
    "kv-cache-utilization-scorer": 2.0,
    "prefix-cache-scorer": 3.0,
    "lora-affinity-scorer": 1.0,
}
"""The reference's default weights, and adapters kept where they are loaded."""


class Site(msgspec.Struct, frozen=True):
    """What runs, and where to reach it."""

    picker_url: str
    """Gateway in front of the left fleet."""
    round_robin_url: str
    """Gateway in front of the right fleet."""
    pages: str
    """The picker's /metrics and /debug."""
    left: tuple[str, ...]
    """Addresses of the picker's fleet."""
    right: tuple[str, ...]
    notes: tuple[str, ...]
    """What a person should know, as a port that was taken."""


@contextlib.asynccontextmanager
async def running(folder: Path, workload: Workload, seed: int) -> AsyncIterator[Site]:
    """Run the whole site for as long as the block runs; everything answers when the block begins.

    Raises:
        ConfigError: a part does not start; the message has its last words.
    """
    ports, notes = _gateway_ports()
    async with contextlib.AsyncExitStack() as stack:
        left = await stack.enter_async_context(_fleet("left", folder, workload, seed))
        right = await stack.enter_async_context(_fleet("right", folder, workload, seed))
        picker, pages = await stack.enter_async_context(_picker(folder, left, seed))
        for name, addresses in (("picker", left), ("round_robin", right)):
            envoy.write_endpoints(folder / "eds" / f"{name}.json", addresses)
        gateways = [
            envoy.Gateway(
                name=name,
                endpoints=folder / "eds" / f"{name}.json",
                port=ports[name],
                picker=envoy.Picker(address=picker) if name == "picker" else None,
                stalled_after=STALLED_AFTER,
            )
            for name in ports
        ]
        gateway = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        yield Site(gateway.url("picker"), gateway.url("round_robin"), pages, left, right, notes)


@contextlib.asynccontextmanager
async def _fleet(name: str, folder: Path, workload: Workload, seed: int) -> AsyncIterator[tuple[str, ...]]:
    options = ["--port=0", f"--count={FLEET}", "--engine=demo", f"--model={workload.model}", f"--seed={seed}"]
    options += [f"--adapters={adapter}" for adapter in workload.adapters]
    async with child(f"servers-{name}", *_epp("model-server", *options), folder=folder, grace=1.0) as process:

        async def ready() -> bool:
            return '{"addresses"' in process.output(1)

        await process.until(ready, "addresses")
        yield tuple(json.loads(process.output(1))["addresses"])


@contextlib.asynccontextmanager
async def _picker(folder: Path, addresses: tuple[str, ...], seed: int) -> AsyncIterator[tuple[str, str]]:
    """Yields the picker's address and the URL of its pages."""
    listing = folder / "endpoints.yaml"
    endpoints = [
        {"name": f"server-{n}", "address": host, "port": port}
        for n, (host, _, port) in enumerate(address.rpartition(":") for address in addresses)
    ]
    listing.write_text(yaml.safe_dump({"endpoints": endpoints}))
    config = folder / "picker.yaml"
    config.write_text(yaml.safe_dump(_configuration(listing), sort_keys=False))
    port, health, pages = free_ports(3)
    options = [f"--grpc-port={port}", f"--grpc-health-port={health}", f"--metrics-port={pages}", f"--seed={seed}"]
    options += ["--pool-name=demo", f"--config-file={config}", "--secure-serving=false", "--drain-timeout=2s"]
    async with child("picker", *_epp("serve", *options), folder=folder, grace=4.0) as process:
        url = f"http://127.0.0.1:{pages}"
        await process.until(lambda: _answers(process, f"{url}/debug/endpoints"), "answer")
        yield f"127.0.0.1:{port}", url


def _configuration(listing: Path) -> dict[str, object]:
    """An EndpointPickerConfig: these scorers, and two fallbacks for Envoy."""
    picks = {"type": "max-score-picker", "parameters": {"maxNumOfEndpoints": 3}}
    discovers = {"type": "file-discovery", "parameters": {"path": str(listing), "watchFile": True}}
    weighted = [{"pluginRef": name, "weight": weight} for name, weight in SCORERS.items()]
    return {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [discovers, *({"type": name} for name in SCORERS), picks],
        "schedulingProfiles": [{"name": "default", "plugins": [*weighted, {"pluginRef": "max-score-picker"}]}],
        "dataLayer": {"discovery": {"pluginRef": "file-discovery"}},
    }


async def _answers(process: Child, url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            rows = await response.json()
    except aiohttp.ClientError:
        return False
    return bool(rows) and all(row["page_age"] is not None for row in rows)


def _epp(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "epp", *words)


def _gateway_ports() -> tuple[dict[str, int], tuple[str, ...]]:
    """The gateways' usual ports, or free ones where those are taken, and a note for each that was."""
    ports: dict[str, int] = {}
    notes: list[str] = []
    for name, usual in GATEWAY_PORTS.items():
        ports[name] = usual
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind(("127.0.0.1", usual))
            except OSError:
                (ports[name],) = free_ports(1)
                notes.append(f"port {usual} is taken: the {name.replace('_', ' ')} gateway is on {ports[name]}")
    return ports, tuple(notes)
