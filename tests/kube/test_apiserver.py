"""The API server that the other tests stand on does what they rely on: rights, tokens, watches, a forgotten past."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Final

import aiohttp
import pytest
import yaml

from tests.kube.apiserver import EPP, STRANGER, Access, ApiServer, api_server
from tests.kube.client import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    NAMESPACES,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    Client,
    Object,
    Rejected,
    client,
)

pytestmark = pytest.mark.anyio

REVIEWS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"


def pod(name: str, namespace: str) -> Object:
    return {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": [{"name": "engine", "image": "vllm"}]},
    }


def role(namespace: str, *verbs: str) -> Object:
    return {
        "metadata": {"name": "pods", "namespace": namespace},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": list(verbs)}],
    }


def binding(namespace: str, account: str, *, of: str = "default") -> Object:
    return {
        "metadata": {"name": "pods", "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "pods"},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": of}],
    }


async def changes(watcher: Client, namespace: str, since: str, count: int) -> list[tuple[str, str]]:
    """The first so many: what happened, to whom."""
    seen: list[tuple[str, str]] = []
    async with aclosing(watcher.watch(PODS, namespace, since)) as events:
        async for kind, thing in events:
            seen.append((kind, thing["metadata"]["name"]))
            if len(seen) == count:
                break
    return seen


async def allowed(who: Client, namespace: str) -> None:
    """Wait until who may list pods: the authorizer hears of a binding by a watch of its own."""
    while True:
        try:
            await who.list(PODS, namespace)
        except Rejected as rejected:
            if rejected.status != 403:
                raise
        else:
            return


async def test_a_watch_tells_every_change_since_the_list(admin: Client, namespace: str) -> None:
    await admin.create(PODS, pod("before", namespace))
    listed, since = await admin.list(PODS, namespace)
    assert [each["metadata"]["name"] for each in listed] == ["before"]
    await admin.create(PODS, pod("a", namespace))
    told = await admin.patch_status(PODS, "a", {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}, namespace)
    assert told["status"]["podIP"] == "10.0.0.1"
    await admin.delete(PODS, "before", namespace)
    # a deletion with a grace of none is an update first, of the deletion's time
    assert await changes(admin, namespace, since, 4) == [
        ("ADDED", "a"),
        ("MODIFIED", "a"),
        ("MODIFIED", "before"),
        ("DELETED", "before"),
    ]


async def test_a_replacement_of_an_older_version_is_a_conflict(admin: Client, namespace: str) -> None:
    made = await admin.create(PODS, pod("a", namespace))
    newer = await admin.patch(PODS, "a", {"metadata": {"labels": {"app": "llama"}}}, namespace)
    with pytest.raises(Rejected) as caught:
        await admin.replace(PODS, made)
    assert (caught.value.status, caught.value.reason) == (409, "Conflict")
    newer["metadata"]["labels"]["app"] = "mistral"
    assert (await admin.replace(PODS, newer))["metadata"]["labels"] == {"app": "mistral"}


async def test_an_account_has_the_verbs_of_its_role_and_no_other(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    async with client(apiserver.access(EPP)) as epp:
        with pytest.raises(Rejected, match='cannot list resource "pods"') as caught:
            await epp.list(PODS, namespace)
        assert (caught.value.status, caught.value.reason) == (403, "Forbidden")
        await admin.create(ROLES, role(namespace, "list"))
        await admin.create(ROLE_BINDINGS, binding(namespace, EPP))
        await allowed(epp, namespace)
        with pytest.raises(Rejected, match='cannot watch resource "pods"'):
            await changes(epp, namespace, "0", 1)
    async with client(apiserver.access(STRANGER)) as stranger:
        with pytest.raises(Rejected, match="system:serviceaccount:default:stranger"):
            await stranger.list(PODS, namespace)


async def test_an_account_of_the_tests_own_namespace_has_a_token(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    token = await admin.token(namespace, "own")
    await admin.create(ROLES, role(namespace, "list"))
    await admin.create(ROLE_BINDINGS, binding(namespace, "own", of=namespace))
    async with client(Access(apiserver.url, token, apiserver.access().ca)) as own:
        await allowed(own, namespace)


async def test_a_token_review_tells_accounts_from_forgeries(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    real = await admin.token(namespace, "own")
    for token, user in (
        (real, f"system:serviceaccount:{namespace}:own"),
        (apiserver.access(STRANGER).token, "system:serviceaccount:default:stranger"),
        ("made-up", None),
    ):
        status = (await admin.ask("POST", REVIEWS, {"spec": {"token": token}}))["status"]
        assert status.get("authenticated", False) is (user is not None)
        assert status.get("user", {}).get("username") == user


async def test_who_has_no_token_is_not_known(apiserver: ApiServer) -> None:
    async with client(Access(apiserver.url, "made-up", apiserver.access().ca)) as nobody:
        with pytest.raises(Rejected) as caught:
            await nobody.list(PODS)
    assert caught.value.status == 401


async def test_the_kubeconfig_says_what_access_says(apiserver: ApiServer, namespace: str) -> None:
    config = yaml.safe_load(apiserver.kubeconfig(EPP, namespace).read_text())
    (cluster,), (user,), (context,) = config["clusters"], config["users"], config["contexts"]
    access = apiserver.access(EPP)
    assert cluster["cluster"] == {"server": access.url, "certificate-authority": str(access.ca)}
    assert user["user"] == {"token": access.token}
    assert context["context"] == {"cluster": cluster["name"], "user": user["name"], "namespace": namespace}
    assert config["current-context"] == context["name"]


async def test_the_certificate_is_checked(apiserver: ApiServer) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(f"{apiserver.url}/readyz")


async def test_cluster_roles_hold_in_every_namespace(apiserver: ApiServer, admin: Client, namespace: str) -> None:
    token = await admin.token(namespace, "everywhere")
    given = role("", "list")
    given["metadata"] = {"name": namespace}
    await admin.create(CLUSTER_ROLES, given)
    bound = binding("", "everywhere", of=namespace)
    bound["metadata"] = {"name": namespace}
    bound["roleRef"] = {**bound["roleRef"], "kind": "ClusterRole", "name": namespace}
    await admin.create(CLUSTER_ROLE_BINDINGS, bound)
    async with client(Access(apiserver.url, token, apiserver.access().ca)) as everywhere:
        await allowed(everywhere, "")


async def test_a_server_that_was_killed_remembers_what_etcd_does(tmp_path: Path) -> None:
    async with api_server(tmp_path) as server, client(server.access()) as admin:
        await admin.create(NAMESPACES, {"metadata": {"name": "here"}})
        for name in ("a", "b", "c"):
            await admin.create(PODS, pod(name, "here"))
        _, since = await admin.list(PODS, "here")
        first = await admin.ask("GET", PODS.path("here"), query={"limit": "1"})
        await admin.delete(PODS, "a", "here")

        port = server.port
        await server.compact()
        # the running server still has the past in its cache
        assert await changes(admin, "here", since, 2) == [("MODIFIED", "a"), ("DELETED", "a")]
        await server.kill()
        with pytest.raises(aiohttp.ClientError):
            await admin.list(PODS, "here")
        await server.start()

        assert server.port == port
        with pytest.raises(Rejected) as caught:
            await changes(admin, "here", since, 1)
        assert (caught.value.status, caught.value.reason) == (410, "Expired")
        with pytest.raises(Rejected) as caught:
            await admin.list(PODS, "here", **{"limit": "1", "continue": first["metadata"]["continue"]})
        assert (caught.value.status, caught.value.reason) == (410, "Expired")
        listed, now = await admin.list(PODS, "here")
        assert [each["metadata"]["name"] for each in listed] == ["b", "c"]
        assert int(now) > int(since)


async def test_a_server_that_is_stopped_ends_its_watches_in_order(tmp_path: Path) -> None:
    async with api_server(tmp_path) as server, client(server.access()) as admin:
        await admin.create(PODS, pod("a", "default"))
        watch = admin.watch(PODS, "default", "0")
        assert (await anext(watch))[0] == "ADDED"
        await server.stop()
        assert [kind async for kind, _ in watch] == []  # it ends without an error
        with pytest.raises(aiohttp.ClientError):
            await admin.list(PODS)
