"""grpcio's client at its limits: thousands of streams, large metadata, gzip, deadlines, readers that do not read.

That it plays every transcript is tests/extproc's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc import aio

from epp.extproc.events import BodyMode, Modes, ResponseData, ResponseStarted
from epp.extproc.http2.faults import ConnectionLimits
from epp.ticket import Outcome
from tests.contract.transport import METHOD, channel, stream
from tests.extproc import oracle
from tests.extproc.transcripts import WORDS
from tests.interop.serving import ANSWERED, GET, UPLOAD, Wire, body_of, is_routed, own_certificate, until, upload, wire

pytestmark = pytest.mark.anyio
WINDOW = ConnectionLimits().stream_window
Call = aio.StreamStreamCall[bytes, bytes]
DUPLEX = Modes(BodyMode.FULL_DUPLEX, BodyMode.FULL_DUPLEX)
CHUNK = oracle.message(ResponseData(b"x" * 16_000), None).SerializeToString()
"""A piece of a response, which comes back as it is."""


async def exchange(connection: aio.Channel) -> None:
    """What Envoy does for a GET."""
    async with stream(connection) as call:
        await call.write(GET)
        assert is_routed(await reply(call))
        await call.write(ANSWERED)
        await reply(call)


async def reply(call: Call) -> bytes:
    message = await call.read()
    assert isinstance(message, bytes), await call.details()
    return message


async def test_three_thousand_streams_at_once_share_one_tls_connection() -> None:
    tls = own_certificate()
    together = asyncio.Barrier(3000)

    async def one(connection: aio.Channel, served: Wire) -> None:
        async with stream(connection) as call:
            await call.write(GET)
            assert is_routed(await reply(call))
            await together.wait()  # nobody ends before everybody is there
            assert served.transport.streams_open == 3000

    credentials = grpc.ssl_channel_credentials(tls.certificate)
    async with wire(tls=tls) as served, channel(served.address, credentials) as connection:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3000):
                tasks.create_task(one(connection, served))
        await served.idle()
        assert len(served.transport.peers) == 1
        assert served.breaches == {}
        assert len(served.watch.tickets) == 3000


async def test_metadata_within_the_limit_is_read_from_continuation_frames() -> None:
    async with wire() as served, channel(served.address) as connection:
        call: Call = connection.stream_stream(METHOD)(metadata=[(f"x-{at}", "y" * 400) for at in range(100)])
        await call.write(GET)
        assert is_routed(await reply(call))
        call.cancel()
        await served.idle()
        assert served.breaches == {}


async def test_metadata_above_the_limit_ends_its_stream_and_no_other() -> None:
    async with wire() as served, channel(served.address) as connection, stream(connection) as good:
        await good.write(GET)
        await reply(good)
        call: Call = connection.stream_stream(METHOD)(metadata=[(f"x-{at}", "y" * 400) for at in range(150)])
        assert await call.code() is not grpc.StatusCode.OK
        await good.write(ANSWERED)
        await reply(good)
        assert len(served.transport.peers) == 1


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.NoCompression], ids=str)
async def test_a_large_prompt_passes_in_either_encoding(compression: grpc.Compression) -> None:
    prompt = b'{"model":"m","prompt":"%s"}' % (b"0123456789abcdef" * (1 << 17))
    async with wire() as served, channel(served.address) as connection:
        call: Call = connection.stream_stream(METHOD)(compression=compression)
        await call.write(UPLOAD)
        await call.write(upload(prompt))
        await call.done_writing()
        replies = [message async for message in call]
        assert is_routed(replies[0])
        assert body_of(replies[1:]) == prompt
        assert await call.code() is grpc.StatusCode.OK


async def test_deflate_is_refused_by_name() -> None:
    async with wire() as served, channel(served.address) as connection:
        call: Call = connection.stream_stream(METHOD)(compression=grpc.Compression.Deflate)
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "deflate" in (await call.details() or "")


async def test_a_deadline_ends_a_stream_on_both_sides() -> None:
    async with wire() as served, channel(served.address) as connection:
        call: Call = connection.stream_stream(METHOD)(timeout=0.3)
        await call.write(UPLOAD)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await served.idle()


async def test_a_call_without_messages_that_has_ended_gets_a_status() -> None:
    async with wire() as served, channel(served.address) as connection, stream(connection) as call:
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK


# -- readers that do not read -------------------------------------------------------------------------------------


@asynccontextmanager
async def stuffed(connection: aio.Channel, served: Wire) -> AsyncIterator[Call]:
    """A stream whose replies nobody takes, pushed until the server takes no more of it."""
    async with stream(connection) as call:
        await call.write(oracle.message(WORDS["BodylessRequest"](WORDS["GET"]), DUPLEX).SerializeToString())
        await reply(call)
        await call.write(oracle.message(ResponseStarted(WORDS["OK"], DUPLEX), None).SerializeToString())
        writer = asyncio.create_task(push(call))
        try:
            before = 0
            while (seen := queued(served)) != before or seen < WINDOW // 4:  # it grows, until the windows close
                before = seen
                await asyncio.wait([writer], timeout=0.3)
            assert not writer.done()
            yield call
        finally:
            writer.cancel()
            await asyncio.wait([writer])


async def push(call: Call) -> None:
    while True:
        await call.write(CHUNK)


def queued(served: Wire) -> int:
    """Bytes of replies that wait in the server, by what each connection says of itself."""
    return sum(int(repr(peer).split(" streams, ")[1].split()[0]) for peer in served.transport.peers)


@pytest.mark.parametrize("beside", ["same connection", "another connection"])
@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
async def test_a_stream_that_is_not_read_costs_bounded_memory_and_nobody_else_anything(
    beside: str, secure: bool
) -> None:
    tls = own_certificate() if secure else None
    credentials = None if tls is None else grpc.ssl_channel_credentials(tls.certificate)
    async with (
        wire(tls=tls) as served,
        channel(served.address, credentials) as slow,
        channel(served.address, credentials) as other,
        stuffed(slow, served) as call,
    ):
        for _ in range(20):
            async with asyncio.timeout(5):
                await exchange(slow if beside == "same connection" else other)
            assert WINDOW // 4 <= queued(served) <= 2 * WINDOW
        await until(lambda: served.watch.outcomes == [Outcome.COMPLETE] * 20)
        # Once it is read, it goes on where it stood.
        for _ in range(200):
            await reply(call)
        assert served.breaches == {}
