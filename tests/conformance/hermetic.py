"""A picker over objects in a real API server, asked in Envoy's own messages: one for each way to run it.

In: pods and what their metrics pages say, ext_proc messages. Out: the replies as Envoy's own messages, and the series
of the metrics page.
- `inside`: the pure whole and Kubernetes discovery in this process; pages are told to the table, as upstream's harness
  has a fake client of metrics; every request is decided at one moment.
- `process`: `epp serve`, asked over gRPC, which reads the pages over HTTP.
Rules here: a harness is ready when its endpoints and pages are those that were asked for; nothing is in flight then.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, Protocol

import aiohttp
import msgspec
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from prometheus_client.parser import text_string_to_metric_families

from epp.config.build import build, detector
from epp.config.load import load
from epp.demo.child import child, free_ports
from epp.discovery.kube.discovery import KubeDiscovery
from epp.discovery.kube.view import NamedPool, SelectedPods
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import EndpointTable, Page
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.exchange import Limits
from epp.flow.policies import Policies
from epp.picker import Picker, PickerOptions
from epp.telemetry.exposition import Sources, render
from epp.telemetry.log import Problems
from epp.telemetry.metrics import Metrics
from tests.conformance.conftest import Cluster
from tests.conformance.objects import POOL, Namespace
from tests.contract.transport import channel, stream
from tests.e2e import serving

NOW: Final = 100.0
WITHIN: Final = 20.0
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Value by name and labels."""

CONFIG: Final = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: kv-cache-utilization-scorer
- type: queue-scorer
- type: prefix-cache-scorer
- type: lora-affinity-scorer
- type: max-score-picker
- type: utilization-detector
  parameters: {metricsStalenessThreshold: 2s}
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: kv-cache-utilization-scorer
  - pluginRef: queue-scorer
  - pluginRef: prefix-cache-scorer
  - pluginRef: lora-affinity-scorer
  - pluginRef: max-score-picker
flowControl:
  saturationDetector: {pluginRef: utilization-detector}
"""
"""Upstream's scheduler in these tests: four scorers, weight 1 each. Upstream's 200 ms of freshness are a clock that a
busy machine does not keep."""


class Server(msgspec.Struct, frozen=True):
    """One pod, and what its page says: requests waiting, share of the KV cache in use, adapters that run."""

    waiting: float
    kv: float
    adapters: tuple[str, ...] = ()

    @property
    def page(self) -> Page:
        return Page(waiting=self.waiting, running=0.0, kv_usage=self.kv, running_adapters=self.adapters)

    @property
    def text(self) -> bytes:
        adapters = ",".join(self.adapters)
        labels = f'{{max_lora="0",running_lora_adapters="{adapters}",waiting_lora_adapters=""}}'
        return (
            f"vllm:num_requests_waiting {self.waiting}\nvllm:num_requests_running 0\n"
            f"vllm:kv_cache_usage_perc {self.kv}\nvllm:lora_requests_info{labels} 1\n"
        ).encode()


class Harness(Protocol):
    def address(self, pod: int) -> str: ...

    async def be(self, servers: Sequence[Server]) -> None:
        """These are the pool's pods, ready, with these pages; there are no others."""

    async def ask(self, messages: Sequence[ep.ProcessingRequest]) -> list[ep.ProcessingResponse]:
        """One stream: all these messages in order, and everything that is answered."""

    async def series(self) -> Series: ...


# -- in this process -------------------------------------------------------------------------------------------------


class Inside:
    def __init__(self, namespace: Namespace, table: EndpointTable, picker: Picker, metrics: Metrics) -> None:
        self.picker = picker
        self._namespace = namespace
        self._table = table
        self._metrics = metrics

    def address(self, pod: int) -> str:
        return f"192.168.1.{pod + 1}:8000"

    async def be(self, servers: Sequence[Server]) -> None:
        for number in range(len(servers)):
            await self._namespace.pod(f"pod-{number}", f"192.168.1.{number + 1}")
        wanted = {self.address(number): server.page for number, server in enumerate(servers)}
        async with asyncio.timeout(WITHIN):
            while {self._table.endpoint(slot).address for slot in self._table.listed.tolist()} != set(wanted):
                await asyncio.sleep(0.01)
        for slot in self._table.listed.tolist():
            page = wanted[self._table.endpoint(slot).address]
            self._table.page_told(slot, self._table.generation(slot), page, NOW)

    async def ask(self, messages: Sequence[ep.ProcessingRequest]) -> list[ep.ProcessingResponse]:
        conversation = Conversation(self.picker, Limits(), Connection("a test"), NOW)
        replies = [reply for message in messages for reply in conversation.receive(message.SerializeToString(), NOW)]
        conversation.lose(NOW)
        assert not self._table.column("inflight", self._table.listed, NOW)[0].any()
        return [ep.ProcessingResponse.FromString(reply) for reply in replies]

    async def series(self) -> Series:
        page = b"".join(render(self._metrics, Sources(self._table, POOL, lambda: NOW)))
        return _series(page.decode())


