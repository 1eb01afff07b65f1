"""Servers that fail on purpose: what the client sees of each fault, and how faults are asked for."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from random import Random

import aiohttp
import msgspec
import pytest

from epp.errors import ConfigError
from epp.sim.serve.faults import Fault, Faults, MetricsFault, parse_faults
from tests.sim.serving import CHAT, client_of, post, server

NOTHING = 0.1
"""Seconds in which nothing comes; a healthy server answers within a millisecond."""


def test_a_spec_is_read() -> None:
    assert parse_faults("stall=0.02, reset=0.03,error=0.05,metrics=hang") == Faults(
        stall=0.02, reset=0.03, error=0.05, metrics=MetricsFault.HANG
    )
    assert parse_faults("") == Faults()


@pytest.mark.parametrize("spec", ["stall", "stall=2", "stall=x", "crash=0.1", "metrics=slow", "stall=0.6,error=0.6"])
def test_a_spec_that_is_none_is_refused_with_an_example(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected as in stall="):
        parse_faults(spec)


def test_faults_are_as_frequent_as_asked_and_the_seed_decides() -> None:
    faults = Faults(stall=0.1, reset=0.2, error=0.3)
    rng = Random(1)
    drawn = Counter(faults.draw(rng) for _ in range(10_000))
    expected = {Fault.STALL: 1000, Fault.RESET: 1000, Fault.CUT: 1000, Fault.ERROR: 3000, None: 4000}
    assert all(abs(drawn[fault] - count) < 250 for fault, count in expected.items())
    assert [faults.draw(Random(7)) for _ in range(3)] == [faults.draw(Random(7)) for _ in range(3)]


@pytest.mark.anyio
async def test_a_stalled_request_is_never_answered() -> None:
    async with server(faults=Faults(stall=1.0)) as served, client_of(served) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(client, "/v1/chat/completions", CHAT), NOTHING)
        assert len(served.driver.engine) == 0


@pytest.mark.anyio
async def test_a_reset_comes_before_or_after_the_headers() -> None:
    seen = Counter[str]()
    async with server(faults=Faults(reset=1.0)) as served, client_of(served) as client:
        for _ in range(20):
            try:
                async with client.post("/v1/chat/completions", json=CHAT) as response:
                    with pytest.raises(aiohttp.ClientError):
                        await response.read()
                    seen["after"] += 1
            except aiohttp.ClientError:
                seen["before"] += 1
    assert seen["before"] >= 3
    assert seen["after"] >= 3


@pytest.mark.anyio
async def test_an_error_is_a_500_at_once() -> None:
    async with server(faults=Faults(error=1.0)) as served, client_of(served) as client:
        assert (await post(client, "/v1/completions", {"prompt": "x"}))[0] == 500
        status, answer = await post(client, "/v1/messages", CHAT)
    assert (status, answer["type"], answer["error"]["message"]) == (500, "error", "simulated failure")


@pytest.mark.anyio
async def test_faults_change_while_it_runs() -> None:
    async with server() as served, client_of(served) as client:
        assert (await post(client, "/v1/completions", {"prompt": "x"}))[0] == 200
        assert await post(client, "/faults", {"error": 1.0}) == (
            200,
            {"stall": 0.0, "reset": 0.0, "error": 1.0, "metrics": "none"},
        )
        assert (await post(client, "/v1/completions", {"prompt": "x"}))[0] == 500
        status, answer = await post(client, "/faults", {"error": 7})
        assert (status, answer["error"]["message"]) == (400, "Expected `float` <= 1.0 - at `$.error`")
        assert (await post(client, "/faults", {}))[0] == 200
        assert (await post(client, "/v1/completions", {"prompt": "x"}))[0] == 200


@pytest.mark.anyio
async def test_a_metrics_page_hangs_dies_or_is_garbage_and_the_rest_goes_on() -> None:
    async with server() as served, client_of(served) as client:
        await post(client, "/faults", {"metrics": "hang"})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.get("/metrics"), NOTHING)
        await post(client, "/faults", {"metrics": "die"})
        with pytest.raises(aiohttp.ClientError):
            await client.get("/metrics")
        await post(client, "/faults", {"metrics": "garbage"})
        async with client.get("/metrics") as response:
            assert response.status == 200
            assert b"vllm:" not in await response.read()
        assert (await post(client, "/v1/completions", {"prompt": "x"}))[0] == 200
        await post(client, "/faults", {"metrics": "none"})
        async with client.get("/metrics") as response:
            assert b"vllm:num_requests_running" in await response.read()


def test_json_of_faults_is_what_a_spec_says() -> None:
    spoken = json.dumps({"stall": 0.5, "metrics": "die"}).encode()
    assert msgspec.json.decode(spoken, type=Faults) == parse_faults("stall=0.5,metrics=die")
