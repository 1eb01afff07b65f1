"""One request as the picker sees it: what was asked, of which model, in which dialect.

Made once per HTTP request by `epp.dialects.read`, from headers and a body of which only the top level was looked at.
`prompt`, `tokens`, `messages` and `media` are computed when a plugin first asks, and kept.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from epp.dialects.body import ALL, BYTES_PER_TOKEN, Body, Message
from epp.headers import FAIRNESS_ID, MODEL_REWRITE, OBJECTIVE, REQUEST_ID, Headers

DEFAULT_FLOW: Final = "default-flow"
"""Fairness id of a request that names none."""


class Dialect(Enum):
    """Whose API a request speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    VLLM = "vllm"
    SGLANG = "sglang"
    PASSTHROUGH = "passthrough"
    """Anybody's: the body is not read, and the model is not known."""


class Request:
    """What is decided upon. Plain and mutable, for a pipeline fills in `target_model` and `priority`."""

    __slots__ = (
        "_media",
        "_messages",
        "_prompt",
        "_tokens",
        "body",
        "cache_salt",
        "content",
        "dialect",
        "estimate",
        "fairness_id",
        "headers",
        "max_tokens",
        "method",
        "model",
        "n",
        "objective",
        "path",
        "peer",
        "priority",
        "request_id",
        "rewrite",
        "session",
        "size_bytes",
        "stream",
        "target_model",
        "text",
        "token_ratio",
    )

    def __init__(
        self,
        dialect: Dialect,
        headers: Headers,
        found: dict[str, bytes],
        path: str,
        body: bytes,
        content: Body,
        text: bytes = b"",
    ) -> None:
        self.dialect = dialect
        self.method = found.get(":method", b"").decode("latin-1")
        self.path = path
        """Without the query; empty when the client's path is not known."""
        self.headers = headers
        self.body = body
        """As the client sent it, codings and all."""
        self.content = content
        """What the body says, read as far as anybody asked."""
        self.text = text
        """The body with its coding undone; empty where it was not read."""
        self.model = content.model or ""
        """Empty for passthrough, for requests without a body, and where the API needs none."""
        self.target_model = self.model
        """The model to ask the server for."""
        self.stream = content.streams()
        self.max_tokens = content.output_limit()
        """Most tokens of output, per choice; None: not said."""
        self.n = content.choices()
        """Choices per prompt, at least 1."""
        self.cache_salt = content.salt()
        """Prompts of different salts never share cached blocks; empty: shared with everybody."""
        self.size_bytes = len(body)
        self.request_id = header(found, REQUEST_ID)
        self.rewrite = header(found, *MODEL_REWRITE)
        """The model that the client's own header asks for instead; empty: none."""
        self.objective = header(found, *OBJECTIVE)
        self.fairness_id = header(found, *FAIRNESS_ID) or DEFAULT_FLOW
        self.priority = 0
        self.session = ""
        """Names the session that it belongs to, where a plugin has found that out; empty: none has."""
        self.peer: int | None = None
        """Slot of the endpoint that another stage of this request goes to; None: no stage before this one chose any."""
        self.token_ratio = 1.0
        """Real tokens for each one that is estimated, as it was learned of the target model."""
        self.estimate = 0
        """The estimate behind `tokens`; 0: they are exact, or nobody asked."""
        self._prompt: bytes | None = None
        self._tokens: int | None = None
        self._messages: tuple[Message, ...] | None = None
        self._media: tuple[bytes, ...] | None = None

    @property
    def prompt(self) -> bytes:
        """Bytes that identify the (first) prompt from its beginning; a conversation's next turn begins with them.

        Spans of the client's own JSON, token ids as little-endian uint32; empty where there is no prompt. Only equal
        beginnings of the same shape of body mean equal prompts, so hash the model and `cache_salt` in.
        """
        if self._prompt is None:
            self._prompt = self.content.prompt_bytes(ALL)
        return self._prompt

    def prompt_start(self, most: int) -> bytes:
        """The first `most` bytes of `prompt`, or some more: a part of the work where the prompt is long. Not kept."""
        return self.content.prompt_bytes(most) if self._prompt is None else self._prompt

    @property
    def tokens(self) -> int:
        """Prompt tokens, of all prompts together: exact where the body holds ids, else 4 bytes a token plus one, times
        `token_ratio`.

        An image, audio or file inside the JSON, and an upload, count 225. A body that is not read counts by its size,
        so that it weighs something; no body counts 0.
        """
        if self._tokens is None:
            unread = self.dialect is Dialect.PASSTHROUGH and self.size_bytes
            self._tokens = self.size_bytes // BYTES_PER_TOKEN + 1 if unread else self.content.prompt_tokens()
            if not self.content.has_ids():
                self.estimate = self._tokens
                self._tokens = round(self._tokens * self.token_ratio)
        return self._tokens

    @property
    def messages(self) -> tuple[Message, ...]:
        """The (first) conversation; empty where the body has none, or none that can be read."""
        if self._messages is None:
            self._messages = self.content.conversation()
        return self._messages

    @property
    def media(self) -> tuple[bytes, ...]:
        """A digest of each image, audio and video of the (first) prompt, in order; two that are equal have one."""
        if self._media is None:
            self._media = self.content.media()
        return self._media

    @property
    def previous(self) -> str:
        """Id of the stored response that this request goes on from, of the Responses API; empty: it begins anew."""
        return self.content.previous()

    def let_go(self) -> None:
        """Forget the body and all that was read from it: it has been forwarded, and answers take minutes."""
        self.body = self.text = b""
        self.content = Body()
        self._prompt, self._messages, self._media = b"", (), ()

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {self.dialect.value} model={self.model!r} {self.size_bytes} bytes>"


def header(found: dict[str, bytes], *names: str) -> str:
    """As `epp.headers.text`, of headers that are a dict already; empty when absent."""
    for name in names:
        if name in found:
            return found[name].decode("utf-8", "replace").strip()
    return ""
