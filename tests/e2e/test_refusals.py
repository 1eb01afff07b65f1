"""What is refused, with which status, in whose shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.client import Got, chat, chunked, post

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
bodies = pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered", "whole"])


def error_of(got: Got, path: str) -> dict[str, object]:
    """The error object, in the shape that clients of this path know."""
    assert got.all("content-type") == [b"application/json"]
    assert isinstance(got.json, dict)
    if path == ANTHROPIC:
        assert got.json["type"] == "error"
    error = got.json["error"]
    assert isinstance(error, dict)
    assert error["message"]
    return error


@bodies
@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
@pytest.mark.parametrize("body", [b"{not json", b'{"messages":[]}', b'{"model":3,"messages":[]}', b"[]", b"\xff"])
async def test_bodies_that_cannot_be_understood(site: Site, gateway: str, path: str, body: bytes) -> None:
    got = await site.send(gateway, post(path, body))
    assert got.status == 400
    assert error_of(got, path)["type"] == "invalid_request_error"
    assert site.seen == []


@pytest.mark.parametrize("gateway", ["light", "path", "duplex", "buffered"])
async def test_a_body_over_the_limit(site: Site, gateway: str) -> None:
    """`--max-body` is 10 MiB here."""
    got = await site.send(gateway, post(OPENAI, chat(user="x" * (11 << 20))))
    assert got.status == 413
    assert error_of(got, OPENAI)["type"] == "invalid_request_error"
    assert "10485760" in str(error_of(got, OPENAI)["message"])
    assert site.seen == []


@pytest.mark.parametrize("gateway", ["light", "duplex"])
async def test_a_body_over_the_limit_in_chunks(site: Site, gateway: str) -> None:
    got = await site.send(gateway, chunked(ANTHROPIC, [b"x" * (1 << 20)] * 12))
    assert got.status == 413
    assert error_of(got, ANTHROPIC)["type"] == "request_too_large"


async def test_streamed_request_bodies_name_what_to_configure(site: Site) -> None:
    got = await site.send("streamed", post(OPENAI, chat()))
    assert got.status == 500
    assert "FULL_DUPLEX_STREAMED" in str(error_of(got, OPENAI)["message"])


async def test_refusals_are_not_in_flight_and_are_counted(site: Site) -> None:
    before = await refusals(site)
    for _ in range(3):
        await site.send("light", post(OPENAI, b"{"))
    await site.idle()
    assert await refusals(site) - before == 3


async def refusals(site: Site) -> float:
    return sum((await site.picker.metric("epp_refusals_total", "reason")).values())
