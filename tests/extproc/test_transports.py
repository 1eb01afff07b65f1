"""ext_proc over both transports: the transcripts, many streams at once, deadlines, and streams that end badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from grpc import aio

from epp.extproc.conversation import PROCESS, Connection, Conversation
from epp.extproc.events import BodylessRequest, BodyMode, Modes, RequestStarted, ResponseStarted
from epp.extproc.exchange import Limits
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.grpcio import GrpcioTransport
from epp.extproc.transport.options import Push, Transport
from epp.extproc.transport.wire import WireTransport
from epp.picker import Picker
from epp.ticket import Outcome
from tests.contract.transport import channel, check_transcript, decided_endpoints, picker_for, stream
from tests.extproc import oracle
from tests.extproc.transcripts import ALL, LIMITS, WORDS, Transcript
from tests.watching import Watch

pytestmark = pytest.mark.anyio
GET = BodylessRequest(WORDS["GET"])
LIGHT = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE)


@pytest.fixture(params=["wire", "grpcio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def serving(kind: str, picker: Picker, limits: Limits = LIMITS) -> AsyncIterator[tuple[Transport, str]]:
    def converse(peer: Connection, _: Push, now: float) -> Conversation:
        return Conversation(picker, limits, peer, now)

    clock = asyncio.get_running_loop().time
    transport: Transport = (
        WireTransport({PROCESS: converse}, ConnectionLimits(), clock)
        if kind == "wire"
        else GrpcioTransport({PROCESS: converse}, clock)
    )
    port = await transport.listen("127.0.0.1", 0)
    try:
        yield transport, f"127.0.0.1:{port}"
    finally:
        await transport.stop(0.0)


async def settled(transport: Transport) -> None:
    """Wait until the server has seen the end of every stream."""
    async with asyncio.timeout(10):
        while transport.streams_open:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("transcript", ALL, ids=lambda transcript: transcript.name)
async def test_transcript(kind: str, transcript: Transcript) -> None:
    watch = Watch()
    picker = picker_for(decided_endpoints(transcript), watch)
    async with serving(kind, picker) as (transport, address):
        await check_transcript(address, transcript)
        await settled(transport)
    watch.check()
    assert picker.table.column("inflight", picker.table.listed, 0.0)[0].sum() == 0


async def test_thousands_of_streams_opened_at_once_are_all_answered(kind: str) -> None:
    watch = Watch()
    picker = picker_for(("10.0.0.1:8000",), watch)
    together = asyncio.Barrier(3000)

    async def one(connection: aio.Channel) -> None:
        async with stream(connection) as call:
            await call.write(oracle.message(GET, LIGHT).SerializeToString())
            assert isinstance(await call.read(), bytes)
            await together.wait()  # nobody ends before everybody is there
            assert picker.table.column("inflight", picker.table.listed, 0.0)[0].sum() == 3000

    async with serving(kind, picker) as (transport, address), channel(address) as connection:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3000):
                tasks.create_task(one(connection))
        await settled(transport)
    watch.check()
    assert len(watch.tickets) == 3000


async def test_a_client_that_stops_sending_gets_a_408(kind: str) -> None:
    watch = Watch()
    async with serving(kind, picker_for((), watch), Limits(body_timeout=0.05)) as (transport, address):
        async with channel(address) as connection, stream(connection) as call:
            await call.write(oracle.message(RequestStarted(WORDS["POST"]), Modes()).SerializeToString())
            reply = await call.read()
            assert isinstance(reply, bytes)
            assert ep.ProcessingResponse.FromString(reply).immediate_response.status.code == 408
            assert await call.code() is grpc.StatusCode.OK
        await settled(transport)
    watch.check()


async def test_garbage_ends_its_own_stream_and_no_other(kind: str) -> None:
    watch = Watch()
    async with serving(kind, picker_for(("10.0.0.1:8000",), watch)) as (transport, address):
        async with channel(address) as connection, stream(connection) as good, stream(connection) as bad:
            await good.write(oracle.message(GET, LIGHT).SerializeToString())
            await good.read()
            await bad.write(b"\xff\xff\xff")
            assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
            await good.write(oracle.message(ResponseStarted(WORDS["OK"], LIGHT), None).SerializeToString())
            assert isinstance(await good.read(), bytes)
        await settled(transport)
    watch.check()
    assert watch.outcomes == [Outcome.COMPLETE]


async def test_a_connection_that_never_shows_responses_is_told_once(kind: str) -> None:
    watch = Watch()
    picker = picker_for(("10.0.0.1:8000",), watch)
    async with serving(kind, picker) as (transport, address), channel(address) as connection:
        for _ in range(25):
            async with stream(connection) as call:
                await call.write(oracle.message(GET, LIGHT).SerializeToString())
                await call.read()
            await settled(transport)
    watch.check()
    assert watch.outcomes == [Outcome.UNANSWERED] * 25
    assert len(watch.silent) == 1