@asynccontextmanager
async def inside(
    cluster: Cluster, namespace: Namespace, scope: NamedPool | SelectedPods, objectives: int = 0, rules: int = 0
) -> AsyncIterator[Inside]:
    """Begins when the pool is known, and so many objectives and rules are."""
    config = load(CONFIG)
    scheduler = build(config, Random(1))
    table = EndpointTable(on_forget=scheduler.forget)
    metrics = Metrics(Problems(logging.getLogger("epp.test")))
    options = PickerOptions(detector=detector(config))
    picker = Picker(table, scheduler, Ejection(table, EjectionParams()), metrics, lambda: 0.0, options)
    synced = asyncio.Event()
    failures: list[Exception] = []

    def learn(policies: Policies) -> None:
        picker.policies = policies

    discovery = KubeDiscovery(
        scope,
        table,
        now=lambda: NOW,
        rng=Random(1),
        on_policies=learn,
        on_sync=lambda is_synced: synced.set() if is_synced else synced.clear(),
        failed=lambda _, error: failures.append(error),
    )
    await discovery.begin(str(cluster.server.kubeconfig(namespace=namespace.name)))
    running = asyncio.create_task(discovery.run())
    try:
        async with asyncio.timeout(WITHIN):
            await synced.wait()
            while (len(picker.policies.objectives), len(picker.policies.rules)) != (objectives, rules):
                await asyncio.sleep(0.01)
        yield Inside(namespace, table, picker, metrics)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await discovery.close()
    assert failures == []


# -- as a process ----------------------------------------------------------------------------------------------------


class Process:
    def __init__(self, namespace: Namespace, picker: serving.Picker, pages: Pages) -> None:
        self.picker = picker
        self._namespace = namespace
        self._pages = pages
        self._pods = 0

    def address(self, pod: int) -> str:
        return self._pages.address(pod)

    async def be(self, servers: Sequence[Server]) -> None:
        for number in range(max(self._pods, len(servers))):
            ip = self._pages.ip(number)
            if number >= self._pods:
                await self._namespace.pod(f"pod-{number}", ip)
            await self._namespace.be_ready(f"pod-{number}", ip, "True" if number < len(servers) else "False")
        self._pods = max(self._pods, len(servers))
        self._pages.servers = tuple(servers)
        wanted = {
            self.address(number): (server.waiting, server.kv, set(server.adapters))
            for number, server in enumerate(servers)
        }
        await serving.until(self._seen, wanted, within=WITHIN)

    async def _seen(self) -> dict[str, tuple[float | None, float | None, set[str]]]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.picker.pages}/debug/endpoints") as page:
            rows = msgspec.json.decode(await page.read())
        return {row["address"]: (row["waiting"], row["kv_usage"], set(row["adapters"])) for row in rows}

    async def ask(self, messages: Sequence[ep.ProcessingRequest]) -> list[ep.ProcessingResponse]:
        replies: list[ep.ProcessingResponse] = []
        async with channel(self.picker.address) as connection, stream(connection) as call:
            for message in messages:
                await call.write(message.SerializeToString())
            await call.done_writing()
            while isinstance(reply := await call.read(), bytes):
                replies.append(ep.ProcessingResponse.FromString(reply))
        return replies

    async def series(self) -> Series:
        async with aiohttp.ClientSession() as session, session.get(f"{self.picker.pages}/metrics") as page:
            return _series(await page.text())


class Pages:
    """Model servers that have a metrics page and nothing else: pod i listens on an address of its own."""

    def __init__(self, port: int) -> None:
        self.servers: tuple[Server, ...] = ()
        self.port = port

    def ip(self, pod: int) -> str:
        return f"127.0.7.{pod + 1}"

    def address(self, pod: int) -> str:
        return f"{self.ip(pod)}:{self.port}"

    async def serve(self, pod: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                text = self.servers[pod].text if pod < len(self.servers) else b""
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()


@asynccontextmanager
async def process(
    cluster: Cluster, namespace: Namespace, folder: Path, *flags: str, pods: int = 3, config: str = CONFIG
) -> AsyncIterator[Process]:
    """`epp serve` over this namespace, in which a pool is made; ready, and without pods."""
    (folder / "config.yaml").write_text(config)
    port, *ports = free_ports(4)
    pages = Pages(port)
    async with AsyncExitStack() as stack:
        for pod in range(pods):
            server = await asyncio.start_server(partial(pages.serve, pod), pages.ip(pod), port)
            stack.callback(server.close)
        await namespace.pool(port)
        options = ("--grpc-port", "--grpc-health-port", "--metrics-port")
        given = [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
        given += [
            f"--pool-name={POOL}",
            f"--pool-namespace={namespace.name}",
            f"--config-file={folder / 'config.yaml'}",
        ]
        given += ["--secure-serving=false", "--metrics-endpoint-auth=false", "--drain-timeout=100ms", *flags]
        environment = {"KUBECONFIG": str(cluster.server.kubeconfig(namespace=namespace.name))}
        command = (sys.executable, "-m", "epp", "serve", *given)
        running = await stack.enter_async_context(child("picker", *command, folder=folder, env=environment))
        picker = serving.Picker(running, ports[0], ports[1], ports[2])
        await ready(picker)
        yield Process(namespace, picker, pages)


async def ready(picker: serving.Picker, service: str = "") -> None:
    """Wait until the health service says so. Raises ConfigError: it ended, or takes too long; with its last words."""

    async def serving() -> bool:
        return await picker.serving(service) == "SERVING"

    await picker.process.until(serving, "SERVING from its health service", 3 * WITHIN)


def _series(text: str) -> Series:
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def labelled(series: Series, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """One family's samples of this name, by their labels."""
    return {labels: value for (each, labels), value in series.items() if each == name}


def grown(before: Series, after: Series, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """What has been added to the counters of a name, by their labels."""
    was, now = labelled(before, name), labelled(after, name)
    return {labels: value - was.get(labels, 0.0) for labels, value in now.items() if value != was.get(labels, 0.0)}
