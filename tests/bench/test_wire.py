"""The bare servers, asked by the bench's own client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from bench.bare import Bare
from bench.client import Client
from bench.wire import Wire
from epp.pb.ext_proc_pb2 import ProcessingRequest

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Wire(Bare("10.0.0.1:8000")), "127.0.0.1", 0)
    async with server:
        _, client = await loop.create_connection(Client, *server.sockets[0].getsockname())
        yield client
        client.close()


@pytest.mark.parametrize("size", [0, 100, 32_768, 1_000_000])
async def test_a_prompt_of_any_size_comes_back_from_bare_wire(size: int) -> None:
    async with connected() as client:
        await client.decided(bytes(size))


async def test_many_streams_stay_open_on_one_connection() -> None:
    async with connected() as client:
        assert await client.capacity() == 100_000
        streams = await asyncio.gather(*(client.decided(b"%d" % at) for at in range(200)))
        assert len(set(streams)) == 200
        for stream in streams:
            client.reset(stream)
        await client.decided(b"and the connection still works")


def test_the_bare_answer_names_the_destination_and_gives_the_body_back() -> None:
    bare, body = Bare("10.0.0.1:8000"), list[bytes]()
    first, last = ProcessingRequest(), ProcessingRequest()
    first.request_body.body, last.request_body.body, last.request_body.end_of_stream = b"ab", b"c", True
    assert bare.replies(first, body) == ()
    headers, streamed = bare.replies(last, body)
    assert headers.request_headers.response.header_mutation.set_headers[0].header.raw_value == b"10.0.0.1:8000"
    metadata = headers.dynamic_metadata.fields["envoy.lb"].struct_value.fields["x-gateway-destination-endpoint"]
    assert metadata.string_value == "10.0.0.1:8000"
    assert streamed.request_body.response.body_mutation.streamed_response.body == b"abc"
    assert streamed.request_body.response.body_mutation.streamed_response.end_of_stream
