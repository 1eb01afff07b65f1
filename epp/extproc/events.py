"""What happens to one HTTP exchange, in our own words.

One ext_proc message is one event. Flags end in the codec: what Envoy says with a flag on headers, a flag on the last
body message, an empty last message or trailers are events of different types here, so that the exchange is a table.
`gc=False`: bytes, text and tuples of them make no cycle, so the collector need not know an event.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec

from epp.errors import Refusal
from epp.headers import Headers


class BodyMode(Enum):
    """How Envoy hands a body over: `processing_mode` of the ext_proc filter."""

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX = 4


class Modes(msgspec.Struct, frozen=True, gc=False):
    """Body modes, told by `protocol_config` on the first message of a stream; absent: full duplex both ways."""

    request: BodyMode = BodyMode.FULL_DUPLEX
    response: BodyMode = BodyMode.FULL_DUPLEX


class Part(Enum):
    """What ended a body; the answer must end the same way."""

    BODY = 1
    TRAILERS = 2


class RequestStarted(msgspec.Struct, frozen=True, gc=False):
    headers: Headers
    """Lower-case names, order and duplicates kept, pseudo-headers included."""
    modes: Modes = Modes()
    subset: tuple[str, ...] | None = None
    """Endpoints that the gateway allows, "ip:port" or "ip"; None: no hint, (): a hint that allows nothing."""


class BodylessRequest(RequestStarted, frozen=True, gc=False):
    """The headers are the whole request: a GET, a POST of length 0, or a filter that does not send bodies."""


class TunnelRequested(RequestStarted, frozen=True, gc=False):
    """A WebSocket upgrade or CONNECT: data flows both ways after the response, so the headers alone must decide."""


class RequestData(msgspec.Struct, frozen=True, gc=False):
    data: bytes
    subset: tuple[str, ...] | None = None


class RequestEnded(msgspec.Struct, frozen=True, gc=False):
    by: Part
    data: bytes = b""
    """The last piece of the body, often empty; only with Part.BODY."""
    subset: tuple[str, ...] | None = None


class Decided(msgspec.Struct, frozen=True, gc=False):
    endpoints: tuple[str, ...]
    """"ip:port", best first, never empty; the rest are fallbacks. IPv6 in brackets."""
    set_headers: Headers = ()
    """Headers to set towards the model server, beside the destination."""
    body: bytes | None = None
    """The body to send instead of the client's; None: the client's, byte for byte."""
    scores: tuple[tuple[str, float], ...] = ()
    """Endpoint and total score, for dynamic metadata; empty: not asked for."""


class Refused(msgspec.Struct, frozen=True):
    refusal: Refusal


class ResponseStarted(msgspec.Struct, frozen=True, gc=False):
    headers: Headers
    modes: Modes = Modes()
    served: str | None = None
    """The endpoint that Envoy says it used last, "ip:port"; None: not told."""


class BodylessResponse(ResponseStarted, frozen=True, gc=False):
    """The headers are the whole response: HEAD, 204, 304."""


class ResponseData(msgspec.Struct, frozen=True, gc=False):
    data: bytes


class ResponseEnded(msgspec.Struct, frozen=True, gc=False):
    by: Part
    data: bytes = b""
    """The last piece of the body, often empty; only with Part.BODY."""


class Lost(msgspec.Struct, frozen=True, gc=False):
    """The stream is gone. In most response modes this is also the normal end: it tells nothing about why."""


class Expired(msgspec.Struct, frozen=True, gc=False):
    """The exchange's own deadline has passed."""


# Named once: in Python 3.11 each look at a member of an enum costs 70 ns, and a request has a dozen.
NONE: Final = BodyMode.NONE
BUFFERED: Final = BodyMode.BUFFERED
FULL_DUPLEX: Final = BodyMode.FULL_DUPLEX
BODY: Final = Part.BODY
TRAILERS: Final = Part.TRAILERS
LOST: Final = Lost()
EXPIRED: Final = Expired()

RequestEvent = RequestStarted | BodylessRequest | TunnelRequested | RequestData | RequestEnded
ResponseEvent = ResponseStarted | BodylessResponse | ResponseData | ResponseEnded
Event = RequestEvent | ResponseEvent | Decided | Refused | Lost | Expired
