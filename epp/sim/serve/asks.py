"""What a client asks of a simulated model server: OpenAI chat and completions, Anthropic messages.

In: a request body. Out: an `Ask` with the bytes that stand for the prompt's tokens, or a refusal.
Rules here: unknown fields are allowed, as in vLLM; what cannot be served (several answers to one request) is refused
with a word, never ignored. An answer is as long as the client allows, so `ignore_eos` always holds.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from epp.errors import BadRequest, Refusal
from epp.sim import text

COMPLETION_TOKENS: Final = 16
"""Of a completion that names no max_tokens; vLLM's default."""
CHAT_TOKENS: Final = 64
"""Of a chat that names no max_tokens: a real model would stop somewhere."""

T = TypeVar("T")
Positive = Annotated[int, Meta(ge=1)]


class UnknownModel(Refusal):
    """The server has no model or adapter of this name."""

    status = 404
    code = "NotFound"


class InvalidBody(BadRequest):
    """The body is not what the API expects, in vLLM's words."""

    def __init__(self, kind: str, loc: str, what: str) -> None:
        super().__init__(f"1 validation error:\n  {{'type': '{kind}', 'loc': '{loc}', 'msg': '{what}'}}")
        self.param = loc


class Ask(msgspec.Struct, frozen=True):
    """One request, as far as a simulated server understands it."""

    model: str
    """Empty: the one that is served."""
    prompt: bytes
    """4 bytes a token."""
    max_tokens: int
    stopped: bool
    """The answer ends by itself, not because the client limited it."""
    stream: bool
    include_usage: bool
    salt: str


class Part(msgspec.Struct):
    type: str = "text"
    text: str = ""


Content = str | list[Part] | None


class Message(msgspec.Struct):
    role: str
    content: Content = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Chat(msgspec.Struct):
    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: int | None = None
    cache_salt: str | None = None


class Completion(msgspec.Struct):
    prompt: str | list[str | int | list[int]]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    n: int | None = None
    cache_salt: str | None = None


class Messages(msgspec.Struct):
    """Anthropic's."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Positive
    system: Content = None
    stream: bool = False


def read_chat(body: bytes) -> Ask:
    """Raises: BadRequest."""
    chat = _decoded(body, Chat)
    _refuse_several(chat.n)
    limit = chat.max_completion_tokens or chat.max_tokens
    return Ask(
        model=chat.model,
        prompt=text.chat_prompt((message.role, _plain(message.content)) for message in chat.messages),
        max_tokens=limit or CHAT_TOKENS,
        stopped=limit is None,
        stream=chat.stream,
        include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
        salt=chat.cache_salt or "",
    )


def read_completion(body: bytes) -> Ask:
    """Raises: BadRequest."""
    completion = _decoded(body, Completion)
    _refuse_several(completion.n)
    return Ask(
        model=completion.model,
        prompt=_one_prompt(completion.prompt),
        max_tokens=completion.max_tokens or COMPLETION_TOKENS,
        stopped=False,
        stream=completion.stream,
        include_usage=bool(completion.stream_options and completion.stream_options.include_usage),
        salt=completion.cache_salt or "",
    )


def read_messages(body: bytes) -> Ask:
    """Raises: BadRequest."""
    asked = _decoded(body, Messages)
    system = [("system", _plain(asked.system))] if asked.system else []
    said = [(message.role, _plain(message.content)) for message in asked.messages]
    return Ask(
        model=asked.model,
        prompt=text.chat_prompt(system + said),
        max_tokens=asked.max_tokens,
        stopped=False,
        stream=asked.stream,
        include_usage=True,
        salt="",
    )


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidBody("json_invalid", "body", f"JSON decode error: {error}") from error


def _invalid(message: str) -> InvalidBody:
    """msgspec's words, `Object missing required field `x` - at `$.a``, as vLLM's."""
    what, _, where = message.partition(" - at `$")
    loc = "body" + where.rstrip("`").replace("[", ".").replace("]", "").replace("...", "")
    prefix = "Object missing required field `"
    if what.startswith(prefix):
        return InvalidBody("missing", f"{loc}.{what.removeprefix(prefix).rstrip('`')}", "Field required")
    return InvalidBody("value_error", loc, what)


def _refuse_several(n: int | None) -> None:
    if n not in (None, 1):
        raise InvalidBody("value_error", "body.n", "this simulated server gives one answer to a request: leave n out")


def _one_prompt(prompt: str | list[str | int | list[int]]) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode()
    if len(prompt) == 1 and not isinstance(prompt[0], int):
        return _one_prompt([*prompt[0]] if isinstance(prompt[0], list) else prompt[0])
    tokens = [token for token in prompt if isinstance(token, int)]
    if len(tokens) < len(prompt) or not all(0 <= token < 2**32 for token in tokens):
        raise InvalidBody(
            "value_error", "body.prompt", "expected a text, an array of tokens, or an array of one of them"
        )
    return struct.pack(f"<{len(tokens)}I", *tokens)


def _plain(content: Content) -> str:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""
