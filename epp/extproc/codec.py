"""ext_proc's messages <-> events and actions: with `messages.py` and `replies.py` the only place that knows them.

In: the bytes of one ProcessingRequest. Out: one event; and from one action, the bytes of one ProcessingResponse.
Rules here:
- Flags end here: which event a message becomes says how the request or the response goes on.
- What Envoy never sends (no header map, no kind, bytes that are no message) is a ProtocolError.

    messages.py  what the bytes of a message say         replies.py  the bytes of an action
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from epp.errors import ProtocolError
from epp.extproc.actions import Send, SendResponseBody
from epp.extproc.events import (
    BODY,
    BUFFERED,
    FULL_DUPLEX,
    NONE,
    TRAILERS,
    BodylessRequest,
    BodylessResponse,
    BodyMode,
    Modes,
    RequestData,
    RequestEnded,
    RequestEvent,
    RequestStarted,
    ResponseData,
    ResponseEnded,
    ResponseEvent,
    ResponseStarted,
    TunnelRequested,
)
from epp.extproc.messages import Beside, anything, usual
from epp.extproc.replies import CONTINUE_RESPONSE, WRITERS, with_metadata
from epp.headers import Headers, first


class Codec:
    """One stream's translation. It remembers the body modes, which only the first message tells."""

    __slots__ = ("_modes",)

    def __init__(self) -> None:
        self._modes: Modes | None = None

    def decode(self, data: bytes) -> RequestEvent | ResponseEvent:
        """Turn one message into one event.

        Raises:
            ProtocolError: bytes that are no ProcessingRequest, a message without a kind or without its header map.
        """
        kind, content, ends, beside = usual(data) or anything(data)
        if self._modes is None:
            self._modes = _modes(beside)
        return EVENTS[kind](content, ends, beside, self._modes)

    def encode(self, action: Send) -> bytes:
        """Turn one action into the bytes of one ProcessingResponse."""
        if type(action) is SendResponseBody and (self._modes is None or self._modes.response is not FULL_DUPLEX):
            return with_metadata(CONTINUE_RESPONSE, action.metadata) if action.metadata else CONTINUE_RESPONSE
        return WRITERS[type(action)](action)


MODES: Final = {(one.value, two.value): Modes(one, two) for one in BodyMode for two in BodyMode}
UNTOLD: Final = MODES[FULL_DUPLEX.value, FULL_DUPLEX.value]


def _modes(beside: Beside) -> Modes:
    if beside.modes is None:
        return UNTOLD
    try:
        return MODES[beside.modes]
    except KeyError:
        raise ProtocolError(
            f"unknown body modes {beside.modes[0]}, {beside.modes[1]}: set "
            "processing_mode.request_body_mode to FULL_DUPLEX_STREAMED, response_body_mode to NONE"
        ) from None


def _request_headers(headers: Headers, ends: bool, beside: Beside, modes: Modes) -> RequestStarted:
    if not headers:
        raise ProtocolError("headers without a header map")
    if ends or modes.request is NONE:
        return BodylessRequest(headers, modes, beside.subset)
    return (TunnelRequested if _is_tunnel(headers) else RequestStarted)(headers, modes, beside.subset)


def _is_tunnel(headers: Headers) -> bool:
    return first(headers, ":method") == b"CONNECT" or (first(headers, "upgrade") or b"").lower() == b"websocket"


def _request_body(data: bytes, ends: bool, beside: Beside, modes: Modes) -> RequestData | RequestEnded:
    # A buffered body is whole whatever its flag says: Envoy clears the flag when trailers follow.
    if ends or modes.request is BUFFERED:
        return RequestEnded(BODY, data, beside.subset)
    return RequestData(data, beside.subset)


def _response_headers(headers: Headers, ends: bool, beside: Beside, modes: Modes) -> ResponseStarted:
    if not headers:
        raise ProtocolError("headers without a header map")
    return (BodylessResponse if ends else ResponseStarted)(headers, modes, beside.served)


def _response_body(data: bytes, ends: bool, beside: Beside, modes: Modes) -> ResponseData | ResponseEnded:
    return ResponseEnded(BODY, data) if ends else ResponseData(data)


def _no_kind(content: None, ends: bool, beside: Beside, modes: Modes) -> RequestEvent:
    raise ProtocolError("a ProcessingRequest of no known kind")


# By kind; what the content is follows from it, which mypy cannot see.
EVENTS: Final[dict[str, Callable[[Any, bool, Beside, Modes], RequestEvent | ResponseEvent]]] = {
    "request_headers": _request_headers,
    "request_body": _request_body,
    "request_trailers": lambda content, ends, beside, modes: RequestEnded(TRAILERS, subset=beside.subset),
    "response_headers": _response_headers,
    "response_body": _response_body,
    "response_trailers": lambda content, ends, beside, modes: ResponseEnded(TRAILERS),
    "": _no_kind,
}
