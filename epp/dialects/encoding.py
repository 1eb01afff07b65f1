"""From the bytes on the wire to JSON text and back: content codings, the byte order mark, UTF-8, broken escapes.

A decoded copy is bounded before it is made, so a body that unpacks to terabytes costs what the limit allows.
Rejected: several codings on one body (nobody sends them; such a body passes unread); brotli (no model server takes
it, and its library is no dependency of ours).
Source: RFC 9110 section 8.4 (codings), RFC 9659 (zstd windows of at most 8 MiB over HTTP), RFC 8259 section 8 (text).
"""

from __future__ import annotations

import codecs
import re
import zlib
from typing import Final

import zstandard

from epp.errors import BadRequest, TooLarge

_ZSTD_WINDOW: Final = 8 << 20
_MEMBERS: Final = 64
"""Members of one gzip body: what follows each is copied once more."""
_CHUNK: Final = 256 << 10
_GZIP: Final = 16 + zlib.MAX_WBITS
MARK_BYTES: Final = len(codecs.BOM_UTF8)
_MAX_MENDED: Final = 100_000
# After any escaped backslashes (group 1): a surrogate pair, or a surrogate that stands alone (group 2).
_SURROGATE = re.compile(
    rb"(?<!\\)((?:\\\\)*+)\\(?:u[dD][89abAB]HH\\u[dD][c-fC-F]HH|(u[dD][89a-fA-F]HH))".replace(b"H", b"[0-9a-fA-F]")
)


def coding(header: bytes) -> str | None:
    """The coding that a `content-encoding` names: "" for none, None for one that cannot be read here."""
    name = header.decode("latin-1").strip().lower().removeprefix("x-")
    if name in ("", "identity"):
        return ""
    return name if name in ("gzip", "deflate", "zstd") else None


def unpack(body: bytes, coding: str, limit: int) -> bytes:
    """Decode a body of coding "", "gzip", "deflate" (zlib's format, or bare) or "zstd"; "" returns the body itself.

    Raises TooLarge over `limit` bytes, BadRequest when it is broken or cut off.
    """
    if not coding:
        return body
    try:
        data = _unzstd(body, limit) if coding == "zstd" else _inflate(body, coding, limit)
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadRequest(f"the request body is not valid {coding}: {error}") from None
    if len(data) > limit:
        raise TooLarge(f"the request body is larger than {limit} bytes once its {coding} coding is undone")
    return data


def pack(data: bytes, coding: str) -> bytes:
    """Encode with the coding that `unpack` undid, at the fastest level."""
    if coding == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(data)
    if not coding:
        return data
    engine = zlib.compressobj(1, wbits=_GZIP if coding == "gzip" else zlib.MAX_WBITS)
    return engine.compress(data) + engine.flush()


def _unzstd(body: bytes, limit: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    with decompressor.stream_reader(body, read_across_frames=True) as reader:
        return reader.read(limit + 1)


def _inflate(body: bytes, coding: str, limit: int) -> bytes:
    pieces, size, rest = [], 0, body
    for _ in range(_MEMBERS):
        engine = zlib.decompressobj(_wbits(rest, coding))
        piece = engine.decompress(rest, limit + 1 - size)
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            break
        if not engine.eof:
            raise BadRequest(f"the {coding} request body is cut off")
        rest = engine.unused_data.lstrip(b"\0")  # padding, which gzip allows
        if not rest:
            break
    else:
        raise BadRequest(f"the {coding} request body has more than {_MEMBERS} members")
    return b"".join(pieces)


def _wbits(data: bytes, coding: str) -> int:
    """zlib's format; its first two bytes are a multiple of 31 (RFC 1950), else some clients send bare deflate."""
    if coding == "gzip":
        return _GZIP
    return zlib.MAX_WBITS if int.from_bytes(data[:2], "big") % 31 == 0 and data[0] & 15 == 8 else -zlib.MAX_WBITS


def mark(data: bytes) -> int:
    """The length of the byte order mark that `data` begins with: MARK_BYTES or 0."""
    return MARK_BYTES if data.startswith(codecs.BOM_UTF8) else 0


def check_utf8(data: bytes) -> None:
    """Raise BadRequest unless all of it is UTF-8; the JSON decoder looks only at the few strings that it decodes."""
    if data.isascii():
        return
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(data)
    try:
        for at in range(0, len(data), _CHUNK):  # a whole copy as text may take four times the body
            decoder.decode(view[at : at + _CHUNK], at + _CHUNK >= len(data))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request body is not UTF-8: {error.reason}") from None


def mend(text: bytes) -> bytes:
    r"""Replace escapes of lone surrogates by \ufffd, byte for byte in place.

    JavaScript writes them for a text cut in the middle of an emoji; Go and Python read them, msgspec does not.
    """
    return _SURROGATE.sub(lambda match: match[1] + rb"\ufffd" if match[2] else match[0], text, count=_MAX_MENDED)
