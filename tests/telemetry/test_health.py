from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc import aio
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from epp.errors import ConfigError
from epp.telemetry.health import Health, HealthServer

pytestmark = pytest.mark.anyio

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
READINESS = ("", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor", "made-up")


class Probe:
    """A client that knows the service by its name only."""

    def __init__(self, channel: aio.Channel) -> None:
        self._check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        self._list = channel.unary_unary(
            "/grpc.health.v1.Health/List",
            request_serializer=HealthListRequest.SerializeToString,
            response_deserializer=HealthListResponse.FromString,
        )
        self._watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )

    async def check(self, service: str) -> int:
        answer: HealthCheckResponse = await self._check(HealthCheckRequest(service=service))
        return int(answer.status)

    async def listed(self) -> dict[str, int]:
        answer = await self._list(HealthListRequest())
        return {name: status.status for name, status in answer.statuses.items()}

    async def watch(self, service: str) -> AsyncIterator[int]:
        async for answer in self._watch(HealthCheckRequest(service=service)):
            yield answer.status


@asynccontextmanager
async def serving(health: Health) -> AsyncIterator[Probe]:
    server = HealthServer(health)
    port = await server.start(0, "127.0.0.1")
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Probe(channel)
    await server.stop()


async def test_readiness_is_ready_and_not_draining_and_liveness_is_an_answer() -> None:
    health = Health()
    async with serving(health) as probe:

        async def answers() -> set[int]:
            assert await probe.check("liveness") == SERVING
            return {await probe.check(service) for service in READINESS}

        assert await answers() == {NOT_SERVING}
        health.set_ready(True)
        assert await answers() == {SERVING}
        health.set_ready(False)
        assert await answers() == {NOT_SERVING}
        health.set_ready(True)
        health.set_draining()
        assert await answers() == {NOT_SERVING}
        health.set_ready(True)  # draining is for good
        assert await answers() == {NOT_SERVING}


async def test_list_tells_the_names_that_probes_use() -> None:
    health = Health()
    async with serving(health) as probe:
        assert await probe.listed() == {
            "": NOT_SERVING,
            "liveness": SERVING,
            "readiness": NOT_SERVING,
            "inference-extension": NOT_SERVING,
            "envoy.service.ext_proc.v3.ExternalProcessor": NOT_SERVING,
        }


async def test_watch_tells_the_state_and_then_every_change() -> None:
    health = Health()
    async with serving(health) as probe, asyncio.timeout(5):
        seen = probe.watch("readiness")
        assert await anext(seen) == NOT_SERVING
        health.set_ready(True)
        assert await anext(seen) == SERVING
        health.set_ready(True)  # no change: nothing is sent, however long the watch waits
        assert await probe.check("readiness") == SERVING
        health.set_draining()
        assert await anext(seen) == NOT_SERVING


async def test_two_changes_between_two_messages_of_a_watch_lose_nothing_that_lasts() -> None:
    health = Health()
    async with serving(health) as probe, asyncio.timeout(5):
        first, second = probe.watch(""), probe.watch("liveness")
        assert await anext(first) == NOT_SERVING
        assert await anext(second) == SERVING
        health.set_ready(True)
        health.set_ready(False)
        health.set_ready(True)
        assert await anext(first) == SERVING


async def test_the_service_may_stand_on_another_server_too() -> None:
    health = Health()
    other = aio.server()
    health.register(other)
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    async with serving(health) as probe, aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health.set_ready(True)
        assert await Probe(channel).check("") == await probe.check("") == SERVING
    await other.stop(None)


async def test_stopping_ends_open_watches() -> None:
    server = HealthServer(Health())
    port = await server.start(0, "127.0.0.1")
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(5):
        seen = Probe(channel).watch("")
        assert await anext(seen) == NOT_SERVING
        await server.stop()
        with pytest.raises(aio.AioRpcError):
            await anext(seen)


async def test_a_port_that_another_picker_has_is_named_with_its_flag() -> None:
    """grpc would let two servers share it, and probes would reach either."""
    first, second = HealthServer(Health()), HealthServer(Health())
    port = await first.start(0, "127.0.0.1")
    with pytest.raises(ConfigError, match=f"--grpc-health-port {port} cannot be bound"):
        await second.start(port, "127.0.0.1")
    await first.stop()
