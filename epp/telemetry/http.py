"""The metrics port: /metrics for Prometheus, /debug for whoever asks why.

In: GET requests. Out: the page of `epp.telemetry.exposition`, and JSON that others make.
Rules here:
- Where there is a guard, no page is begun for whom it does not let in; every page has a right of its own, its path.
- One page of metrics is made at a time, and everybody who asks meanwhile gets the same one.
- Pages are made, encoded and written in pieces, and between two the event loop does its other work: decisions wait for
  one piece, not for a page. That holds for the debug pages too: a thousand decisions in JSON take 50 ms and more.
- What is sent is bytes that are already there. A reader that has not taken all of them after `SEND_TIMEOUT` is cut off,
  and no more than `READERS` are served at once, so that dead ones hold no more memory than that.
- Plain text always: Prometheus takes it whatever it prefers, and so does the reference's port answer. Not compressed:
  that would take more time than making the page.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from errno import EADDRNOTAVAIL, EAFNOSUPPORT
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web

from epp.errors import ConfigError
from epp.telemetry.exposition import CONTENT_TYPE
from epp.telemetry.guard import Guard

Page = Callable[[web.Request], Awaitable[web.StreamResponse]]

CHUNK: Final = 1 << 16
"""Bytes written at once, about: handing 3 MB to a socket takes a millisecond."""
READERS: Final = 8
SEND_TIMEOUT: Final = 10.0
"""Seconds to send one answer."""
DECISIONS: Final = 20
MOST_DECISIONS: Final = 1000

REFUSALS: Final = {
    HTTPStatus.UNAUTHORIZED: ("a bearer token is needed that the API server knows", {"WWW-Authenticate": "Bearer"}),
    HTTPStatus.FORBIDDEN: ("the token's user needs a ClusterRole with this nonResourceURL and this verb", {}),
    HTTPStatus.TOO_MANY_REQUESTS: ("too many unknown tokens; try again", {"Retry-After": "1"}),
    HTTPStatus.INTERNAL_SERVER_ERROR: ("the API server could not be asked; the picker's log says why", {}),
}


class Views(msgspec.Struct, frozen=True):
    """What can be read on the port."""

    metrics: Callable[[], Iterable[bytes]]
    """The page, in pieces."""
    decisions: Callable[[int], Iterable[object]]
    """The last n decisions, latest first, a JSON value each."""
    endpoints: Callable[[], Iterable[object]]
    """What is known of every endpoint, likewise."""


class MetricsServer:
    """Serves `Views` over HTTP. `start` and `stop` once each."""

    def __init__(self, views: Views, guard: Guard | None = None, *, send_timeout: float = SEND_TIMEOUT) -> None:
        """
        Args:
            guard: says who may read; None: everybody.
        """
        self._views = views
        self._guard = guard
        self._send_timeout = send_timeout
        self._readers = 0
        self._rendering: asyncio.Task[list[bytes]] | None = None
        pages: dict[str, Page] = {
            "/metrics": self._metrics,
            "/debug/decisions": self._decisions,
            "/debug/endpoints": self._endpoints,
        }
        app = web.Application()
        app.add_routes([web.get(path, self._guarded(path, page)) for path, page in pages.items()])
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str | None, port: int, secured: ssl.SSLContext | None = None) -> int:
        """Bind and serve; returns the port.

        Args:
            host: None: every address, IPv4 and IPv6.
            port: 0: any that is free.
            secured: serves HTTPS; None: HTTP.

        Raises:
            ConfigError: the port cannot be bound.
        """
        try:
            listener = _listen(host, port)
        except OSError as error:
            raise ConfigError(f"--metrics-port {port} cannot be bound ({error.strerror}); choose another") from None
        await self._runner.setup()
        await web.SockSite(self._runner, listener, ssl_context=secured).start()
        bound: int = listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        if self._rendering is not None:
            self._rendering.cancel()
        await self._runner.cleanup()

    def _guarded(self, path: str, page: Page) -> Page:
        """The page, for whom the guard lets in."""
        guard = self._guard
        if guard is None:
            return page

        async def admitted(request: web.Request) -> web.StreamResponse:
            told = request.headers.get("Authorization", "")
            verdict = await guard.admit(told, request.method.lower(), path, request.remote or "")
            return await page(request) if verdict is HTTPStatus.OK else _refusal(verdict)

        return admitted

    # -- pages ---------------------------------------------------------------------------------------------------

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return await self._send(request, self._shared_page, CONTENT_TYPE)

    async def _decisions(self, request: web.Request) -> web.StreamResponse:
        text = request.query.get("n", str(DECISIONS))
        n = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
        if not 1 <= n <= MOST_DECISIONS:
            raise web.HTTPBadRequest(text=f"n must be a number from 1 to {MOST_DECISIONS}\n")
        return await self._send_json(request, self._views.decisions(n))

    async def _endpoints(self, request: web.Request) -> web.StreamResponse:
        return await self._send_json(request, self._views.endpoints())

    # -- inside --------------------------------------------------------------------------------------------------

    async def _shared_page(self) -> list[bytes]:
        if self._rendering is None or self._rendering.done():
            self._rendering = asyncio.create_task(_chunks(self._views.metrics()))
        return await self._rendering

    async def _send_json(self, request: web.Request, values: Iterable[object]) -> web.StreamResponse:
        return await self._send(request, lambda: _chunks(_json(values)), "application/json")

    async def _send(
        self, request: web.Request, make: Callable[[], Awaitable[list[bytes]]], content_type: str
    ) -> web.StreamResponse:
        if self._readers >= READERS:
            raise web.HTTPServiceUnavailable(text="too many readers; try again\n", headers={"Retry-After": "1"})
        self._readers += 1
        try:
            body = await make()
            length = str(sum(map(len, body)))
            response = web.StreamResponse(headers={"Content-Type": content_type, "Content-Length": length})
            async with asyncio.timeout(self._send_timeout):
                await response.prepare(request)
                for chunk in body if request.method == "GET" else ():  # HEAD: how long it would be
                    await response.write(chunk)
                    await asyncio.sleep(0)  # a socket that takes everything never makes anybody wait
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._readers -= 1
        return response


def _refusal(verdict: HTTPStatus) -> web.Response:
    words, headers = REFUSALS[verdict]
    return web.Response(status=verdict, text=f"{verdict.phrase}: {words}\n", headers=headers)


def _listen(host: str | None, port: int) -> socket.socket:
    if host is not None:
        return socket.create_server((host, port))
    try:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError) as error:  # containers often have no IPv6, and say so only here
        if isinstance(error, OSError) and error.errno not in (EADDRNOTAVAIL, EAFNOSUPPORT):
            raise
        return socket.create_server(("0.0.0.0", port))


def _json(values: Iterable[object]) -> Iterator[bytes]:
    """A JSON array, a line for each value."""
    before = b"["
    for value in values:
        yield before + msgspec.json.encode(value)
        before = b",\n"
    yield b"]\n" if before == b",\n" else b"[]\n"


async def _chunks(pieces: Iterable[bytes]) -> list[bytes]:
    """The pieces in chunks of at least CHUNK bytes, each piece made in a turn of the event loop of its own."""
    chunks, chunk = [], bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) >= CHUNK:
            chunks.append(bytes(chunk))
            chunk.clear()
        await asyncio.sleep(0)
    return [*chunks, bytes(chunk)]
