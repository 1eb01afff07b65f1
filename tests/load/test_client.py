"""The load client against simulated servers: every arrival has one result, and each kind of end is told."""

from __future__ import annotations

import asyncio
import resource
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from epp.load import Client, Load, run_load, summarize
from epp.load.client import NO_SOCKET, asked_at
from epp.sim.profile import EngineProfile
from epp.sim.serve import serve_model
from epp.sim.serve.faults import Faults
from epp.sim.workload import Arrival, Prompts, Workload
from epp.telemetry.tls import self_signed
from tests.sim.serving import client_of, metrics, post, profile, server

pytestmark = pytest.mark.anyio

SHARED = Workload("test", "tiny", 400.0, (Prompts("team", 1.0, 2, 3, 100, 40, output_tokens=5),))
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"the "}}]}\n\n'
OK = b"HTTP/1.1 200 OK\r\n\r\n"


def arrival(at: float = 0.0) -> Arrival:
    return Arrival(at, "team", "tiny", (("user", "x" * 100),), 5, "s")


async def test_every_arrival_gets_one_result_with_its_times_and_tokens() -> None:
    arrivals = list(SHARED.arrivals(1, 0.5))
    async with server() as served:
        load = await run_load(arrivals, f"http://{served.address}")
    assert (load.sent, len(load.results), load.in_flight, load.errors) == (len(arrivals), len(arrivals), 0, 0)
    assert sorted(result.scheduled_at for result in load.results) == [arrival.at for arrival in arrivals]
    for result in load.results:
        assert (result.status, result.prompt_tokens, result.completion_tokens) == (200, 140, 5)
        assert result.served_by == served.address
        assert result.ttft is not None
        assert result.scheduled_at <= result.sent_at
        assert result.sent_at - result.scheduled_at <= result.ttft <= result.e2e
    assert load.lateness_max == max(result.sent_at - result.scheduled_at for result in load.results)
    summary = summarize(load.results)
    assert summary.by_server == {served.address: len(arrivals)}
    assert summary.cached_share is not None
    assert summary.cached_share > 0.5  # six different prompts, asked again and again


async def test_late_requests_are_sent_at_once_and_their_lateness_is_kept() -> None:
    async with server() as served:
        load = await run_load([arrival(), arrival()], f"http://{served.address}", start=time.monotonic() - 10.0)
    assert load.lateness_max >= 10.0
    assert [result.error for result in load.results] == ["", ""]
    assert all(result.ttft is not None and result.ttft >= 10.0 for result in load.results)


async def test_no_request_waits_for_another() -> None:
    """The engine never gives a token, so all arrivals stand before the server together."""
    async with server(profile(a0=3600.0)) as served, client_of(served) as client:
        load = Load()
        running = asyncio.create_task(run_load([arrival()] * 30, f"http://{served.address}", load=load))
        async with asyncio.timeout(5):
            while True:
                page = await metrics(client)
                if page["vllm:num_requests_running"][()] + page["vllm:num_requests_waiting"][()] == 30:
                    break
        assert (load.sent, load.in_flight) == (30, 30)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert Counter(result.error for result in load.results) == {"cancelled": 30}
    assert load.in_flight == 0


async def test_refusals_and_faults_are_told_apart() -> None:
    async with server(faults=Faults(error=1.0)) as served, client_of(served) as client:
        url = f"http://{served.address}"
        assert await errors(url) == ["http_500"]
        await post(client, "/faults", {"reset": 1.0})
        assert await errors(url) == ["reset"]
        await post(client, "/faults", {"stall": 1.0})
        assert await errors(url, answer_within=0.1) == ["timeout"]
        await post(client, "/faults", {})
        assert await errors(url, model="nope") == ["http_404"]
        assert await errors(url) == [""]
    assert await errors(url) == ["connect"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (OK + TOKEN + b"data: [DONE]\n\n", ""),
        (OK + TOKEN, "truncated"),
        (OK, "truncated"),
        (OK + TOKEN + TOKEN[:30], "truncated"),
        (OK + b'{"choices":[]}', "malformed"),
        (OK + b"<html>log in</html>", "malformed"),
        (OK + TOKEN + b'data: {"error":{"message":"out of memory"}}\n\ndata: [DONE]\n\n', "stream_error"),
        (OK + b"data: <html>\n\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata", "reset"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ndata\r\n", "reset"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "http_503"),
        (b"HTTP/1.1 302 Found\r\nlocation: /v1/chat/completions\r\ncontent-length: 0\r\n\r\n", "http_302"),
        (b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /v1/chat/completions\r\ncontent-length: 0\r\n\r\n", "http_307"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 99\r\n\r\nbroken off", "http_500"),
        (b"nonsense\r\n\r\n", "reset"),
        (b"", "reset"),
    ],
)
async def test_an_answer_that_ends_early_is_an_error_of_its_kind(answer: bytes, kind: str) -> None:
    async with one_answer(answer) as (url, _):
        assert await errors(url) == [kind]


