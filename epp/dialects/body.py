"""What every body shape shares: its top-level fields, and how spans of the client's JSON are read.

In: `msgspec.Raw` values, each a view into the body that the client sent. Out: numbers, texts, prompts, estimates.
Rules here: nothing is decoded that was not asked for; no field becomes a Python object of a size that the client
chooses (ten million empty lists in `max_tokens` stay bytes); a field of an unexpected type is as good as absent, for
the model server validates it; nothing here raises but `Body.check`.
Rejected: decoding into dicts (the Go picker decodes every body twice, and JSON was its largest cost).
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import Raw
from xxhash import xxh3_128_digest

from epp.errors import BadRequest

ALL: Final = sys.maxsize
"""For `most`: all of it."""
ABSENT: Final = Raw()
"""A field that the body does not have."""
BYTES_PER_ID: Final = 8
"""A token id of up to six digits in JSON, with its comma and a space."""
BYTES_PER_TOKEN: Final = 4
"""English text under common tokenizers; the reference's estimator packs as many bytes into one of its tokens."""
TOKENS_PER_BLOB: Final = 225
"""One image of 640 x 360 pixels at 1,024 pixels a token: the reference's value where the size is not known."""
BLOB_BYTES: Final = 2048
"""A string of base64 of at least this size is no text."""
MAX_MESSAGES: Final = 100_000
"""A body with more `{` than this is not taken apart into messages; it would cost 20 times its size in memory."""

_EMPTY = re.compile(rb'(?:null|""|\[\s*\]|\{\s*\})?')
_NUMBERS = re.compile(rb"\[[\s\[]*[-0-9]")
_NESTED = re.compile(rb'\[\s*[\["]')
# Where a quoted run of base64 begins, bare or as a data URL; slashes may be escaped. Possessive, so linear.
_BLOB = re.compile(rb'"(?:data:[\w/+.;=\\-]{0,128},)?(?=[A-Za-z0-9+/=_\\-]{%d})' % BLOB_BYTES)
_ESCAPED_BLOB = re.compile(rb"(?:[A-Za-z0-9+/=_-]++|\\/)++")


class Part(msgspec.Struct, frozen=True):
    """One part of a message."""

    kind: str
    """As the API calls it: "text", "image_url", "input_audio", "tool_result"; "" when it does not say."""
    text: str
    """Empty for what is not text."""


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation, as far as routing may care."""

    role: str
    """Empty when it has none, as the tool outputs of a Responses input."""
    parts: tuple[Part, ...]


class Body(msgspec.Struct):
    """The fields that most bodies share, and what can be asked of any of them. Alone: a body of which nothing is known.

    Every subclass names the spans that hold its prompt; unknown fields are skipped.
    """

    model: str | None = None
    stream: Raw = ABSENT
    n: Raw = ABSENT
    cache_salt: Raw = ABSENT

    def check(self) -> None:
        """Raise BadRequest where the field that holds the input is missing or empty."""

    def streams(self) -> bool:
        return is_true(self.stream)

    def choices(self) -> int:
        return whole(self.n) or 1

    def salt(self) -> str:
        return string(self.cache_salt)

    def output_limit(self) -> int | None:
        return None

    def prompt_bytes(self, most: int) -> bytes:
        """What identifies the prompt from its beginning; a longer conversation begins with a shorter one's bytes.

        Not less than the first `most` bytes of it; more only where that is cheaper than to cut.
        """
        return b""

    def prompt_tokens(self) -> int:
        """Tokens of all prompts in the body: exact for token ids, else `estimate`."""
        return 0

    def has_ids(self) -> bool:
        """The prompt comes as token ids, so that its tokens are counted and not estimated."""
        return False

    def conversation(self) -> tuple[Message, ...]:
        """The messages; empty where the body has none, or none that can be read."""
        return ()

    def media(self) -> tuple[bytes, ...]:
        """A digest of each image, audio and video of the (first) prompt; two that are equal have one."""
        return ()

    def previous(self) -> str:
        """Id of the stored response that this request goes on from; empty: it begins anew."""
        return ""


class _First(msgspec.Struct, array_like=True):
    first: Raw = ABSENT


class _Text(msgspec.Struct):
    type: Raw = ABSENT
    text: Raw = ABSENT


class _Message(msgspec.Struct):
    role: Raw = ABSENT
    content: Raw = ABSENT
    output: Raw = ABSENT


class _Media(msgspec.Struct):
    """A part of a message, as far as it may hold an image, audio or video. `content`: of a tool's result."""

    image_url: Raw = ABSENT
    video_url: Raw = ABSENT
    audio_url: Raw = ABSENT
    input_audio: Raw = ABSENT
    source: Raw = ABSENT
    content: Raw = ABSENT


