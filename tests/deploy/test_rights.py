"""The rights that the chart gives are exactly those that a picker uses, with the very args that the chart gives it.

Each test runs the real picker as the rendered service account. Where a right is taken away its log must name it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from epp.demo.child import Child, child, free_ports
from tests.deploy.charts import LABELLED, Object, Rendered, render
from tests.deploy.cluster import apply, install, kubeconfig_of, ready, token_of
from tests.e2e.serving import Picker, until
from tests.kube.client import MODELS, OBJECTIVES, REWRITES, Client, Resource
from tests.kube.test_discovery import pod, thing

pytestmark = pytest.mark.anyio

WITHIN = 40.0
"""Seconds; a tenth of it is usual, but the machine may be busy."""

Change = Callable[[list[Object]], list[Object]]


def release(namespace: str, *values: str) -> tuple[Rendered, list[int]]:
    """With ports that are free, and in plaintext so that health is easy to ask."""
    ports = free_ports(3)
    names = ("grpc-port", "grpc-health-port", "metrics-port")
    flags = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    flags += ["secure-serving=false", "drain-timeout=100ms"]
    given = (*LABELLED, *values, *(f"inferenceExtension.flags.{flag}" for flag in flags))
    return render(*given, namespace=namespace), ports


@asynccontextmanager
async def picker(
    admin: Client, rendered: Rendered, ports: list[int], namespace: str, folder: Path
) -> AsyncIterator[Picker]:
    """`epp serve` as the Deployment's container would run it."""
    config = rendered.write_config(folder)
    account = rendered.one("Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    kubeconfig = await kubeconfig_of(admin, namespace, account, folder)
    args = [str(config) if word.startswith("/config/") else word for word in rendered.args]
    environment = {"KUBECONFIG": str(kubeconfig), "NAMESPACE": namespace, "POD_NAME": "llm-epp-75b9d7f5c-x2x4z"}
    command = (sys.executable, "-m", "epp", "serve", *args)
    async with child("picker", *command, folder=folder, env=environment) as process:
        yield Picker(process, *ports)


async def logged(process: Child, words: str) -> None:
    async def is_there() -> bool:
        return words in process.output(10_000)

    await process.until(is_there, f"line that says {words!r}", WITHIN)


def without(*verbs: str) -> Change:
    """Rules that lack these verbs, whatever they are for."""
    return lambda rules: [{**rule, "verbs": [verb for verb in rule["verbs"] if verb not in verbs]} for rule in rules]


async def limited(admin: Client, rendered: Rendered, change: Change) -> None:
    """Install a release whose role is less than it should be."""
    await install(admin, rendered)
    role = copy.deepcopy(rendered.one("Role"))
    role["rules"] = [rule for rule in change(role["rules"]) if rule["verbs"]]
    await apply(admin, role, force="true")


def forbidden(verb: str, resource: str, group: str) -> str:
    return f'cannot {verb} resource \\"{resource}\\" in API group \\"{group}\\"'


FOLLOWED = [
    ("pods", ""),
    ("inferencepools", "inference.networking.k8s.io"),
    ("inferenceobjectives", "llm-d.ai"),
    ("inferenceobjectives", "inference.networking.x-k8s.io"),
    ("inferencemodelrewrites", "llm-d.ai"),
    ("inferencemodelrewrites", "inference.networking.x-k8s.io"),
    ("inferencemodels", "inference.networking.x-k8s.io"),
]
"""What the role lets be listed and watched, with its API group."""
POLICIES: list[tuple[Resource, str, Object]] = [
    (OBJECTIVES, "InferenceObjective", {"priority": 1}),
    (REWRITES, "InferenceModelRewrite", {"rules": [{"targets": [{"modelRewrite": "m", "weight": 1}]}]}),
    (MODELS, "InferenceModel", {"modelName": "m", "criticality": "Critical"}),
]
"""One of each kind that has conditions."""


async def make_policies(admin: Client, namespace: str) -> None:
    for resource, kind, spec in POLICIES:
        await admin.create(resource, thing(resource, kind, namespace, "it", {**spec, "poolRef": {"name": "llm"}}))


async def accepted(admin: Client, namespace: str) -> list[str]:
    """Those of POLICIES whose condition says so; a definition may have given them others."""
    found = {kind: await admin.get(resource, "it", namespace) for resource, kind, _ in POLICIES}
    said = {kind: one.get("status", {}).get("conditions", ()) for kind, one in found.items()}
    return [kind for kind, all_of_it in said.items() if any(each["type"] == "Accepted" for each in all_of_it)]


async def page(running: Picker, token: str = "") -> int:
    """The status of /metrics for whoever has this token."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{running.pages}/metrics") as answer:
        return answer.status


async def test_with_the_rights_of_the_chart_a_picker_does_all_that_it_can_and_nothing_is_forbidden(
    admin: Client, namespace: str, tmp_path: Path
) -> None:
    """It leads, serves, writes conditions, and asks who reads its metrics."""
    rendered, ports = release(
        namespace, "inferenceExtension.replicas=2", "inferenceExtension.monitoring.prometheus.enabled=true"
    )
    await install(admin, rendered)
    await pod(admin, namespace, "a", "127.0.0.2")
    await make_policies(admin, namespace)
    reader = await token_of(admin, namespace, "llm-epp-metrics-reader")
    async with picker(admin, rendered, ports, namespace, tmp_path) as running:
        await ready(running)
        assert await running.serving("liveness") == "SERVING"
        await until(lambda: accepted(admin, namespace), [kind for _, kind, _ in POLICIES], within=WITHIN)
        await until(lambda: page(running, reader), 200, within=WITHIN)
        assert await page(running) == 401
        log = running.process.output(10_000)
    assert "forbidden" not in log
    assert '"level": "error"' not in log


def test_the_role_lets_nothing_else_be_followed() -> None:
    rules = render(*LABELLED).one("Role")["rules"]
    followed = {
        (resource, group)
        for rule in rules
        if "watch" in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
    }
    assert followed == set(FOLLOWED)


@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_a_right_to_follow_that_is_missing_is_named_in_the_log(
    admin: Client, namespace: str, tmp_path: Path, verb: str
) -> None:
    """Taken away from all at once: each is named by itself."""
    rendered, ports = release(namespace)
    await limited(admin, rendered, without(verb))
    async with picker(admin, rendered, ports, namespace, tmp_path) as running:
        for resource, group in FOLLOWED:
            await logged(running.process, forbidden(verb, resource, group))


@pytest.mark.parametrize(("verb", "part"), [("get", ""), ("patch", "/status")])
async def test_a_right_to_write_conditions_that_is_missing_is_named_in_the_log(
    admin: Client, namespace: str, tmp_path: Path, verb: str, part: str
) -> None:
    rendered, ports = release(namespace)
    await limited(admin, rendered, without(verb))
    await make_policies(admin, namespace)
    async with picker(admin, rendered, ports, namespace, tmp_path) as running:
        for resource, _, _ in POLICIES:
            await logged(running.process, forbidden(verb, resource.plural + part, resource.version.partition("/")[0]))


@pytest.mark.parametrize(
    ("resource", "group"),
    [("tokenreviews", "authentication.k8s.io"), ("subjectaccessreviews", "authorization.k8s.io")],
)
async def test_a_right_to_ask_who_reads_metrics_that_is_missing_is_named_in_the_log(
    admin: Client, namespace: str, tmp_path: Path, resource: str, group: str
) -> None:
    rendered, ports = release(namespace, "inferenceExtension.monitoring.prometheus.enabled=true")
    await install(admin, rendered)
    (role,) = [each for each in rendered.all("ClusterRole") if not each["metadata"]["name"].endswith("-read")]
    rules = [rule for rule in role["rules"] if resource not in rule["resources"]]
    await apply(admin, {**role, "rules": rules}, force="true")
    reader = await token_of(admin, namespace, "llm-epp-metrics-reader")
    async with picker(admin, rendered, ports, namespace, tmp_path) as running:
        await ready(running)
        assert await page(running, reader) == 500
        await logged(running.process, forbidden("create", resource, group))


@pytest.mark.parametrize("verb", ["get", "create", "update"])
async def test_a_right_to_the_lease_that_is_missing_is_named_in_the_log(
    admin: Client, namespace: str, tmp_path: Path, verb: str
) -> None:
    rendered, ports = release(namespace, "inferenceExtension.replicas=2")
    await limited(admin, rendered, without(verb))
    async with picker(admin, rendered, ports, namespace, tmp_path) as running:
        await logged(running.process, forbidden(verb, "leases", "coordination.k8s.io"))
