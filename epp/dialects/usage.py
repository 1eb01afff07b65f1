"""How many tokens a request took, and what its response is called, from what the model server answered.

In: a response's headers, then its body in whatever pieces it comes. Out: `Usage`, as soon as it is known; an id.
Rules here: bytes are only looked at, they go on to the client elsewhere; an answer that cannot be read has no usage and
is no error; memory is bounded by MAX_LINE or MAX_ANSWER.
Event streams are cut into lines anywhere, CRLF and UTF-8 characters included, and of a block of lines that mentions no
usage only its last byte is looked at; where servers repeat the usage in every event, the largest numbers count, for
they only grow.
Rejected: reading each piece by itself (the Go picker: an event split over two messages loses its usage).
Source: OpenAI chat, completions and Responses events; Anthropic `message_start` and `message_delta`; SGLang
`meta_info`; WHATWG server-sent events for line ends.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

import msgspec
from msgspec import Raw

from epp.dialects.body import ABSENT, opening, string, whole
from epp.dialects.request import Dialect, Request
from epp.headers import Headers
from epp.headers import text as header_text

MAX_LINE: Final = 1 << 20
"""A longer line of an event stream is skipped."""
MAX_ANSWER: Final = 4 << 20
"""Of a longer whole answer the usage is given up; a list of embeddings may get there."""
MAX_ID: Final = 256
"""A longer id is not looked at."""
MAX_ITEMS: Final = 1_024
"""Outputs in one SGLang answer to a batch that are added up; beyond it the usage is given up."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts as the model server says them; None: not told.

    `prompt_tokens` is what it calls prompt or input tokens: engines count cached ones in, Anthropic's own API does not.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt, taken from the prefix cache."""


