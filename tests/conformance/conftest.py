"""Two API servers: one with every definition of ours, one as clusters of the older picker have it.

The first is that of the other tests over Kubernetes, started once more where both run in one session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.conformance.objects import Namespace
from tests.kube.apiserver import ApiServer, api_server
from tests.kube.client import NAMESPACES, NEW, Client, client, definitions
from tests.kube.conftest import NUMBERS, admin, apiserver

__all__ = ("admin", "apiserver")


class Cluster(msgspec.Struct, frozen=True):
    """An API server, and a namespace of the test's own in it."""

    server: ApiServer
    admin: Client

    async def namespace(self) -> Namespace:
        name = f"conformance-{next(NUMBERS)}"
        await self.admin.create(NAMESPACES, {"metadata": {"name": name}})
        return Namespace(self.admin, name)


@pytest.fixture(scope="session")
def cluster(apiserver: ApiServer, admin: Client) -> Cluster:
    """With the definitions of both groups, so that objects of the older one do not count."""
    return Cluster(apiserver, admin)


@pytest.fixture(scope="session")
async def older_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Without the group llm-d.ai: what the Gateway API Inference Extension had installed to v1.5."""
    async with api_server(tmp_path_factory.mktemp("older")) as server, client(server.access()) as user:
        await user.install(each for each in definitions() if each["spec"]["group"] != NEW.partition("/")[0])
        yield Cluster(server, user)


@pytest.fixture(scope="session")
async def bare_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Without any definition: pods are all there is."""
    async with api_server(tmp_path_factory.mktemp("bare")) as server, client(server.access()) as user:
        yield Cluster(server, user)


def pytest_itemcollected(item: pytest.Item) -> None:
    """The first test of a session pays for the API servers' start."""
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(120))
