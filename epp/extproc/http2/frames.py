"""The frames of HTTP/2: their numbers, and the few that a server like ours writes.

Rules here:
- Nothing but constants and functions from values to bytes.
- What we write fits every peer: frames of at most 16,384 bytes, header blocks without a dynamic table.
Source: RFC 9113 sections 4, 6, 7; RFC 7541 section 6.2.2 (literals that are not indexed).
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES: Final = 9
FRAME_BYTES: Final = 16_384
"""Largest frame that we write and, by default, read: what every peer takes (section 4.2)."""
LARGEST_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITIZED: Final = 0x20

HEAD: Final = Struct(">HBBBI")
"""A frame's head: length in two pieces (24 bits), type, flags, stream."""
MESSAGE_HEAD: Final = Struct(">HBBBIBI")
"""The head of a DATA frame and of the one gRPC message in it: a flag and its length."""
MESSAGE_PREFIX: Final = Struct(">BI")
U32: Final = Struct(">I")
SETTING: Final = Struct(">HI")


class Setting(IntEnum):
    """Section 6.5.2."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Code(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame; the payload is not checked against the peer's limits."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def settings(values: dict[Setting, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*item) for item in values.items()))


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, U32.pack(increment))


def rst_stream(stream: int, code: Code) -> bytes:
    return frame(RST_STREAM, 0, stream, U32.pack(code))


def goaway(last_stream: int, code: Code, debug: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, U32.pack(last_stream) + U32.pack(code) + debug)


def ping(payload: bytes, *, ack: bool) -> bytes:
    return frame(PING, ACK if ack else 0, 0, payload)


def header_block(*fields: tuple[bytes, bytes]) -> bytes:
    """Literals without indexing, names lower-case; `:status` 200 is the one entry of the static table used."""
    block = bytearray()
    for name, value in fields:
        if (name, value) == (b":status", b"200"):
            block.append(0x88)
        else:
            block += b"\x00" + _string(name) + _string(value)
    return bytes(block)


def _string(value: bytes) -> bytes:
    """A string literal without Huffman coding (RFC 7541 section 5.2)."""
    size = len(value)
    if size < 0x7F:
        return bytes((size,)) + value
    size -= 0x7F
    length = bytearray((0x7F,))
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes(length) + value
