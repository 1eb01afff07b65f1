"""What tests write and read in the API server: raw JSON over HTTP, one method for each verb.

In: objects as dicts, with their namespace and name in `metadata`. Out: objects as the server has them now.
Rules: nothing is retried, cached or hidden; whatever is not a success raises Rejected with the server's own words.
Rejected: the official client, which is what is under test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import yaml

from tests.kube.apiserver import Access

Object = dict[str, Any]

MERGE: Final = "application/merge-patch+json"
CRDS: Final = Path(__file__).parent.parent.parent / "config" / "crd"


class Resource(msgspec.Struct, frozen=True):
    """One kind of object in one version."""

    version: str
    """As in apiVersion: v1, or group/version."""
    plural: str

    def path(self, namespace: str = "", name: str = "") -> str:
        """Namespace "": all of them, or a resource that lives in none. Name "": all objects."""
        root = f"/apis/{self.version}" if "/" in self.version else f"/api/{self.version}"
        place = f"/namespaces/{namespace}" if namespace else ""
        return f"{root}{place}/{self.plural}" + (f"/{name}" if name else "")


NAMESPACES: Final = Resource("v1", "namespaces")
PODS: Final = Resource("v1", "pods")
SERVICE_ACCOUNTS: Final = Resource("v1", "serviceaccounts")
LEASES: Final = Resource("coordination.k8s.io/v1", "leases")
ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "roles")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "rolebindings")
CLUSTER_ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "clusterroles")
CLUSTER_ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "clusterrolebindings")
DEFINITIONS: Final = Resource("apiextensions.k8s.io/v1", "customresourcedefinitions")

NEW: Final = "llm-d.ai/v1alpha2"
OLD: Final = "inference.networking.x-k8s.io/v1alpha2"
POOLS: Final = Resource("inference.networking.k8s.io/v1", "inferencepools")
OLD_POOLS: Final = Resource(OLD, "inferencepools")
OBJECTIVES: Final = Resource(NEW, "inferenceobjectives")
OLD_OBJECTIVES: Final = Resource(OLD, "inferenceobjectives")
REWRITES: Final = Resource(NEW, "inferencemodelrewrites")
OLD_REWRITES: Final = Resource(OLD, "inferencemodelrewrites")
MODELS: Final = Resource(OLD, "inferencemodels")
OLDEST_MODELS: Final = Resource("inference.networking.x-k8s.io/v1alpha1", "inferencemodels")
IMPORTS: Final = Resource("inference.networking.x-k8s.io/v1alpha1", "inferencepoolimports")


class Rejected(Exception):
    """The server did not do it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        """One word: NotFound, Forbidden, Invalid, Conflict, Expired."""
        self.message = message


