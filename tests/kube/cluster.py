"""A pool of many pods in a real API server, and a real `epp serve` over it.

In: an API server, a namespace. Out: pods that are made, flapped, moved and deleted, many at a time; a picker's own
account of which endpoints it lists.
Rules here: a pod has the size of a real one (9 KB with what the server adds), since what a picker reads of it is a
hundredth; its address is one of loopback where nobody listens unless a test does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import yaml

from epp.demo.child import child, free_ports
from tests.e2e.serving import QUEUE_ALONE, Picker
from tests.kube.apiserver import ApiServer
from tests.kube.client import PODS, POOLS, Client, Object

PORT: Final = 8000
NAME: Final = "pool"
AT_ONCE: Final = 16
"""Requests to the API server under way at a time."""


def address(number: int) -> str:
    """An IP address of loopback for pod `number`, 0 to 65,000."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


class Cluster:
    """One pool and its pods in one namespace."""

    def __init__(self, admin: Client, namespace: str) -> None:
        self.admin = admin
        self.namespace = namespace

    async def pool(self, *ports: int) -> None:
        spec = {
            "selector": {"matchLabels": {"app": "llm"}},
            "targetPorts": [{"number": port} for port in ports or (PORT,)],
            "endpointPickerRef": {"name": "epp", "port": {"number": 9002}},
        }
        metadata = {"namespace": self.namespace, "name": NAME}
        await self.admin.create(
            POOLS, {"apiVersion": POOLS.version, "kind": "InferencePool", "metadata": metadata, "spec": spec}
        )

    async def add(self, name: str, ip: str) -> None:
        """Make a pod and let it be ready."""
        await self.admin.create(PODS, pod(self.namespace, name))
        await self.be_ready(name, ip)

    async def be_ready(self, name: str, ip: str, ready: str = "True") -> None:
        await self.admin.patch_status(PODS, name, status(ip, ready), self.namespace)

    async def relabel(self, name: str, app: str) -> None:
        await self.admin.patch(PODS, name, {"metadata": {"labels": {"app": app}}}, self.namespace)

    async def delete(self, name: str) -> None:
        await self.admin.delete(PODS, name, self.namespace)


async def each(numbers: Iterable[int], work: Callable[[int], Awaitable[None]]) -> None:
    """Do the work for every number, a few at a time, begun in order."""
    waiting = iter(numbers)

    async def some() -> None:
        for number in waiting:
            await work(number)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(some())


def pod(namespace: str, name: str) -> Object:
    """A model server as a deployment makes it."""
    variables: list[dict[str, Any]] = [
        {"name": f"SETTING_{number}", "value": f"/var/lib/models/{number}"} for number in range(24)
    ]
    variables.append({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    probe = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 5, "failureThreshold": 3}
    devices = {"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": "1"}
    mounts = [{"name": volume, "mountPath": f"/mnt/{volume}"} for volume in ("models", "cache", "shm")]
    engine = {
        "name": "vllm",
        "image": "vllm/vllm-openai@sha256:" + "0" * 64,
        "args": ["--model=meta-llama/Llama-3.1-8B-Instruct", f"--port={PORT}", "--enable-lora", "--max-loras=4"],
        "env": variables,
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": devices, "requests": devices},
        "livenessProbe": probe,
        "readinessProbe": probe,
        "startupProbe": {**probe, "failureThreshold": 600},
        "volumeMounts": mounts,
    }
    side = {"name": "adapters", "image": "example.com/adapters:v1", "env": variables[:8], "volumeMounts": mounts}
    labels = {"app": "llm", "pod-template-hash": "6d4cf56db6", "llm-d.ai/role": "both"}
    volumes = [{"name": mount["name"], "emptyDir": {}} for mount in mounts]
    return {
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": {"containers": [engine, side], "volumes": volumes, "nodeSelector": {"accelerator": "h100"}},
    }


def status(ip: str, ready: str) -> Object:
    """The status of a pod with this address, as kubelet writes it."""
    since = "2026-01-01T00:00:00Z"
    kinds = {"Initialized": "True", "Ready": ready, "ContainersReady": ready, "PodScheduled": "True"}
    conditions = [{"type": kind, "status": holds, "lastTransitionTime": since} for kind, holds in kinds.items()]
    states = [
        {"name": name, "ready": ready == "True", "restartCount": 0, "image": name, "imageID": name}
        for name in ("vllm", "adapters")
    ]
    addresses = {"podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "127.0.0.1"}
    return {"phase": "Running", "conditions": conditions, "containerStatuses": states, **addresses}


@asynccontextmanager
async def picker(
    server: ApiServer, namespace: str, folder: Path, *flags: str, name: str = "picker", drain: str = "100ms"
) -> AsyncIterator[Picker]:
    """`epp serve` over the pool, with its own certificate; started, and perhaps not ready."""
    ports = free_ports(3)
    given = [f"--pool-name={NAME}", f"--pool-namespace={namespace}", "--metrics-endpoint-auth=false"]
    options = ("--grpc-port", "--grpc-health-port", "--metrics-port")
    given += [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
    environment = {"KUBECONFIG": str(server.kubeconfig(namespace=namespace))}
    command = (sys.executable, "-m", "epp", "serve", *given, f"--drain-timeout={drain}", *flags)
    async with child(name, *command, folder=folder, env=environment) as process:
        yield Picker(process, *ports)


async def serves(asked: Picker, within: float = 20.0) -> None:
    """Wait until its health service says so; fails with the picker's last words."""

    async def ready() -> bool:
        return await asked.serving() == "SERVING"

    await asked.process.until(ready, "SERVING from its health service", within)


def configured(folder: Path, choices: int) -> str:
    """The flag of a configuration with the queue scorer alone, that names so many endpoints in a decision."""
    picks = {"type": "max-score-picker", "parameters": {"maxNumOfEndpoints": choices}}
    weighted = [{"pluginRef": name, "weight": weight} for name, weight in QUEUE_ALONE.items()]
    document = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [*({"type": name} for name in QUEUE_ALONE), picks],
        "schedulingProfiles": [{"name": "default", "plugins": [*weighted, {"pluginRef": "max-score-picker"}]}],
    }
    path = folder / f"choices-{choices}.yaml"
    path.write_text(yaml.safe_dump(document))
    return f"--config-file={path}"


async def listed(asked: Picker) -> dict[str, str]:
    """The picker's endpoints: address by name; none while it does not answer yet."""
    return {row.name: row.address for row in await _rows(asked)}


async def running_on(asked: Picker) -> dict[str, float]:
    """Requests in flight that scorers see on the endpoints that are listed; those without any are left out."""
    return {row.name: row.inflight for row in await _rows(asked) if row.inflight}


class _Row(msgspec.Struct):
    """Of /debug/endpoints, as far as it is read here."""

    name: str
    address: str
    inflight: float


async def _rows(asked: Picker) -> list[_Row]:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{asked.pages}/debug/endpoints") as page:
            return msgspec.json.decode(await page.read(), type=list[_Row])
    except aiohttp.ClientConnectionError:
        return []
