"""What the Responses API calls a response, read from the answer in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects import Request, usage_reader
from epp.headers import Headers
from tests.dialects.requests import chat, post, recorded
from tests.dialects.test_usage import JSON, STREAM, events, feed, split

WHOLE = post("/v1/responses", {"model": "m", "input": "x"})
STREAMED = post("/v1/responses", {"model": "m", "input": "x", "stream": True})
USAGE = {"input_tokens": 9, "output_tokens": 3}


def last(kind: str = "response.completed", **response: object) -> dict[str, Any]:
    return {"type": kind, "response": {"id": "resp_1", "usage": USAGE, "output": [{"id": "msg_1"}]} | response}


STARTED = {"type": "response.created", "response": {"id": "resp_1", "usage": None}}
DELTA = {"type": "response.output_text.delta", "delta": '"type":"response.completed" "id":"resp_2"'}


@given(cuts=st.lists(st.integers(min_value=0), max_size=5))
def test_the_id_of_a_recorded_answer_is_read_from_any_pieces(cuts: list[int]) -> None:
    response, body = recorded("responses")
    assert feed(WHOLE, response, *split(body, cuts)).response_id == json.loads(body)["id"]


@given(cuts=st.lists(st.integers(min_value=0), max_size=8))
def test_the_id_of_a_stream_is_that_of_its_last_event(cuts: list[int]) -> None:
    body = events(STARTED, DELTA, last())
    assert feed(STREAMED, STREAM, *split(body, cuts)).response_id == "resp_1"


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
def test_each_last_event_tells_it_with_or_without_a_usage(kind: str) -> None:
    for usage in (USAGE, None, {}):
        assert feed(STREAMED, STREAM, events(last(kind, usage=usage))).response_id == "resp_1"


def test_it_is_known_before_the_body_ends_so_that_a_client_may_leave() -> None:
    reader = usage_reader(STREAMED, STREAM)
    reader.feed(events(STARTED, DELTA))
    assert reader.response_id == ""
    reader.feed(events(last()))
    assert reader.response_id == "resp_1"


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"message": "no"}},
        {"id": None},
        {"id": 7},
        {"id": "r" * 300},
        [{"id": "resp_1"}],
        "resp_1",
    ],
)
def test_an_answer_without_an_id_has_none(answer: object) -> None:
    assert feed(WHOLE, JSON, json.dumps(answer).encode()).response_id == ""


@pytest.mark.parametrize(
    ("request_", "response"),
    [
        (chat(), JSON),
        (chat(stream=True), STREAM),
        (post("/v1/messages", {"model": "m", "messages": [1], "stream": True}), STREAM),
        (WHOLE, (*JSON, ("content-encoding", b"gzip"))),
        (WHOLE, (("content-type", b"text/html"),)),
    ],
)
def test_what_is_no_response_of_that_api_has_none(request_: Request, response: Headers) -> None:
    body = events({"type": "message_stop", "id": "msg_1", "usage": {}}) if request_.stream else b'{"id":"x","usage":{}}'
    assert feed(request_, response, body).response_id == ""


def test_a_path_with_a_slash_at_its_end_is_the_same_path() -> None:
    request = post("/v1/responses/", {"model": "m", "input": "x"})
    assert feed(request, JSON, b'{"id":"resp_1"}').response_id == "resp_1"
