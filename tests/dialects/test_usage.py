"""Token counts from answers that come in any pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects import Request, Usage, UsageReader, read, usage, usage_reader
from epp.headers import Headers
from tests.dialects.requests import chat, headers, post, recorded

STREAM: Headers = ((":status", b"200"), ("content-type", b"text/event-stream; charset=utf-8"))
JSON: Headers = ((":status", b"200"), ("content-type", b"application/json"))
ANTHROPIC = post("/v1/messages", {"model": "m", "messages": [1], "stream": True})
RESPONSES = post("/v1/responses", {"model": "m", "input": "x", "stream": True})
SGLANG = post("/generate", {"text": "x", "stream": True})


def feed(request: Request, response: Headers, *pieces: bytes) -> UsageReader:
    reader = usage_reader(request, response)
    for piece in pieces:
        reader.feed(piece)
    reader.end()
    return reader


def split(body: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[start:end] for start, end in pairwise(places)]


def events(*data: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in data)


RECORDED = {
    "chat": (chat(), Usage(867, 16, 0), False),
    "chat-prefix-hit": (chat(), Usage(867, 16, 864), False),
    "chat-stream-usage": (chat(stream=True), Usage(867, 16, 864), True),
    "chat-stream-no-usage": (chat(stream=True), None, True),
    "completion-lora-b": (post("/v1/completions", {"model": "b", "prompt": "x"}), Usage(5, 8, 0), False),
    "responses": (post("/v1/responses", {"model": "m", "input": "x"}), Usage(18, 16, 0), False),
    "anthropic-messages": (post("/v1/messages", {"model": "m", "messages": [1]}), Usage(18, 16, 0), False),
    "error-missing-messages": (chat(stream=True), None, False),
    "error-unknown-model": (chat(), None, False),
}
"""What each recorded answer was asked with, and says: numbers read off the recordings."""

# Anthropic's and OpenAI's published examples of events, shortened, and SGLang's cumulative ones.
ANTHROPIC_STREAM = b"""event: message_start
data: {"type":"message_start","message":{"id":"msg_1","role":"assistant","usage":{"input_tokens":25,"cache_read_input_tokens":20,"output_tokens":1}}}

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\xc3\xa9 \\"usage\\": {\\"input_tokens\\": 99}"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"message_stop"}}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":0,"output_tokens":15}}

event: message_stop
data: {"type":"message_stop"}

