"""Standalone mode whole: the picker and the Envoy that the chart renders, over a real API server and two model servers.

Nothing of the rendered configuration is changed but ports and the address of the admin page.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from epp.demo.child import child, free_ports
from tests.deploy.charts import LABELLED, Rendered, render
from tests.deploy.cluster import install, kubeconfig_of, ready
from tests.e2e import client as http
from tests.e2e.client import chat, post
from tests.e2e.serving import Picker, until
from tests.e2e.test_eds import says_who_it_is
from tests.e2e.upstream import Upstream
from tests.envoys import envoy_or_skip
from tests.kube.client import PODS, Client
from tests.kube.test_discovery import pod

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]


class Site:
    """A release that runs: what kubelet would start, started here."""

    def __init__(self, rendered: Rendered, ports: list[int], folder: Path, cluster: Client, namespace: str) -> None:
        self.rendered = rendered
        self.listener, self.stats, self.admin = ports
        self.folder = folder
        self.cluster, self.namespace = cluster, namespace
        self.upstreams = [Upstream(f"127.0.0.{number}") for number in (2, 3)]

    async def ask(self) -> str:
        """Who answered a request; else the status."""
        got = await http.send(self.listener, post("/v1/chat/completions", chat()))
        return got.body.decode() if got.status == 200 else str(got.status)

    async def add_servers(self) -> None:
        for number, upstream in enumerate(self.upstreams):
            await pod(self.cluster, self.namespace, f"vllm-{number}", upstream.address.partition(":")[0])

    async def remove_servers(self) -> None:
        for number in range(len(self.upstreams)):
            await self.cluster.delete(PODS, f"vllm-{number}", self.namespace)

    async def readiness(self) -> tuple[str, str]:
        """What the probes of both containers see."""
        return await self.page("ready"), await self.running.serving("readiness")

    async def page(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.stats}/{path}"
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                return await response.text()
        except aiohttp.ClientConnectionError as error:
            return str(error)

    @asynccontextmanager
    async def envoy(self) -> AsyncIterator[None]:
        from epp.demo.envoy import envoy_binary

        text = self.rendered.one("ConfigMap", "-envoy")["data"]["envoy.yaml"]
        for was, free in ((19001, self.stats), (19000, self.admin)):
            assert f"port_value: {was}}}" in text
            text = text.replace(f"port_value: {was}}}", f"port_value: {free}}}")
        where = self.folder / "envoy.yaml"
        where.write_text(text)
        (container,) = [each for each in self.rendered.containers if each["name"] == "envoy"]
        args = [str(where) if word == "/etc/envoy/envoy.yaml" else word for word in container["args"]]
        async with child("envoy", envoy_binary(), *args, folder=self.folder):
            yield

    @asynccontextmanager
    async def picker(self, kubeconfig: Path, namespace: str) -> AsyncIterator[None]:
        flags = self.rendered.flags
        config = self.rendered.write_config(self.folder)
        args = [str(config) if word.startswith("/config/") else word for word in self.rendered.args]
        environment = {"KUBECONFIG": str(kubeconfig), "NAMESPACE": namespace, "POD_NAME": "llm-epp-75b9d7f5c-x2x4z"}
        command = (sys.executable, "-m", "epp", "serve", *args)
        async with child("picker", *command, folder=self.folder, env=environment) as process:
            self.running = Picker(process, flags.grpc_port, flags.grpc_health_port, flags.metrics_port)
            yield


POOL = LABELLED
NO_POOL = (
    "inferenceExtension.endpointsServer.createInferencePool=false",
    "inferenceExtension.endpointsServer.endpointSelector=app=llm",
)


@pytest.fixture(params=["with a pool", "without a pool", "on IPv6 too, in plaintext"])
async def site(request: pytest.FixtureRequest, admin: Client, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    envoy_or_skip()
    target, listener, stats, admin_page, *own = free_ports(7)
    flags = [
        f"{name}={port}" for name, port in zip(("grpc-port", "grpc-health-port", "metrics-port"), own, strict=True)
    ]
    values = ["mode=standalone", f"inferenceExtension.sidecar.port={listener}"]
    if request.param == "without a pool":
        values += [*NO_POOL, f"inferenceExtension.endpointsServer.targetPorts={target}"]
    else:
        values += [*POOL, f"inferencePool.targetPorts[0].number={target}"]
    if request.param.startswith("on IPv6"):
        values += ["inferenceExtension.sidecar.address=::"]
        flags += ["secure-serving=false"]
    values += (f"inferenceExtension.flags.{flag}" for flag in (*flags, "drain-timeout=100ms"))
    rendered = render(*values, namespace=namespace)
    await install(admin, rendered)
    kubeconfig = await kubeconfig_of(admin, namespace, "llm-epp", tmp_path)
    made = Site(rendered, [listener, stats, admin_page], tmp_path, admin, namespace)
    async with AsyncExitStack() as stack:
        for number, upstream in enumerate(made.upstreams):
            upstream.address = f"127.0.0.{number + 2}:{target}"
            await upstream.listen()
            stack.push_async_callback(upstream.close)
            says_who_it_is(upstream)
        await stack.enter_async_context(made.envoy())  # as kubelet: the side-car first
        await stack.enter_async_context(made.picker(kubeconfig, namespace))
        yield made


READY = ("LIVE\n", "SERVING")


async def test_a_pod_that_is_ready_routes_and_a_dead_endpoint_costs_no_request(site: Site) -> None:
    await site.add_servers()
    first, second = site.upstreams
    await ready(site.running)
    await until(site.readiness, READY, within=20.0)
    assert {await site.ask() for _ in range(20)} <= {first.address, second.address}
    await first.close()
    assert [await site.ask() for _ in range(20)] == [second.address] * 20
    assert "envoy_cluster_upstream_rq_retry" in await site.page("stats/prometheus")


async def test_a_pod_waits_for_its_first_endpoint_and_stays_ready_when_the_last_one_goes(site: Site) -> None:
    await ready(site.running)
    assert (await site.page("ready")).startswith("Cannot connect")
    await site.add_servers()
    await until(site.readiness, READY, within=20.0)
    await site.remove_servers()
    await until(site.ask, "503", within=10.0)
    assert await site.readiness() == READY