class _Source(msgspec.Struct):
    url: Raw = ABSENT
    data: Raw = ABSENT


_FIRST = msgspec.json.Decoder(_First)
_STRING = msgspec.json.Decoder(str)
_ANYTHING = msgspec.json.Decoder()
_TEXTS = msgspec.json.Decoder(list[_Text])
_MESSAGES = msgspec.json.Decoder(list[_Message])
_MEDIA = msgspec.json.Decoder(list[_Media])
_SOURCE = msgspec.json.Decoder(_Source)
# A limit on nesting is the interpreter's, so a span that `read` took may be too deep for a caller further down.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def require(name: str, *spans: Raw) -> None:
    """Raise BadRequest unless one of `spans`, alternatives to field `name`, holds something."""
    for span in spans:
        if not is_empty(span):
            return
    raise BadRequest(f"`{name}` is missing or empty: send something to work on")


def is_empty(span: Raw) -> bool:
    return not span or _EMPTY.fullmatch(span) is not None


def is_true(span: Raw) -> bool:
    return len(span) == 4 and bytes(span) == b"true"


def opening(span: Raw) -> bytes:
    """The first byte: `"`, `[`, `{`, a digit, ...; empty for an absent field."""
    return bytes(memoryview(span)[:1])


def whole(span: Raw) -> int | None:
    """A number >= 0 written as an integer of at most 18 digits; None for anything else."""
    if not 0 < len(span) <= 18:
        return None
    digits = bytes(span)
    return int(digits) if digits.isdigit() else None


def string(span: Raw) -> str:
    """A JSON string; "" for anything else."""
    if not span or opening(span) != b'"':
        return ""
    try:
        return _STRING.decode(span)
    except _UNREADABLE:
        return ""


def first_item(span: Raw) -> Raw:
    """The first item of an array; ABSENT when it is empty or no array."""
    try:
        return _FIRST.decode(span).first
    except _UNREADABLE:
        return ABSENT


def open_ended(*spans: Raw, most: int = ALL) -> bytes:
    """The spans that hold something, one after the other, the last without its closing bracket or quote.

    So the next turn of a conversation, which appends to the last array, begins with these very bytes.
    """
    views = [memoryview(span) for span in spans if not is_empty(span)]
    if not views:
        return b""
    views[-1] = views[-1][:-1]
    joined = b"".join([view[:most] for view in views])
    return joined[:most] if len(joined) > most else joined.rstrip()


def first_prompt(span: Raw, most: int = ALL) -> bytes:
    """The first prompt in a field that may hold a text, token ids, or a list of either, or its first `most` bytes.

    A text is its JSON string without the quotes, escapes left as they are; token ids are little-endian uint32.
    """
    if _NESTED.match(span):
        span = first_item(span)
    if _NUMBERS.match(span):
        return pack(span, most)
    return bytes(memoryview(span)[1:-1][:most]) if opening(span) == b'"' else open_ended(span, most=most)


def are_ids(span: Raw) -> bool:
    """Whether a field that `first_prompt` reads has token ids, in a list or in lists of a list."""
    return _NUMBERS.match(span) is not None


