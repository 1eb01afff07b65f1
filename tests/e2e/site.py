"""One site for the whole suite: two model servers, one picker, and one Envoy with a gateway for each mode.

Gateways, by name (request body; response headers/body/trailers):
    light     full duplex; SEND/NONE/SEND               path      full duplex; SKIP/NONE/SKIP
    duplex    full duplex both ways                     buffered  BUFFERED; SEND/NONE/SEND
    whole     BUFFERED both ways                        passing   BUFFERED; response bodies STREAMED
    blind     no request bodies; SEND/NONE/SEND         streamed  STREAMED, which the picker refuses
    trailing-light, trailing-duplex, trailing-buffered: as these, without retries, so that trailers pass
    hasty  as light, and gives a silent model server up after a second
    h2c-light, h2c-duplex, h2c-buffered: as the last, to model servers that speak HTTP/2; h2c-retrying: with retries
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from epp.demo import envoy
from epp.demo.envoy import Body, Envoy, Gateway, Response
from tests.e2e import client, serving
from tests.e2e.client import Got
from tests.e2e.serving import Picker
from tests.e2e.upstream import Pairs, Seen, Upstream

MAX_BODY: Final = 10 << 20
HASTE: Final = 1.0
"""Seconds; the other gateways wait for longer than any test does."""

MODES: Final[dict[str, tuple[Body, Response]]] = {
    "light": ("FULL_DUPLEX_STREAMED", "SEND/NONE/SEND"),
    "path": ("FULL_DUPLEX_STREAMED", "SKIP/NONE/SKIP"),
    "duplex": ("FULL_DUPLEX_STREAMED", "SEND/FULL_DUPLEX_STREAMED/SEND"),
    "buffered": ("BUFFERED", "SEND/NONE/SEND"),
    "whole": ("BUFFERED", "SEND/BUFFERED/SEND"),
    "passing": ("BUFFERED", "SEND/STREAMED/SEND"),
    "blind": ("NONE", "SEND/NONE/SEND"),
    "streamed": ("STREAMED", "SEND/NONE/SEND"),
}

TRAILING: Final = ("light", "duplex", "buffered")


class Site:
    """Everything that a test needs to ask and to look at."""

    def __init__(
        self, folder: Path, transport: str, upstreams: Sequence[Upstream], picker: Picker, gateway: Envoy
    ) -> None:
        self.folder = folder
        self.transport = f"--transport={transport}"
        """For a picker of a test's own."""
        self.a, self.b = upstreams
        self.picker = picker
        self.envoy = gateway

    @property
    def seen(self) -> list[Seen]:
        """What the model servers were sent since the last `reset`."""
        return [*self.a.seen, *self.b.seen]

    async def send(self, gateway: str, *pieces: bytes, within: float = 15.0) -> Got:
        return await client.send(self.envoy.ports[gateway], *pieces, within=within)

    async def send_h2(self, gateway: str, headers: Pairs, body: bytes = b"", trailers: Pairs = ()) -> Got:
        return await client.send_h2(self.envoy.ports[gateway], headers, body, trailers)

    def connection(self, gateway: str) -> contextlib.AbstractAsyncContextManager[client.Connection]:
        return client.connection(self.envoy.ports[gateway])

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await serving.until(self.picker.in_flight, {})

    async def prefer(self, upstream: Upstream) -> None:
        """Make this server the better one, wait until the picker acts on it, and clear its record of failures."""
        for each in (self.a, self.b):
            each.load = 0 if each is upstream else 50
        before = [each.scrapes for each in (self.a, self.b)]

        async def goes_there() -> bool:
            upstream.seen.clear()
            assert (await self.send("light", b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n")).status == 200
            told = all(each.scrapes >= was + 2 for each, was in zip((self.a, self.b), before, strict=True))
            return told and bool(upstream.seen)

        await serving.until(goes_there, True)
        for each in (self.a, self.b):
            each.seen.clear()
            each.started.clear()

    def reset(self) -> None:
        for upstream in (self.a, self.b):
            upstream.reset()


@contextlib.asynccontextmanager
async def site(folder: Path, transport: str) -> AsyncIterator[Site]:
    """Run it all."""
    async with contextlib.AsyncExitStack() as stack:
        upstreams = [Upstream(), Upstream()]
        for upstream in upstreams:
            await upstream.listen()
            stack.push_async_callback(upstream.close)
        addresses = [upstream.address for upstream in upstreams]
        flags = ("--secure-serving=false", f"--transport={transport}", f"--max-body={MAX_BODY}", "--seed=1")
        picker = await stack.enter_async_context(serving.picker(folder, "picker", addresses, *flags))
        listing = folder / "pool.json"
        envoy.write_endpoints(listing, addresses)
        gateways = [
            *(gateway(name, listing, picker, name) for name in MODES),
            *(gateway(f"trailing-{mode}", listing, picker, mode, retries=0) for mode in TRAILING),
            *(gateway(f"h2c-{mode}", listing, picker, mode, retries=0, h2c=True) for mode in TRAILING),
            gateway("hasty", listing, picker, "light", stalled_after=HASTE),
            gateway("h2c-retrying", listing, picker, "light", h2c=True),
        ]
        running = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        yield Site(folder, transport, upstreams, picker, running)


def gateway(
    name: str,
    listing: Path,
    picker: Picker,
    mode: str,
    *,
    h2c: bool = False,
    retries: int = 3,
    stalled_after: float = 60.0,
) -> Gateway:
    body, response = MODES[mode]
    asked = envoy.Picker(address=picker.address, request_body=body, response=response)
    return Gateway(name=name, endpoints=listing, picker=asked, h2c=h2c, retries=retries, stalled_after=stalled_after)