async def test_the_tenant_is_named_to_the_picker() -> None:
    async with one_answer(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n") as (url, asked):
        await errors(url)
    assert b"\r\nx-llm-d-inference-fairness-id: team\r\n" in asked[0]


async def test_headers_of_the_operator_are_sent_and_the_server_is_read_from_the_header_that_he_names() -> None:
    named = b"HTTP/1.1 200 OK\r\nX-Pod: vllm-3\r\nX-Served-By: proxy\r\n\r\n" + TOKEN + b"data: [DONE]\n\n"
    client = Client(served_by="x-pod", headers=(("authorization", "Bearer secret"),))
    async with one_answer(named) as (url, asked):
        load = await run_load([arrival()], f"{url}/team-a/v1/", client=client)
    assert asked[0].startswith(b"POST /team-a/v1/chat/completions HTTP/1.1\r\n")
    assert b"\r\nauthorization: Bearer secret\r\n" in asked[0]
    assert [result.served_by for result in load.results] == ["vllm-3"]


async def test_times_of_a_known_server_are_its_steps() -> None:
    """A prompt of 140 tokens: one step of 50 ms + 140 x 1 ms = 190 ms to the first token. Then four steps of 50 ms."""
    known = EngineProfile("known", 0.050, 0.001, 0.0, 0.0, 0.0, 64, 512, 8, 1, 0.0)
    asked = next(SHARED.arrivals(1))
    async with server(known) as served:
        load = await run_load([msgspec.structs.replace(asked, at=0.0)], f"http://{served.address}")
    (result,) = load.results
    assert (result.error, result.prompt_tokens, result.completion_tokens) == ("", 140, 5)
    # Nothing can be quicker than the engine; a busy machine may be slower.
    assert result.ttft is not None
    assert 0.190 <= result.ttft < 0.290
    assert result.itl_mean is not None
    assert 0.040 < result.itl_mean < 0.090
    assert result.itl_max is not None
    assert result.itl_max >= result.itl_mean
    assert 0.390 <= result.e2e < 0.590


async def test_a_server_that_reads_slowly_delays_nobody_else() -> None:
    """It never reads a body of 16 MB, which fits no socket buffer; the others ask meanwhile and are answered."""
    long = msgspec.structs.replace(arrival(), messages=(("user", "x" * (16 << 20)),))
    async with never_reads() as url, server() as served:
        slow = asyncio.create_task(run_load([long, long], url, client=Client(answer_within=1.0)))
        load = await run_load([arrival()] * 20, f"http://{served.address}")
        assert [result.error for result in load.results] == [""] * 20
        assert [result.error for result in (await slow).results] == ["timeout"] * 2


async def test_a_stream_that_is_cut_keeps_the_tokens_that_came() -> None:
    cut = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (2 * len(TOKEN), 2 * TOKEN)
    async with one_answer(cut) as (url, _):
        load = await run_load([arrival()], url)
    (result,) = load.results
    assert (result.error, result.completion_tokens) == ("reset", 2)
    assert result.ttft is not None
    assert result.itl_mean == 0.0  # both came in one piece


async def test_two_loads_with_one_start_run_side_by_side() -> None:
    engine = profile()
    async with (
        serve_model("127.0.0.1", 0, engine, served_model="tiny") as left,
        serve_model("127.0.0.1", 0, engine, served_model="tiny") as right,
    ):
        start = time.monotonic()
        loads = await asyncio.gather(
            *(run_load(SHARED.arrivals(1, 0.2), f"http://{one.address}", start=start) for one in (left, right))
        )
    assert [len(load.results) for load in loads] == [sum(1 for _ in SHARED.arrivals(1, 0.2))] * 2
    assert [load.errors for load in loads] == [0, 0]


async def test_a_refusal_that_never_ends_is_read_no_further() -> None:
    async with one_answer(b"HTTP/1.1 503 No\r\n\r\n" + b"x" * (32 << 20)) as (url, _):
        load = await run_load([arrival()], url)
    (result,) = load.results
    assert (result.error, result.status) == ("http_503", 503)


async def test_no_cookie_makes_one_user_of_all_requests() -> None:
    told = b"HTTP/1.1 200 OK\r\nset-cookie: pod=3\r\n\r\n" + TOKEN + b"data: [DONE]\n\n"
    async with one_answer(told) as (url, asked):
        await run_load([arrival(), arrival(0.1)], url.replace("127.0.0.1", "localhost"))
    assert len(asked) == 2
    assert not any(b"\r\ncookie:" in head.lower() for head in asked)


@pytest.mark.parametrize("given", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_chats_are_asked_for_at_one_path_however_the_url_is_given(given: str) -> None:
    assert asked_at(f"http://h:1/team{given}") == "http://h:1/team/v1/chat/completions"


async def test_a_machine_without_another_file_is_no_fault_of_the_server() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # what is open stays so, and nothing more is opened
    try:
        load = await run_load([arrival()] * 3, "http://127.0.0.1:9")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [result.error for result in load.results] == [NO_SOCKET] * 3


async def test_a_certificate_that_nobody_vouches_for_is_named(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    for file, content in zip((key, certificate), self_signed(), strict=True):
        file.write_bytes(content)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    listening = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    async with listening:
        assert await errors(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}") == ["certificate"]


async def errors(url: str, *, model: str = "tiny", answer_within: float = 5.0) -> list[str]:
    asked = Arrival(0.0, "team", model, (("user", "hi"),), 5, "s")
    load = await run_load([asked], url, client=Client(answer_within))
    return [result.error for result in load.results]


@asynccontextmanager
async def one_answer(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that says this to everyone and closes; its URL, and the heads of what it was asked."""
    asked: list[bytes] = []

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        with suppress(ConnectionError):  # who has read enough may leave
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(say, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked


@asynccontextmanager
async def never_reads() -> AsyncIterator[str]:
    """A server that accepts, and of which nobody reads: its buffers fill, and that is all. Its URL."""
    writers: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.transport.abort()
