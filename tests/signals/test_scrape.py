"""The scraper against real servers on loopback, on asyncio's own loop and on uvloop."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from epp.config.pages import GPU_USE, CoreMetrics, CustomMetric, EngineConfig, MetricsSource
from epp.endpoints.table import Endpoint, EndpointTable
from epp.signals.engines import engines
from epp.signals.response import Failure, Problem
from epp.signals.scrape import Scraper, Target
from epp.signals.sources import GpuPages, MetricsPages, Source, Way, way
from tests.authority import Authority

pytestmark = pytest.mark.anyio

PAGE = (Path(__file__).parents[1] / "data" / "vllm-0.32.0" / "metrics-busy-3.txt").read_bytes()  # 8 wait, 4 run


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


def page(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def vllm(waiting: int) -> bytes:
    return page(f"vllm:num_requests_waiting {waiting}\nvllm:num_requests_running 0\n".encode())


class PageServer:
    """A model server's metrics port. `answer` says what comes back: None is silence, b"" a closed connection."""

    def __init__(self, answer: Callable[[], bytes | None]) -> None:
        self.answer = answer
        self.asked = 0
        self.connections = 0
        self.open = 0
        self.requests: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Wait until nobody is connected any more, and close."""
        self.gate.set()
        await until(lambda: self.open == 0)
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                self.asked += 1
                await self.gate.wait()
                answer = self.answer()
                if answer == b"":
                    break
                if answer is not None:
                    writer.write(answer)
                    if b"Connection: close" in answer or answer.startswith(b"HTTP/1.0"):
                        break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


class Site:
    """One table, its scraper, and servers."""

    def __init__(self, sources: Sequence[Source], attributes: Mapping[str, float]) -> None:
        self.table = EndpointTable(freshness=0.5, attributes=attributes)
        self.scraper = Scraper(self.table, random.Random(1), sources, deadline=0.2, limit=1 << 20)
        self.servers: list[PageServer] = []

    async def serve(
        self, answer: Callable[[], bytes | None], name: str = "a", tls: ssl.SSLContext | None = None
    ) -> PageServer:
        server = PageServer(answer)
        await server.start(tls=tls)
        self.servers.append(server)
        self.list(server, name)
        return server

    def list(self, server: PageServer, name: str = "a") -> int:
        return self.table.put(Endpoint(f"default/{name}", f"127.0.0.1:{server.port}"), time.monotonic())

    def waiting(self, name: str = "a", column: str = "waiting") -> float | None:
        candidates = self.table.candidates(time.monotonic())
        values, known = candidates.column(column)
        for endpoint, value, is_known in zip(candidates.endpoints(), values.tolist(), known.tolist(), strict=True):
            if endpoint.name == f"default/{name}":
                return float(value) if is_known else None
        return None

    def failures(self) -> dict[Problem, int]:
        return {problem: count for problem, count in self.scraper.counts.failures.items() if count}


@asynccontextmanager
async def running(
    sources: Sequence[Source] = (MetricsPages(Way(interval=0.01)),), attributes: Mapping[str, float] = {}
) -> AsyncIterator[Site]:
    site = Site(sources, attributes)
    task = asyncio.create_task(site.scraper.run())
    try:
        yield site
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for server in site.servers:
            await server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def more(count: Callable[[], int]) -> None:
    before = count()
    await until(lambda: count() > before)


async def test_pages_come_again_and_again_over_one_connection() -> None:
    async with running() as site:
        server = await site.serve(lambda: page(PAGE))
        await until(lambda: site.scraper.counts.pages >= 10)
        assert site.waiting() == 8.0
        assert server.connections == 1
        assert server.requests[0].startswith(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1:")
        assert site.failures() == {}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n"
        + PAGE[:2048]
        + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(PAGE) - 2048, PAGE[2048:]),
        page(PAGE, "Connection: close"),
        b"HTTP/1.0 200 OK\r\n\r\n" + PAGE,
    ],
    ids=["chunks", "closed-each-time", "http-1.0"],
)
async def test_a_page_may_come_in_any_framing(answer: bytes) -> None:
    async with running() as site:
        await site.serve(lambda: answer)
        await until(lambda: site.scraper.counts.pages >= 5)
        assert site.waiting() == 8.0
        assert site.failures() == {}


WRONG: dict[str, tuple[Callable[[], bytes | None], Problem]] = {
    "silence": (lambda: None, Problem.TIMEOUT),
    "closed": (lambda: b"", Problem.CONNECT),
    "cut": (lambda: b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\nhalf", Problem.CONNECT),
    "status": (lambda: page(b"busy", status="503 Service Unavailable"), Problem.STATUS),
    "too large": (lambda: page(bytes(2 << 20)), Problem.TOO_LARGE),
    "garbage": (lambda: page(b"<html>welcome</html>"), Problem.GARBAGE),
    "not a number": (lambda: page(b"vllm:num_requests_waiting NaN\n"), Problem.GARBAGE),
    "no http": (lambda: b"\x15\x03\x01\x00\x02\x02\x16\r\n\r\n", Problem.PROTOCOL),
    "drips": (lambda: b"H", Problem.TIMEOUT),
}


async def test_what_goes_wrong_is_counted_and_makes_values_unknown() -> None:
    async def check(answer: Callable[[], bytes | None], problem: Problem) -> None:
        async with running() as site:
            server = await site.serve(lambda: vllm(7))
            await until(lambda: site.waiting() == 7.0)
            server.answer = answer
            await until(lambda: site.waiting() is None)
            assert set(site.failures()) == {problem}
            assert server.open <= 1
            server.answer = lambda: vllm(2)
            await until(lambda: site.waiting() == 2.0)
        counts = site.scraper.counts
        is_garbage = problem is Problem.GARBAGE
        polls, extracts = counts.errors
        assert (polls > 0, extracts > 0) == (not is_garbage, is_garbage)

    async with asyncio.TaskGroup() as tasks:
        for name, (answer, problem) in WRONG.items():
            tasks.create_task(check(answer, problem), name=name)


async def test_trouble_is_told_once_when_it_begins_and_once_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "epp.signals.scrape")
    async with running() as site:
        server = await site.serve(lambda: page(b"no", status="503 Busy"))
        await until(lambda: site.failures().get(Problem.STATUS, 0) >= 3)
        server.answer = lambda: vllm(1)
        await until(lambda: site.waiting() == 1.0)
        server.answer = lambda: page(b"no", status="503 Busy")  # again within a minute: flapping fills no log
        await more(lambda: site.failures()[Problem.STATUS])
        server.answer = lambda: vllm(3)
        await until(lambda: site.waiting() == 3.0)
    begins, ends = (record.getMessage() for record in caplog.records)
    assert begins == f"no metrics from 127.0.0.1:{server.port} (status): the answer's status is 503"
    assert ends.startswith(f"metrics from 127.0.0.1:{server.port} again, after ")


async def test_a_server_that_comes_up_later_is_found() -> None:
    async with running() as site:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            site.table.put(Endpoint("default/a", f"127.0.0.1:{port}"), 0.0)
            await until(lambda: site.failures().get(Problem.CONNECT, 0) >= 2)
        server = PageServer(lambda: vllm(4))
        site.servers.append(server)
        await server.start(port)
        await until(lambda: site.waiting() == 4.0)


async def test_a_kept_connection_that_the_server_closes_is_no_failure() -> None:
    async with running() as site:
        answers = 0

        def every_third_closes() -> bytes:
            nonlocal answers
            answers += 1
            return b"" if answers % 3 == 0 else vllm(1)

        await site.serve(every_third_closes)
        await until(lambda: site.scraper.counts.pages >= 10)
        assert site.failures() == {}


async def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    async with running() as site:
        server = await site.serve(lambda: page(PAGE, "connection: close"))  # and yet the server leaves it open
        await until(lambda: server.asked >= 5)
        assert server.connections == server.asked
        assert site.failures() == {}


async def test_pauses_grow_with_each_failure_up_to_two_seconds() -> None:
    table = EndpointTable()
    scraper = Scraper(table, random.Random(1))
    endpoint = Endpoint("default/a", "127.0.0.1:1")
    target = Target(scraper, MetricsPages(), table.put(endpoint, 0.0), endpoint, due=0.0)
    for longest in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, *(2.0 for _ in range(2000))):
        target.fail(Failure(Problem.CONNECT, "refused"), 100.0)
        assert longest / 2 <= target.due - 100.0 <= longest


async def test_the_table_is_followed() -> None:
    async with running() as site:
        first = await site.serve(lambda: vllm(1), "a")
        await until(lambda: site.waiting("a") == 1.0)
        second = await site.serve(lambda: vllm(2), "b")
        await until(lambda: site.waiting("b") == 2.0)
        site.table.drop("default/a")
        await until(lambda: first.open == 0)
        await more(lambda: site.scraper.counts.pages)
        site.list(first, "c")
        await until(lambda: site.waiting("c") == 1.0)
        site.table.put(  # its metrics are somewhere else now
            Endpoint("default/b", f"127.0.0.1:{second.port}", metrics_address=f"127.0.0.1:{first.port}"), 0.0
        )
        await until(lambda: site.waiting("b") == 1.0)
        await until(lambda: second.open == 0)


async def test_a_page_of_an_endpoint_that_left_says_nothing_of_its_successor() -> None:
    async with running() as site:
        old = await site.serve(lambda: vllm(9))
        old.gate.clear()
        await until(lambda: old.asked == 1)
        site.table.drop("default/a")
        new = await site.serve(lambda: vllm(5), "b")
        new.gate.clear()
        assert site.table.listed.tolist() == [0]
        old.gate.set()
        await until(lambda: new.asked == 1)
        assert site.waiting("b") is None
        new.gate.set()
        await until(lambda: site.waiting("b") == 5.0)


async def test_requests_sent_while_a_page_is_under_way_count_on_top_of_it() -> None:
    async with running() as site:
        server = await site.serve(lambda: vllm(3))
        early = site.table.admit(0)
        await until(lambda: site.waiting() == 3.0)
        server.gate.clear()
        await more(lambda: server.asked)
        late = site.table.admit(0)
        pages = site.scraper.counts.pages
        server.gate.set()
        await until(lambda: site.scraper.counts.pages > pages)
        assert site.waiting() in (3.0, 4.0)  # 3 once yet another page, asked for since, has come
        await until(lambda: site.waiting() == 3.0)
        site.table.release(early)
        site.table.release(late)


async def test_the_engine_is_recognised_and_recognised_again() -> None:
    async with running() as site:
        server = await site.serve(lambda: vllm(1))
        await until(lambda: site.waiting() == 1.0)
        server.answer = lambda: page(b"sglang:num_queue_reqs 6\n")
        await until(lambda: site.waiting() == 6.0)
        assert site.failures() == {}


async def test_a_label_names_the_engine() -> None:
    async with running() as site:
        server = await site.serve(lambda: page(b"vllm:num_requests_waiting 1\nsglang:num_queue_reqs 6\n"))
        await until(lambda: site.waiting() == 1.0)
        site.table.put(
            Endpoint("default/a", f"127.0.0.1:{server.port}", {"llm-d.ai/engine-type": "sglang"}), time.monotonic()
        )
        await until(lambda: site.waiting() == 6.0)
        server.answer = lambda: vllm(2)
        await until(lambda: Problem.GARBAGE in site.failures())


async def test_a_loop_that_stood_still_is_not_the_servers_fault() -> None:
    async with running() as site:
        server = await site.serve(lambda: vllm(1))
        for _ in range(2):
            await more(lambda: site.scraper.counts.pages)
            server.gate.clear()
            await more(lambda: server.asked)
            time.sleep(0.25)  # longer than the deadline
            server.gate.set()
        await more(lambda: site.scraper.counts.pages)
        assert site.failures() == {}


async def test_ipv6_servers_are_reached() -> None:
    async with running() as site:
        server = PageServer(lambda: vllm(3))
        listening = await asyncio.start_server(server._serve, "::1", 0)
        port = listening.sockets[0].getsockname()[1]
        site.table.put(Endpoint("default/a", f"[::1]:{port}"), time.monotonic())
        await until(lambda: site.waiting() == 3.0)
        assert f"host: [::1]:{port}".encode() in server.requests[0]
        listening.close()


# -- TLS ---------------------------------------------------------------------------------------------------------------


class Secured:
    """A server's certificate, perhaps a demand for the client's, and how sources are told of both."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority()
        self.folder = folder
        self.ca = str(self.authority.write(folder / "ca.pem"))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = self.authority.issue().write(folder / "server")
        self.context.load_cert_chain(server / "tls.crt", server / "tls.key")

    def demand(self) -> None:
        """Clients must show a certificate of the authority."""
        self.context.load_verify_locations(self.ca)
        self.context.verify_mode = ssl.CERT_REQUIRED

    def client(self, authority: Authority) -> Path:
        return authority.issue().write(self.folder / "client")

    def source(self, **params: object) -> tuple[Source, ...]:
        written = msgspec.convert({"scheme": "https", **params}, MetricsSource)
        return (MetricsPages(way(written, 0.01)),)

    def shown(self, client: Path) -> dict[str, str]:
        return {"clientCertPath": str(client / "tls.crt"), "clientKeyPath": str(client / "tls.key")}