def pack(span: Raw, most: int = ALL) -> bytes:
    """Token ids, a flat JSON array, as little-endian uint32; what is no token id leaves the JSON as it is.

    Of a long array only what makes up `most` bytes is read, and a little more: 35 ns an id.
    """
    text = _first_ids(bytes(span), most // 4 + 1)
    try:
        ids = array("I", _ANYTHING.decode(text) if _is_flat(text) else ())
    except (*_UNREADABLE, TypeError, OverflowError):
        ids = array("I")
    if not ids:
        return open_ended(span, most=most)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _is_flat(array_text: bytes) -> bool:
    """Whether an array has only numbers in it, or null; true and false and what is written with an exponent end here.

    Then it may be decoded without a type, in half the time of list[int], and costs no more memory.
    """
    return not any(array_text.find(mark, 1) >= 0 for mark in (b"[", b"{", b'"', b"e"))


def _first_ids(array_text: bytes, count: int) -> bytes:
    """An array of at least the first `count` numbers of a longer one; all of a shorter one."""
    found, start, end = 0, 0, BYTES_PER_ID * count
    while end < len(array_text) and (found := found + array_text.count(b",", start, end)) < count:
        start, end = end, end + BYTES_PER_ID * (count - found)
    return array_text[: array_text.rindex(b",", 0, end)] + b"]" if end < len(array_text) else array_text


def count_tokens(span: Raw) -> int:
    """Tokens in a field as `first_prompt` reads it, of all its prompts together: ids are counted, texts estimated."""
    if is_empty(span):
        return 0
    if _NUMBERS.match(span):
        return bytes(span).count(b",") + 1  # also for a list of lists: n - 1 commas inside and between them
    return estimate(span)


def estimate(*spans: Raw) -> int:
    """Tokens in spans of JSON: a token for four bytes, each base64 blob (image, audio, file) TOKENS_PER_BLOB."""
    size, found = 0, 0
    for span in spans:
        size += len(span)
        if may_have_blobs(span):
            for start, end in blobs(bytes(span)):
                size -= end - start
                found += 1
    return size // BYTES_PER_TOKEN + found * TOKENS_PER_BLOB + 1


def may_have_blobs(span: bytes | Raw) -> bool:
    """Whether somewhere no space comes for BLOB_BYTES: in prose `blobs` takes 5 to 13 times as long as this."""
    if len(span) <= BLOB_BYTES:
        return False
    text, at = bytes(span), 0
    while len(text) - at >= BLOB_BYTES:
        space = text.rfind(b" ", at, at + BLOB_BYTES)
        if space < 0:
            return True
        at = space + 1
    return False


def blobs(text: bytes) -> Iterator[tuple[int, int]]:
    """Where the base64 blobs of a JSON text are, quotes included; the last may be open.

    Past BLOB_BYTES a string is taken for one if it has neither spaces nor escapes and is ASCII: a look at every letter
    of an image of 4 MB takes 5 ms, this takes 0.5 ms.
    """
    end = 0
    while begins := _BLOB.search(text, end):
        start, end = begins.end(), text.find(b'"', begins.end())
        end = len(text) if end < 0 else end
        if text.find(b"\\", start, end) >= 0:
            is_blob = _ESCAPED_BLOB.fullmatch(text, start, end) is not None
        else:
            is_blob = text.find(b" ", start, end) < 0 and text[start:end].isascii()
        if is_blob:
            yield begins.start(), end + 1


def read_messages(span: Raw) -> tuple[Message, ...]:
    """The messages in an array of them; a plain text is one message of the user; () for anything else."""
    if opening(span) == b'"':
        return (Message("user", _parts(span)),)
    return tuple(Message(string(m.role), _parts(m.content or m.output)) for m in _messages(span))


def read_media(span: Raw) -> tuple[bytes, ...]:
    """A digest of each image, audio and video in an array of messages, in order, each once.

    Of what a part says of it, its URL or its data count: the same image with another `detail` is the same image.
    """
    found = [value for message in _messages(span) for value in _media(message.content or message.output)]
    return tuple(dict.fromkeys(map(digest, found)))


def digest(span: Raw) -> bytes:
    """16 bytes that tell one span from another, but for those that somebody makes up to be mistaken."""
    return xxh3_128_digest(memoryview(span))


def _messages(span: Raw) -> list[_Message]:
    try:
        return [] if bytes(span).count(b"{") > MAX_MESSAGES else _MESSAGES.decode(span)
    except _UNREADABLE:
        return []


def _media(content: Raw, *, nested: bool = False) -> Iterator[Raw]:
    """The JSON strings that hold images, audio and video, or say where they are."""
    if opening(content) != b"[":
        return
    try:
        parts = _MEDIA.decode(content)
    except _UNREADABLE:
        return
    for part in parts:
        for value in (part.image_url, part.video_url, part.audio_url, part.input_audio, part.source):
            if value and (found := _place(value)):
                yield found
        if part.content and not nested:
            yield from _media(part.content, nested=True)


def _place(value: Raw) -> Raw:
    """The URL or the data, bare or in an object; ABSENT: there is none."""
    if opening(value) == b"{":
        try:
            source = _SOURCE.decode(value)
        except _UNREADABLE:
            return ABSENT
        value = source.url or source.data
    return value if opening(value) == b'"' and len(value) > len('""') else ABSENT


def _parts(content: Raw) -> tuple[Part, ...]:
    if opening(content) == b'"':
        return (Part("text", string(content)),)
    try:
        return tuple(Part(string(part.type), string(part.text)) for part in _TEXTS.decode(content))
    except _UNREADABLE:
        return ()  # null beside tool calls, or what the model server will refuse
