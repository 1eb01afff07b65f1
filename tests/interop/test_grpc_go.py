"""grpc-go's client, the one in most gateways that are not Envoy."""

from __future__ import annotations

import asyncio

import pytest

from epp.extproc.exchange import Limits
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import GOAWAY, PING
from epp.ticket import Outcome as Ended
from tests.interop.golang import GoClient, Outcome, go_client
from tests.interop.relay import FROM_CLIENT, FROM_SERVER, Relay, relay
from tests.interop.serving import (
    ANSWERED,
    GET,
    NOT_SERVING,
    SERVING,
    UPLOAD,
    WATCH,
    body_of,
    is_routed,
    own_certificate,
    until,
    upload,
    wire,
)
from tests.interop.uvloop_port import on_uvloop

pytestmark = pytest.mark.anyio
secured = pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
PROMPT = b'{"model":"m","prompt":"%s"}' % (b"0123456789abcdef" * (1 << 18))
"""A little over 4 MiB."""


async def plays_an_exchange(client: GoClient, count: int, *, gzip: bool = False) -> None:
    """So many streams at once do what Envoy does for a GET, and see the same."""
    await client.open("exchange", count, gzip=gzip)
    await client.send("exchange", GET)
    (routed,) = await client.read("exchange")
    assert (routed.streams, routed.code) == (count, "")
    assert is_routed((routed.messages or [])[0])
    await client.send("exchange", ANSWERED)
    (went_on,) = await client.read("exchange")
    assert (went_on.streams, went_on.code) == (count, "")
    assert await client.finish("exchange") == [Outcome(count, None, "OK", "")]


async def passes_unchanged(client: GoClient, prompt: bytes, *, gzip: bool = False) -> None:
    """A prompt is sent in one message, and comes back in several."""
    await client.open("large", gzip=gzip)
    await client.send("large", UPLOAD)
    await client.send("large", upload(prompt))
    (end,) = await client.finish("large")
    assert end.code == "OK"
    assert end.messages is not None
    assert is_routed(end.messages[0])
    assert body_of(end.messages[1:]) == prompt


@secured
async def test_many_streams_on_one_connection_are_all_served(secure: bool) -> None:
    async with wire(tls=own_certificate() if secure else None) as served:
        async with go_client(served.address, secure=secure) as client:
            await plays_an_exchange(client, 200)
            assert len(served.transport.peers) == 1
        await served.idle()
        assert served.watch.outcomes == [Ended.COMPLETE] * 200
        assert served.breaches == {}


@secured
async def test_on_uvloop_all_this_holds_too(secure: bool) -> None:
    async with on_uvloop(secure) as port, go_client(f"127.0.0.1:{port}", secure=secure) as client:
        await plays_an_exchange(client, 200)
        await passes_unchanged(client, PROMPT)


async def test_gzip_is_read() -> None:
    async with wire() as served, go_client(served.address) as client:
        await plays_an_exchange(client, 3, gzip=True)
    assert served.breaches == {}


@pytest.mark.parametrize("gzip", [False, True], ids=["identity", "gzip"])
@secured
async def test_a_prompt_of_4_mib_passes_unchanged(secure: bool, gzip: bool) -> None:
    limits = ConnectionLimits(max_message_bytes=8 << 20)
    tls = own_certificate() if secure else None
    async with wire(limits, tls) as served, go_client(served.address, secure=secure) as client:
        await passes_unchanged(client, PROMPT, gzip=gzip)


@pytest.mark.parametrize("gzip", [False, True], ids=["identity", "gzip"])
async def test_a_message_above_the_limit_ends_its_stream_with_resource_exhausted(gzip: bool) -> None:
    async with wire() as served, go_client(served.address) as client:  # whose limit is 4 MiB
        await client.open("good")
        await client.open("large", gzip=gzip)
        await client.send("large", upload(PROMPT))
        (end,) = await client.finish("large")
        assert end.code == "ResourceExhausted"
        assert "raise --grpc-max-recv-msg-size" in end.detail
        assert served.breaches == {"max_message_bytes": 1}
        await client.send("good", GET)
        (routed,) = await client.read("good")
        assert routed.code == ""


async def test_a_body_above_the_limit_is_answered_and_the_stream_ends_with_ok() -> None:
    async with wire(body=Limits(max_body=100_000)) as served, go_client(served.address) as client:
        await client.open("large")
        await client.send("large", UPLOAD)
        await client.send("large", upload(PROMPT[:200_000]))
        (end,) = await client.finish("large")
    assert end.code == "OK"
    assert len(end.messages or []) == 1  # the 413


async def test_a_deadline_is_kept_on_both_sides() -> None:
    async with wire() as served, go_client(served.address) as client:
        await client.open("slow", deadline=0.3)
        await client.send("slow", GET)
        (end,) = await client.finish("slow")  # it half-closes, but the deadline is not needed for that
        assert end.code == "OK"
        await client.open("waiting", deadline=0.3)
        await client.send("waiting", UPLOAD)
        await until(lambda: served.transport.streams_open == 1)
        (end,) = await client.read("waiting")
        assert end.code == "DeadlineExceeded"
        await served.idle()


