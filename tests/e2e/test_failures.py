"""Model servers, clients and Envoy itself misbehave; the next server answers, and counts return to zero."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.e2e.client import chat, post
from tests.e2e.serving import until
from tests.e2e.upstream import Answer, Cut

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

PATH = "/v1/chat/completions"
SSE = (("content-type", b"text/event-stream"),)
both = pytest.mark.parametrize("gateway", ["light", "duplex", "buffered"])


async def served_by_the_second(site: Site, gateway: str, body: bytes) -> None:
    """The picker's first choice fails in some way; the answer comes from its second, and is counted there."""
    end = asyncio.Event()
    site.b.answer = lambda seen: Answer(steps=(b"one", end, b"two"))
    async with asyncio.timeout(10), site.connection(gateway) as link:
        link.writer.write(post(PATH, body))
        head = await link.head()
        assert head.status == 200
        await until(site.picker.in_flight, {"e1": 1})
        end.set()
        assert (await link.rest(head)).body == b"onetwo"
    assert [seen.body == body for seen in site.b.seen] == [True]


@both
async def test_a_dead_server_is_replaced_by_the_second_choice(site: Site, gateway: str) -> None:
    await site.prefer(site.a)
    await site.a.close()
    try:
        await served_by_the_second(site, gateway, chat())
    finally:
        await site.a.listen()


async def test_a_large_body_is_replayed_to_the_second_choice(site: Site) -> None:
    await site.prefer(site.a)
    await site.a.close()
    try:
        await served_by_the_second(site, "light", chat(user="x" * (4 << 20)))
    finally:
        await site.a.listen()


@pytest.mark.parametrize("step", [Cut.CUT, asyncio.Event()], ids=["reset", "stalled"])
async def test_a_server_that_takes_the_request_and_fails_is_replaced(site: Site, step: Cut | asyncio.Event) -> None:
    await site.prefer(site.a)
    site.a.answer = lambda seen: Answer(steps=(step,))
    await served_by_the_second(site, "hasty", chat())
    assert len(site.a.seen) == 1


async def test_a_server_that_answers_503_is_replaced(site: Site) -> None:
    await site.prefer(site.a)
    site.a.answer = lambda seen: Answer(status=503)
    await served_by_the_second(site, "light", chat())
    assert len(site.a.seen) == 1


@both
async def test_an_answer_that_had_begun_is_cut_and_counted_out(site: Site, gateway: str) -> None:
    death = asyncio.Event()
    site.a.answer = site.b.answer = lambda seen: Answer(headers=SSE, steps=(b"data: 1\n\n", death, Cut.CUT))
    async with asyncio.timeout(5), site.connection(gateway) as link:
        link.writer.write(post(PATH, chat(stream=True)))
        head = await link.head()
        assert await link.data() == b"data: 1\n\n"
        death.set()
        got = await link.rest(head)
    assert (got.status, got.body, got.complete) == (200, b"", False)


async def test_an_answer_that_stalls_is_cut_after_the_stated_time(site: Site) -> None:
    site.a.answer = site.b.answer = lambda seen: Answer(headers=SSE, steps=(b"data: 1\n\n", asyncio.Event()))
    started = asyncio.get_running_loop().time()
    got = await site.send("hasty", post(PATH, chat(stream=True)))
    assert (got.status, got.body, got.complete) == (200, b"data: 1\n\n", False)
    assert asyncio.get_running_loop().time() - started < 5  # a second here, and one in which Envoy closes


@both
async def test_errors_of_the_model_server_are_passed_on(site: Site, gateway: str) -> None:
    answer = Answer(status=404, steps=(b'{"error":{"message":"no such model"}}',))
    site.a.answer = site.b.answer = lambda seen: answer
    got = await site.send(gateway, post(PATH, chat()))
    assert (got.status, got.body) == (404, answer.steps[0])


@pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered"])
async def test_a_client_that_leaves_in_mid_answer_is_counted_out(site: Site, gateway: str) -> None:
    site.a.answer = site.b.answer = lambda seen: Answer(headers=SSE, steps=(b"data: 1\n\n", asyncio.Event()))
    async with asyncio.timeout(5), site.connection(gateway) as link:
        link.writer.write(post(PATH, chat(stream=True)))
        assert (await link.head()).status == 200
        assert await link.data() == b"data: 1\n\n"
        if gateway != "path":
            assert sum((await site.picker.in_flight()).values()) == 1
    await site.idle()


@pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered"])
async def test_a_client_that_leaves_before_the_answer_is_counted_out(site: Site, gateway: str) -> None:
    await site.prefer(site.a)
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(asyncio.Event(),))
    async with asyncio.timeout(5), site.connection(gateway) as link:
        link.writer.write(post(PATH, chat(stream=True)))
        await site.a.started.wait()
        if gateway != "path":
            assert await site.picker.in_flight() == {"e0": 1}
    await site.idle()


@both
async def test_a_client_that_leaves_in_mid_body_harms_nobody(site: Site, gateway: str) -> None:
    for _ in range(3):
        async with site.connection(gateway) as link:
            link.writer.write(post(PATH, chat(user="x" * 200_000))[:150_000])
            await link.writer.drain()
    assert (await site.send(gateway, post(PATH, chat()))).status == 200


@both
async def test_a_client_that_hangs_up_after_done_leaves_no_request(site: Site, gateway: str) -> None:
    done = b"data: [DONE]\n\n"
    site.a.answer = site.b.answer = lambda seen: Answer(headers=SSE, steps=(done, asyncio.Event()))
    async with asyncio.timeout(5), site.connection(gateway) as link:
        link.writer.write(post(PATH, chat(stream=True)))
        assert (await link.head()).status == 200
        assert await link.data() == done
    await site.idle()


@both
async def test_an_answer_may_overtake_its_request(site: Site, gateway: str) -> None:
    """Envoy's own 413 overtakes a BUFFERED body; elsewhere the model server answers before it has read the body."""
    body = chat(user="x" * (17 << 20)) if gateway == "buffered" else chat()
    got = await site.send(gateway, post(PATH, body))
    assert got.status == (413 if gateway == "buffered" else 200)


@pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered", "whole", "passing"])
async def test_envoys_own_answers_reach_the_client(site: Site, gateway: str) -> None:
    """No Host: 400. An upgrade that the gateway does not allow: 403."""
    got = await site.send(gateway, b"GET /v1/models HTTP/1.1\r\n\r\n")
    assert got.status == 400
    got = await site.send(gateway, b"GET / HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: other\r\n\r\n")
    assert got.status == 403
    assert site.seen == []


BROKEN = (
    b"not http at all\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nno colon here\r\n\r\n",
    b"GET / HTTP/1.0\r\nhost: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nx-large: " + b"x" * 70_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\n" + b"x-many: 1\r\n" * 150 + b"\r\n",
)
BAD_CHUNK = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nbad\r\n\r\n"


@both
async def test_broken_http_harms_nobody_else(site: Site, gateway: str) -> None:
    """Envoy opens a stream that begins with its own response headers and closes it before anybody can reply; its
    client gets no answer, from Envoy, and after a bad chunk not even the end of the connection."""
    got = await asyncio.gather(*(site.send(gateway, raw) for raw in BROKEN))
    assert [each.status for each in got] == [0] * len(BROKEN)
    async with site.connection(gateway) as link:
        link.writer.write(BAD_CHUNK)
        assert (await site.send(gateway, post(PATH, chat()))).status == 200
    assert (await site.send(gateway, post(PATH, chat()))).status == 200


async def test_more_streams_at_once_than_grpc_keeps_waiting_are_all_answered(site: Site) -> None:
    site.a.answer = site.b.answer = lambda seen: Answer()
    port = site.envoy.ports["light"]
    links = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1_500)]
    for _, writer in links:
        writer.write(post(PATH, chat(), "connection: close"))
    heads = await asyncio.gather(*(reader.readline() for reader, _ in links))
    for _, writer in links:
        writer.transport.abort()
    assert set(heads) == {b"HTTP/1.1 200 OK\r\n"}
