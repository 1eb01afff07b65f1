"""Conditions in the status of objects of a real API server; and what a patch says, worked out by hand."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

import msgspec
import pytest
import yaml

from epp.demo.child import free_ports
from epp.discovery.kube.api import Api
from epp.discovery.kube.discovery import KubeDiscovery
from epp.discovery.kube.election import Candidate, Timing
from epp.discovery.kube.objects import Condition, Kind
from epp.discovery.kube.statuses import StatusWriter, patch_of
from epp.discovery.kube.view import NamedPool, Status
from tests.e2e.serving import until as until_seen
from tests.kube.apiserver import ADMIN, EPP, ApiServer, api_server
from tests.kube.client import (
    LEASES,
    MODELS,
    OBJECTIVES,
    OLD_OBJECTIVES,
    OLDEST_MODELS,
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
from tests.kube.test_discovery import Seen, following, pool, thing, until

pytestmark = pytest.mark.anyio

REF: Final = {"name": "pool"}
NOW: Final = "2026-03-01T12:00:00Z"
BEFORE: Final = "2026-01-01T00:00:00Z"
PENDING: Final = {
    "type": "Ready",
    "status": "Unknown",
    "reason": "Pending",
    "message": "Waiting for controller",
    "lastTransitionTime": "1970-01-01T00:00:00Z",
}
ACCEPTED: Final = Condition("Accepted", "True", "Accepted", "", 2)


# -- the patch --------------------------------------------------------------------------------------------------------


def found(*conditions: Object, generation: int = 2) -> Object:
    metadata = {"name": "o", "resourceVersion": "41", "generation": generation}
    return {"metadata": metadata, "spec": {}, "status": {"conditions": list(conditions)}}


def written(status: str = "True", since: str = NOW, generation: int = 2) -> Object:
    return {
        "type": "Accepted",
        "status": status,
        "reason": "Accepted",
        "message": "",
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }


def test_a_condition_is_added_beside_those_of_others_and_to_this_very_version() -> None:
    patch = {"metadata": {"resourceVersion": "41"}, "status": {"conditions": [PENDING, written()]}}
    assert patch_of(found(PENDING), ACCEPTED, NOW) == patch


@pytest.mark.parametrize("status", [None, {}, {"conditions": None}, {"other": 1}])
def test_an_object_without_conditions_gets_its_first(status: Object | None) -> None:
    item = {**found(), "status": status}
    assert patch_of(item, ACCEPTED, NOW) == {
        "metadata": {"resourceVersion": "41"},
        "status": {"conditions": [written()]},
    }


def test_a_transition_is_one_of_the_status_alone() -> None:
    """A newer generation that is accepted like the one before changed nothing on the day it came."""
    patch = patch_of(found(written(since=BEFORE, generation=1), PENDING), ACCEPTED, NOW)
    assert patch is not None
    assert patch["status"]["conditions"] == [written(since=BEFORE), PENDING]
    patch = patch_of(found(written("False", since=BEFORE, generation=1)), ACCEPTED, NOW)
    assert patch is not None
    assert patch["status"]["conditions"] == [written(since=NOW)]


def test_what_is_there_already_is_not_written() -> None:
    assert patch_of(found(PENDING, written(since=BEFORE)), ACCEPTED, NOW) is None


@pytest.mark.parametrize("generation", [1, 3])
def test_what_was_concluded_from_another_generation_is_not_written(generation: int) -> None:
    assert patch_of(found(PENDING, generation=generation), ACCEPTED, NOW) is None


# -- a real API server ------------------------------------------------------------------------------------------------


async def conditions(admin: Client, resource: Resource, namespace: str, name: str) -> dict[str, Object]:
    status = (await admin.get(resource, name, namespace)).get("status") or {}
    return {each["type"]: each for each in status.get("conditions") or ()}


async def accepted(admin: Client, resource: Resource, namespace: str, name: str) -> tuple[str, str, int]:
    """Status, reason and generation of the condition Accepted."""
    found = (await conditions(admin, resource, namespace, name)).get("Accepted") or {}
    return found.get("status", ""), found.get("reason", ""), found.get("observedGeneration", 0)


def model(namespace: str, name: str, of: str, resource: Resource = MODELS) -> Object:
    return thing(resource, "InferenceModel", namespace, name, {"modelName": of, "poolRef": REF})


def objective(namespace: str, name: str, resource: Resource = OBJECTIVES, priority: int = 1) -> Object:
    return thing(resource, "InferenceObjective", namespace, name, {"priority": priority, "poolRef": REF})


async def test_conditions_appear_and_follow_their_objects(apiserver: ApiServer, admin: Client, namespace: str) -> None:
    await admin.create(POOLS, pool(namespace))
    await admin.create(OBJECTIVES, objective(namespace, "batch"))
    rules = [{"matches": [{"model": {"value": "a"}}], "targets": [{"modelRewrite": "b"}]}]
    spec = {"poolRef": REF, "rules": rules}
    await admin.create(REWRITES, thing(REWRITES, "InferenceModelRewrite", namespace, "rewrite", spec))
    await admin.create(MODELS, model(namespace, "model", "m"))
    async with following(apiserver, NamedPool(namespace, "pool")) as seen:
        for resource, name in ((OBJECTIVES, "batch"), (REWRITES, "rewrite"), (MODELS, "model")):
            await until_seen(partial(accepted, admin, resource, namespace, name), ("True", "Accepted", 1))
        placeholder = (await conditions(admin, OBJECTIVES, namespace, "batch"))["Ready"]
        assert placeholder["reason"] == "Pending"  # the definition's own, kept
        since = (await conditions(admin, OBJECTIVES, namespace, "batch"))["Accepted"]["lastTransitionTime"]

        await admin.patch(OBJECTIVES, "batch", {"spec": {"priority": 2}}, namespace)
        await until_seen(lambda: accepted(admin, OBJECTIVES, namespace, "batch"), ("True", "Accepted", 2))
        after = (await conditions(admin, OBJECTIVES, namespace, "batch"))["Accepted"]
        assert after["lastTransitionTime"] == since
    assert seen.failures == []
    found = await admin.get(POOLS, "pool", namespace)
    assert "status" not in found or not found["status"]  # a pool's status is its gateway's


async def test_of_two_models_with_one_name_the_younger_is_told_and_takes_over_when_the_older_goes(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """Both in the same second: then the first by name counts as the older."""
    await admin.create(POOLS, pool(namespace))
    for name in ("a", "b"):
        await admin.create(MODELS, model(namespace, name, "chat"))
    async with following(apiserver, NamedPool(namespace, "pool")):
        await until_seen(lambda: accepted(admin, MODELS, namespace, "b"), ("False", "ModelNameInUse", 1))
        await until_seen(lambda: accepted(admin, MODELS, namespace, "a"), ("True", "Accepted", 1))
        told = (await conditions(admin, MODELS, namespace, "b"))["Accepted"]["message"]
        assert told == f"InferenceModel {namespace}/a, which is older, has the model name 'chat'"
        await admin.delete(MODELS, "a", namespace)
        await until_seen(lambda: accepted(admin, MODELS, namespace, "b"), ("True", "Accepted", 1))


async def test_a_condition_of_another_writer_is_kept_and_its_writes_are_no_failure(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """Another controller writes its own condition again and again, while each new generation asks for ours."""
    await admin.create(POOLS, pool(namespace))
    await admin.create(OBJECTIVES, objective(namespace, "batch"))
    theirs = {**PENDING, "type": "example.com/Costed", "status": "True", "lastTransitionTime": BEFORE}

    async def write_theirs(number: int) -> None:
        """As a careful controller does: by its own key of the list."""
        body = {
            "apiVersion": OBJECTIVES.version,
            "kind": "InferenceObjective",
            "metadata": {"name": "batch"},
            "status": {"conditions": [{**theirs, "message": str(number)}]},
        }
        path = OBJECTIVES.path(namespace, "batch") + "/status"
        query = {"fieldManager": "costs", "force": "true"}
        await admin.ask("PATCH", path, body, query=query, content="application/apply-patch+yaml")

    async with following(apiserver, NamedPool(namespace, "pool")) as seen:
        for number in range(1, 21):
            await admin.patch(OBJECTIVES, "batch", {"spec": {"priority": number + 1}}, namespace)
            for more in range(3):
                await write_theirs(10 * number + more)
        await until_seen(lambda: accepted(admin, OBJECTIVES, namespace, "batch"), ("True", "Accepted", 21))
        kept = await conditions(admin, OBJECTIVES, namespace, "batch")
        assert kept["example.com/Costed"]["message"] == "202"
        assert set(kept) == {"Accepted", "Ready", "example.com/Costed"}
    assert seen.failures == []


async def grant(admin: Client, namespace: str, *rules: Object) -> None:
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "epp"}
    subject = {"kind": "ServiceAccount", "name": "epp", "namespace": "default"}
    metadata = {"namespace": namespace, "name": "epp"}
    await admin.create(ROLES, {"metadata": metadata, "rules": list(rules)})
    await admin.create(ROLE_BINDINGS, {"metadata": metadata, "roleRef": role, "subjects": [subject]})


GROUPS: Final = ["llm-d.ai", "inference.networking.x-k8s.io"]
READING: Final = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["inference.networking.k8s.io"], "resources": ["inferencepools"], "verbs": ["get", "list", "watch"]},
    {
        "apiGroups": GROUPS,
        "resources": ["inferenceobjectives", "inferencemodelrewrites", "inferencemodels"],
        "verbs": ["get", "list", "watch"],
    },
]
"""The reference's Role, and InferenceModels."""


