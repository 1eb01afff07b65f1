"""The real `epp serve` as a process, over model servers listed in a file."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from epp.demo.child import Child, child, free_ports

QUEUE_ALONE = {"queue-scorer": 1.0}
"""One scorer, so that a test can say which server is the better one."""

STATUSES = {b"": "UNKNOWN", b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "SERVICE_UNKNOWN"}
"""grpc.health.v1.HealthCheckResponse, its one field read by hand."""


class Picker:
    """A running `epp serve`."""

    def __init__(self, process: Child, port: int, health_port: int, metrics_port: int) -> None:
        self.process = process
        self.address = f"127.0.0.1:{port}"
        self.health = f"127.0.0.1:{health_port}"
        self.pages = f"http://127.0.0.1:{metrics_port}"

    async def metric(self, name: str, label: str = "endpoint_name") -> dict[str, float]:
        """Sums of a family of /metrics by the value of one label, "" where it is absent."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.pages}/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        sums: dict[str, float] = defaultdict(float)
        for sample in (sample for family in families for sample in family.samples if sample.name == name):
            sums[sample.labels.get(label, "")] += sample.value
        return dict(sums)

    async def in_flight(self) -> dict[str, float]:
        """Requests under way, by endpoint; those without any are left out."""
        counts = await self.metric("llm_d_epp_inflight_requests")
        return {name: count for name, count in counts.items() if count}

    async def serving(self, service: str = "") -> str:
        """What the health service says of a service, by the name of its status; the gRPC code's where it fails."""
        async with grpc.aio.insecure_channel(self.health) as channel:
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            try:
                answer = await check(b"\x0a" + bytes([len(service)]) + service.encode() if service else b"", timeout=2)
            except grpc.aio.AioRpcError as error:
                return error.code().name
        return STATUSES[answer]


@contextlib.asynccontextmanager
async def picker(
    folder: Path,
    name: str,
    endpoints: Iterable[str],
    *flags: str,
    scorers: Mapping[str, float] = QUEUE_ALONE,
    drain: str = "100ms",
) -> AsyncIterator[Picker]:
    """Run `epp serve` over these endpoints, named e0, e1 and so on; `folder/name.endpoints.yaml` lists them."""
    listing, config = folder / f"{name}.endpoints.yaml", folder / f"{name}.yaml"
    write_listing(listing, endpoints)
    config.write_text(configuration(listing, scorers))
    ports = free_ports(3)
    options = ("--grpc-port", "--grpc-health-port", "--metrics-port")
    chosen = [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
    command = (sys.executable, "-m", "epp", "serve", "--pool-name=pool", f"--config-file={config}", *chosen, *flags)
    command = (*command, f"--drain-timeout={drain}")
    async with child(name, *command, folder=folder) as process:
        running = Picker(process, *ports)

        async def ready() -> bool:
            return await running.serving() == "SERVING"

        await process.until(ready, "SERVING from its health service")
        yield running


def configuration(listing: Path, scorers: Mapping[str, float]) -> str:
    """An EndpointPickerConfig: endpoints from `listing`, weighted scorers, one fallback."""
    plugins = [
        {"type": "file-discovery", "parameters": {"path": str(listing), "watchFile": True}},
        {"type": "max-score-picker", "parameters": {"maxNumOfEndpoints": 2}},
        *({"type": name} for name in scorers),
    ]
    weighted = [{"pluginRef": name, "weight": weight} for name, weight in scorers.items()]
    document = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": plugins,
        "schedulingProfiles": [{"name": "default", "plugins": [*weighted, {"pluginRef": "max-score-picker"}]}],
        "dataLayer": {"discovery": {"pluginRef": "file-discovery"}},
    }
    return yaml.safe_dump(document)


def write_listing(path: Path, endpoints: Iterable[str]) -> None:
    """Write the file that file discovery reads."""
    entries = [
        {"name": f"e{at}", "address": address.rpartition(":")[0].strip("[]"), "port": address.rpartition(":")[2]}
        for at, address in enumerate(endpoints)
    ]
    beside = path.with_suffix(".new")
    beside.write_text(yaml.safe_dump({"endpoints": entries}))
    beside.rename(path)


async def until(look: Callable[[], Awaitable[object]], expected: object, within: float = 5.0) -> None:
    """Look until what is seen is as expected; fail with what was seen last."""
    deadline = asyncio.get_running_loop().time() + within
    while (seen := await look()) != expected:
        assert asyncio.get_running_loop().time() < deadline, f"{seen} after {within} s, expected {expected}"
        await asyncio.sleep(0.02)
