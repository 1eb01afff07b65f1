"""Compressed bodies: read from a bounded copy, forwarded as they came."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects import Dialect, Request, encoding, read
from epp.errors import BadRequest, Refusal, TooLarge
from tests.dialects.requests import CHAT, headers

TEXT = b'{"model":"m","messages":["' + b"x" * 5_000 + b'"]}'


def bare_deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(data) + engine.flush()


def streamed_zstd(data: bytes) -> bytes:
    """Without the size in its header, in two frames."""
    half = len(data) // 2
    engines = [zstandard.ZstdCompressor(write_content_size=False).compressobj() for _ in range(2)]
    return b"".join(e.compress(d) + e.flush() for e, d in zip(engines, (data[:half], data[half:]), strict=True))


WRITTEN = {
    "gzip": gzip.compress(TEXT),
    "x-gzip": gzip.compress(TEXT[:10]) + gzip.compress(TEXT[10:]) + b"\0" * 512,
    " GZIP ": gzip.compress(TEXT),
    "deflate": zlib.compress(TEXT),
    "Deflate": bare_deflate(TEXT),
    "zstd": zstandard.ZstdCompressor().compress(TEXT),
    "ZSTD": streamed_zstd(TEXT),
    "identity": TEXT,
    "": TEXT,
}


def send(coding: str, body: bytes, limit: int = 1 << 20) -> Request:
    return read(headers(CHAT, ("content-encoding", coding.encode())), body, limit=limit)


@pytest.mark.parametrize("coding", WRITTEN)
def test_a_coded_body_is_read_and_kept_as_it_came(coding: str) -> None:
    request = send(coding, WRITTEN[coding])
    assert (request.model, request.body, request.size_bytes) == ("m", WRITTEN[coding], len(WRITTEN[coding]))
    assert request.prompt == TEXT[len('{"model":"m","messages":') : -2]


@pytest.mark.parametrize("coding", ["br", "gzip, zstd", "compress", "*", "\xff"])
def test_codings_that_cannot_be_read_pass_through(coding: str) -> None:
    request = read(headers(CHAT, ("content-encoding", coding.encode("latin-1"))), b"\x1b\x00")
    assert (request.dialect, request.model, request.body) == (Dialect.PASSTHROUGH, "", b"\x1b\x00")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_body_over_the_limit_is_refused_however_small_it_came(coding: str) -> None:
    assert send(coding, WRITTEN[coding], limit=len(TEXT)).model == "m"
    with pytest.raises(TooLarge, match=f"larger than {len(TEXT) - 1} bytes"):
        send(coding, WRITTEN[coding], limit=len(TEXT) - 1)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_bomb_costs_what_the_limit_allows(coding: str) -> None:
    bomb = encoding.pack(b" " * (64 << 20), coding)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            send(coding, bomb, limit=1000)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_whose_check_sum_did_not_arrive_is_cut_off(coding: str) -> None:
    with pytest.raises(BadRequest, match=f"{coding} request body is cut off"):
        send(coding, WRITTEN[coding][:-1])


def test_a_zstd_window_beyond_what_http_allows_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=24, write_content_size=False)
    engine = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(BadRequest, match="not valid zstd"):
        send("zstd", engine.compress(TEXT) + engine.flush())


def test_a_gzip_body_of_very_many_members_is_refused() -> None:
    assert send("gzip", b"".join(gzip.compress(TEXT[at : at + 80]) for at in range(0, len(TEXT), 80))).model == "m"
    with pytest.raises(BadRequest, match="more than 64 members"):
        send("gzip", b"".join(gzip.compress(TEXT[at : at + 77]) for at in range(0, len(TEXT), 77)))


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "Deflate"])
@given(data=st.data())
def test_broken_and_cut_bodies_are_refused(coding: str, data: st.DataObject) -> None:
    whole = WRITTEN[coding]
    cut = data.draw(st.integers(1, len(whole) - 1))
    with suppress(BadRequest):
        assert send(coding, whole[:cut]).prompt == send(coding, whole).prompt  # only the check sum is missing
    with pytest.raises(BadRequest):
        send(coding, b"{}" + whole)


@given(st.binary(max_size=40), st.sampled_from(["gzip", "deflate", "zstd"]))
def test_no_body_makes_a_coding_fail_otherwise(body: bytes, coding: str) -> None:
    with suppress(Refusal):
        send(coding, body)


@given(st.binary(max_size=200), st.sampled_from(["", "gzip", "deflate", "zstd"]))
def test_what_is_packed_is_unpacked(data: bytes, coding: str) -> None:
    assert encoding.unpack(encoding.pack(data, coding), coding, 200) == data
