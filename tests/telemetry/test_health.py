from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc import StatusCode, aio
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.grpcio import GrpcioTransport
from epp.extproc.transport.options import Transport
from epp.extproc.transport.wire import WireTransport
from epp.telemetry.health import Health

pytestmark = pytest.mark.anyio

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
READINESS = ("", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor", "made-up")
ELECTED = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")


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

        self.raw: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")

    async def check(self, service: str) -> int:
        answer: HealthCheckResponse = await self._check(HealthCheckRequest(service=service))
        return int(answer.status)

    async def listed(self) -> dict[str, int]:
        answer = await self._list(HealthListRequest())
        return {name: status.status for name, status in answer.statuses.items()}

    async def watch(self, service: str) -> AsyncGenerator[int]:
        call = self._watch(HealthCheckRequest(service=service))
        try:
            async for answer in call:
                yield answer.status
        finally:
            call.cancel()


@pytest.fixture(params=["wire", "grpcio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def carrier(kind: str, health: Health) -> Transport:
    clock = asyncio.get_running_loop().time
    if kind == "wire":
        return WireTransport(health.methods(), ConnectionLimits(), clock)
    return GrpcioTransport(health.methods(), clock)


@asynccontextmanager
async def serving(kind: str, health: Health) -> AsyncIterator[Probe]:
    server = carrier(kind, health)
    port = await server.listen("127.0.0.1", 0)
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Probe(channel)
    finally:
        await server.stop(0.0)


async def test_readiness_is_ready_and_not_draining_and_liveness_is_an_answer(kind: str) -> None:
    health = Health()
    async with serving(kind, health) as probe:

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


async def test_with_an_election_readiness_is_ready_and_leading_and_not_draining(kind: str) -> None:
    health = Health(elected=True)
    async with serving(kind, health) as probe:

        async def answers() -> set[int]:
            assert await probe.check("liveness") == SERVING
            return {await probe.check(service) for service in ELECTED}

        assert await answers() == {NOT_SERVING}
        health.set_ready(True)
        assert await answers() == {NOT_SERVING}
        health.set_leading(True)
        assert await answers() == {SERVING}
        health.set_leading(False)
        assert await answers() == {NOT_SERVING}
        health.set_leading(True)
        health.set_ready(False)
        assert await answers() == {NOT_SERVING}
        health.set_ready(True)
        assert await answers() == {SERVING}
        health.set_draining()
        assert await answers() == {NOT_SERVING}


async def test_with_an_election_other_names_are_unknown_and_an_answer_says_so(kind: str) -> None:
    health = Health(elected=True)
    health.set_ready(True)
    health.set_leading(True)
    async with serving(kind, health) as probe, asyncio.timeout(5):
        assert {await probe.check(name) for name in ("inference-extension", "made-up")} == {SERVICE_UNKNOWN}
        assert await anext(probe.watch("inference-extension")) == SERVICE_UNKNOWN
        assert await probe.listed() == dict.fromkeys(("liveness", *ELECTED), SERVING)


async def test_watch_tells_who_leads(kind: str) -> None:
    health = Health(elected=True)
    health.set_ready(True)
    async with serving(kind, health) as probe, asyncio.timeout(5):
        seen = probe.watch("readiness")
        assert await anext(seen) == NOT_SERVING
        health.set_leading(True)
        assert await anext(seen) == SERVING
        health.set_leading(False)
        assert await anext(seen) == NOT_SERVING


async def test_list_tells_the_names_that_probes_use(kind: str) -> None:
    health = Health()
    async with serving(kind, health) as probe:
        assert await probe.listed() == {
            "": NOT_SERVING,
            "liveness": SERVING,
            "readiness": NOT_SERVING,
            "inference-extension": NOT_SERVING,
            "envoy.service.ext_proc.v3.ExternalProcessor": NOT_SERVING,
        }


async def test_watch_tells_the_state_and_then_every_change(kind: str) -> None:
    health = Health()
    async with serving(kind, health) as probe, asyncio.timeout(5):
        seen = probe.watch("readiness")
        assert await anext(seen) == NOT_SERVING
        health.set_ready(True)
        assert await anext(seen) == SERVING
        health.set_ready(True)  # no change: nothing is sent, however long the watch waits
        assert await probe.check("readiness") == SERVING
        health.set_draining()
        assert await anext(seen) == NOT_SERVING


async def test_two_changes_between_two_messages_of_a_watch_lose_nothing_that_lasts(kind: str) -> None:
    health = Health()
    async with serving(kind, health) as probe, asyncio.timeout(5):
        first, second = probe.watch(""), probe.watch("liveness")
        assert await anext(first) == NOT_SERVING
        assert await anext(second) == SERVING
        health.set_ready(True)
        health.set_ready(False)
        health.set_ready(True)
        assert await anext(first) == SERVING


async def test_the_service_may_stand_on_two_ports(kind: str) -> None:
    health = Health()
    async with serving(kind, health) as probe, serving(kind, health) as other:
        health.set_ready(True)
        assert await probe.check("") == await other.check("") == SERVING


async def test_garbage_for_a_question_is_told_so(kind: str) -> None:
    async with serving(kind, Health()) as probe:
        with pytest.raises(aio.AioRpcError) as refused:
            await probe.raw(b"\xff\xff")
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_watch_that_its_client_leaves_is_forgotten(kind: str) -> None:
    health = Health()
    async with serving(kind, health) as probe, asyncio.timeout(5):
        seen = probe.watch("")
        assert await anext(seen) == NOT_SERVING
        await seen.aclose()
        while health.watching:
            await asyncio.sleep(0.001)


async def test_stopping_ends_open_watches(kind: str) -> None:
    server = carrier(kind, Health())
    port = await server.listen("127.0.0.1", 0)
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(5):
        seen = Probe(channel).watch("")
        assert await anext(seen) == NOT_SERVING
        await server.stop(0.0)
        with pytest.raises(aio.AioRpcError):
            await anext(seen)


async def test_a_port_that_another_picker_has_is_not_shared(kind: str) -> None:
    """grpc would let two servers share it, and probes would reach either."""
    first, second = carrier(kind, Health()), carrier(kind, Health())
    port = await first.listen("127.0.0.1", 0)
    with pytest.raises(OSError, match=r"bind|use"):
        await second.listen("127.0.0.1", port)
    await first.stop(0.0)
