"""Records what a real Envoy says to its picker: `python -m tests.http2.record FILE`.

An Envoy with three gateways (light, whole duplex, buffered), one picker, and between them a port that keeps what Envoy
sends. Calls: GET, POST of 100 B and of 100 KB, a body in chunks, a client that leaves; some at once, some in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path

from epp.demo import envoy
from tests.e2e import client, serving
from tests.e2e.site import MODES
from tests.e2e.upstream import Upstream

NAMES = ("light", "duplex", "buffered")
GET = b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"


def post(body: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


class Tap:
    """A port before the picker's."""

    def __init__(self, address: str) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.heard: list[bytearray] = []

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard = bytearray()
        self.heard.append(heard)
        from_picker, to_picker = await asyncio.open_connection(self.host, int(self.port))
        async with asyncio.TaskGroup() as both:
            both.create_task(copy(reader, to_picker, heard))
            both.create_task(copy(from_picker, writer, bytearray()))


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            heard += data
            writer.write(data)
        writer.close()


async def record(folder: Path) -> bytes:
    """The longest connection's bytes."""
    async with contextlib.AsyncExitStack() as stack:
        upstream = Upstream()
        await upstream.listen()
        stack.push_async_callback(upstream.close)
        flags = ("--secure-serving=false", "--transport=wire", "--seed=1")
        picker = await stack.enter_async_context(serving.picker(folder, "picker", [upstream.address], *flags))
        tap = Tap(picker.address)
        server = await asyncio.start_server(tap.take, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        listing = folder / "pool.json"
        envoy.write_endpoints(listing, [upstream.address])
        gateways = []
        for name in NAMES:
            body, response = MODES[name]
            asked = envoy.Picker(address=f"{host}:{port}", request_body=body, response=response)
            gateways.append(envoy.Gateway(name=name, endpoints=listing, picker=asked))
        running = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        small, large = (b'{"model": "m", "prompt": "%s"}' % (b"word " * count) for count in (15, 4_000))
        for name in NAMES:
            for said in (GET, post(small), post(large), GET, post(small)):
                await client.send(running.ports[name], said)
        await asyncio.gather(*(client.send(running.ports[name], post(small)) for name in NAMES * 3))
        await asyncio.sleep(0.5)  # the last resets
        server.close()
    return bytes(max(tap.heard, key=len))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        Path(sys.argv[1]).write_bytes(asyncio.run(record(Path(place))))
