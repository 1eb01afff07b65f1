"""What happens to headers: only what must change does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from epp.headers import CONTROL, ROUTING
from tests.e2e.client import chat, chunked, post
from tests.e2e.upstream import Answer

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

PATH = "/v1/chat/completions"
both = pytest.mark.parametrize("gateway", ["light", "duplex", "buffered"])

MADE_BY_ENVOY = {"x-forwarded-proto", "x-request-id", "x-envoy-expected-rq-timeout-ms", "transfer-encoding"}
DESTINATION = "x-gateway-destination-endpoint"


@both
async def test_headers_keep_their_order_and_duplicates(site: Site, gateway: str) -> None:
    sent = ["x-b: 2", "x-a: 1", "x-b: 3", "cookie: a=1", "x-empty:", "x-b: 1,1", "authorization: Bearer k", "x-b: 2"]
    assert (await site.send(gateway, post(PATH, chat(), *sent))).status == 200
    got = [f"{name}: {value.decode()}".strip() for name, value in site.seen[0].headers]
    ours = {*MADE_BY_ENVOY, DESTINATION, "host", "content-length"}
    assert [line for line in got if line.partition(":")[0] not in ours] == sent


@both
async def test_control_headers_end_at_the_picker(site: Site, gateway: str) -> None:
    sent = [f"{name}: 1" for name in sorted(CONTROL) if "rewrite" not in name]
    assert (await site.send(gateway, post(PATH, chat(), *sent, "x-kept: 1"))).status == 200
    names = set(site.seen[0].names)
    assert not names & CONTROL
    assert "x-kept" in names


@pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered", "blind"])
async def test_forged_routing_headers_do_not_survive(site: Site, gateway: str) -> None:
    forged = [f"{name}: 127.0.0.1:1" for name in sorted(ROUTING)]
    get = "\r\n".join(["GET /v1/models HTTP/1.1", "host: h", *forged, "", ""]).encode()
    for raw in (post("/anything" if gateway == "blind" else PATH, chat(), *forged), get):
        assert (await site.send(gateway, raw)).status == 200
    for seen in site.seen:
        assert set(seen.names) & ROUTING == {DESTINATION}
        assert seen.all(DESTINATION)[0].decode().split(",")[0] in (site.a.address, site.b.address)
        assert len(seen.all(DESTINATION)) == 1


@both
async def test_a_forged_destination_chooses_nothing(site: Site, gateway: str) -> None:
    await site.prefer(site.a)
    for _ in range(4):
        await site.send(gateway, post(PATH, chat(), f"{DESTINATION}: {site.b.address}"))
    assert (len(site.a.seen), len(site.b.seen)) == (4, 0)


async def test_content_length_stays_where_the_mode_keeps_it(site: Site) -> None:
    body = chat()
    await site.send("buffered", post(PATH, body))
    assert site.seen[0].all("content-length") == [str(len(body)).encode()]


async def test_full_duplex_sends_chunks(site: Site) -> None:
    await site.send("light", post(PATH, chat()))
    assert site.seen[0].all("content-length") == []
    assert site.seen[0].all("transfer-encoding") == [b"chunked"]


@both
async def test_a_renamed_model_arrives_with_the_right_length(site: Site, gateway: str) -> None:
    raw = post("/v1/completions", b'{"prompt": "p", "model" : "m", "n":1}', "x-llm-d-model-name-rewrite: longer-name")
    assert (await site.send(gateway, raw)).status == 200
    assert site.seen[0].body == b'{"prompt": "p", "model" : "longer-name", "n":1}'
    assert site.seen[0].all("content-length") == ([b"47"] if gateway == "buffered" else [])


async def test_a_renamed_model_in_chunks_arrives_buffered(site: Site) -> None:
    raw = chunked(
        "/v1/completions", [b'{"prompt": "p", "model"', b' : "m"}'], "x-llm-d-model-name-rewrite: longer-name"
    )
    assert (await site.send("buffered", raw)).status == 200
    assert site.seen[0].body == b'{"prompt": "p", "model" : "longer-name"}'


@both
async def test_answers_keep_their_headers(site: Site, gateway: str) -> None:
    headers = (("set-cookie", b"a=1"), ("x-z", b"1"), ("set-cookie", b"b=2"), ("content-type", b"text/plain"))
    site.a.answer = site.b.answer = lambda seen: Answer(headers=headers)
    got = await site.send(gateway, post(PATH, chat()))
    made_by_envoy = ("server", "date", "x-envoy-upstream-service-time", "transfer-encoding", "content-length")
    assert tuple((name, value) for name, value in got.headers if name not in made_by_envoy) == headers
    assert got.all("content-length") == ([] if gateway == "duplex" else [b"11"])
