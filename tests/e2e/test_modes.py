"""Every kind of request through every mode in which Envoy can be told to ask."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.e2e.client import chat, chunked, post
from tests.e2e.serving import until
from tests.e2e.upstream import Answer, Pairs

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

PATH = "/v1/chat/completions"
ROUTED = ("light", "path", "duplex", "buffered", "whole", "passing")
HTTP2 = ("h2c-light", "h2c-duplex", "h2c-buffered")
COUNTED = ("light", "duplex", "buffered", "whole", "passing")

every_mode = pytest.mark.parametrize("gateway", ROUTED)
every_http2 = pytest.mark.parametrize("gateway", HTTP2)


@every_mode
async def test_body_reaches_the_model_server_byte_for_byte(site: Site, gateway: str) -> None:
    body = b'{ "model" : "m", "messages":[{"role":"user","content":"\xc3\xa9\\u00e9"}], "n":9007199254740993 }'
    got = await site.send(gateway, post(PATH, body, "content-type: application/json"))
    assert (got.status, got.body, got.complete) == (200, b'{"ok":true}', True)
    assert [(seen.method, seen.path, seen.body) for seen in site.seen] == [("POST", PATH, body)]


@every_mode
async def test_body_in_many_pieces_arrives_whole(site: Site, gateway: str) -> None:
    body = chat(user="u" * 300_000)
    raw = chunked(PATH, [body[at : at + 7_001] for at in range(0, len(body), 7_001)])
    got = await site.send(gateway, *(raw[at : at + 10_000] for at in range(0, len(raw), 10_000)))
    assert got.status == 200
    assert [seen.body for seen in site.seen] == [body]


@every_mode
async def test_get_is_routed(site: Site, gateway: str) -> None:
    got = await site.send(gateway, b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n")
    assert got.status == 200
    assert [(seen.method, seen.path, seen.body) for seen in site.seen] == [("GET", "/v1/models", b"")]


@every_mode
async def test_empty_post_is_routed(site: Site, gateway: str) -> None:
    for raw in (chunked("/reset_prefix_cache", []), post("/reset_prefix_cache", b"")):
        assert (await site.send(gateway, raw)).status == 200
    assert [(seen.path, seen.body) for seen in site.seen] == [("/reset_prefix_cache", b"")] * 2


@pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered"])
async def test_eight_megabytes_arrive_whole(site: Site, gateway: str) -> None:
    body = chat(user="x" * (8 << 20))
    assert (await site.send(gateway, post(PATH, body))).status == 200
    assert [seen.body == body for seen in site.seen] == [True]


@every_mode
async def test_answers_arrive_as_they_were_sent(site: Site, gateway: str) -> None:
    pieces = tuple(b"data: %d\n\n" % at for at in range(300))
    site.a.answer = site.b.answer = lambda seen: Answer(headers=(("content-type", b"text/event-stream"),), steps=pieces)
    got = await site.send(gateway, post(PATH, chat(stream=True)))
    assert (got.status, got.body, got.complete) == (200, b"".join(pieces), True)
    assert got.all("content-type") == [b"text/event-stream"]


@every_mode
async def test_streamed_answers_arrive_piece_by_piece(site: Site, gateway: str) -> None:
    go_on = asyncio.Event()
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(b"first", go_on, b"second"))
    async with asyncio.timeout(5), site.connection(gateway) as link:
        link.writer.write(post(PATH, chat(stream=True)))
        if gateway == "whole":  # BUFFERED responses: nothing before the end
            await site_started(site)
            go_on.set()
            assert (await link.rest()).body == b"firstsecond"
        else:
            head = await link.head()
            assert await link.data() == b"first"
            go_on.set()
            assert (await link.rest(head)).body == b"second"


async def site_started(site: Site) -> None:
    async def started() -> bool:
        return site.a.started.is_set() or site.b.started.is_set()

    await until(started, True)


@pytest.mark.parametrize("gateway", COUNTED)
async def test_requests_are_in_flight_until_their_answer_ends(site: Site, gateway: str) -> None:
    await site.prefer(site.a)
    end = asyncio.Event()
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(b"first", end, b"second"))
    async with asyncio.timeout(10):
        tasks = [asyncio.create_task(site.send(gateway, post(PATH, chat()))) for _ in range(3)]
        await until(site.picker.in_flight, {"e0": 3})
        end.set()
        assert [got.status for got in await asyncio.gather(*tasks)] == [200, 200, 200]
    await site.idle()


async def test_requests_are_not_in_flight_where_responses_are_skipped(site: Site) -> None:
    end = asyncio.Event()
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(b"first", end, b"second"))
    async with asyncio.timeout(10):
        task = asyncio.create_task(site.send("path", post(PATH, chat())))
        await site_started(site)
        await site.idle()
        end.set()
        assert (await task).status == 200


@every_mode
async def test_answers_without_a_body_are_passed_on(site: Site, gateway: str) -> None:
    site.a.answer = site.b.answer = lambda seen: Answer(status=204, headers=(), steps=(b"",))
    got = await site.send(gateway, post("/v1/load_lora_adapter", b"{}"))
    assert (got.status, got.body) == (204, b"")


@every_http2
async def test_http2_to_the_model_server(site: Site, gateway: str) -> None:
    body = chat()
    got = await site.send(gateway, post(PATH, body))
    assert (got.status, got.body) == (200, b'{"ok":true}')
    assert [(seen.version, seen.body) for seen in site.seen] == [("2", body)]


@every_http2
async def test_trailers_of_the_request_arrive(site: Site, gateway: str) -> None:
    body, trailers = chat(), (("x-checksum", b"1234"), ("x-more", b"yes"))
    got = await site.send_h2(gateway, ((":path", PATH.encode()), ("content-type", b"application/json")), body, trailers)
    assert (got.status, got.body) == (200, b'{"ok":true}')
    assert [(seen.body, seen.trailers) for seen in site.seen] == [(body, trailers)]


@pytest.mark.parametrize("gateway", ["h2c-light", "h2c-duplex"])
async def test_trailers_without_a_body_arrive(site: Site, gateway: str) -> None:
    trailers: Pairs = (("x-checksum", b"1234"),)
    got = await site.send_h2(gateway, ((":path", b"/anything"),), b"", trailers)
    assert got.status == 200
    assert [(seen.body, seen.trailers) for seen in site.seen] == [(b"", trailers)]


@every_http2
async def test_trailers_of_the_answer_arrive(site: Site, gateway: str) -> None:
    trailers: Pairs = (("grpc-status", b"0"), ("x-tail", b"t"))
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(b"one", b"two"), trailers=trailers)
    got = await site.send_h2(gateway, ((":path", PATH.encode()),), chat())
    assert (got.status, got.body, got.trailers) == (200, b"onetwo", trailers)


@pytest.mark.parametrize("gateway", ["trailing-light", "trailing-duplex", "trailing-buffered"])
async def test_trailers_of_http1_arrive_both_ways(site: Site, gateway: str) -> None:
    body, answered = chat(), (("x-tail", b"t"),)
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(b"one",), trailers=answered)
    got = await site.send(gateway, chunked(PATH, [body], "te: trailers", trailers=["x-checksum: 1234"]))
    assert (got.status, got.body, got.trailers) == (200, b"one", answered)
    assert [(seen.body, seen.trailers) for seen in site.seen] == [(body, (("x-checksum", b"1234"),))]


@every_mode
async def test_trailers_of_http1_harm_no_body_where_envoy_retries(site: Site, gateway: str) -> None:
    """Envoy drops them there: it would send the body twice."""
    body = chat()
    got = await site.send(gateway, chunked(PATH, [body], trailers=["x-checksum: 1234"]))
    assert (got.status, got.body) == (200, b'{"ok":true}')
    assert [seen.body for seen in site.seen] == [body]


@pytest.mark.xfail(
    raises=AssertionError, reason="Envoy 1.40 replays its retry buffer when the trailers are answered", strict=True
)
async def test_trailers_of_http2_arrive_where_envoy_retries(site: Site) -> None:
    body = chat()
    await site.send_h2("h2c-retrying", ((":path", PATH.encode()),), body, (("x-checksum", b"1234"),))
    assert [seen.body for seen in site.seen] == [body]


@pytest.mark.parametrize("gateway", ["light", "path", "duplex"])
async def test_websockets_pass_frames_both_ways(site: Site, gateway: str) -> None:
    upgrade = ("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: AAAA")
    async with asyncio.timeout(10), site.connection(gateway) as link:
        lines = ["GET /v1/realtime HTTP/1.1", "host: h", *upgrade, "", ""]
        link.writer.write("\r\n".join(lines).encode())
        switched = await link.raw(b"\r\n\r\n")
        assert switched.startswith(b"HTTP/1.1 101 ")
        for frame in (b"ping", b"pong" * 1000):
            link.writer.write(frame)
            assert await link.raw(frame[-4:], len(frame)) == frame
    assert [seen.path for seen in site.seen] == ["/v1/realtime"]


async def test_without_bodies_what_needs_none_is_routed(site: Site) -> None:
    """Request body mode NONE: paths that nobody reads pass, whatever they carry."""
    for raw in (b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n", post("/anything", b"body")):
        assert (await site.send("blind", raw)).status == 200
    assert sorted(seen.body for seen in site.seen) == [b"", b"body"]
