"""A release in a real API server: every object applied as `kubectl apply --server-side` would, tried first.

In: rendered objects. Out: the server's word on each. Rules: an unknown field is an error; a kind that the server does
not know must be one of NOT_VALIDATED, whose definitions belong to projects that are not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import yaml

from tests.deploy.charts import Object, Rendered
from tests.e2e.serving import Picker
from tests.kube.client import SERVICE_ACCOUNTS, Client, Rejected, Resource

NOT_VALIDATED: Final = {
    "ServiceMonitor",  # the Prometheus operator
    "DestinationRule",  # Istio
    "HTTPRoute",  # Gateway API
    "HealthCheckPolicy",  # GKE
    "GCPBackendPolicy",
    "PodMonitoring",
    "ClusterPodMonitoring",
}
APPLY: Final = "application/apply-patch+yaml"


async def resource_of(admin: Client, thing: Object) -> Resource | None:
    """Where the server keeps such objects; None: it does not know the kind."""
    version = thing["apiVersion"]
    try:
        found = await admin.ask("GET", f"/apis/{version}" if "/" in version else f"/api/{version}")
    except Rejected as rejected:
        if rejected.status != 404:
            raise
        return None
    plurals = [each["name"] for each in found["resources"] if each["kind"] == thing["kind"] and "/" not in each["name"]]
    assert len(plurals) == 1, f"{version} has no {thing['kind']}"
    return Resource(version, plurals[0])


async def apply(admin: Client, thing: Object, **query: str) -> Object | None:
    """Create or change it; None: the kind is one of NOT_VALIDATED.

    Raises:
        Rejected: it is not valid.
    """
    resource = await resource_of(admin, thing)
    if resource is None:
        assert thing["kind"] in NOT_VALIDATED
        return None
    metadata = thing["metadata"]
    path = resource.path(metadata.get("namespace", ""), metadata["name"])
    asked = {"fieldManager": "tests", "fieldValidation": "Strict", **query}
    return await admin.ask("PATCH", path, thing, query=asked, content=APPLY)


async def install(admin: Client, rendered: Rendered) -> list[str]:
    """All of a release; returns the kinds that were really applied."""
    for thing in rendered.objects:
        await apply(admin, thing, dryRun="All")
    return [thing["kind"] for thing in rendered.objects if await apply(admin, thing) is not None]


async def token_of(admin: Client, namespace: str, account: str) -> str:
    """A token that is a service account which is there."""
    path = SERVICE_ACCOUNTS.path(namespace, account) + "/token"
    token: str = (await admin.ask("POST", path, {"spec": {"expirationSeconds": 3600}}))["status"]["token"]
    return token


async def kubeconfig_of(admin: Client, namespace: str, account: str, folder: Path) -> Path:
    """Write a kubeconfig file that is a service account which is there."""
    token = await token_of(admin, namespace, account)
    server = {"server": admin.access.url, "certificate-authority": str(admin.access.ca)}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": server}],
        "users": [{"name": account, "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": account, "namespace": namespace}}],
        "current-context": "test",
    }
    file = folder / f"{account}.kubeconfig"
    file.write_text(yaml.safe_dump(content))
    return file


async def ready(picker: Picker, within: float = 40.0) -> None:
    """Wait until a readiness probe would succeed.

    Raises:
        ConfigError: it ended, or takes too long; with its last words.
    """

    async def serves() -> bool:
        return await picker.serving("readiness") == "SERVING"

    await picker.process.until(serves, "SERVING for readiness", within)
