"""Reading HTTP responses in place: whole, byte by byte, in any pieces, and with a tail."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.signals.response import FIRST_SIZE, MOST_HEAD, Failure, Problem, ResponseReader

LIMIT = 1 << 20
PAGE = (Path(__file__).parents[1] / "data" / "vllm-0.32.0" / "metrics-after.txt").read_bytes()
OK = b"HTTP/1.1 200 OK\r\n"


def feed(reader: ResponseReader, data: bytes, size: int = 1 << 30) -> bytes | Failure | None:
    """Write the data in pieces of at most `size`; what the last piece gave. The pieces before it must give nothing."""
    got: bytes | Failure | None = None
    while data:
        assert got is None, "the answer was over before all of it had come"
        space = reader.space()
        assert len(space)
        piece = data[: min(size, len(space))]
        space[: len(piece)] = piece
        got = reader.received(len(piece))
        data = data[len(piece) :]
    return got


def read(data: bytes, size: int = 1 << 30) -> bytes | Failure | None:
    return feed(ResponseReader(LIMIT), data, size)


def problem(got: bytes | Failure | None) -> Problem:
    assert isinstance(got, Failure), got
    return got.problem


def chunked(body: bytes, *sizes: int, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    out = b""
    for size in sizes:
        piece, body = body[:size], body[size:]
        out += b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) if piece else b""
    return out + (b"%X\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n" + trailers + b"\r\n"


PLAIN = OK + b"Content-Length: %d\r\n\r\n" % len(PAGE) + PAGE
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(PAGE, 2048)


@pytest.mark.parametrize("data", [PLAIN, CHUNKED], ids=["plain", "chunked"])
@pytest.mark.parametrize("size", [1, 1000, 4096, 1 << 30])
def test_a_recorded_page_comes_out_as_it_went_in(data: bytes, size: int) -> None:
    assert read(data, size) == PAGE


def test_one_reader_reads_one_answer_after_another() -> None:
    reader = ResponseReader(LIMIT)
    for data in (PLAIN, CHUNKED, OK + b"content-length: 0\r\n\r\n", PLAIN):
        reader.begin()
        assert not reader.has_begun
        got = feed(reader, data, 10_000)
        assert got == (b"" if data.endswith(b"0\r\n\r\n") and data is not CHUNKED else PAGE)
        assert reader.keep


@pytest.mark.parametrize("data", [PLAIN, CHUNKED], ids=["plain", "chunked"])
@pytest.mark.parametrize("size", [1, 1 << 30])
def test_more_than_the_answer_is_a_failure(data: bytes, size: int) -> None:
    reader = ResponseReader(LIMIT)
    got = feed(reader, data[:-1], size)
    assert got is None
    assert problem(feed(reader, data[-1:] + b"HTTP/1.1 200 OK")) is Problem.PROTOCOL


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """An answer as it comes, and its body."""
    body = draw(st.binary(max_size=300) | st.just(b"\r\n0\r\n\r\n"))
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nlink: a\r\n\r\n"]))
    other = draw(st.sampled_from([b"", b"Server: uvicorn\r\n", b"X: a:b\r\ndate: now\r\n"]))
    if draw(st.booleans()):
        framing, wire = b"CONTENT-length:  %d \r\n" % len(body), body
    else:
        sizes = draw(st.lists(st.integers(1, 100), max_size=5))
        extension = draw(st.sampled_from([b"", b";a=b", b" ; a"]))
        trailers = draw(st.sampled_from([b"", b"x: y\r\n"]))
        framing = b"transfer-encoding: chunked\r\n"
        wire = chunked(body, *sizes, extension=extension, trailers=trailers)
    return interim + b"HTTP/1.1 200 \r\n" + other + framing + b"\r\n" + wire, body


@given(answer=answers(), size=st.integers(1, 400))
def test_any_answer_in_any_pieces(answer: tuple[bytes, bytes], size: int) -> None:
    data, body = answer
    assert read(data, size) == body


@given(answer=answers(), cut=st.integers(0, 400), size=st.integers(1, 400))
def test_an_answer_that_is_cut_is_never_taken_for_a_whole_one(answer: tuple[bytes, bytes], cut: int, size: int) -> None:
    data, _ = answer
    reader = ResponseReader(LIMIT)
    assert feed(reader, data[: min(cut, len(data) - 1)], size) is None
    assert problem(reader.closed()) is Problem.CONNECT


@given(data=st.binary(max_size=400), size=st.integers(1, 100))
def test_no_bytes_are_a_surprise(data: bytes, size: int) -> None:
    reader = ResponseReader(LIMIT)
    for at in range(0, len(data), size):
        piece = data[at : at + size]
        reader.space()[: len(piece)] = piece
        if reader.received(len(piece)) is not None:
            break
    reader.closed()


@given(
    head=st.sampled_from([OK + b"transfer-encoding: chunked\r\n\r\n", OK + b"content-length: 9\r\n\r\n", OK]),
    data=st.binary(max_size=60),
)
def test_no_body_is_a_surprise(head: bytes, data: bytes) -> None:
    reader = ResponseReader(LIMIT)
    reader.space()[: len(head + data)] = head + data
    reader.received(len(head + data))


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    reader = ResponseReader(LIMIT)
    assert feed(reader, b"HTTP/1.0 200 OK\r\n\r\n" + PAGE) is None
    assert reader.closed() == PAGE
    assert not reader.keep


@pytest.mark.parametrize(
    ("head", "keep"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\n", True),
    ],
)
def test_whether_the_connection_stays_open(head: bytes, keep: bool) -> None:
    reader = ResponseReader(LIMIT)
    assert feed(reader, head + b"content-length: 1\r\n\r\nx") == b"x"
    assert reader.keep is keep


@pytest.mark.parametrize("status", [204, 307, 404, 503])
def test_only_200_has_a_page(status: int) -> None:
    got = read(b"HTTP/1.1 %d Whatever\r\ncontent-length: 5\r\n\r\n" % status)
    assert problem(got) is Problem.STATUS
    assert isinstance(got, Failure)
    assert str(status) in got.detail


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"\r\n\r\n",
        OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
        OK + b"content-length: -1\r\n\r\n",
        OK + b"content-length: " + b"9" * 5000 + b"\r\n\r\n",
        OK + b"content-length: 1_0\r\n\r\n",
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n",
        OK + b"content-length: 5\r\ncontent-encoding: gzip\r\n\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\n-1\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\n1g\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\n123456789\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\n2\r\nabcd",
        OK + b"transfer-encoding: chunked\r\n\r\n" + b"0" * 2000,
        b"x" * MOST_HEAD,
    ],
)
def test_what_is_not_the_http_that_was_asked_for_is_a_failure(data: bytes) -> None:
    assert problem(read(data)) is Problem.PROTOCOL


def test_a_length_said_twice_alike_is_one_length() -> None:
    assert read(OK + b"content-length: 1\r\nContent-Length: 1\r\n\r\nx") == b"x"


def test_a_page_may_be_as_large_as_the_limit_and_no_larger() -> None:
    body = bytes(LIMIT)
    assert read(OK + b"content-length: %d\r\n\r\n" % LIMIT + body) == body
    assert read(OK + b"transfer-encoding: chunked\r\n\r\n" + chunked(body, 1000), 50_000) == body
    assert problem(read(OK + b"content-length: %d\r\n\r\n" % (LIMIT + 1))) is Problem.TOO_LARGE
    assert problem(read(OK + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % (LIMIT + 1))) is Problem.TOO_LARGE
    reader = ResponseReader(LIMIT)
    assert feed(reader, b"HTTP/1.0 200 OK\r\n\r\n" + body) is None
    assert problem(feed(reader, b"x")) is Problem.TOO_LARGE


def test_memory_is_bounded_whatever_comes() -> None:
    reader = ResponseReader(FIRST_SIZE)
    feed(reader, OK + b"transfer-encoding: chunked\r\n\r\n")
    total = 0
    while feed(reader, b"1\r\nx\r\n" * 1000) is None:  # six bytes of connection for one of page
        total += 6000
    assert total <= FIRST_SIZE + MOST_HEAD
    assert len(reader.space()) <= 4 * FIRST_SIZE
