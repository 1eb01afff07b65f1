"""Header blocks of requests: unpacked, checked, and remembered.

In: the bytes of one header block. Out: a `Head`, all that a gRPC server needs of it.
Rules here:
- Every block is unpacked, also one whose stream is refused: HPACK's dynamic table is the connection's.
- A block that added nothing to that table means the same as long as nothing changes it, so its Head is kept: Envoy
  sends the same few indexed bytes for every stream; unpacking and checking them costs 20 us, a look-up 0.1.
Rejected: a decoder of our own. `hpack` is read by many, and its cost is paid once a connection.
Source: RFC 9113 sections 8.2, 8.3; RFC 7541; grpc/grpc, doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec
from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

from epp.extproc.http2.faults import ConnectionFault, StreamFault
from epp.extproc.http2.frames import Code
from epp.extproc.http2.messages import GZIP, Status, parse_timeout

Fields = list[tuple[bytes, bytes]]

KNOWN: Final = 64
"""Heads remembered on one connection."""
KNOWN_BYTES: Final = 256
"""Longest block remembered."""
BOMB: Final = 2
"""A list this many times over the limit ends the connection: below it, it is unpacked, and only the stream ends."""

NAME: Final = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
BAD_VALUE: Final = re.compile(rb"[\x00\r\n]|^[ \t]|[ \t]$")
PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
HOP_BY_HOP: Final = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))


class Head(msgspec.Struct, frozen=True):
    """What a request's header block says."""

    method: bytes
    path: str
    is_grpc: bool
    content_length: int | None = None
    encoding: bytes = b""
    """Of `grpc-encoding`: "" or "gzip"."""
    timeout: float | None = None
    refusal: tuple[Status, str] | None = None
    """Why the call cannot be taken, whatever it calls."""


class HeadReader:
    """The header blocks of one connection, in the order in which they came."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: of a header list, in bytes as RFC 9113 section 6.5.2 counts.
        """
        self._limit = limit
        self._decoder = Decoder(BOMB * limit)
        self._table = self._decoder.header_table = CountingTable()
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """The head of a request.

        Raises:
            ConnectionFault: it cannot be unpacked.
            StreamFault: it is malformed, or too long.
        """
        head = self._known.get(block)
        if head is None:
            added = self._table.added
            head = _head(self._fields(block))
            if self._table.added == added and len(block) <= KNOWN_BYTES:
                if len(self._known) >= KNOWN:
                    self._known.clear()  # what this peer repeats is not among them
                self._known[block] = head
        return head

    def read_trailers(self, block: bytes) -> None:
        """Trailers say nothing to us, but must be well-formed. Raises as `read`."""
        fields = self._fields(block)
        _check_fields(fields)
        if any(name.startswith(b":") for name, _ in fields):
            raise _malformed("a pseudo-header in trailers")

    def skip(self, block: bytes) -> None:
        """Keep the table in step. Raises ConnectionFault."""
        self._unpack(block)

    def _fields(self, block: bytes) -> Fields:
        fields = self._unpack(block)
        if sum(len(name) + len(value) + 32 for name, value in fields) > self._limit:
            raise StreamFault(
                Code.ENHANCE_YOUR_CALM, f"a header list of more than {self._limit} bytes", "max_header_bytes"
            )
        return fields

    def _unpack(self, block: bytes) -> Fields:
        added = self._table.added
        try:
            decoded: Iterable[tuple[bytes, bytes]] = self._decoder.decode(block, raw=True)
            fields = [(bytes(name), bytes(value)) for name, value in decoded]
        except OversizedHeaderListError:
            message = f"a header list of more than {BOMB} times {self._limit} bytes"
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, message, "max_header_bytes") from None
        except HPACKError:  # its text has bytes of the peer's in it, and addresses in our memory
            raise ConnectionFault(Code.COMPRESSION_ERROR, "a header block that HPACK cannot read") from None
        if self._table.added != added or _resizes(block):
            self._known.clear()
        return fields


class CountingTable(HeaderTable):
    """HPACK's dynamic table, and how many entries it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.added = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.added += 1
        super().add(name, value)


def _resizes(block: bytes) -> bool:
    """It begins with a size update (RFC 7541 section 6.3), the only place where one may stand."""
    return bool(block) and block[0] & 0xE0 == 0x20


def _head(fields: Fields) -> Head:
    pseudo = _check_fields(fields)
    method = pseudo.get(b":method")
    if method is None:
        raise _malformed("no :method")
    if method == b"CONNECT":
        if pseudo.keys() != {b":method", b":authority"}:
            raise _malformed("CONNECT without :authority, or with more (section 8.5)")
        return Head(method, "", is_grpc=False)
    path = pseudo.get(b":path")
    if not path or not pseudo.get(b":scheme"):
        raise _malformed("no :path or no :scheme")
    rest = dict(fields)
    is_grpc = _is_grpc(rest.get(b"content-type", b""))
    encoding = rest.get(b"grpc-encoding", b"identity")
    timeout, refusal = None, None
    try:
        timeout = parse_timeout(rest[b"grpc-timeout"]) if b"grpc-timeout" in rest else None
    except ValueError as error:
        refusal = Status.INTERNAL, str(error)
    if encoding not in (b"identity", GZIP):
        refusal = Status.UNIMPLEMENTED, f"grpc-encoding {encoding[:40]!r}: identity and gzip are understood"
    return Head(
        method,
        path.decode("latin-1"),
        is_grpc and method == b"POST",
        _content_length(fields),
        GZIP if encoding == GZIP else b"",
        timeout,
        refusal,
    )


def _check_fields(fields: Fields) -> dict[bytes, bytes]:
    """Well-formed as section 8.2 wants it; returns the pseudo-headers. Raises StreamFault."""
    pseudo: dict[bytes, bytes] = {}
    regular = False
    for name, value in fields:
        if not NAME.fullmatch(name):
            raise _malformed(f"a header named {name[:40]!r}")
        if BAD_VALUE.search(value):
            raise _malformed(f"header {name[:40]!r} with a value that begins or ends with space, or has a line break")
        if name[0] == 0x3A:  # a colon
            if regular or name in pseudo or name not in PSEUDO:
                raise _malformed(f"pseudo-header {name[:40]!r} unknown, twice, or after a regular one")
            pseudo[name] = value
            continue
        regular = True
        if name in HOP_BY_HOP or (name == b"te" and value.lower() != b"trailers"):
            raise _malformed(f"header {name[:40]!r} belongs to HTTP/1.1")
    return pseudo


def _is_grpc(content_type: bytes) -> bool:
    """`application/grpc`, with or without `+proto`; not grpc-web."""
    kind = content_type.lower()
    return kind.startswith(b"application/grpc") and kind[16:17] in (b"", b"+", b";")


def _content_length(fields: Fields) -> int | None:
    values = {value for name, value in fields if name == b"content-length"}
    if not values:
        return None
    value = values.pop()
    if values or not value.isdigit() or len(value) > 18:
        raise _malformed("a content-length that is no number, or several")
    return int(value)


def _malformed(message: str) -> StreamFault:
    return StreamFault(Code.PROTOCOL_ERROR, message)
