"""The picker's view of a real API server: pools, pods and policies come, change and go, and so does the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Final

import pytest

from epp.discovery.kube.discovery import KubeDiscovery
from epp.discovery.kube.objects import Kind
from epp.discovery.kube.view import NamedPool
from epp.endpoints.table import EndpointTable
from epp.flow.policies import NO_POLICIES, Policies, Target
from tests.kube.apiserver import ADMIN, EPP, ApiServer, api_server
from tests.kube.client import (
    MODELS,
    NAMESPACES,
    OBJECTIVES,
    OLD_OBJECTIVES,
    OLD_POOLS,
    PODS,
    POOLS,
    REWRITES,
    ROLE_BINDINGS,
    ROLES,
    Client,
    Object,
    Resource,
    client,
    definitions,
)

pytestmark = pytest.mark.anyio

WITHIN: Final = 20.0


class Seen:
    """What a discovery has said."""

    def __init__(self) -> None:
        self.table = EndpointTable()
        self.policies = NO_POLICIES
        self.synced = False
        self.failures: list[Exception] = []

    @property
    def addresses(self) -> list[str]:
        return sorted(self.table.endpoint(slot).address for slot in self.table.listed.tolist())

    def learn(self, policies: Policies) -> None:
        self.policies = policies

    def sync(self, synced: bool) -> None:
        self.synced = synced

    def failed(self, _: str, error: Exception) -> None:
        self.failures.append(error)


@asynccontextmanager
async def following(server: ApiServer, scope: NamedPool, user: str = ADMIN) -> AsyncIterator[Seen]:
    seen = Seen()
    discovery = KubeDiscovery(
        scope,
        seen.table,
        now=asyncio.get_running_loop().time,
        rng=Random(1),
        on_policies=seen.learn,
        on_sync=seen.sync,
        failed=seen.failed,
    )
    await discovery.begin(str(server.kubeconfig(user)))
    running = asyncio.create_task(discovery.run())
    try:
        yield seen
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await discovery.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN):
        while not holds():
            await asyncio.sleep(0.01)


def thing(resource: Resource, kind: str, namespace: str, name: str, spec: Object) -> Object:
    metadata = {"namespace": namespace, "name": name}
    return {"apiVersion": resource.version, "kind": kind, "metadata": metadata, "spec": spec}


def pool(namespace: str) -> Object:
    spec = {
        "selector": {"matchLabels": {"app": "llm"}},
        "targetPorts": [{"number": 8000}],
        "endpointPickerRef": {"name": "epp", "port": {"number": 9002}},
    }
    return thing(POOLS, "InferencePool", namespace, "pool", spec)


async def pod(admin: Client, namespace: str, name: str, ip: str, app: str = "llm") -> None:
    await admin.create(
        PODS,
        {
            "metadata": {"namespace": namespace, "name": name, "labels": {"app": app}},
            "spec": {"containers": [{"name": "vllm", "image": "vllm"}]},
        },
    )
    await ready(admin, namespace, name, ip, "True")


async def ready(admin: Client, namespace: str, name: str, ip: str, status: str) -> None:
    conditions = [{"type": "Ready", "status": status}]
    told = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}
    await admin.patch_status(PODS, name, told, namespace)


async def test_a_pool_and_its_pods_become_endpoints_in_any_order(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    async with following(apiserver, NamedPool(namespace, "pool")) as seen:
        await pod(admin, namespace, "a", "10.0.0.1")
        await pod(admin, namespace, "other", "10.0.0.9", app="web")
        await admin.create(POOLS, pool(namespace))
        await until(lambda: seen.synced and seen.addresses == ["10.0.0.1:8000"])
        await pod(admin, namespace, "b", "fd00::2")
        await until(lambda: seen.addresses == ["10.0.0.1:8000", "[fd00::2]:8000"])
        await ready(admin, namespace, "a", "10.0.0.1", "False")
        await until(lambda: seen.addresses == ["[fd00::2]:8000"])
        await admin.patch(POOLS, "pool", {"spec": {"targetPorts": [{"number": 8000}, {"number": 8001}]}}, namespace)
        await until(lambda: seen.addresses == ["[fd00::2]:8000", "[fd00::2]:8001"])
        await admin.delete(PODS, "b", namespace)
        await until(lambda: seen.addresses == [])
        await admin.delete(POOLS, "pool", namespace)
        await until(lambda: not seen.synced)
    assert seen.failures == []


async def test_objectives_rewrites_and_models_become_policies(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    ref = {"name": "pool"}
    await admin.create(POOLS, pool(namespace))
    async with following(apiserver, NamedPool(namespace, "pool")) as seen:
        await until(lambda: seen.synced)
        spec: Object = {"priority": -1, "poolRef": ref}
        await admin.create(OBJECTIVES, thing(OBJECTIVES, "InferenceObjective", namespace, "batch", spec))
        await admin.create(OLD_OBJECTIVES, thing(OLD_OBJECTIVES, "InferenceObjective", namespace, "ignored", spec))
        rule = {"matches": [{"model": {"value": "a"}}], "targets": [{"modelRewrite": "b", "weight": 1}]}
        spec = {"poolRef": ref, "rules": [rule]}
        await admin.create(REWRITES, thing(REWRITES, "InferenceModelRewrite", namespace, "rewrite", spec))
        spec = {"modelName": "m", "criticality": "Sheddable", "poolRef": ref}
        await admin.create(MODELS, thing(MODELS, "InferenceModel", namespace, "model", spec))
        await until(lambda: seen.policies.objectives == {"batch": -1} and len(seen.policies.rules) == 2)
        rules = {rule.model: rule for rule in seen.policies.rules}
        assert rules["a"].targets == (Target("b", 1),)
        assert rules["m"].priority == -1
        await admin.delete(OBJECTIVES, "batch", namespace)
        await until(lambda: not seen.policies.objectives)


async def test_a_pool_of_the_older_group_is_served(apiserver: ApiServer, admin: Client, namespace: str) -> None:
    spec = {"selector": {"app": "llm"}, "targetPortNumber": 9000, "extensionRef": {"name": "epp"}}
    await admin.create(OLD_POOLS, thing(OLD_POOLS, "InferencePool", namespace, "pool", spec))
    await pod(admin, namespace, "a", "10.0.0.1")
    async with following(apiserver, NamedPool(namespace, "pool", (Kind.LEGACY_POOL,))) as seen:
        await until(lambda: seen.addresses == ["10.0.0.1:9000"])


async def test_what_a_role_does_not_allow_is_named_and_the_rest_is_served(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """Pods and pools are enough to serve; without objectives nobody has a priority."""
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["inference.networking.k8s.io"], "resources": ["inferencepools"], "verbs": ["list", "watch"]},
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "epp"}
    subject = {"kind": "ServiceAccount", "name": "epp", "namespace": "default"}
    metadata = {"namespace": namespace, "name": "epp"}
    await admin.create(ROLES, {"metadata": metadata, "rules": rules})
    await admin.create(ROLE_BINDINGS, {"metadata": metadata, "roleRef": role, "subjects": [subject]})
    await admin.create(POOLS, pool(namespace))
    await pod(admin, namespace, "a", "10.0.0.1")
    async with following(apiserver, NamedPool(namespace, "pool"), EPP) as seen:
        await until(lambda: seen.synced and seen.addresses == ["10.0.0.1:8000"])
    told = {str(error) for error in seen.failures}
    assert any('cannot list resource "inferenceobjectives" in API group "llm-d.ai"' in words for words in told)


@pytest.mark.slow
async def test_a_server_that_was_away_and_has_forgotten_misses_nothing(tmp_path: Path) -> None:
    """Definitions that come later are noticed, a server that is killed changes nothing, and after 410 all is true."""
    async with api_server(tmp_path) as server, client(server.access()) as admin:
        await admin.create(NAMESPACES, {"metadata": {"name": "models"}})
        async with following(server, NamedPool("models", "pool")) as seen:
            await pod(admin, "models", "a", "10.0.0.1")
            await admin.install(definitions())
            await admin.create(POOLS, pool("models"))
            async with asyncio.timeout(40):
                while seen.addresses != ["10.0.0.1:8000"]:
                    await asyncio.sleep(0.05)
            await server.kill()
            assert seen.addresses == ["10.0.0.1:8000"]
            await server.start()
            await admin.delete(PODS, "a", "models")
            await pod(admin, "models", "b", "10.0.0.2")
            await server.compact()
            await server.kill()
            await server.start()
            async with asyncio.timeout(60):
                while seen.addresses != ["10.0.0.2:8000"]:
                    await asyncio.sleep(0.05)
        assert seen.failures  # it was away