@pytest.fixture
def secured(tmp_path: Path) -> Secured:
    return Secured(tmp_path)


@pytest.mark.parametrize("verifies", [False, True])
async def test_pages_come_over_tls(secured: Secured, verifies: bool) -> None:
    params = {"insecureSkipVerify": False, "caCertPath": secured.ca} if verifies else {}
    async with running(secured.source(**params)) as site:
        server = await site.serve(lambda: page(PAGE), tls=secured.context)
        await until(lambda: site.scraper.counts.pages >= 5)
        assert site.waiting() == 8.0
        assert server.connections == 1
        assert site.failures() == {}


async def test_a_certificate_of_an_unknown_authority_is_refused(secured: Secured, tmp_path: Path) -> None:
    other = str(Authority("other").write(tmp_path / "other.pem"))
    for params in ({"caCertPath": other}, {}):  # {}: the system's authorities
        async with running(secured.source(insecureSkipVerify=False, **params)) as site:
            server = await site.serve(lambda: page(PAGE), tls=secured.context)
            await until(lambda: site.failures().get(Problem.CONNECT, 0) >= 2)
            assert (server.asked, site.waiting()) == (0, None)


async def test_a_server_of_another_name_is_refused(secured: Secured) -> None:
    async with running(secured.source(insecureSkipVerify=False, caCertPath=secured.ca)) as site:
        server = PageServer(lambda: page(PAGE))
        listening = await asyncio.start_server(server._serve, "127.0.0.2", 0, ssl=secured.context)
        port = listening.sockets[0].getsockname()[1]
        site.table.put(Endpoint("default/a", f"127.0.0.2:{port}"), time.monotonic())
        await until(lambda: site.failures().get(Problem.CONNECT, 0) >= 1)
        assert server.asked == 0
        listening.close()


