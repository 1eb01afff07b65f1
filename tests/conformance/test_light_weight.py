"""What the suite's light-weight picker does, where no other test has it over a real API server; and where to find the
rest.

    one pool by name, its ready pods          tests/kube/test_discovery.py, test_a_pool_and_its_pods_become_endpoints...
    a pod that is being deleted               here
    a rank for each target port               tests/kube_objects/test_objects.py, test_each_target_port_of_a...
    active-ports                              here; what is odd in it: tests/kube_objects/test_objects.py
    another selector, other ports             here; tests/kube/test_discovery.py
    a deleted pool                            here
    NOT_SERVING until the pool is known       tests/kube/test_process.py, test_a_picker_of_a_pool_serves_its_pods
    the header that chooses, before a subset  test_plugins.py
    a subset as a list, as one string         tests/e2e/test_process.py, test_a_gateways_subset_is_obeyed
    ip:port is one, an ip all ports of it     tests/test_picker.py, test_the_gateways_subset_limits_the_choice
    a subset that is empty, or of nobody      tests/test_picker.py, test_a_subset_without_a_match_is_a_503
    no endpoints at all                       tests/e2e/test_process.py, test_an_empty_pool_answers_503_in_every_shape
    GET answered at its headers               tests/e2e/test_modes.py, test_get_is_routed
    headers of several values                 tests/e2e/test_headers.py, test_headers_keep_their_order_and_duplicates
    a body over the limit                     tests/e2e/test_refusals.py, test_a_body_over_the_limit

Otherwise, on purpose: a refusal is an answer of ours (503, 413) and no gRPC status; equals are spread by lot, not in
turn; body messages are answered with the body (that picker's empty replies lose it in full duplex); neither
X-Echo-Set-Header nor x-went-into-resp-headers is set.
Source: Gateway API Inference Extension v1.6, its light-weight picker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from epp.extproc.events import BODY, Modes, RequestEnded, RequestStarted
from tests.conformance.conftest import Cluster
from tests.conformance.hermetic import Process, process
from tests.conformance.objects import APP, POOL, Namespace
from tests.e2e.serving import until
from tests.extproc import oracle
from tests.kube.client import PODS, POOLS

pytestmark = pytest.mark.anyio

SERVICE = "inference-extension"


class Running(msgspec.Struct, frozen=True):
    namespace: Namespace
    harness: Process

    async def listed(self) -> list[str]:
        pages = self.harness.picker.pages
        async with aiohttp.ClientSession() as session, session.get(f"{pages}/debug/endpoints") as page:
            return sorted(row["name"].removeprefix(f"{self.namespace.name}/") for row in await page.json())

    async def health(self) -> str:
        return await self.harness.picker.serving(SERVICE)

    async def status(self) -> int:
        """Of a request: 0 when it is routed."""
        head = RequestStarted(((":method", b"POST"), (":path", b"/v1/completions")))
        body = RequestEnded(BODY, b'{"model":"m","prompt":"hello"}')
        reply = (await self.harness.ask([oracle.message(head, Modes()), oracle.message(body, None)]))[0]
        return int(reply.immediate_response.status.code)


@pytest.fixture
async def running(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Running]:
    namespace = await cluster.namespace()
    async with process(cluster, namespace, tmp_path, pods=0) as harness:
        yield Running(namespace, harness)
        log = harness.picker.process.output(lines=10_000)
    assert "Traceback" not in log, log


async def test_a_pod_that_is_being_deleted_gets_nothing_more_although_it_is_still_ready(running: Running) -> None:
    namespace = running.namespace
    await namespace.pod("goes", "127.0.7.1", node="a-node")
    await namespace.pod("stays", "127.0.7.2")
    await until(running.listed, ["goes-rank-0", "stays-rank-0"])
    await namespace.admin.ask("DELETE", PODS.path(namespace.name, "goes"), {"gracePeriodSeconds": 300})
    await until(running.listed, ["stays-rank-0"])
    left = await namespace.admin.get(PODS, "goes", namespace.name)
    assert left["metadata"]["deletionTimestamp"]
    assert left["status"]["conditions"][0]["status"] == "True"


@pytest.mark.parametrize("annotation", ["inference.networking.k8s.io/active-ports", "llm-d.ai/active-ports"])
async def test_active_ports_and_the_pool_may_change_while_requests_come(running: Running, annotation: str) -> None:
    namespace, admin = running.namespace, running.namespace.admin
    await admin.patch(
        POOLS, POOL, {"spec": {"targetPorts": [{"number": port} for port in (3000, 3002, 3004)]}}, namespace.name
    )
    await namespace.pod("all", "127.0.7.1")
    await namespace.pod("some", "127.0.7.2", annotations={annotation: "3004, 3000"})
    await until(running.listed, ["all-rank-0", "all-rank-1", "all-rank-2", "some-rank-0", "some-rank-2"])
    await admin.patch(PODS, "some", {"metadata": {"annotations": {annotation: "3002"}}}, namespace.name)
    await until(running.listed, ["all-rank-0", "all-rank-1", "all-rank-2", "some-rank-1"])
    await admin.patch(PODS, "some", {"metadata": {"annotations": {annotation: None}}}, namespace.name)
    await until(running.listed, [f"{name}-rank-{rank}" for name in ("all", "some") for rank in range(3)])
    await admin.patch(POOLS, POOL, {"spec": {"targetPorts": [{"number": 3002}]}}, namespace.name)
    await until(running.listed, ["all-rank-0", "some-rank-0"])
    await admin.patch(PODS, "all", {"metadata": {"labels": {"app": "other"}}}, namespace.name)
    await until(running.listed, ["some-rank-0"])
    await admin.patch(POOLS, POOL, {"spec": {"selector": {"matchLabels": {"app": "other"}}}}, namespace.name)
    await until(running.listed, ["all-rank-0"])


async def test_a_deleted_pool_is_not_served_until_it_is_back(running: Running) -> None:
    namespace = running.namespace
    await namespace.pod("a", "127.0.7.1")
    await until(running.listed, ["a-rank-0"])
    assert (await running.health(), await running.status()) == ("SERVING", 0)
    await namespace.admin.delete(POOLS, POOL, namespace.name)
    await until(running.health, "NOT_SERVING")
    assert (await running.listed(), await running.status()) == ([], 503)
    await namespace.pool(3000, app=APP)
    await until(running.health, "SERVING")
    await until(running.listed, ["a-rank-0"])
    assert await running.status() == 0
