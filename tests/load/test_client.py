"""The load client against simulated servers: every arrival has one result, and each kind of end is told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import hypothesis.strategies as st
import pytest
from hypothesis import given

from epp.load import Load, run_load, summarize
from epp.load.client import read_usage
from epp.sim.serve import serve_model
from epp.sim.serve.faults import Faults
from epp.sim.workload import Arrival, Prompts, Workload
from tests.sim.serving import client_of, metrics, post, profile, server

pytestmark = pytest.mark.anyio

SHARED = Workload("test", "tiny", 400.0, (Prompts("team", 1.0, 2, 3, 100, 40, output_tokens=5),))
USAGE_EVENT = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":867,"total_tokens":883,"completion_tokens":16,'
    b'"prompt_tokens_details":{"cached_tokens":864,"created_cache_tokens":0}},"system_fingerprint":"v"}'
)


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
        (b"HTTP/1.1 200 OK\r\n\r\n" + USAGE_EVENT + b"\n\ndata: [DONE]\n\n", ""),
        (b"HTTP/1.1 200 OK\r\n\r\n" + USAGE_EVENT + b"\n\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata", "reset"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ndata\r\n", "reset"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "http_503"),
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


async def test_usage_is_read_from_the_last_event_that_has_it() -> None:
    usage = read_usage(b'data: {"usage":{"prompt_tokens":1}}\n\n' + USAGE_EVENT + b"\n\ndata: [DONE]\n\n")
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (867, 16, 864)


@given(cut=st.integers(0, len(USAGE_EVENT)))
def test_usage_of_a_stream_cut_anywhere_is_zeros(cut: int) -> None:
    cut_off = USAGE_EVENT[:cut]
    assert read_usage(cut_off).prompt_tokens == (867 if cut == len(USAGE_EVENT) else 0)
    assert read_usage(USAGE_EVENT[cut:]).prompt_tokens == (867 if cut == 0 else 0)


async def errors(url: str, *, model: str = "tiny", answer_within: float = 5.0) -> list[str]:
    asked = Arrival(0.0, "team", model, (("user", "hi"),), 5, "s")
    load = await run_load([asked], url, answer_within=answer_within)
    return [result.error for result in load.results]


@asynccontextmanager
async def one_answer(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that says this to everyone and closes; its URL, and the heads of what it was asked."""
    asked: list[bytes] = []

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(say, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked
