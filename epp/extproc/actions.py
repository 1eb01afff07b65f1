"""What one HTTP exchange asks of the world, in the order in which it must be done.

Our own types rather than protobuf messages: transcripts stay readable, and a transport may encode them its own way.
`gc=False`: as with events, no cycle runs through them (but a refusal has a traceback).
"""

from __future__ import annotations

import msgspec

from epp.errors import Refusal
from epp.extproc.events import ResponseEvent
from epp.headers import Headers
from epp.scheduling.reporters import Metadata
from epp.ticket import Outcome


class AskDecision(msgspec.Struct, frozen=True, gc=False):
    headers: Headers
    body: bytes
    subset: tuple[str, ...] | None


class SendRequestHeaders(msgspec.Struct, frozen=True, gc=False):
    """Answer to the request headers. `destination` None: nothing decided yet (BUFFERED), go on to the body."""

    destination: str | None = None
    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()


class SendRequestBody(msgspec.Struct, frozen=True, gc=False):
    """One piece of the request body in full duplex."""

    data: bytes | memoryview
    last: bool


class SendBufferedBody(msgspec.Struct, frozen=True, gc=False):
    """Answer to a BUFFERED body: routing and mutations ride on it. `body` None: unchanged."""

    destination: str
    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None
    scores: tuple[tuple[str, float], ...] = ()


class SendRequestTrailers(msgspec.Struct, frozen=True, gc=False):
    pass


class SendResponseHeaders(msgspec.Struct, frozen=True, gc=False):
    """Answer to the response headers."""

    set_headers: Headers = ()
    """Each in place of all that have its name."""


class SendResponseBody(msgspec.Struct, frozen=True, gc=False):
    """Answer to one response body message; in full duplex it carries the bytes on, elsewhere it only says go on."""

    data: bytes
    last: bool
    metadata: Metadata = ()


class SendResponseTrailers(msgspec.Struct, frozen=True, gc=False):
    metadata: Metadata = ()


class SendImmediateResponse(msgspec.Struct, frozen=True):
    """Our own answer instead of a model's; the stream ends after it."""

    status: int
    headers: Headers
    body: bytes
    refusal: Refusal
    """Why: for whoever counts."""


class Report(msgspec.Struct, frozen=True, gc=False):
    """Tell whoever made the decision what the model server answered."""

    event: ResponseEvent


class Finished(msgspec.Struct, frozen=True, gc=False):
    """Count the admitted request out. Exactly one for every exchange that got a Decided."""

    outcome: Outcome


Send = (
    SendRequestHeaders
    | SendRequestBody
    | SendBufferedBody
    | SendRequestTrailers
    | SendResponseHeaders
    | SendResponseBody
    | SendResponseTrailers
    | SendImmediateResponse
)
Action = AskDecision | Send | Report | Finished