async def test_a_server_may_ask_who_we_are(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    secured.demand()
    async with running(secured.source()) as site:
        await site.serve(lambda: page(PAGE), tls=secured.context)
        await until(lambda: site.failures().get(Problem.CONNECT, 0) >= 1)
        assert site.waiting() is None
    assert "no metrics from 127.0.0.1" in caplog.text
    async with running(secured.source(**secured.shown(secured.client(secured.authority)))) as site:
        await site.serve(lambda: page(PAGE), tls=secured.context)
        await until(lambda: site.waiting() == 8.0)
        assert site.failures() == {}


async def test_our_certificate_may_change(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    secured.demand()
    client = secured.client(Authority("other"))
    async with running(secured.source(**secured.shown(client))) as site:
        await site.serve(lambda: page(PAGE), tls=secured.context)
        await until(lambda: site.failures().get(Problem.CONNECT, 0) >= 1)
        (client / "tls.crt").write_bytes(b"half of a")
        await until(lambda: "changed files are not taken" in caplog.text)
        secured.client(secured.authority)
        await until(lambda: site.waiting() == 8.0)


async def test_a_handshake_that_never_ends_is_given_up(secured: Secured) -> None:
    async with running(secured.source()) as site:
        server = await site.serve(lambda: None)  # no TLS, and never an answer
        await until(lambda: site.failures().get(Problem.TIMEOUT, 0) >= 2)
        await until(lambda: server.open <= 1)


async def test_plain_http_where_tls_was_meant_is_a_failure(secured: Secured) -> None:
    async with running() as site:
        await site.serve(lambda: page(PAGE), tls=secured.context)
        await until(lambda: site.failures().get(Problem.CONNECT, 0) >= 2)
        assert site.waiting() is None


# -- where pages are, and which ----------------------------------------------------------------------------------------


async def test_the_page_may_have_a_port_and_a_path_of_its_own() -> None:
    server = PageServer(lambda: vllm(6))
    await server.start()
    async with running((MetricsPages(Way("/stats?all=1", server.port, 0.01)),)) as site:
        site.servers.append(server)
        site.table.put(Endpoint("default/a", "127.0.0.1:1"), time.monotonic())
        await until(lambda: site.waiting() == 6.0)
        assert server.requests[0].startswith(b"GET /stats?all=1 HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % server.port)


async def test_attributes_of_a_configured_engine_come_with_its_pages() -> None:
    custom = (CustomMetric(attribute_key="Heat", metric_spec="my:celsius{gpu=0}"),)
    config = EngineConfig(name="mine", queued_requests_spec="my:queue", custom_metrics=custom)
    source = MetricsPages(Way(interval=0.01), engines(CoreMetrics(engine_configs=(config,))))
    async with running((source,), {"Heat": 0.5}) as site:
        server = await site.serve(lambda: page(b'my:queue 2\nmy:celsius{gpu="0"} 61\nmy:celsius{gpu="1"} 3\n'))
        await site.serve(lambda: vllm(1), "b")
        await until(lambda: site.waiting(column="Heat") == 61.0)
        await until(lambda: site.waiting("b") == 1.0)
        assert site.waiting("b", "Heat") is None
        server.answer = lambda: page(b"my:queue 2\n")
        await until(lambda: site.waiting(column="Heat") is None)
        assert site.waiting() == 2.0
        assert site.failures() == {}


async def test_gpu_pages_are_fetched_beside_and_fail_alone() -> None:
    exporter = PageServer(lambda: page(b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 40\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} 70\n'))
    await exporter.start()
    sources = (MetricsPages(Way(interval=0.01)), GpuPages(Way(port=exporter.port, interval=0.02)))
    async with running(sources, {GPU_USE: 0.3}) as site:
        site.servers.append(exporter)
        await site.serve(lambda: vllm(3))
        await until(lambda: site.waiting(column=GPU_USE) == 0.7)
        await until(lambda: site.waiting() == 3.0)
        exporter.answer = lambda: page(b"no", status="503 Busy")
        await until(lambda: site.waiting(column=GPU_USE) is None)
        assert site.waiting() == 3.0
        assert site.failures() == {}
        assert site.scraper.counts_of(GpuPages.what).failures[Problem.STATUS] > 0
        exporter.answer = lambda: page(b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 5\n')
        await until(lambda: site.waiting(column=GPU_USE) == 0.05)