"""  # noqa: E501
RESPONSES_STREAM = events(
    {"type": "response.created", "response": {"id": "r", "usage": None}},
    {"type": "response.output_text.delta", "delta": "\N{GRINNING FACE} response.completed"},
    {
        "type": "response.completed",
        "response": {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 3}},
    },
)
SGLANG_STREAM = events(
    {"text": "a", "meta_info": {"prompt_tokens": 7, "completion_tokens": 1, "finish_reason": None}},
    {
        "text": "ab",
        "meta_info": {"prompt_tokens": 7, "completion_tokens": 2, "cached_tokens": 5, "finish_reason": None},
    },
    {
        "text": "abc",
        "meta_info": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "cached_tokens": 5,
            "finish_reason": {"type": "length", "length": 3},
        },
    },
) + (b"data: [DONE]\n\n")
CONTINUOUS_STREAM = events(
    {"choices": [{"finish_reason": None}], "usage": {"prompt_tokens": 5, "completion_tokens": 0}},
    {"choices": [{"finish_reason": None}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}},
    {"choices": [{"finish_reason": "stop"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
) + (b"data: [DONE]\n\n")

STREAMS = {
    "anthropic": (ANTHROPIC, ANTHROPIC_STREAM, Usage(25, 15, 20), True),
    "responses": (RESPONSES, RESPONSES_STREAM, Usage(9, 3, 4), True),
    "sglang": (SGLANG, SGLANG_STREAM, Usage(7, 3, 5), True),
    "continuous": (chat(stream=True), CONTINUOUS_STREAM, Usage(5, 2, None), True),
    "cut": (chat(stream=True), CONTINUOUS_STREAM[:200], Usage(5, 1, None), False),
    "usage": (chat(stream=True), recorded("chat-stream-usage")[1], Usage(867, 16, 864), True),
    "no usage": (chat(stream=True), recorded("chat-stream-no-usage")[1], None, True),
}


@pytest.mark.parametrize("name", RECORDED)
@given(cuts=st.lists(st.integers(min_value=0), max_size=5))
def test_the_usage_of_a_recorded_answer_is_read_from_any_pieces(name: str, cuts: list[int]) -> None:
    (request, expected, done), (response, body) = RECORDED[name], recorded(name)
    reader = feed(request, response, *split(body, cuts))
    assert (reader.usage, reader.done) == (expected, done)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@given(cuts=st.lists(st.integers(min_value=0), max_size=8))
def test_the_usage_of_a_stream_is_read_from_any_pieces(name: str, end: bytes, cuts: list[int]) -> None:
    request, body, expected, done = STREAMS[name]
    reader = feed(request, STREAM, *split(body.replace(b"\n", end), cuts))
    assert (reader.usage, reader.done) == (expected, done)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_usage_of_a_stream_is_read_byte_by_byte_and_with_a_tail(name: str, end: bytes) -> None:
    request, body, expected, done = STREAMS[name]
    tail = b": a comment\n\ndata: {}\n\nevent: x\n" if done else b""
    whole = body.replace(b"\n", end) + tail
    reader = feed(request, STREAM, *(whole[at : at + 1] for at in range(len(whole))))
    assert (reader.usage, reader.done) == (expected, done)


def test_the_usage_is_known_as_soon_as_its_line_is_whole() -> None:
    reader = usage_reader(chat(stream=True), STREAM)
    line = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
    said = []
    for piece in (line, b"\r", b"\ndata:[DONE]", b"\n"):
        reader.feed(piece)
        said.append((reader.usage, reader.done))
    assert said == [(None, False), (Usage(5, 2), False), (Usage(5, 2), False), (Usage(5, 2), True)]


def test_a_last_line_without_its_end_counts() -> None:
    reader = feed(chat(stream=True), STREAM, b'data: {"usage":{"prompt_tokens":5}}\n\ndata: [DONE]')
    assert (reader.usage, reader.done) == (Usage(5, None, None), True)


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
def test_each_last_event_of_responses_completes_the_answer(kind: str) -> None:
    body = events({"type": kind, "response": {"usage": {"input_tokens": 1, "output_tokens": 2}}})
    reader = feed(RESPONSES, STREAM, body)
    assert (reader.usage, reader.done) == (Usage(1, 2, None), True)
    reader = feed(RESPONSES, STREAM, events({"type": kind, "response": {"usage": None}}))
    assert (reader.usage, reader.done) == (None, True)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 0}, Usage(5, 0, None)),
        ({"prompt_tokens": 5, "total_tokens": 5}, Usage(5, None, None)),
        ({"prompt_tokens": 5, "prompt_tokens_details": None}, Usage(5, None, None)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}, Usage(5, None, 3)),
        ({"prompt_tokens": 5, "prompt_token_details": {"cached_tokens": 3}}, Usage(5, None, 3)),
        ({"input_tokens": 5, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 1}, Usage(5, 1, 3)),
        ({"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": 3}, Usage(5, 1, 3)),
        ({"prompt_tokens": -5, "completion_tokens": 2.5, "prompt_tokens_details": {"cached_tokens": True}}, None),
        ({"prompt_tokens": "5", "completion_tokens": [], "prompt_tokens_details": 3}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": 1}, Usage(None, 1, None)),
        ({"type": "duration", "seconds": 3}, None),
        ({}, None),
        (None, None),
        ("many", None),
        ([1], None),
    ],
)
def test_only_whole_numbers_count(counts: object, expected: Usage | None) -> None:
    body = json.dumps({"choices": [], "usage": counts}).encode()
    assert feed(chat(), JSON, body).usage == expected
    assert feed(chat(), STREAM, b"data: " + body + b"\n\n").usage == expected


def test_sglang_answers_are_read_one_and_many() -> None:
    one = {"text": "a", "meta_info": {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 5}}
    other = {"text": "b", "meta_info": {"prompt_tokens": 10, "completion_tokens": 4, "cached_tokens": 0}}
    assert feed(SGLANG, JSON, json.dumps(one).encode()).usage == Usage(7, 3, 5)
    assert feed(SGLANG, JSON, json.dumps([one, other]).encode()).usage == Usage(17, 7, 5)
    twice = post("/generate", {"text": ["x", "y"], "sampling_params": {"n": 2}})
    answer = json.dumps([one, one, other, other]).encode()
    assert feed(twice, JSON, answer).usage == Usage(17, 14, 5)
    assert feed(SGLANG, JSON, json.dumps([one] * 1025).encode()).usage is None


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"[", b"null", b'{"usage":{', b"[{" * 100_000, b'{"usage":{"prompt_tokens":5}} x', b"\xff\xfe"],
)
def test_an_answer_that_cannot_be_read_has_no_usage(body: bytes) -> None:
    assert feed(chat(), JSON, body).usage is None
    assert feed(chat(), STREAM, b"data: " + body + b"\n\n").usage is None
    assert feed(SGLANG, JSON, b'["meta_info"' + body).usage is None


@given(st.lists(st.sampled_from([b"data:", b'{"usage":{"prompt_tokens":', b"1", b"}}", b"\n", b"\r", b"[DONE]", b" "])))
def test_no_stream_makes_the_reader_fail(pieces: list[bytes]) -> None:
    in_pieces, whole = feed(chat(stream=True), STREAM, *pieces), feed(chat(stream=True), STREAM, b"".join(pieces))
    assert (in_pieces.usage, in_pieces.done) == (whole.usage, whole.done)


@pytest.mark.parametrize("stream", [True, False])
def test_the_content_type_decides_how_an_answer_is_read(stream: bool) -> None:
    document = b'{"usage":{"prompt_tokens":5}}'
    as_events = b"data: " + document + b"\n\n"
    request = chat(stream=stream)
    assert feed(request, JSON, document).usage == Usage(5)
    assert feed(request, (("content-type", b"application/problem+json"),), document).usage == Usage(5)
    assert feed(request, STREAM, as_events).usage == Usage(5)
    assert feed(request, (("content-type", b"text/plain"),), document).usage is None
    assert feed(request, (), as_events if stream else document).usage == Usage(5)
    assert feed(request, (), document if stream else as_events).usage is None


def test_compressed_answers_and_requests_passed_through_have_no_usage() -> None:
    document = b'{"usage":{"prompt_tokens":5}}'
    assert feed(chat(), (*JSON, ("content-encoding", b"gzip")), document).usage is None
    assert feed(chat(), (*JSON, ("content-encoding", b"identity")), document).usage == Usage(5)
    again = read(headers("/v1/responses/resp_1", method=b"GET"), b"")
    reader = feed(again, JSON, document)
    assert (reader.usage, reader.done) == (None, False)


def test_a_whole_answer_beyond_the_limit_is_given_up() -> None:
    start, end = b'{"data":"', b'","usage":{"prompt_tokens":5}}'
    room = usage.MAX_ANSWER - len(start) - len(end)
    fits = [start, b"x" * room, end]
    assert feed(chat(), JSON, *fits).usage == Usage(5)
    assert feed(chat(), JSON, *fits, b" ").usage is None
    assert feed(chat(), JSON, b"".join(fits) + b" ").usage is None
    assert feed(chat(), JSON, start + b"x" * usage.MAX_ANSWER, b'{"usage":{"prompt_tokens":5}}').usage is None


@pytest.mark.parametrize("size", [1 << 10, 1 << 16, 1 << 22])
@pytest.mark.parametrize(("more", "seen"), [(0, True), (1, False)])
def test_a_line_beyond_the_limit_is_skipped_however_it_comes(size: int, more: int, seen: bool) -> None:
    start, end = b'data: {"usage":{"prompt_tokens":9},"x":"', b'"}'
    line = start + b"x" * (usage.MAX_LINE - len(start) - len(end) + more) + end
    body = line + b'\r\n\r\ndata: {"usage":{"completion_tokens":5}}\n\n'
    reader = feed(chat(stream=True), STREAM, *(body[at : at + size] for at in range(0, len(body), size)))
    assert reader.usage == Usage(9 if seen else None, 5, None)


def test_the_rest_of_a_skipped_line_is_not_taken_for_a_line() -> None:
    event = b'data: {"usage":{"prompt_tokens":9}}'
    reader = feed(chat(stream=True), STREAM, b"x" * (usage.MAX_LINE + 1), event + b"\n", b'data: {"x":"usage"}\n')
    assert reader.usage is None
    assert feed(chat(stream=True), STREAM, b"x" * (usage.MAX_LINE + 1), event).usage is None
    assert feed(chat(stream=True), STREAM, b"x" * (usage.MAX_LINE + 1), b"\n" + event).usage == Usage(9)