async def test_an_unknown_method_is_unimplemented() -> None:
    async with wire() as served, go_client(served.address) as client:
        await client.open("lost", 20, method="/envoy.service.auth.v3.Authorization/Check")
        await client.send("lost", GET)
        (end,) = await client.finish("lost")
        assert (end.streams, end.code) == (20, "Unimplemented")
        assert "/envoy.service.auth.v3.Authorization/Check" in end.detail
        await plays_an_exchange(client, 1)
        assert len(served.transport.peers) == 1


async def test_a_watch_of_health_hears_every_change_beside_other_calls() -> None:
    async with wire() as served, go_client(served.address) as client:
        await client.open("watch", 5, method=WATCH)
        await client.send("watch", b"")
        assert await client.read("watch") == [Outcome(5, [SERVING], "", "")]
        await plays_an_exchange(client, 1)
        served.health.set_draining()
        assert await client.read("watch") == [Outcome(5, [NOT_SERVING], "", "")]
        await client.cancel("watch")
        await served.idle()


async def test_metadata_above_the_limit_is_refused_before_it_is_sent() -> None:
    # The client keeps to our SETTINGS_MAX_HEADER_LIST_SIZE by itself, as soon as it knows it.
    async with wire() as served, go_client(served.address) as client:
        await plays_an_exchange(client, 1)
        await client.open("big", metadata={"x-big": "x" * 50_000})
        await client.send("big", GET)
        (routed,) = await client.read("big")
        assert routed.code == ""
        await client.open("bigger", metadata={"x-big": "x" * 61_000})
        (end,) = await client.read("bigger")
        assert end.code == "Internal"
        assert "header list size" in end.detail
        assert served.breaches == {}


async def test_a_thousand_cancelled_streams_do_not_end_the_connection() -> None:
    async with wire() as served, go_client(served.address) as client:
        for _ in range(4):
            await client.open("left", 250)
            await client.send("left", GET)
            (routed,) = await client.read("left")
            assert routed.streams == 250
            await client.cancel("left")
        await served.idle()
        await plays_an_exchange(client, 1)
        assert len(served.transport.peers) == 1
        assert served.breaches == {}


@pytest.mark.slow
@pytest.mark.timeout(60)
async def test_keepalive_pings_are_answered_for_as_long_as_a_stream_is_silent() -> None:
    async with wire() as served, relay(served.port) as between, go_client(between.address, keepalive="10s") as client:
        await client.open("silent")
        await client.send("silent", GET)
        await client.read("silent")
        # Ten seconds is the shortest interval that grpc-go takes; it ends a connection that is silent for 2 more.
        await until(lambda: keepalives(between, FROM_CLIENT) == 1, within=15)
        await until(lambda: keepalives(between, FROM_SERVER) == 1)
        await client.send("silent", ANSWERED)
        (end,) = await client.finish("silent")
        assert (end.code, len(end.messages or [])) == ("OK", 1)
        assert between.connections == 1


def keepalives(between: Relay, sender: str) -> int:
    """PING of eight zeros; those by which it measures the bandwidth are others."""
    return sum(frame.start == bytes(8) for frame in between.frames(sender, PING))


async def test_streams_end_well_while_their_server_leaves_and_the_next_one_takes_new_streams() -> None:
    async with wire() as leaving, relay(leaving.port) as between, go_client(between.address) as client:
        await client.open("old", 50)
        await client.send("old", GET)
        await client.read("old")
        stopped = asyncio.create_task(leaving.transport.stop(20))
        await asyncio.sleep(0)  # it no longer listens
        async with wire(port=leaving.port) as next_one:
            # The second GOAWAY answers the client's answer to the PING behind the first: it knows.
            await until(lambda: len(between.frames(FROM_SERVER, GOAWAY)) == 2)
            await plays_an_exchange(client, 50)
            assert next_one.transport.streams_total == 50
            await client.send("old", ANSWERED)
            (end,) = await client.finish("old")
            assert (end.streams, end.code, len(end.messages or [])) == (50, "OK", 1)
            async with asyncio.timeout(5):
                await stopped  # long before its time is up
            assert leaving.transport.streams_total == 50
            assert leaving.watch.outcomes == [Ended.COMPLETE] * 50


async def test_streams_that_open_while_the_server_begins_to_leave_are_served_by_either() -> None:
    async with wire() as leaving, go_client(leaving.address) as client:
        await plays_an_exchange(client, 1)
        stopped = asyncio.create_task(leaving.transport.stop(20))
        await asyncio.sleep(0)
        async with wire(port=leaving.port) as next_one:
            for _ in range(20):
                await plays_an_exchange(client, 10)
            await stopped
            assert leaving.transport.streams_total + next_one.transport.streams_total == 201
