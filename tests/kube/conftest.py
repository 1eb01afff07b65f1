"""One API server for all tests of a session, a namespace for each.

What a failed test shows has the end of the server's log in it.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Generator
from typing import Final

import pytest

from tests.kube.apiserver import ApiServer, api_server
from tests.kube.client import NAMESPACES, Client, client, definitions

SERVER: Final = pytest.StashKey[ApiServer]()
NUMBERS: Final = itertools.count(1)


@pytest.fixture(scope="session")
async def apiserver(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[ApiServer]:
    """Shared: a test that kills it, or that wants other definitions, starts one of its own with `api_server`."""
    async with api_server(tmp_path_factory.mktemp("kube")) as server:
        request.config.stash[SERVER] = server
        yield server


@pytest.fixture(scope="session")
async def admin(apiserver: ApiServer) -> AsyncIterator[Client]:
    """A client who may do anything; every definition of config/crd is there."""
    async with client(apiserver.access()) as made:
        await made.install(definitions())
        yield made


@pytest.fixture
async def namespace(admin: Client) -> str:
    """A new one. It stays: nobody here would empty it."""
    name = f"test-{next(NUMBERS)}"
    await admin.create(NAMESPACES, {"metadata": {"name": name}})
    return name


def pytest_itemcollected(item: pytest.Item) -> None:
    """A start takes three seconds of a machine that is not busy, and the first test of a session pays for it."""
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(120))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    server = item.config.stash.get(SERVER, None)
    if report.failed and server is not None:
        report.sections.append(("kube-apiserver", server.log()))
    return report
