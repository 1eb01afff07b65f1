"""The model's name replaced, and not one other byte.

Every top-level `model` is replaced: where a client sent two, decoders keep the last, but a proxy on the way may not.
Rejected: decoding and encoding again (the Go picker: keys sorted, integers above 2**53 rounded, text escaped anew, so
that a tool's schema renders differently and misses the engine's prefix cache); searching for `"model":"x"` as text
(alters what users wrote); a scanner of our own over brackets and strings (33 ms for a chat of 1 MB in 25,000 short
messages, this takes 2.5 ms).
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from msgspec import Raw

from epp.dialects import encoding
from epp.dialects.body import ABSENT
from epp.dialects.openai import Form
from epp.dialects.request import Request
from epp.errors import BadRequest
from epp.headers import first

MAX_MODELS: Final = 16
"""Top-level `model` keys in one body: each costs another look at what is before it."""


class _Model(msgspec.Struct):
    model: Raw = ABSENT


_MODEL = msgspec.json.Decoder(_Model)


def rename(request: Request, model: str) -> bytes:
    """The client's body with `model` as its model's name, all else byte for byte as it came.

    A compressed body is encoded anew with its own coding, so content-encoding stays true (content-length does not).
    A body that names no model, or was not read, comes back as it is.

    Raises BadRequest for a body with more than MAX_MODELS top-level models.
    """
    if not request.model:
        return request.body
    if isinstance(request.content, Form):
        name, spans = model.encode(), request.content.model_spans
    else:
        name, spans = msgspec.json.encode(model), _models(request.text)
    coding = encoding.coding(first(request.headers, "content-encoding") or b"") or ""
    body = encoding.unpack(request.body, coding, len(request.text) + encoding.MARK_BYTES)
    return encoding.pack(_replace(body, spans, len(body) - len(request.text), name), coding)


def _replace(body: bytes, spans: tuple[tuple[int, int], ...], offset: int, value: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    for start, end in spans:
        pieces += (body[at : start + offset], value)
        at = end + offset
    return b"".join((*pieces, body[at:]))


def _models(text: bytes) -> tuple[tuple[int, int], ...]:
    """Where in a JSON object the values of its own `model` keys are, in order."""
    spans: list[tuple[int, int]] = []
    try:
        while (value := _MODEL.decode(text).model) is not ABSENT:
            if len(spans) == MAX_MODELS:
                raise BadRequest(f"the request body has more than {MAX_MODELS} `model` keys")
            start = _address(value) - _address(text)
            spans.append((start, start + len(value)))
            text = _before(text, start)
    except RecursionError:
        raise BadRequest("the request body is nested too deep") from None
    return tuple(reversed(spans))


def _before(text: bytes, value: int) -> bytes:
    """The object without the member whose value is at `value`, and without all that comes after it."""
    head = text[:value].rstrip()[:-1].rstrip()  # up to the end of the key; the name `model` has no quote inside
    return head[: head.rindex(b'"', 0, -1)].rstrip().removesuffix(b",") + b"}"


def _address(view: bytes) -> int:
    """Where a buffer lies in memory: a msgspec.Raw is a view into the text that it was decoded from, but tells no
    offset."""
    return np.frombuffer(view, np.uint8).ctypes.data