class WatchedApi(Api):
    """The real one; a test is told of each GET that was answered before anybody can act on the answer."""

    answered: Callable[[str], Awaitable[object]] | None = None
    """Called with the path."""

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Object:
        found = await super().get(path, query)
        if self.answered is not None:
            await self.answered(path)
        return found


@asynccontextmanager
async def writing(
    server: ApiServer,
    user: str = ADMIN,
    *,
    is_ours: bool = True,
    answered: Callable[[str], Awaitable[object]] | None = None,
) -> AsyncIterator[tuple[StatusWriter, list[Exception]]]:
    api = await WatchedApi.connect(str(server.kubeconfig(user)))
    assert isinstance(api, WatchedApi)
    api.answered = answered
    failures: list[Exception] = []
    writer = StatusWriter(api, Random(1), lambda path, error: failures.append(error), is_ours=is_ours)
    running = asyncio.create_task(writer.run())
    try:
        yield writer, failures
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await api.close()


def status(kind: Kind, namespace: str, name: str, generation: int = 1) -> Status:
    condition = msgspec.structs.replace(ACCEPTED, observed_generation=generation)
    return Status(kind, namespace, name, condition)


async def test_what_another_writes_between_our_reading_and_our_writing_is_kept(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    await admin.create(OBJECTIVES, objective(namespace, "batch"))
    numbers = count(1)

    async def write_theirs(_: str) -> None:
        if (number := next(numbers)) <= 3:
            theirs = {**PENDING, "type": "Costed", "message": str(number)}
            await admin.patch_status(OBJECTIVES, "batch", {"conditions": [theirs]}, namespace)

    async with writing(apiserver, answered=write_theirs) as (writer, failures):
        writer.want((status(Kind.OBJECTIVE, namespace, "batch"),))
        await until_seen(partial(accepted, admin, OBJECTIVES, namespace, "batch"), ("True", "Accepted", 1))
        assert next(numbers) == 5  # three conflicts, then it went through
        assert failures == []
        kept = await conditions(admin, OBJECTIVES, namespace, "batch")
        assert set(kept) == {"Accepted", "Costed"}
        assert kept["Costed"]["message"] == "3"


async def test_a_kind_that_may_not_be_written_is_left_alone(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """It costs one attempt, however many objects there are."""
    patching = {"apiGroups": GROUPS, "resources": ["inferencemodels/status"], "verbs": ["patch"]}
    await grant(admin, namespace, *READING, patching)
    names = [f"objective-{number}" for number in range(8)]
    for name in names:
        await admin.create(OBJECTIVES, objective(namespace, name))
    for name in ("m", "n"):
        await admin.create(MODELS, model(namespace, name, name))
    read: list[str] = []

    async def note(path: str) -> None:
        read.append(path.split("/")[-2])

    async with writing(apiserver, EPP, answered=note) as (writer, failures):
        writer.want(status(Kind.OBJECTIVE, namespace, name) for name in names)
        await until(lambda: bool(read))
        writer.want([
            *(status(Kind.OBJECTIVE, namespace, name) for name in names),
            *(status(Kind.MODEL, namespace, name) for name in ("m", "n")),
        ])  # fmt: skip
        await until_seen(partial(accepted, admin, MODELS, namespace, "n"), ("True", "Accepted", 1))
    assert read == ["inferenceobjectives", "inferencemodels", "inferencemodels"]
    assert failures == []


@pytest.mark.slow
async def test_a_cluster_that_has_only_an_older_version_gets_its_conditions_in_that(tmp_path: Path) -> None:
    (definition,) = [each for each in definitions() if each["spec"]["names"]["kind"] == "InferenceModel"]
    (older,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1alpha1"]
    definition["spec"]["versions"] = [{**older, "storage": True}]
    async with api_server(tmp_path) as server, client(server.access()) as admin:
        await admin.install([definition])
        await admin.create(OLDEST_MODELS, model("default", "old", "m", OLDEST_MODELS))
        async with writing(server) as (writer, failures):
            writer.want((status(Kind.MODEL, "default", "old"),))
            await until_seen(partial(accepted, admin, OLDEST_MODELS, "default", "old"), ("True", "Accepted", 1))
            assert failures == []


async def test_an_object_that_was_deleted_or_changed_meanwhile_is_no_failure(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    await admin.create(OBJECTIVES, objective(namespace, "changed"))
    await admin.patch(OBJECTIVES, "changed", {"spec": {"priority": 9}}, namespace)
    await admin.create(OBJECTIVES, objective(namespace, "there"))
    async with writing(apiserver) as (writer, failures):
        writer.want(status(Kind.OBJECTIVE, namespace, name) for name in ("gone", "changed", "there"))
        await until_seen(lambda: accepted(admin, OBJECTIVES, namespace, "there"), ("True", "Accepted", 1))
        assert await accepted(admin, OBJECTIVES, namespace, "changed") == ("", "", 0)
        assert failures == []


@pytest.mark.parametrize(
    ("kind", "resource"),
    [
        (Kind.LEGACY_OBJECTIVE, OLD_OBJECTIVES),
        (Kind.MODEL, OLDEST_MODELS),  # written in the version that is preferred, which is another
    ],
)
async def test_older_groups_and_versions_have_a_status_too(
    apiserver: ApiServer, admin: Client, namespace: str, kind: Kind, resource: Resource
) -> None:
    spec = {"modelName": "m", "poolRef": REF} if kind is Kind.MODEL else {"priority": 1, "poolRef": REF}
    await admin.create(resource, thing(resource, kind.title, namespace, "old", spec))
    async with writing(apiserver) as (writer, failures):
        writer.want((status(kind, namespace, "old"),))
        await until_seen(lambda: accepted(admin, resource, namespace, "old"), ("True", "Accepted", 1))
        assert failures == []


async def test_an_api_server_that_is_away_is_asked_later_and_later(tmp_path: Path) -> None:
    """Nobody listens there. The second attempt comes after a second at least, the third after two more."""
    (port,) = free_ports(1)
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "test", "context": {"cluster": "test", "user": ""}}
    named = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "users": []}
    kubeconfig.write_text(yaml.safe_dump({**named, "current-context": "test"}))
    api = await Api.connect(str(kubeconfig))
    attempts: list[float] = []
    writer = StatusWriter(api, Random(1), lambda path, error: attempts.append(time.monotonic()))
    writer.want(status(Kind.OBJECTIVE, "models", name) for name in ("a", "b", "c"))
    running = asyncio.create_task(writer.run())
    await until(lambda: len(attempts) == 3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await api.close()
    first, second, third = attempts
    assert second - first >= 1.0
    assert third - second >= 2.0


async def test_who_does_not_lead_writes_nothing_until_he_does(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    await admin.create(OBJECTIVES, objective(namespace, "batch"))
    await admin.create(OBJECTIVES, objective(namespace, "other"))
    async with writing(apiserver, is_ours=False) as (standby, _), writing(apiserver) as (leader, _):
        standby.want((status(Kind.OBJECTIVE, namespace, "batch"),))
        leader.want((status(Kind.OBJECTIVE, namespace, "other"),))
        await until_seen(lambda: accepted(admin, OBJECTIVES, namespace, "other"), ("True", "Accepted", 1))
        assert await accepted(admin, OBJECTIVES, namespace, "batch") == ("", "", 0)
        standby.set_ours(True)
        await until_seen(lambda: accepted(admin, OBJECTIVES, namespace, "batch"), ("True", "Accepted", 1))


async def test_a_role_without_the_right_is_told_once_for_a_kind_and_others_are_written(
    apiserver: ApiServer, admin: Client, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    patching = {"apiGroups": GROUPS, "resources": ["inferencemodels/status"], "verbs": ["patch"]}
    await grant(admin, namespace, *READING, patching)
    await admin.create(POOLS, pool(namespace))
    for number in range(20):
        await admin.create(OBJECTIVES, objective(namespace, f"objective-{number}"))
    await admin.create(MODELS, model(namespace, "model", "m"))
    with caplog.at_level(logging.INFO, "epp.discovery"):
        async with following(apiserver, NamedPool(namespace, "pool"), EPP) as seen:
            await until_seen(lambda: accepted(admin, MODELS, namespace, "model"), ("True", "Accepted", 1), within=20)
            await admin.create(OBJECTIVES, objective(namespace, "one-more"))
            await until(lambda: "one-more" in seen.policies.objectives)
            await admin.delete(MODELS, "model", namespace)
            await admin.create(MODELS, model(namespace, "another", "m"))
            await until_seen(lambda: accepted(admin, MODELS, namespace, "another"), ("True", "Accepted", 1))
    (line,) = [record.getMessage() for record in caplog.records if "no conditions" in record.getMessage()]
    assert line.startswith("no conditions are written to inferenceobjectives.llm-d.ai, which harms no routing")
    assert 'cannot patch resource "inferenceobjectives/status" in API group "llm-d.ai"' in line
    assert line.endswith("a role needs get of inferenceobjectives and patch of inferenceobjectives/status")


class Stander(Seen):
    """What a discovery has said that stands for election."""

    def __init__(self) -> None:
        super().__init__()
        self.synced_when_it_led: list[bool] = []

    def lead(self, leads: bool) -> None:
        if leads:
            self.synced_when_it_led.append(self.synced)


@asynccontextmanager
async def standing(server: ApiServer, namespace: str, identity: str) -> AsyncIterator[Stander]:
    """With short times."""
    seen = Stander()
    discovery = KubeDiscovery(
        NamedPool(namespace, "pool"),
        seen.table,
        now=time.monotonic,
        rng=Random(1),
        on_policies=seen.learn,
        on_sync=seen.sync,
        failed=seen.failed,
        candidate=Candidate(namespace, "lease", identity, Timing(4.0, 3.0, 0.1)),
        on_lead=seen.lead,
    )
    await discovery.begin(str(server.kubeconfig()))
    running = asyncio.create_task(discovery.run())
    try:
        yield seen
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await discovery.close()


async def test_pickers_that_stand_by_know_the_same_and_write_nothing(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """Neither leads while somebody else has the lease; when it is let go one of them does, and writes."""
    await admin.create(POOLS, pool(namespace))
    await admin.create(OBJECTIVES, objective(namespace, "batch"))
    spec = {"holderIdentity": "theirs", "leaseDurationSeconds": 3600}
    await admin.create(LEASES, {"metadata": {"namespace": namespace, "name": "lease"}, "spec": spec})
    async with standing(apiserver, namespace, "a") as first, standing(apiserver, namespace, "b") as second:
        await until(lambda: all(each.policies.objectives == {"batch": 1} for each in (first, second)))
        assert first.synced
        assert second.synced
        assert await accepted(admin, OBJECTIVES, namespace, "batch") == ("", "", 0)
        await admin.patch(LEASES, "lease", {"spec": {"holderIdentity": ""}}, namespace)
        await until_seen(lambda: accepted(admin, OBJECTIVES, namespace, "batch"), ("True", "Accepted", 1))


async def test_who_does_not_know_the_pool_yet_leaves_the_lease_to_who_does(
    apiserver: ApiServer, admin: Client, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picker that has just started would otherwise keep one that is ready from it."""
    go_on = asyncio.Event()

    class SlowApi(Api):
        async def list(self, path: str, query: Mapping[str, str]) -> tuple[list[Object], str]:
            await go_on.wait()
            return await super().list(path, query)

    await admin.create(POOLS, pool(namespace))
    with monkeypatch.context() as patched:
        patched.setattr("epp.discovery.kube.discovery.Api", SlowApi)
        slow = standing(apiserver, namespace, "slow")
        starting = await slow.__aenter__()
    try:
        for _ in range(50):  # time enough to take it
            assert (await admin.list(LEASES, namespace))[0] == []
        async with standing(apiserver, namespace, "quick") as quick:
            await until(lambda: bool(quick.synced_when_it_led))
            go_on.set()
            await until(lambda: starting.synced)
            assert starting.synced_when_it_led == []
        await until(lambda: starting.synced_when_it_led == [True])  # the lease of the other has run out
    finally:
        await slow.__aexit__(None, None, None)
