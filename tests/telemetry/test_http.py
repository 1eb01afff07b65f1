from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from epp.errors import ConfigError
from epp.telemetry.access import PEER_BURST
from epp.telemetry.exposition import Sources, render
from epp.telemetry.guard import Guard
from epp.telemetry.http import READERS, MetricsServer, Views
from tests.telemetry.builders import metrics, table, ticket, zero

pytestmark = pytest.mark.anyio


class Page:
    """A page that counts how often it is made, and can be held up between two pieces."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.made = 0

    def __call__(self) -> Iterator[bytes]:
        self.made += 1
        yield b"# first\n"
        yield b"x" * self.size


@asynccontextmanager
async def serving(page: Page, *, send_timeout: float = 10.0) -> AsyncIterator[str]:
    views = Views(page, lambda n: [{"request_id": str(i)} for i in range(n)], lambda: [{"name": "a", "waiting": None}])
    server = MetricsServer(views, send_timeout=send_timeout)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop()


async def test_the_page_is_served_as_prometheus_wants_it() -> None:
    counted = metrics()
    counted.decided(ticket())
    views = Views(lambda: render(counted, Sources(table([]), "p", zero)), lambda n: [], list)
    server = MetricsServer(views)
    port = await server.start("127.0.0.1", 0)
    # What Prometheus 3 asks for; text is what it gets.
    accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept}) as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await response.text()
    await server.stop()
    assert any(family.name == "llm_d_epp_request" for family in text_string_to_metric_families(text))


class Steps:
    """A page of three pieces, each of which says how often the loop has turned by then; and a thousand values."""

    def __init__(self) -> None:
        self.turns = 0
        self.seen: list[int] = []

    async def turn(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)

    def pieces(self) -> Iterator[bytes]:
        for _ in range(3):
            self.seen.append(self.turns)
            yield b"# piece\n"

    def values(self, n: int) -> Iterator[object]:
        for number in range(n):
            self.seen.append(self.turns)
            yield {"number": number}


@pytest.mark.parametrize("path", ["/metrics", "/debug/decisions?n=3", "/debug/endpoints"])
async def test_the_loop_does_its_other_work_between_two_pieces_of_a_page(path: str) -> None:
    steps = Steps()
    server = MetricsServer(Views(steps.pieces, steps.values, lambda: steps.values(3)))
    port = await server.start("127.0.0.1", 0)
    turning = asyncio.create_task(steps.turn())
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}{path}") as response:
        assert response.status == 200
        await response.read()
    turning.cancel()
    await server.stop()
    assert len(steps.seen) == 3
    assert steps.seen == sorted(set(steps.seen))  # no two of them in one turn


async def test_a_page_of_many_pieces_comes_whole() -> None:
    pieces = [b"%d " % number * 1000 for number in range(300)]
    server = MetricsServer(Views(lambda: pieces, lambda n: [], list))
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/metrics") as response:
        assert await response.read() == b"".join(pieces)
    await server.stop()


async def test_a_reader_of_heads_gets_the_length_and_the_connection_goes_on() -> None:
    connector = aiohttp.TCPConnector(limit=1)  # one connection, on which a body that nobody waits for would be seen
    async with serving(Page()) as url, aiohttp.ClientSession(connector=connector) as client:
        async with client.head(f"{url}/metrics") as response:
            assert (response.status, response.headers["Content-Length"]) == (200, "18")
        async with client.get(f"{url}/metrics") as response:
            assert await response.read() == b"# first\n" + b"x" * 10


async def test_readers_who_ask_at_the_same_time_share_one_page() -> None:
    page = Page()
    async with serving(page) as url, aiohttp.ClientSession() as client:

        async def read() -> bytes:
            async with client.get(f"{url}/metrics") as response:
                return await response.read()

        pages = await asyncio.gather(*(read() for _ in range(4)))
        assert set(pages) == {b"# first\n" + b"x" * 10}
        assert page.made <= 4
        made = page.made
        await read()
        assert page.made == made + 1  # nobody gets an old one


async def test_a_reader_who_goes_away_does_not_spoil_it_for_the_others() -> None:
    page = Page(200_000)
    async with serving(page) as url, aiohttp.ClientSession() as client:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        writer.transport.abort()
        async with client.get(f"{url}/metrics") as response:
            assert len(await response.read()) == 200_008


class DeadReader:
    """Asks for the page, takes the first bytes of it, and no more."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)

    async def ask(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", port))
        await loop.sock_sendall(self.socket, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await loop.sock_recv(self.socket, 12) == b"HTTP/1.1 200"

    async def take_what_is_left(self) -> int:
        taken = 0
        while data := await asyncio.get_running_loop().sock_recv(self.socket, 1 << 20):
            taken += len(data)
        return taken


async def status_of(client: aiohttp.ClientSession, url: str) -> int:
    async with client.get(f"{url}/debug/endpoints") as response:
        return response.status


async def test_no_more_than_a_few_readers_are_served_at_once_and_those_who_leave_make_room() -> None:
    """Their pages are larger than any socket buffer, so they stay until they leave."""
    async with serving(Page(30_000_000), send_timeout=60.0) as url, aiohttp.ClientSession() as client:
        dead = [DeadReader() for _ in range(READERS)]
        for reader in dead:
            await reader.ask(int(url.rpartition(":")[2]))
        async with client.get(f"{url}/debug/endpoints") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
        for reader in dead:
            reader.socket.close()
        async with asyncio.timeout(10):
            while await status_of(client, url) == 503:
                pass
        assert await status_of(client, url) == 200


async def test_a_reader_who_takes_nothing_is_cut_off() -> None:
    async with serving(Page(30_000_000), send_timeout=0.2) as url, aiohttp.ClientSession() as client:
        dead = [DeadReader() for _ in range(READERS)]
        for reader in dead:
            await reader.ask(int(url.rpartition(":")[2]))
        async with asyncio.timeout(10):
            while await status_of(client, url) == 503:  # the first to ask is the first to be cut off
                pass
            assert await dead[0].take_what_is_left() < 30_000_000
        for reader in dead:
            reader.socket.close()


async def test_debug_pages_are_json() -> None:
    async with serving(Page()) as url, aiohttp.ClientSession() as client:
        async with client.get(f"{url}/debug/decisions?n=2") as response:
            assert response.content_type == "application/json"
            assert await response.json() == [{"request_id": "0"}, {"request_id": "1"}]
        async with client.get(f"{url}/debug/decisions") as response:
            assert len(await response.json()) == 20
        async with client.get(f"{url}/debug/endpoints") as response:
            assert await response.json() == [{"name": "a", "waiting": None}]


async def test_a_debug_page_without_values_is_an_empty_list() -> None:
    server = MetricsServer(Views(Page(), lambda n: [], list))
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/debug/endpoints") as response:
        assert await response.json() == []
    await server.stop()


@pytest.mark.parametrize("n", ["0", "1001", "-1", "x", "", "1" * 5000, "%C2%B2"])
async def test_a_number_that_is_none_is_a_bad_request_that_says_what_is_allowed(n: str) -> None:
    async with (
        serving(Page()) as url,
        aiohttp.ClientSession() as client,
        client.get(f"{url}/debug/decisions?n={n}") as response,
    ):
        assert response.status == 400
        assert await response.text() == "n must be a number from 1 to 1000\n"


def loopbacks() -> list[str]:
    """Those that this machine has."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return ["127.0.0.1"]
    return ["127.0.0.1", "[::1]"]


async def test_every_address_is_served_of_both_families() -> None:
    server = MetricsServer(Views(Page(), lambda n: [], list))
    port = await server.start(None, 0)
    async with aiohttp.ClientSession() as client:
        for host in loopbacks():
            assert await status_of(client, f"http://{host}:{port}") == 200
    await server.stop()


async def test_a_port_that_is_taken_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port {port} cannot be bound"):
            await MetricsServer(Views(Page(), lambda n: [], list)).start("127.0.0.1", port)


class Asked:
    """An authority that says one thing, and remembers what it was asked."""

    def __init__(self, verdict: HTTPStatus) -> None:
        self.verdict = verdict
        self.questions: list[tuple[str, str, str]] = []

    async def review(self, token: str, verb: str, path: str) -> HTTPStatus:
        self.questions.append((token, verb, path))
        return self.verdict


@asynccontextmanager
async def guarded(asked: Asked, page: Page) -> AsyncIterator[str]:
    server = MetricsServer(Views(page, lambda n: [], list), Guard(asked.review, zero))
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop()


TOKEN = {"Authorization": "Bearer let-me-in"}


@pytest.mark.parametrize("path", ["/metrics", "/debug/decisions", "/debug/endpoints"])
async def test_every_page_is_asked_about_by_its_own_path_and_the_requests_verb(path: str) -> None:
    asked = Asked(HTTPStatus.OK)
    async with guarded(asked, Page()) as url, aiohttp.ClientSession(headers=TOKEN) as client:
        async with client.get(f"{url}{path}?n=1") as response:
            assert response.status == 200
        async with client.head(f"{url}{path}") as response:
            assert response.status == 200
    assert asked.questions == [("let-me-in", "get", path), ("let-me-in", "head", path)]


@pytest.mark.parametrize(
    ("verdict", "header", "value"),
    [
        (HTTPStatus.UNAUTHORIZED, "WWW-Authenticate", "Bearer"),
        (HTTPStatus.FORBIDDEN, "Content-Type", "text/plain; charset=utf-8"),
        (HTTPStatus.INTERNAL_SERVER_ERROR, "Content-Type", "text/plain; charset=utf-8"),
    ],
)
async def test_whom_the_guard_does_not_let_in_gets_its_status_and_no_page_is_made(
    verdict: HTTPStatus, header: str, value: str
) -> None:
    page = Page()
    async with (
        guarded(Asked(verdict), page) as url,
        aiohttp.ClientSession(headers=TOKEN) as client,
        client.get(f"{url}/metrics") as response,
    ):
        assert response.status == verdict
        assert response.headers[header] == value
        words = await response.text()
    assert words.startswith(verdict.phrase)
    assert "let-me-in" not in words
    assert page.made == 0


async def test_a_request_without_a_token_is_told_that_one_is_needed() -> None:
    asked, page = Asked(HTTPStatus.OK), Page()
    async with guarded(asked, page) as url, aiohttp.ClientSession() as client:
        for path in ("/metrics", "/debug/decisions", "/debug/endpoints"):
            async with client.get(f"{url}{path}") as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
        async with client.get(f"{url}/other") as response:
            assert response.status == 404
    assert asked.questions == []
    assert page.made == 0


async def test_more_unknown_tokens_than_are_looked_at_are_told_to_come_back() -> None:
    async with guarded(Asked(HTTPStatus.UNAUTHORIZED), Page()) as url, aiohttp.ClientSession() as client:
        for number in range(PEER_BURST + 1):
            async with client.get(f"{url}/metrics", headers={"Authorization": f"Bearer {number}"}) as response:
                status, after = response.status, response.headers.get("Retry-After")
    assert (status, after) == (429, "1")
