"""curl, which knows HTTP/2 and nothing of gRPC: what a person sees who tries the port by hand.

HTTP/1.1 is not spoken here, with TLS or without: the answer is a 400 with the sentence that says why.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from epp.extproc.http2.frames import MESSAGE_PREFIX
from tests.contract.transport import METHOD
from tests.interop.serving import CHECK, GET, SERVING, WATCH, Wire, is_routed, own_certificate, program, run, wire

pytestmark = pytest.mark.anyio
POSTED = ("--http2-prior-knowledge", "--header", "content-type: application/grpc", "--data-binary", "@-")
schemes = pytest.mark.parametrize("scheme", ["http", "https"])


async def curl(
    served: Wire, scheme: str, path: str, *options: str, message: bytes = GET
) -> tuple[int, list[str], bytes]:
    """Ask once: curl's exit code, the lines of head and trailers, the body. The message is sent where it is POSTED."""
    url = f"{scheme}://{served.address}{path}"
    given = ("--silent", "--insecure", "--max-time", "10", "--dump-header", "/dev/stderr", *options, url)
    code, out, err = await run(program("curl"), *given, stdin=MESSAGE_PREFIX.pack(0, len(message)) + message)
    return code, err.decode().split("\r\n"), out


@asynccontextmanager
async def served(scheme: str) -> AsyncIterator[Wire]:
    async with wire(tls=own_certificate() if scheme == "https" else None) as port:
        yield port


@schemes
async def test_get_is_told_what_the_port_speaks(scheme: str) -> None:
    async with served(scheme) as port:
        code, head, body = await curl(port, scheme, "/", "--http2-prior-knowledge")
    assert code == 0
    assert head[0].split() == ["HTTP/2", "415"]
    assert "content-type: text/plain" in head
    assert body.startswith(b"This port speaks gRPC")
    assert f"content-length: {len(body)}" in head


@schemes
async def test_head_is_told_the_same_without_the_text(scheme: str) -> None:
    async with served(scheme) as port:
        given = ("--http2-prior-knowledge", "--head", "--output", "/dev/null")
        code, head, size = await curl(port, scheme, "/", *given, "--write-out", "%{size_download}")
    assert code == 0
    assert head[0].split() == ["HTTP/2", "415"]
    assert size == b"0"


@schemes
async def test_a_message_that_is_posted_gets_its_reply_and_trailers(scheme: str) -> None:
    async with served(scheme) as port:
        code, head, body = await curl(port, scheme, METHOD, *POSTED)
    assert code == 0
    assert head[0].split() == ["HTTP/2", "200"]
    assert "content-type: application/grpc" in head
    assert head.index("content-type: application/grpc") < head.index("grpc-status: 0")
    flag, size = MESSAGE_PREFIX.unpack_from(body)
    assert (flag, size) == (0, len(body) - MESSAGE_PREFIX.size)
    assert is_routed(body[MESSAGE_PREFIX.size :])


@schemes
async def test_health_is_told(scheme: str) -> None:
    async with served(scheme) as port:
        code, head, body = await curl(port, scheme, CHECK, *POSTED, message=b"")
        assert (code, body) == (0, MESSAGE_PREFIX.pack(0, len(SERVING)) + SERVING)
        assert "grpc-status: 0" in head


async def test_a_call_whose_time_is_up_is_ended_by_the_server() -> None:
    # curl keeps no gRPC deadline of its own, as other clients do.
    async with served("http") as port:
        timeout = ("--header", "grpc-timeout: 300m")
        code, head, body = await curl(port, "http", WATCH, *POSTED, *timeout, message=b"")
    assert (code, body) == (0, MESSAGE_PREFIX.pack(0, len(SERVING)) + SERVING)
    assert "grpc-status: 4" in head


@schemes
async def test_an_unknown_method_is_named(scheme: str) -> None:
    # Without a body: curl 7.88 fails (92) when the answer and its RST_STREAM(NO_ERROR) come before it has sent one.
    posted = ("--http2-prior-knowledge", "--request", "POST", "--header", "content-type: application/grpc")
    async with served(scheme) as port:
        code, head, body = await curl(port, scheme, "/no.Service/Method", *posted)
    assert (code, body) == (0, b"")
    assert "grpc-status: 12" in head
    assert "grpc-message: there is no method /no.Service/Method here" in head


@pytest.mark.parametrize("option", ["--http1.1", "--http2"], ids=["plain", "with upgrade"])
async def test_http_1_is_refused_and_told_why(option: str) -> None:
    async with served("http") as port:
        code, head, body = await curl(port, "http", "/", option)
    assert (code, body) == (0, b"this port speaks HTTP/2, and gRPC on it\n")
    assert head[0] == "HTTP/1.1 400 Bad Request"


@pytest.mark.parametrize("option", ["--http1.1", "--no-alpn"], ids=["ALPN http/1.1", "no ALPN"])
async def test_tls_without_alpn_h2_is_refused_and_told_why(option: str) -> None:
    async with served("https") as port:
        code, head, body = await curl(port, "https", "/", option)
    assert (code, body) == (0, b"TLS without ALPN h2: this port speaks HTTP/2\n")
    assert head[0] == "HTTP/1.1 400 Bad Request"
