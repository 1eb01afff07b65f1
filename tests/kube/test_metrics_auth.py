"""Who may read the metrics port, as a real API server says: service accounts, their tokens and their rights.

The guard's time is an argument, so that nobody waits for a verdict to end; the API server's own time is real, and a
right that was just given is there some milliseconds later.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from textwrap import dedent
from typing import Final

import aiohttp
import pytest
import yaml
from aiohttp import web

from epp.demo.child import child, free_ports
from epp.discovery.kube.reviews import RIGHTS, TOKENS, Reviews
from epp.flags import ServeFlags
from epp.telemetry.guard import Guard
from epp.telemetry.http import MetricsServer, Views
from tests.e2e.serving import Picker, until
from tests.kube.apiserver import Access, ApiServer, api_server
from tests.kube.client import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    NAMESPACES,
    POOLS,
    SERVICE_ACCOUNTS,
    Client,
    Object,
    client,
)
from tests.kube.test_discovery import pool

pytestmark = pytest.mark.anyio

TOKEN_REVIEWS: Final = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
ACCESS_REVIEWS: Final = {
    "apiGroups": ["authorization.k8s.io"],
    "resources": ["subjectaccessreviews"],
    "verbs": ["create"],
}
ROOT: Final = Path(__file__).parent.parent.parent
DENY_LASTS: Final = 10.0
ALLOW_LASTS: Final = 60.0


def reading(*paths: str) -> Object:
    """The rule of docs/serve.md."""
    return {"nonResourceURLs": list(paths), "verbs": ["get"]}


async def allow(admin: Client, namespace: str, account: str, *rules: Object) -> None:
    """Give a service account a ClusterRole."""
    name = f"{namespace}-{account}"
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    await admin.create(CLUSTER_ROLES, {"metadata": {"name": name}, "rules": list(rules)})
    await admin.create(CLUSTER_ROLE_BINDINGS, {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]})


def kubeconfig(url: str, token: str, path: Path, ca: Path | None = None) -> str:
    """Written to `path`, for whoever has this token."""
    cluster = {"server": url, **({} if ca is None else {"certificate-authority": str(ca)})}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "epp", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "epp"}}],
        "current-context": "test",
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


class Door:
    """A metrics port on loopback, and what it made of the API server."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.told: list[str] = []
        self.reviewed = 0
        self.reviews = Reviews(self.told.append)
        self.url = ""

    async def review(self, token: str, verb: str, path: str) -> HTTPStatus:
        self.reviewed += 1
        return await self.reviews.review(token, verb, path)

    async def status(self, token: str, path: str = "/metrics", address: str = "127.0.0.1") -> int:
        """Of a GET from this address; token "": none is sent."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as session,
            session.get(self.url + path) as response,
        ):
            return response.status

    async def will_answer(self, expected: int, token: str, path: str = "/metrics") -> None:
        """Ask until it does, while the API server learns of a role; each time as if a deny had just ended."""
        async with asyncio.timeout(20):
            while await self.status(token, path) != expected:
                self.now += DENY_LASTS
                await asyncio.sleep(0.02)


@asynccontextmanager
async def door(access: Access, token: str, folder: Path) -> AsyncIterator[Door]:
    """Guarded by whoever has this token."""
    made = Door()
    await made.reviews.begin(kubeconfig(access.url, token, folder / "kubeconfig", access.ca))
    server = MetricsServer(Views(lambda: [b"# page\n"], lambda n: [], list), Guard(made.review, lambda: made.now))
    made.url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
    try:
        yield made
    finally:
        await server.stop()
        await made.reviews.close()


@asynccontextmanager
async def cluster_door(access: Access, admin: Client, namespace: str, folder: Path) -> AsyncIterator[Door]:
    """Guarded by a service account that has the two rights that a picker needs, and no other."""
    picker = await admin.token(namespace, "epp")
    await allow(admin, namespace, "epp", TOKEN_REVIEWS, ACCESS_REVIEWS)
    async with door(access, picker, folder) as made:
        await made.will_answer(401, "a-token-of-nobody")
        made.told.clear()  # until the API server had learnt of the role
        yield made


async def test_who_has_the_right_reads_and_nobody_else_does(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    scraper, stranger = await admin.token(namespace, "prometheus"), await admin.token(namespace, "stranger")
    await allow(admin, namespace, "prometheus", reading("/metrics"))
    async with cluster_door(apiserver.access(), admin, namespace, tmp_path) as made:
        await made.will_answer(200, scraper)
        assert await made.status(stranger) == 403
        assert await made.status("") == 401
        assert await made.status(scraper[:-4] + "AAAA") == 401  # the signature is another's
        assert await made.status(scraper, "/debug/decisions") == 403  # a page of its own
        assert await made.status(scraper, "/other") == 404
        assert made.told == []


async def test_a_role_for_the_debug_pages_is_one_rule(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    engineer = await admin.token(namespace, "engineer")
    await allow(admin, namespace, "engineer", reading("/debug/*"))
    async with cluster_door(apiserver.access(), admin, namespace, tmp_path) as made:
        await made.will_answer(200, engineer, "/debug/decisions")
        assert await made.status(engineer, "/debug/endpoints") == 200
        assert await made.status(engineer) == 403


async def test_groups_count_as_they_do_for_the_api_server(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    scraper = await admin.token(namespace, "prometheus")
    await allow(admin, namespace, "prometheus")  # no rule of its own
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": f"{namespace}-group"}
    group = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": f"system:serviceaccounts:{namespace}"}
    metadata = {"name": f"{namespace}-group"}
    await admin.create(CLUSTER_ROLES, {"metadata": metadata, "rules": [reading("/metrics")]})
    await admin.create(CLUSTER_ROLE_BINDINGS, {"metadata": metadata, "roleRef": role, "subjects": [group]})
    async with cluster_door(apiserver.access(), admin, namespace, tmp_path) as made:
        await made.will_answer(200, scraper)


async def test_a_token_that_was_made_for_somebody_else_is_no_token(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    scraper = await admin.token(namespace, "prometheus")
    await allow(admin, namespace, "prometheus", reading("/metrics"))
    path = SERVICE_ACCOUNTS.path(namespace, "prometheus") + "/token"
    made_for_vault = await admin.ask("POST", path, {"spec": {"expirationSeconds": 3600, "audiences": ["vault"]}})
    async with cluster_door(apiserver.access(), admin, namespace, tmp_path) as made:
        await made.will_answer(200, scraper)
        assert await made.status(made_for_vault["status"]["token"]) == 401


async def test_what_the_documentation_gives_to_the_picker_and_to_prometheus_is_enough(
    apiserver: ApiServer, admin: Client, tmp_path: Path
) -> None:
    kinds = {"ClusterRole": CLUSTER_ROLES, "ClusterRoleBinding": CLUSTER_ROLE_BINDINGS}
    for namespace in ("inference", "monitoring"):
        await admin.create(NAMESPACES, {"metadata": {"name": namespace}})
    picker, scraper = await admin.token("inference", "epp"), await admin.token("monitoring", "prometheus")
    page = (ROOT / "docs" / "serve.md").read_text()
    blocks = [dedent(block) for block in re.findall(r"^ +```yaml\n(.*?)^ +```$", page, re.MULTILINE | re.DOTALL)]
    documents = [each for block in blocks for each in yaml.safe_load_all(block) if "kind" in each]
    assert [each["kind"] for each in documents] == ["ClusterRole", "ClusterRoleBinding"] * 2
    for each in documents:
        await admin.create(kinds[each["kind"]], each)
    async with door(apiserver.access(), picker, tmp_path) as made:
        await made.will_answer(200, scraper)
        assert await made.status(scraper, "/debug/endpoints") == 403


async def test_a_right_given_later_works_when_the_deny_is_over_and_one_taken_ends_with_the_allow(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    scraper = await admin.token(namespace, "prometheus")
    async with cluster_door(apiserver.access(), admin, namespace, tmp_path) as made:
        assert await made.status(scraper) == 403
        await allow(admin, namespace, "prometheus", reading("/metrics"))
        made.now += DENY_LASTS - 0.5
        assert await made.status(scraper) == 403
        await made.will_answer(200, scraper)
        allowed_at = made.now
        await admin.delete(SERVICE_ACCOUNTS, "prometheus", namespace)
        made.now = allowed_at + ALLOW_LASTS - 0.5
        assert await made.status(scraper) == 200
        made.now = allowed_at + ALLOW_LASTS
        # The API server itself believes in a token for ten seconds more, by its own clock.
        async with asyncio.timeout(20):
            while await made.status(scraper) != 401:
                made.now += ALLOW_LASTS
                await asyncio.sleep(0.2)


async def test_a_role_that_may_make_no_reviews_is_named_with_what_to_add(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    scraper = await admin.token(namespace, "prometheus")
    picker = await admin.token(namespace, "epp")
    await allow(admin, namespace, "prometheus", reading("/metrics"))
    async with door(apiserver.access(), picker, tmp_path) as made:
        assert await made.status(scraper) == 500
        (told,) = made.told
        assert 'cannot create resource "tokenreviews" in API group "authentication.k8s.io"' in told
        assert "ClusterRole that may create tokenreviews" in told
        assert scraper not in told
        await allow(admin, namespace, "epp", TOKEN_REVIEWS)
        async with asyncio.timeout(20):
            while "tokenreviews.authentication" in made.told[-1]:
                made.now += DENY_LASTS
                assert await made.status(scraper) == 500
        assert 'cannot create resource "subjectaccessreviews" in API group "authorization.k8s.io"' in made.told[-1]
        await admin.patch(CLUSTER_ROLES, f"{namespace}-epp", {"rules": [TOKEN_REVIEWS, ACCESS_REVIEWS]})
        await made.will_answer(200, scraper)


KNOWN: Final = b'{"status": {"authenticated": true, "user": {"username": "u"}}}'


@pytest.mark.parametrize(
    ("tokens", "access", "expected"),
    [
        (KNOWN, b'{"status": {"allowed": true}}', 200),
        (KNOWN, b'{"status": {"allowed": true, "denied": true}}', 403),
        (KNOWN, b'{"status": {}}', 403),
        (KNOWN, b"{}", 403),
        (KNOWN, b"<html>sign in</html>", 500),
        (KNOWN, b"", 500),
        (KNOWN, b'{"status": "allowed"}', 500),
        (KNOWN, b'{"status": {"allowed": "true"}}', 500),
        (b'{"status": {"user": {"username": "u"}}}', b'{"status": {"allowed": true}}', 401),
        (b"{}", b'{"status": {"allowed": true}}', 401),
        (b'{"status": {"authenticated": 1}}', b'{"status": {"allowed": true}}', 500),
        (b"[true]", b'{"status": {"allowed": true}}', 500),
        (b"<html>sign in</html>", b'{"status": {"allowed": true}}', 500),
    ],
)
async def test_whatever_answers_in_the_api_servers_place_lets_nobody_in_unless_it_says_so(
    tokens: bytes, access: bytes, expected: int, tmp_path: Path
) -> None:
    def answering(body: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(status=201, body=body, content_type="application/json")

        return answer

    app = web.Application()
    app.add_routes([web.post(TOKENS, answering(tokens)), web.post(RIGHTS, answering(access))])
    runner = web.AppRunner(app)
    await runner.setup()
    (port,) = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    told: list[str] = []
    reviews = Reviews(told.append)
    await reviews.begin(kubeconfig(f"http://127.0.0.1:{port}", "t", tmp_path / "kubeconfig"))
    assert await reviews.review("secret", "get", "/metrics") == expected
    assert bool(told) == (expected == 500)
    assert not any("secret" in words for words in told)
    await reviews.close()
    await runner.cleanup()


async def test_a_flood_of_wrong_tokens_is_a_few_reviews_and_the_scraper_reads_on(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    scraper, renewed = [await admin.token(namespace, name) for name in ("prometheus", "prometheus-2")]
    for name in ("prometheus", "prometheus-2"):
        await allow(admin, namespace, name, reading("/metrics"))
    async with cluster_door(apiserver.access(), admin, namespace, tmp_path) as made:
        await made.will_answer(200, scraper)
        made.now += 100.0  # the allow is over, and so is what this test has asked for already
        before = made.reviewed
        flood = [made.status(f"wrong-{number}", address="127.0.0.2") for number in range(300)]
        answers = asyncio.gather(*flood)
        assert await made.status(scraper) == 200
        assert Counter(await answers) == {401: 5, 429: 295}
        assert made.reviewed - before == 6
        assert await made.status(renewed) == 200  # never seen before, while the flood may ask no more
        assert await made.status("wrong-again", address="127.0.0.2") == 429


@pytest.mark.slow
async def test_while_the_api_server_is_away_an_allow_goes_on_for_its_time_and_nobody_else_reads(
    tmp_path: Path,
) -> None:
    async with api_server(tmp_path / "server") as server, client(server.access()) as admin:
        await admin.create(NAMESPACES, {"metadata": {"name": "models"}})
        scraper, late = await admin.token("models", "prometheus"), await admin.token("models", "late")
        await allow(admin, "models", "prometheus", reading("/metrics"))
        async with cluster_door(server.access(), admin, "models", tmp_path) as made:
            await made.will_answer(200, scraper)
            await server.kill()
            made.now += ALLOW_LASTS - 0.5
            assert await made.status(scraper) == 200
            assert await made.status(late) == 500
            assert await made.status("") == 401
            made.now += 0.5
            assert await made.status(scraper) == 500
            assert made.told[-1].startswith("the API server: Cannot connect")
            await server.start()
            await made.will_answer(200, scraper)
            assert await made.status(late) == 403


def test_with_endpoints_in_a_file_there_is_nobody_to_ask_which_is_told_to_who_wants_it() -> None:
    assert list(ServeFlags().without_effect(kubernetes=False)) == []
    assert list(ServeFlags(metrics_endpoint_auth=False).without_effect(kubernetes=False)) == []
    assert list(ServeFlags(metrics_endpoint_auth=True).without_effect()) == []
    (warning,) = ServeFlags(metrics_endpoint_auth=True).without_effect(kubernetes=False)
    assert warning.startswith("--metrics-endpoint-auth has no effect: endpoints are in a file")


async def test_a_picker_asks_who_reads_unless_it_is_told_not_to(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    """With the flags and the role of the reference's chart: 401 without a token, the page with one."""
    await admin.create(POOLS, pool(namespace))
    config = apiserver.kubeconfig(namespace=namespace)
    command = ["env", f"KUBECONFIG={config}", sys.executable, "-m", "epp", "serve", "--pool-name=pool"]
    command += [f"--pool-namespace={namespace}", "--secure-serving=false", "--drain-timeout=100ms"]
    token = {"Authorization": f"Bearer {admin.access.token}"}
    for flags, without in (((), 401), (("--metrics-endpoint-auth=false",), 200)):
        grpc_port, health, metrics = free_ports(3)
        ports = (f"--grpc-port={grpc_port}", f"--grpc-health-port={health}", f"--metrics-port={metrics}")
        async with child(f"picker-{without}", *command, *ports, *flags, folder=tmp_path) as process:
            picker = Picker(process, grpc_port, health, metrics)
            await until(picker.serving, "SERVING", within=15.0)
            async with aiohttp.ClientSession() as session:
                for path in ("/metrics", "/debug/decisions", "/debug/endpoints"):
                    async with session.get(picker.pages + path) as response:
                        assert response.status == without
                    async with session.get(picker.pages + path, headers=token) as response:
                        assert response.status == 200
            assert admin.access.token not in process.output(1000)
