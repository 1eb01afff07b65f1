"""One HTTP/1.1 response after another, read in place. Pure: bytes in, bodies out.

In: what a connection receives, written straight into `space()`. Out: the body once it is whole, or a `Failure`.
Rules here:
- One buffer a connection, used for one response after another; it grows to what pages need and never beyond the limit.
- A body ends by Content-Length, by chunks, or with the connection. Chunks are put together where they lie.
- Only status 200 has a body that anybody wants; interim responses (1xx) are skipped.
- Whatever comes, reading ends in a body, in a failure, or in waiting for more; it never raises.
Rejected: aiohttp (see scrape.py for what it costs); h11 (pure Python, and it hands out each piece as a copy).
Source: RFC 9112.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

import msgspec

FIRST_SIZE: Final = 64 << 10
"""Bytes of a buffer at first: a vLLM page is 48 to 58 KB."""
MOST_HEAD: Final = 64 << 10
"""Bytes of a header, and of what chunking may add to a page."""
MOST_SIZE_LINE: Final = 1024
"""Bytes of a chunk's size line, extensions included."""

_STATUS = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: |$)")
_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")


class Problem(Enum):
    """What can be wrong with a page; the value is the word for it in logs."""

    CONNECT = "connect"
    """The connection could not be opened, or ended in the middle of an answer."""
    TIMEOUT = "timeout"
    STATUS = "status"
    """An answer, but not 200."""
    PROTOCOL = "protocol"
    """Not the HTTP that was asked for."""
    TOO_LARGE = "too large"
    GARBAGE = "garbage"
    """A page with nothing in it that the engine is known to tell."""


class Failure(msgspec.Struct, frozen=True):
    """Why there is no page."""

    problem: Problem
    detail: str


class ResponseReader:
    """Reads the responses of one connection, one at a time."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes of the largest body that is read.
        """
        self._limit = limit
        self._buffer = bytearray(FIRST_SIZE)
        self._view = memoryview(self._buffer)
        self.begin()

    def begin(self) -> None:
        """Another response follows; nothing of the last one is kept."""
        self._received = 0
        self._body_at = 0  # 0: the header is not whole yet
        self._length: int | None = None
        self._chunked = False
        self._undone = 0  # chunked: where the first chunk begins that was not put in its place yet
        self._body_end = 0  # chunked: end of those that were
        self.keep = True
        """The connection stays open for another request."""

    @property
    def has_begun(self) -> bool:
        """Something of the response has come."""
        return self._received > 0

    def space(self) -> memoryview:
        """Where to write what comes next; never empty. Say how much by `received`."""
        if self._received == len(self._buffer):
            grown = bytearray(2 * len(self._buffer))
            grown[: self._received] = self._buffer
            self._buffer, self._view = grown, memoryview(grown)
        return self._view[self._received :]

    def received(self, count: int) -> bytes | Failure | None:
        """So many bytes were written to `space()`. Returns the body when it is whole, None while it is not."""
        self._received += count
        if self._received > self._limit + MOST_HEAD:
            return self._too_large()
        if not self._body_at:
            failure = self._read_head()
            if failure is not None or not self._body_at:
                return failure
        return self._read_chunks() if self._chunked else self._read_plain()

    def closed(self) -> bytes | Failure:
        """The connection has ended: so has a body that said nothing of its length."""
        if self._body_at and not self._chunked and self._length is None:
            return bytes(self._view[self._body_at : self._received])
        return Failure(Problem.CONNECT, "the connection ended in the middle of an answer")

    # -- inside --------------------------------------------------------------------------------------------------

    def _read_head(self) -> Failure | None:
        while (end := self._buffer.find(b"\r\n\r\n", 0, min(self._received, MOST_HEAD))) >= 0:
            lines = bytes(self._view[:end]).split(b"\r\n")
            match = _STATUS.match(lines[0])
            if match is None:
                break
            status = int(match[2])
            if status >= 200:
                self.keep = match[1] == b"1"
                self._body_at = self._undone = self._body_end = end + 4
                return self._understand(lines[1:]) if status == 200 else self._refused(status)
            rest = self._received - (end + 4)
            self._view[:rest] = self._view[end + 4 : self._received]
            self._received = rest
        if end >= 0 or self._received >= MOST_HEAD:
            return self._not_http("the answer does not begin like one of HTTP/1.1")
        return None

    def _understand(self, lines: list[bytes]) -> Failure | None:
        for line in lines:
            name, _, value = line.partition(b":")
            value = value.strip().lower()
            match name.lower():
                case b"content-length":
                    if not value.isdigit() or len(value) > 18 or self._length not in (None, int(value)):
                        return self._not_http("the answer's length is not to be understood")
                    self._length = int(value)
                case b"transfer-encoding":
                    self._chunked = True
                    if value != b"chunked":
                        return self._not_http(f"the answer's transfer encoding {value[:40]!r} was not asked for")
                case b"content-encoding" if value != b"identity":
                    return self._not_http(f"the answer's content encoding {value[:40]!r} was not asked for")
                case b"connection":
                    self.keep = b"close" not in value and (self.keep or b"keep-alive" in value)
        return self._too_large() if (self._length or 0) > self._limit else None

    def _read_plain(self) -> bytes | Failure | None:
        if self._length is None:
            return self._too_large() if self._received - self._body_at > self._limit else None
        end = self._body_at + self._length
        if self._received > end:
            return self._not_http("more came than the answer's length")
        return bytes(self._view[self._body_at : end]) if self._received == end else None

    def _read_chunks(self) -> bytes | Failure | None:
        """Move each chunk that is whole behind the last one, until the empty one has come."""
        while (line_end := self._buffer.find(b"\r\n", self._undone, self._received)) >= 0:
            match = _SIZE.match(self._buffer, self._undone, line_end)
            if match is None or self._buffer[match.end()] not in b"\r; \t":
                return self._not_http("a chunk's size is not to be understood")
            size, begin = int(match[0], 16), line_end + 2
            if size == 0:
                return self._read_end(line_end)
            if self._body_end - self._body_at + size > self._limit:
                return self._too_large()
            if self._received < begin + size + 2:
                return None
            if self._buffer[begin + size : begin + size + 2] != b"\r\n":
                return self._not_http("a chunk is longer than its size")
            self._view[self._body_end : self._body_end + size] = self._view[begin : begin + size]
            self._body_end += size
            self._undone = begin + size + 2
        too_long = self._received - self._undone > MOST_SIZE_LINE
        return self._not_http("a chunk's size is not to be understood") if too_long else None

    def _read_end(self, line_end: int) -> bytes | Failure | None:
        """The empty chunk has come; trailers may follow, then an empty line."""
        end = self._buffer.find(b"\r\n\r\n", line_end, self._received)
        if end < 0:
            return None
        if end + 4 != self._received:
            return self._not_http("more came after the answer's end")
        return bytes(self._view[self._body_at : self._body_end])

    def _too_large(self) -> Failure:
        return Failure(Problem.TOO_LARGE, f"the page is larger than {self._limit} bytes")

    @staticmethod
    def _refused(status: int) -> Failure:
        return Failure(Problem.STATUS, f"the answer's status is {status}")

    @staticmethod
    def _not_http(detail: str) -> Failure:
        return Failure(Problem.PROTOCOL, detail)
