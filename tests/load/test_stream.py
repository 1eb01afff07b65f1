"""A streamed answer: times of tokens, usage, and its end, however the bytes come."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from epp.load.stream import MAX_LINE_BYTES, StreamedAnswer
from tests.sim.serving import recorded

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"the "}}]}\n\n'
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":867,"total_tokens":883,"completion_tokens":16,'
    b'"prompt_tokens_details":{"cached_tokens":864,"created_cache_tokens":0}},"system_fingerprint":"v"}\n\n'
)
DONE = b"data: [DONE]\n\n"
WHOLE = ROLE + TOKEN * 3 + USAGE + DONE


def fed(*pieces: bytes) -> StreamedAnswer:
    """Piece i comes at second i."""
    stream = StreamedAnswer()
    for at, piece in enumerate(pieces):
        stream.feed(piece, float(at))
    return stream


def test_the_role_alone_is_no_token() -> None:
    stream = fed(ROLE, TOKEN, b": ping\n\n", TOKEN, TOKEN, USAGE, DONE)
    assert (stream.first_at, stream.last_at, stream.events) == (1.0, 4.0, 3)
    assert stream.pause_max == 2.0  # between 1 and 3
    assert stream.itl_mean == 3.0 / 15  # 16 tokens, as the server counts
    assert stream.end(7.0) == ""


def test_without_usage_events_with_a_token_are_counted() -> None:
    stream = fed(TOKEN, TOKEN, TOKEN)
    assert (stream.completion_tokens, stream.itl_mean, stream.end(3.0)) == (3, 1.0, "truncated")


def test_one_token_has_no_time_between_tokens() -> None:
    assert fed(TOKEN, DONE).itl_mean is None
    assert fed(ROLE, DONE).itl_mean is None


@pytest.mark.parametrize(
    "says",
    [
        b'{"delta":{"reasoning":"hm"}}',
        b'{"delta":{"reasoning_content":"hm"}}',
        b'{"delta":{"tool_calls":[{"index":0}]}}',
        b'{"delta":{"content":[{"type":"text"}]}}',
        b'{"delta":{"content":""}}',
    ],
)
def test_whatever_a_choice_says_is_a_token(says: bytes) -> None:
    assert fed(ROLE, b'data: {"choices":[' + says + b"]}\n\n").first_at == 1.0


@pytest.mark.parametrize(
    "says", [b'{"delta":{"content":null}}', b'{"delta":{"tool_calls":[]}}', b'{"delta":{}}', b"{}"]
)
def test_a_choice_that_says_nothing_is_no_token(says: bytes) -> None:
    assert fed(b'data: {"choices":[' + says + b"]}\n\n").first_at is None


def test_cached_tokens_that_the_server_does_not_know_are_none() -> None:
    unknown = fed(b'data: {"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":null}}}\n')
    assert unknown.usage is not None
    assert (unknown.usage.prompt_tokens, unknown.usage.cached_tokens) == (5, 0)
    missing = fed(b'data: {"usage":{"prompt_tokens":5}}\n')
    assert missing.usage is not None
    assert missing.usage.cached_tokens == 0


def test_counts_that_are_null_are_not_known() -> None:
    stream = fed(
        TOKEN, TOKEN, b'data: {"choices":null,"usage":{"prompt_tokens":null,"completion_tokens":null}}\n', DONE
    )
    assert (stream.end(4.0), stream.completion_tokens) == ("", 2)


def test_a_line_that_was_cut_is_no_garbage_and_a_whole_one_is() -> None:
    assert fed(TOKEN, b'data: {"choi').end(2.0) == "truncated"
    assert fed(TOKEN, b'data: {"choi\n').end(2.0) == "malformed"
    assert fed(TOKEN, b'data: {"choi\n', b'data: {"choi').end(2.0) == "malformed"
    assert fed(TOKEN, b'data: {"error":"no"}').end(2.0) == "stream_error"


def test_what_has_no_event_is_no_stream() -> None:
    assert fed(b"<html>log in</html>\n").end(1.0) == "malformed"
    assert fed(b'{"choices":[{"message":{"content":"all at once"}}]}').end(1.0) == "malformed"
    assert fed(b": ping\n\n").end(1.0) == "truncated"
    assert fed().end(1.0) == "truncated"


def test_a_stream_of_a_real_vllm_is_read() -> None:
    stream = fed(recorded("chat-stream-usage.http"))
    assert stream.end(1.0) == ""
    assert stream.usage is not None
    assert stream.completion_tokens == stream.events == 16


@given(cuts=st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_pieces_do_not_change_what_is_read(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    stream = fed(*(WHOLE[a:b] for a, b in pairwise(edges)))
    assert (stream.events, stream.completion_tokens, stream.end(9.0)) == (3, 16, "")
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.cached_tokens) == (867, 864)


def test_byte_by_byte_and_with_carriage_returns_it_is_the_same() -> None:
    crlf = WHOLE.replace(b"\n", b"\r\n")
    stream = fed(*(crlf[at : at + 1] for at in range(len(crlf))))
    assert (stream.events, stream.completion_tokens, stream.end(9.0)) == (3, 16, "")


@given(cut=st.integers(0, len(WHOLE) - len(b"[DONE]\n\n")))
def test_a_stream_cut_anywhere_before_its_end_is_not_whole(cut: int) -> None:
    assert fed(WHOLE[:cut]).end(1.0) in ("truncated", "malformed")


def test_the_end_needs_no_empty_line() -> None:
    assert fed(TOKEN, b"data: [DONE]").end(2.0) == ""


def test_an_error_in_the_stream_is_told_although_it_ends_well() -> None:
    assert fed(TOKEN, b'data: {"error":{"message":"no"}}\n\n', DONE).end(3.0) == "stream_error"


def test_a_line_without_end_is_not_kept() -> None:
    stream = fed(b"data: " + b"x" * MAX_LINE_BYTES, b"x" * 10, DONE)
    assert stream.end(3.0) == "malformed"
