"""Our refusals as the answer that the caller's client library understands.

The dialect is chosen by the path alone, for a refusal may come before the body did (413, 408). OpenAI's shape is the
one for everybody but Anthropic's clients: the engines answer so, too.
Rejected: the reference's plain text without a content type, which client libraries show as "unknown error".
Source: OpenAI and Anthropic error references; RFC 9110 section 10.2.3 (Retry-After).
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from epp.dialects.request import Dialect
from epp.dialects.routes import path_of, route
from epp.errors import Refusal
from epp.headers import DROP_REASON, Headers

_OPENAI: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's names go with its statuses, 504 and 529 among them; the status stays ours, the name is the nearest."""


class Answer(msgspec.Struct, frozen=True):
    """An HTTP response of our own."""

    status: int
    headers: Headers
    body: bytes


def refuse(headers: Headers, refusal: Refusal) -> Answer:
    """Render a refusal for the client that sent `headers`; whatever they are, this raises nothing.

    `retry-after` is whole seconds, rounded up.
    """
    way = route(path_of(dict(reversed(headers))))
    say = _anthropic if way is not None and way.dialect is Dialect.ANTHROPIC else _openai
    answer: list[tuple[str, bytes]] = [("content-type", b"application/json")]
    if refusal.retry_after is not None:
        answer.append(("retry-after", b"%d" % math.ceil(refusal.retry_after)))
    if refusal.reason:
        answer.append((DROP_REASON, refusal.reason.encode()))
    message = refusal.message.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent
    return Answer(refusal.status, tuple(answer), msgspec.json.encode(say(refusal, message)))


def _openai(refusal: Refusal, message: str) -> object:
    kind = _OPENAI.get(refusal.status) or ("server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": refusal.code}}


def _anthropic(refusal: Refusal, message: str) -> object:
    kind = _ANTHROPIC.get(refusal.status) or ("api_error" if refusal.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