class Client:
    """One user's."""

    def __init__(self, session: aiohttp.ClientSession, access: Access) -> None:
        self._session = session
        self.access = access

    async def get(self, resource: Resource, name: str, namespace: str = "") -> Object:
        return await self.ask("GET", resource.path(namespace, name))

    async def create(self, resource: Resource, thing: Object) -> Object:
        """A field that the resource does not have is refused, not dropped in silence."""
        return await self.ask("POST", resource.path(_namespace(thing)), thing, query={"fieldValidation": "Strict"})

    async def replace(self, resource: Resource, thing: Object) -> Object:
        """With `metadata.resourceVersion` only if that is still the newest."""
        return await self.ask("PUT", resource.path(_namespace(thing), thing["metadata"]["name"]), thing)

    async def patch(self, resource: Resource, name: str, changes: Object, namespace: str = "") -> Object:
        """Merge the changes into the object; None takes a field away."""
        return await self.ask("PATCH", resource.path(namespace, name), changes, content=MERGE)

    async def patch_status(self, resource: Resource, name: str, status: Object, namespace: str = "") -> Object:
        """Merge into the object's status, through its own sub-resource."""
        path = resource.path(namespace, name) + "/status"
        return await self.ask("PATCH", path, {"status": status}, content=MERGE)

    async def delete(self, resource: Resource, name: str, namespace: str = "") -> None:
        """At once: nobody here would end a pod's grace."""
        await self.ask("DELETE", resource.path(namespace, name), {"gracePeriodSeconds": 0})

    async def list(self, resource: Resource, namespace: str = "", **query: str) -> tuple[list[Object], str]:
        """The objects, and the resourceVersion from which a watch goes on."""
        found = await self.ask("GET", resource.path(namespace), query=query)
        return found["items"], found["metadata"]["resourceVersion"]

    async def watch(
        self, resource: Resource, namespace: str, since: str, **query: str
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """Changes as (ADDED | MODIFIED | DELETED | BOOKMARK, object), until the server ends it or the caller does.

        Args:
            since: the resourceVersion of a list; "0": first whatever there is. Not "": over an etcd as old as
                Debian 12's the server waits three seconds for word of the newest revision, and answers 504.

        Raises:
            Rejected: 410 when `since` is forgotten, at the start or in the middle.
        """
        asked = {"watch": "1", "resourceVersion": since, **query}
        async with self._session.get(self._url(resource.path(namespace)), params=asked) as answer:
            if answer.status != 200:
                raise await _rejection(answer)
            async for line in answer.content:
                event = msgspec.json.decode(line)
                if event["type"] == "ERROR":
                    raise _rejected(event["object"]["code"], event["object"])
                yield event["type"], event["object"]

    async def token(self, namespace: str, account: str) -> str:
        """Make a service account, and a token that is it."""
        await self.create(SERVICE_ACCOUNTS, {"metadata": {"namespace": namespace, "name": account}})
        path = SERVICE_ACCOUNTS.path(namespace, account) + "/token"
        made = await self.ask("POST", path, {"spec": {"expirationSeconds": 3600}})
        token: str = made["status"]["token"]
        return token

    async def install(self, definitions: Iterable[Object]) -> None:
        """Create definitions of resources, and wait until every version of each is served."""
        waiting: list[Resource] = []
        for definition in definitions:
            await self.create(DEFINITIONS, definition)
            spec = definition["spec"]
            versions = (f"{spec['group']}/{version['name']}" for version in spec["versions"])
            waiting.extend(Resource(version, spec["names"]["plural"]) for version in versions)
        async with asyncio.timeout(20):
            for resource in waiting:
                while not await self._serves(resource):
                    await asyncio.sleep(0.02)

    async def ask(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Object:
        """One request.

        Raises:
            Rejected: the answer is not a success.
        """
        headers = {"Content-Type": content}
        data = None if body is None else msgspec.json.encode(body)
        async with self._session.request(method, self._url(path), params=query, data=data, headers=headers) as answer:
            if answer.status >= 300:
                raise await _rejection(answer)
            found: Object = await answer.json()
            return found

    def _url(self, path: str) -> str:
        return self.access.url + path

    async def _serves(self, resource: Resource) -> bool:
        try:
            await self.list(resource)
        except Rejected as rejected:
            if rejected.status in (404, 503):  # not known yet, or not established
                return False
            raise
        return True


@asynccontextmanager
async def client(access: Access) -> AsyncIterator[Client]:
    """Speak as one user for as long as the block runs."""
    connector = aiohttp.TCPConnector(ssl=access.ssl())
    headers = {"Authorization": f"Bearer {access.token}"}
    # A watch lasts as long as the test; a request that hangs is ended by the test's own limit.
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout()) as session:
        yield Client(session, access)


def definitions() -> list[Object]:
    """Every file of config/crd."""
    return [yaml.safe_load(file.read_text()) for file in sorted(CRDS.glob("*.yaml"))]


def _namespace(thing: Object) -> str:
    namespace: str = thing["metadata"].get("namespace", "")
    return namespace


async def _rejection(answer: aiohttp.ClientResponse) -> Rejected:
    if answer.content_type == "application/json":
        return _rejected(answer.status, await answer.json())
    return Rejected(answer.status, "", await answer.text())  # a group that is not served yet: 404 page not found


def _rejected(status: int, said: Object) -> Rejected:
    return Rejected(status, said.get("reason", ""), said.get("message", ""))
