"""Replies put together by hand against Envoy's own messages."""

from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from hypothesis import given
from hypothesis import strategies as st

from epp.extproc.actions import Send, SendBufferedBody, SendRequestBody, SendRequestHeaders, SendResponseBody
from epp.extproc.events import Modes
from epp.extproc.replies import WRITERS
from epp.headers import CONTROL, ROUTING
from epp.pb import ext_proc_pb2 as pb
from tests.extproc import oracle

SIZES = (0, 1, 2, 50, *range(95, 131), 200, 16_000, *range(16_340, 16_390), 62_000)
NAMES = st.text(min_size=1, max_size=40)
ADDRESSES = st.sampled_from(("10.0.0.1:8000", "[fd00::1]:8000", "10.0.0.1:8000,10.0.0.2:8000")) | NAMES
HEADERS = st.lists(st.tuples(NAMES, st.binary(max_size=300)), max_size=4).map(tuple)
REMOVED = st.lists(st.sampled_from(sorted(CONTROL | ROUTING)), max_size=4).map(tuple)
SCORES = st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=30).map(lambda found: tuple(found.items()))


def check(action: Send) -> None:
    """Envoy reads what the oracle would have said, and protobuf would have written nothing shorter or longer."""
    data = WRITERS[type(action)](action)
    expected = oracle.reply(action, Modes())
    assert ep.ProcessingResponse.FromString(data) == expected
    assert len(data) == expected.ByteSize()
    assert pb.ProcessingResponse.FromString(data).ByteSize() == len(data)  # nothing in it is unknown to ours


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [SendRequestBody, SendResponseBody])
def test_pieces_of_any_size_are_wrapped(kind: type[SendRequestBody | SendResponseBody], last: bool) -> None:
    for size in SIZES:
        check(kind(b"x" * size, last))


@given(st.integers(0, 3_000_000), st.booleans())
def test_a_piece_may_be_a_view(size: int, last: bool) -> None:
    piece = bytes(size)
    write = WRITERS[SendRequestBody]
    assert write(SendRequestBody(memoryview(piece), last)) == write(SendRequestBody(piece, last))
    got = ep.ProcessingResponse.FromString(write(SendRequestBody(piece, last)))
    streamed = got.request_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (piece, last)


@given(ADDRESSES, HEADERS, REMOVED, SCORES)
def test_headers_say_where_to(
    destination: str,
    set_headers: tuple[tuple[str, bytes], ...],
    remove_headers: tuple[str, ...],
    scores: tuple[tuple[str, float], ...],
) -> None:
    for _ in range(2):  # the second time from what is remembered
        check(SendRequestHeaders(destination, set_headers, remove_headers, scores))
        check(SendRequestHeaders(destination, (), remove_headers))


@given(ADDRESSES, HEADERS, REMOVED, st.none() | st.binary(max_size=300), SCORES)
def test_a_buffered_body_says_where_to(
    destination: str,
    set_headers: tuple[tuple[str, bytes], ...],
    remove_headers: tuple[str, ...],
    body: bytes | None,
    scores: tuple[tuple[str, float], ...],
) -> None:
    check(SendBufferedBody(destination, set_headers, remove_headers, body, scores))


def test_a_large_buffered_body_is_carried_whole() -> None:
    check(SendBufferedBody("10.0.0.1:8000", body=b"b" * 3_000_000))
