"""gRPC over HTTP/2: messages in DATA, statuses in trailers, timeouts.

In: pieces of DATA, cut anywhere. Out: whole messages; and the header blocks that answer a call.
Rules here:
- A message's announced size is checked before anything of it is kept.
- A compressed message is never unpacked past the limit.
Source: grpc/grpc, doc/PROTOCOL-HTTP2.md, statuscodes.md, compression.md.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from epp.errors import ProtocolError
from epp.extproc.http2.frames import MESSAGE_PREFIX, header_block

GZIP: Final = b"gzip"
STATUS_CHARACTERS: Final = 500
"""Of a status message: at most 6,000 bytes when encoded."""


class Status(IntEnum):
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class CallFault(ProtocolError):
    """Ends one call with a status."""

    def __init__(self, status: Status, message: str, limit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.limit = limit


ANSWER_HEAD: Final = header_block((b":status", b"200"), (b"content-type", b"application/grpc"))
"""What precedes the first message of an answer."""


def trailers(status: Status, message: str = "") -> bytes:
    """The header block that ends an answer."""
    return header_block(*_status_fields(status, message))


def trailers_only(status: Status, message: str = "") -> bytes:
    """The one header block of an answer without messages. It tells which encodings are understood."""
    return header_block(
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-accept-encoding", b"identity,gzip"),
        *_status_fields(status, message),
    )


OK_TRAILERS: Final = header_block((b"grpc-status", b"0"))

UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
TIMEOUT: Final = re.compile(rb"(\d{1,8})([HMSmun])")


def parse_timeout(value: bytes) -> float:
    """`grpc-timeout` in seconds. Raises ValueError."""
    found = TIMEOUT.fullmatch(value)
    if found is None:
        raise ValueError(f"grpc-timeout {value[:20]!r}: up to 8 digits and one of H, M, S, m, u, n are expected")
    return int(found[1]) * UNITS[found[2]]


class MessageReader:
    """Messages of one stream that did not come in one frame each."""

    __slots__ = ("_encoding", "_limit", "_missing", "_part")

    def __init__(self, encoding: bytes, limit: int) -> None:
        """
        Args:
            encoding: of `grpc-encoding`; what a set compression flag means.
            limit: bytes of one message, unpacked.
        """
        self._encoding = encoding
        self._limit = limit
        self._part = bytearray()
        """What came of a message. One buffer: in a list of pieces, each byte that comes alone would take fifty."""
        self._missing = 5
        """Bytes until there is something to do: a prefix is whole, or a message is."""

    @property
    def held(self) -> int:
        """Bytes kept of a message that is not whole."""
        return len(self._part)

    def feed(self, piece: bytes | memoryview) -> Iterator[bytes]:
        """Take a piece, give the messages that it completes.

        Raises:
            CallFault: a message is too large, compressed in a way that was not announced, or does not unpack.
        """
        part = self._part
        part += piece
        while len(part) >= self._missing:
            flag, size = MESSAGE_PREFIX.unpack_from(part)
            self.check(flag, size)
            end = 5 + size
            if len(part) < end:
                self._missing = end
                return
            message = bytes(memoryview(part)[5:end])
            del part[:end]
            self._missing = 5
            yield self.unpack(message) if flag else message

    def check(self, flag: int, size: int) -> None:
        if size > self._limit:
            raise CallFault(
                Status.RESOURCE_EXHAUSTED,
                f"a message of {size} bytes, where {self._limit} are the limit: raise --grpc-max-recv-msg-size",
                "max_message_bytes",
            )
        if flag > 1 or (flag and self._encoding != GZIP):
            raise CallFault(Status.INTERNAL, f"a message with compression flag {flag}, but no grpc-encoding for it")

    def unpack(self, data: bytes) -> bytes:
        unzip = zlib.decompressobj(wbits=31)  # a gzip header and no other
        try:
            message = unzip.decompress(data, self._limit + 1)
        except zlib.error as error:
            raise CallFault(Status.INTERNAL, f"a message that is not gzip: {error}") from None
        if len(message) > self._limit:
            raise CallFault(
                Status.RESOURCE_EXHAUSTED,
                f"a message that unpacks to more than the limit of {self._limit} bytes: raise --grpc-max-recv-msg-size",
                "max_message_bytes",
            )
        if not unzip.eof or unzip.unused_data:
            raise CallFault(Status.INTERNAL, "a message that is not one whole gzip member")
        return message


def _status_fields(status: Status, message: str) -> list[tuple[bytes, bytes]]:
    fields = [(b"grpc-status", b"%d" % status)]
    if message:
        fields.append((b"grpc-message", _percent_encoded(message)))
    return fields


def _percent_encoded(message: str) -> bytes:
    """Printable ASCII but for `%`; everything else as %XX of its UTF-8. Cut, since it may quote what the peer said and
    a header block of ours is one frame."""
    return b"".join(
        b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in message[:STATUS_CHARACTERS].encode(errors="replace")
    )
