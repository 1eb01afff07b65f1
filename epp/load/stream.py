"""A streamed answer as its client reads it: when tokens came, what the server counted, whether it came to its end.

In: the bytes of server-sent events, in any pieces, and when each piece came. Out: times of the first and the last
token, the longest pause, usage, the kind of error that the stream itself tells.
Rules here:
- An event has a token when a choice of it says something: text, reasoning or a tool call. The opening, which has the
  role and no text, is no token, so a gateway that opens the stream early does not look fast. Empty text without a role
  is one: vLLM sends it for a token that ends within a character.
- What came in one piece came at one time; an event may carry several tokens. So the mean time of a token is worked out
  from the server's count, and the longest pause is between pieces.
- Memory is bounded: one line, at most `MAX_LINE_BYTES`.
No clock: times are arguments, in seconds from any zero.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

MAX_LINE_BYTES: Final = 1 << 20


class CachedTokens(msgspec.Struct):
    cached_tokens: int | None = 0
    """vLLM says null where it does not know."""


class Usage(msgspec.Struct):
    """OpenAI's, as far as it is read here."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    """None: it says null, as some gateways do that cannot count."""
    prompt_tokens_details: CachedTokens | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Delta(msgspec.Struct):
    role: Any = None
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None

    @property
    def says(self) -> bool:
        if self.content or self.reasoning or self.reasoning_content or self.tool_calls:
            return True
        return self.content == "" and self.role is None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_event: Final = msgspec.json.Decoder(_Event)


class StreamedAnswer:
    """What has come so far of one answer."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        """When the first token came; None: none has."""
        self.last_at = 0.0
        self.pause_max = 0.0
        """Longest time between two pieces with tokens."""
        self.events = 0
        """Events with a token."""
        self.usage: Usage | None = None
        self.done = False
        """[DONE] came."""
        self.error = ""
        """`stream_error`: the server sent one in the stream; `malformed`: what came is no such stream."""
        self._rest = b""
        self._heard = self._came = False
        """An event or a comment came; anything at all."""

    def feed(self, data: bytes, now: float) -> None:
        """Take what came."""
        self._came = True
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line, now)
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest, self.error = b"", "malformed"

    def end(self, now: float) -> str:
        """No more comes. Returns the kind of error; empty: the answer is whole."""
        before, rest, self._rest = self.error, self._rest, b""
        self._take(rest, now)
        if self.error == "malformed":
            self.error = before  # a line that was cut is no garbage
        if self._came and not self._heard:
            return "malformed"
        return self.error or ("" if self.done else "truncated")

    @property
    def itl_mean(self) -> float | None:
        """Seconds a token after the first; None: there were fewer than two."""
        tokens = self.completion_tokens
        return None if self.first_at is None or tokens < 2 else (self.last_at - self.first_at) / (tokens - 1)

    @property
    def completion_tokens(self) -> int:
        """The server's count; of a stream that ended before it came, the events with a token."""
        return (self.usage and self.usage.completion_tokens) or self.events

    def _take(self, line: bytes, now: float) -> None:
        self._heard = self._heard or line.startswith((b"data:", b":"))
        if not line.startswith(b"data:"):
            return  # an empty line, a comment, the name of an event
        payload = line[len(b"data:") :].strip()
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            event = _event.decode(payload)
        except msgspec.DecodeError:
            self.error = self.error or "malformed"
            return
        if event.error is not None:
            self.error = self.error or "stream_error"
        self.usage = event.usage or self.usage
        if any(choice.delta is not None and choice.delta.says for choice in event.choices or ()):
            self._token(now)

    def _token(self, now: float) -> None:
        if self.first_at is None:
            self.first_at = now
        else:
            self.pause_max = max(self.pause_max, now - self.last_at)
        self.last_at = now
        self.events += 1
