"""Which path speaks which dialect, and how its body is read.

Paths are compared by whole segments from their end, the longest match first: `/v1/chat/completions` and
`/openai/v1/chat/completions` are chats, `/x/mycompletions` is nothing that we know.
Rejected: comparing string suffixes, as the reference does: then `/x/mycompletions` is read as a completion.
Source: the suffixes that the reference's parsers claim; the APIs' own paths for speech, audio and image edits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import msgspec

from epp.dialects.anthropic import Messages
from epp.dialects.body import Body
from epp.dialects.engines import SglangGenerate, VllmGenerate
from epp.dialects.openai import Chat, Completion, Conversation, Embedding, Generation, Image, Responses, Speech
from epp.dialects.request import Dialect


class Route(msgspec.Struct, frozen=True):
    """How the body of a POST to a path is read."""

    dialect: Dialect
    decoder: msgspec.json.Decoder[Body]
    needs_model: bool = True
    takes_form: bool = False
    """The body may be multipart/form-data."""


def _json(dialect: Dialect, shape: type[Body], *, needs_model: bool = True, takes_form: bool = False) -> Route:
    return Route(dialect, msgspec.json.Decoder(shape), needs_model, takes_form)


_CHAT = _json(Dialect.OPENAI, Chat)
_COMPLETION = _json(Dialect.OPENAI, Completion)
_UPLOAD = _json(Dialect.OPENAI, Image, takes_form=True)

ROUTES: Final[dict[str, Route]] = {
    "chat/completions": _CHAT,
    "chat/completions/render": _CHAT,
    "chat/completions/batch": _CHAT,
    "completions": _COMPLETION,
    "completions/render": _COMPLETION,
    "embeddings": _json(Dialect.OPENAI, Embedding),
    "responses": _json(Dialect.OPENAI, Responses),
    "conversations": _json(Dialect.OPENAI, Conversation, needs_model=False),  # the API has none there
    "images/generations": _json(Dialect.OPENAI, Generation),
    "images/edits": _UPLOAD,
    "images/variations": _UPLOAD,
    "audio/transcriptions": _UPLOAD,
    "audio/translations": _UPLOAD,
    "audio/speech": _json(Dialect.OPENAI, Speech),
    "messages": _json(Dialect.ANTHROPIC, Messages),
    "messages/count_tokens": _json(Dialect.ANTHROPIC, Messages, needs_model=False),  # as the reference
    "inference/v1/generate": _json(Dialect.VLLM, VllmGenerate),
    "/generate": _json(Dialect.SGLANG, SglangGenerate, needs_model=False),  # the whole path; a server has one model
}
"""The last segments of a path; with a slash at the beginning: the whole path."""


def path_of(found: dict[str, bytes]) -> str:
    """The path without its query; `x-original-path`, then `x-forwarded-path`, where there is no `:path`."""
    path = found.get(":path") or found.get("x-original-path") or found.get("x-forwarded-path") or b""
    return path.decode("utf-8", "replace").partition("?")[0]


@lru_cache(64)  # paths are few; of long ones somebody makes up this keeps no more
def route(path: str) -> Route | None:
    """How the body of a POST to `path` is read; None: it is not. A slash at the end does not matter."""
    segments = path.rstrip("/").split("/")
    for count in (3, 2, 1):
        if (found := ROUTES.get("/".join(segments[-count:]))) is not None:
            return found
    return None
