"""A simulated server for tests, and how its answers are read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from epp.sim.profile import EngineProfile
from epp.sim.serve import ModelServer, serve_model
from epp.sim.serve.faults import Faults

RECORDED = Path(__file__).parents[1] / "data/vllm-0.32.0"

CHAT: Mapping[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 4}


def profile(*, a0: float = 1e-4, kv_blocks: int = 64) -> EngineProfile:
    """Steps of 0.1 ms."""
    return EngineProfile("test", a0, 0.0, 0.0, 0.0, 0.0, kv_blocks, 512, 8, 1, 0.0)


def server(
    engine: EngineProfile | None = None, faults: Faults | None = None, host: str = "127.0.0.1"
) -> AbstractAsyncContextManager[ModelServer]:
    return serve_model(host, 0, engine or profile(), served_model="tiny", adapters=("a", "b"), faults=faults)


@asynccontextmanager
async def client_of(served: ModelServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://{served.address}") as client:
        yield client


async def post(client: aiohttp.ClientSession, path: str, body: object) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client.post(path, data=data) as response:
        return response.status, json.loads(await response.read())


async def stream(client: aiohttp.ClientSession, path: str, body: Mapping[str, Any]) -> list[bytes]:
    """Events of a streamed answer."""
    async with client.post(path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events(await response.read())


def events(body: bytes) -> list[bytes]:
    assert body.endswith(b"\n\n")
    return body.removesuffix(b"\n\n").split(b"\n\n")


def datas(listed: list[bytes]) -> list[Any]:
    """JSON of `data:` lines; [DONE] must be the last and is left out."""
    assert listed[-1] == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in listed[:-1]]


def recorded(name: str) -> bytes:
    """Body of an answer of a real vLLM."""
    return (RECORDED / name).read_bytes().replace(b"\r\n", b"\n").partition(b"\n\n")[2]


def shape(value: object) -> object:
    """Names and types of a JSON value, for comparison; what may be null is left open."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return type(value).__name__


async def metrics(client: aiohttp.ClientSession) -> dict[str, dict[tuple[str, ...], float]]:
    """Series by name and label values, `engine` and `model_name` left out."""
    async with client.get("/metrics") as response:
        page = await response.text()
    series: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("engine", "model_name"))
            series.setdefault(sample.name, {})[labels] = sample.value
    return series