class UsageReader(Protocol):
    """Reads one response body. Nothing here raises."""

    done: bool
    """The server said that the answer is complete: `data: [DONE]`, `message_stop`, `response.completed` or its like.
    Stays False for answers that are no event stream: those end when they end."""
    response_id: str
    """What the Responses API calls the response, once it is whole; empty: not that API, or not known."""

    @property
    def usage(self) -> Usage | None:
        """What is known by now."""

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body."""

    def end(self) -> None:
        """The body is complete."""


def usage_reader(request: Request, response_headers: Headers) -> UsageReader:
    """The reader for an answer to `request`: by its content-type, and without one by whether a stream was asked for.

    No usage is read from answers to requests passed through (GET /v1/responses/{id} would count a response again), nor
    from compressed ones.
    """
    kind = header_text(response_headers, "content-type").lower()
    coding = header_text(response_headers, "content-encoding").lower()
    if request.dialect is Dialect.PASSTHROUGH or coding not in ("", "identity"):
        return _Nothing()
    if "text/event-stream" in kind or (not kind and request.stream):
        return _Events(request.dialect)
    return (
        _Whole(request.n, request.path.rstrip("/").endswith("/responses")) if "json" in kind or not kind else _Nothing()
    )


class _Nothing:
    """An answer of which nothing can be known."""

    usage = None
    done = False
    response_id = ""

    def feed(self, data: bytes) -> None:
        pass

    def end(self) -> None:
        pass


class _Whole:
    """An answer that is one JSON document, kept up to MAX_ANSWER bytes."""

    def __init__(self, n: int, is_response: bool) -> None:
        self.usage: Usage | None = None
        self.done = False
        self.response_id = ""
        self._n = n
        self._is_response = is_response
        self._kept = bytearray()
        self._given_up = False

    def feed(self, data: bytes) -> None:
        if self._given_up or len(self._kept) + len(data) > MAX_ANSWER:
            self._given_up = True
            self._kept.clear()
        else:
            self._kept += data

    def end(self) -> None:
        answer = bytes(self._kept)
        self._kept.clear()
        batch = answer.lstrip().startswith(b"[")
        self.usage = _of_batch(Raw(answer), self._n) if batch else _of_document(Raw(answer))
        if self._is_response:
            self.response_id = _id_of(Raw(answer))


class _Events:
    """A stream of server-sent events."""

    def __init__(self, dialect: Dialect) -> None:
        self.done = False
        self.response_id = ""
        self._usage: Usage | None = None
        self._unread = b""  # the latest event with a usage that will be said again
        self._word = b'"meta_info"' if dialect is Dialect.SGLANG else b'"usage"'
        self._last = b"message_stop" if dialect is Dialect.ANTHROPIC else b"[DONE]"
        self._tail = bytearray()  # of a line whose end has not come
        self._skipping = False  # that line is too long
        self._is_within = False  # either of the two: the next piece begins within a line

    @property
    def usage(self) -> Usage | None:
        if self._unread:
            self._usage = _merge(self._usage, _of_document(Raw(self._unread)))
            self._unread = b""
        return self._usage

    def feed(self, data: bytes) -> None:
        # Nearly every piece is whole events without a usage, so these lines are what 100 pieces cost (rfind takes half
        # as long as `in`, for the bytes of one event).
        if self._is_within or not data.endswith(b"\n"):
            data = self._whole_lines(data)
        if data.rfind(self._last) >= 0 or (data.rfind(self._word) >= 0 and _SAYS_SOMETHING.search(data)):
            self._read(data.splitlines())

    def end(self) -> None:
        self._read([bytes(self._tail)])
        self._tail.clear()

    def _whole_lines(self, data: bytes) -> bytes:
        """The lines that are whole by now, without the one that is skipped; the rest is kept."""
        cut = len(data) if data.endswith(b"\n") else max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if not cut:
            self._hold(data)
            return b""
        lines = bytes(self._tail) + data[:cut]
        if self._skipping:
            lines = b"".join(lines.splitlines(keepends=True)[1:])
        self._tail.clear()
        self._skipping = self._is_within = False
        if cut < len(data):
            self._hold(data[cut:])
        return lines

    def _hold(self, data: bytes) -> None:
        self._is_within = True
        self._tail += data
        if self._skipping or len(self._tail) > MAX_LINE:
            self._skipping = True
            self._tail.clear()

    def _read(self, lines: list[bytes]) -> None:
        for line in lines:
            if not line.startswith(b"data:") or len(line) > MAX_LINE:
                continue
            if line[5:].strip() == b"[DONE]":
                self.done = True
            elif last := _LAST_EVENT.search(line):
                self.done = True
                if last[1] != b"message_stop":
                    self.response_id = _id_of(Raw(line[5:]))
            if not _USAGE_FOLLOWS.search(line):
                continue
            if _UNFINISHED.search(line):
                self._unread = line[5:]
            else:
                self._usage = _merge(self._usage, _of_document(Raw(line[5:])))


# In a text that was generated the quotes are escaped, so none of these is found there.
_USAGE_FOLLOWS = re.compile(rb'"(?:usage|meta_info)"\s*:\s*\{')  # many servers say null in all events but one
_UNFINISHED = re.compile(rb'"finish_reason"\s*:\s*null')
_LAST_EVENT = re.compile(rb'"type"\s*:\s*"(message_stop|response\.(?:completed|incomplete|failed))"')
_SAYS_SOMETHING = re.compile(_USAGE_FOLLOWS.pattern + b"|" + _LAST_EVENT.pattern)


class _Document(msgspec.Struct):
    id: Raw = ABSENT
    usage: Raw = ABSENT
    meta_info: Raw = ABSENT
    message: Raw = ABSENT  # around the usage in Anthropic's message_start
    response: Raw = ABSENT  # around the usage in the events of Responses


class _Counts(msgspec.Struct):
    prompt_tokens: Raw = ABSENT
    input_tokens: Raw = ABSENT
    completion_tokens: Raw = ABSENT
    output_tokens: Raw = ABSENT
    prompt_tokens_details: Raw = ABSENT
    input_tokens_details: Raw = ABSENT
    prompt_token_details: Raw = ABSENT  # the spelling of older gateways
    cache_read_input_tokens: Raw = ABSENT
    cached_tokens: Raw = ABSENT


_DOCUMENT = msgspec.json.Decoder(_Document)
_COUNTS = msgspec.json.Decoder(_Counts)
_ITEMS = msgspec.json.Decoder(list[Raw])


def _of_document(span: Raw) -> Usage | None:
    """The usage in an answer, or in the data of an event."""
    try:
        document = _DOCUMENT.decode(span)
        for outer in (document.message, document.response):
            if opening(outer) == b"{":
                document = _DOCUMENT.decode(outer)
        counts = document.usage or document.meta_info
        return _usage(_COUNTS.decode(counts)) if opening(counts) == b"{" else None
    except (msgspec.DecodeError, RecursionError):
        return None


def _id_of(span: Raw) -> str:
    """What a response is called, in an answer or in the data of an event; empty: nothing that ids look like."""
    try:
        document = _DOCUMENT.decode(span)
        if opening(document.response) == b"{":
            document = _DOCUMENT.decode(document.response)
    except (msgspec.DecodeError, RecursionError):
        return ""
    return string(document.id) if len(document.id) <= MAX_ID else ""


def _usage(counts: _Counts) -> Usage | None:
    details = counts.prompt_tokens_details or counts.input_tokens_details or counts.prompt_token_details
    inner = _COUNTS.decode(details) if opening(details) == b"{" else _Counts()
    usage = Usage(
        _first(counts.prompt_tokens, counts.input_tokens),
        _first(counts.completion_tokens, counts.output_tokens),
        _first(inner.cached_tokens, counts.cache_read_input_tokens, counts.cached_tokens),
    )
    return None if usage == Usage() else usage


def _first(*spans: Raw) -> int | None:
    """The first that is a whole number; negative ones, fractions, texts and booleans are none."""
    return next((number for span in spans if (number := whole(span)) is not None), None)


def _merge(old: Usage | None, new: Usage | None) -> Usage | None:
    """Field by field the larger: counts only grow, and a message_delta may say 0 where message_start said more."""
    if old is None or new is None:
        return new or old
    return Usage(
        _larger(old.prompt_tokens, new.prompt_tokens),
        _larger(old.completion_tokens, new.completion_tokens),
        _larger(old.cached_tokens, new.cached_tokens),
    )


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


def _of_batch(answer: Raw, n: int) -> Usage | None:
    """An array of outputs, as SGLang answers a batch: n outputs for each prompt, each saying its prompt's tokens."""
    if not 0 < bytes(answer).count(b'"meta_info"') <= MAX_ITEMS:
        return None
    try:
        found = [usage for item in _ITEMS.decode(answer) if (usage := _of_document(item)) is not None]
    except (msgspec.DecodeError, RecursionError):
        return None
    return Usage(
        _sum([usage.prompt_tokens for usage in found[::n]]),
        _sum([usage.completion_tokens for usage in found]),
        _sum([usage.cached_tokens for usage in found[::n]]),
    )


def _sum(counts: list[int | None]) -> int | None:
    told = [count for count in counts if count is not None]
    return sum(told) if told else None
