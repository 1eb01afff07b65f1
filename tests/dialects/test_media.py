"""Images, audio and video that a body has, and the stored response that it goes on from."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given

from epp.dialects import Request, read
from epp.errors import BadRequest
from tests.dialects.requests import CHAT, VALUES, chat, headers, post

PNG, OTHER = "data:image/png;base64,iVBORw0KGgo=", "https://example.com/cat.png"
TEXT = {"type": "text", "text": "what is this?"}


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [TEXT, *parts]}]


def image(url: str, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def source(kind: str, place: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": kind, "media_type": "image/png", ("url", "data")[kind != "url"]: place}}


def of(*urls: str) -> tuple[bytes, ...]:
    return chat(messages=user(*map(image, urls))).media


def test_each_item_has_a_digest_of_its_own_and_the_same_one_wherever_it_stands() -> None:
    one, two = of(PNG, OTHER)
    assert len(one) == len(two) == 16
    assert one != two
    assert of(OTHER) == (two,)
    assert of(OTHER, PNG, OTHER) == (two, one)  # in order, each once
    turns = [*user(image(PNG)), {"role": "assistant", "content": "a cat"}, *user(image(OTHER))]
    assert chat(messages=turns).media == (one, two)


@pytest.mark.parametrize(
    "part",
    [
        image(OTHER, detail="low"),
        {"type": "image_url", "image_url": OTHER},
        {"type": "video_url", "video_url": {"url": OTHER}},
        {"type": "audio_url", "audio_url": {"url": OTHER}},
        {"type": "input_audio", "input_audio": {"data": OTHER, "format": "wav"}},
    ],
)
def test_what_a_part_points_to_is_what_counts(part: object) -> None:
    assert chat(messages=user(part)).media == of(OTHER)


def test_every_api_has_its_own_way_to_say_it() -> None:
    input_ = [{"role": "user", "content": [{"type": "input_image", "image_url": OTHER}]}]
    tool = [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": OTHER}]}]
    for items in (input_, tool):
        assert post("/v1/responses", {"model": "m", "input": items}).media == of(OTHER)
    for part in (source("url", OTHER), source("base64", OTHER)):
        assert post("/v1/messages", {"model": "m", "messages": user(part)}).media == of(OTHER)
        result = {"type": "tool_result", "tool_use_id": "t", "content": [part]}
        assert post("/v1/messages", {"model": "m", "messages": user(result)}).media == of(OTHER)
    assert post("/v1/embeddings", {"model": "m", "messages": user(image(OTHER))}).media == of(OTHER)
    batch = post("/v1/chat/completions/batch", {"model": "m", "messages": [user(image(PNG)), user(image(OTHER))]})
    assert batch.media == of(PNG)  # the first conversation


def test_vllms_own_bodies_name_them_by_hashes() -> None:
    def generate(features: object) -> tuple[bytes, ...]:
        return post("/inference/v1/generate", {"model": "m", "token_ids": [1], "features": features}).media

    assert len(generate({"mm_hashes": {"image": ["a", "b", "a"], "audio": ["c"]}})) == 3
    assert generate({"mm_hashes": {"image": ["b"]}}) == generate({"mm_hashes": {"audio": ["b"]}})
    none: list[object] = [None, 7, {}, []]
    for nothing in [*none, *({"mm_hashes": each} for each in none), {"mm_hashes": {"image": 7}}]:
        assert generate(nothing) == ()


@pytest.mark.parametrize(
    "messages",
    [
        "a text",
        [{"role": "user", "content": "a text"}],
        [{"role": "user"}],
        user(),
        user({"type": "image_url", "image_url": None}),
        user({"type": "image_url", "image_url": {}}),
        user({"type": "image_url", "image_url": {"url": ""}}),
        user({"type": "image_url", "image_url": {"url": 7}}),
        user({"type": "image_url", "image_url": ["x"]}),
        user({"type": "image", "source": {"type": "file", "file_id": "f"}}),
        user(7),
        7,
    ],
)
def test_where_there_is_none_or_none_that_can_be_read_there_is_none(messages: object) -> None:
    assert chat(messages=messages).media == ()


def test_other_requests_have_none() -> None:
    assert post("/v1/completions", {"model": "m", "prompt": OTHER}).media == ()
    assert read(headers("/some/thing"), b"x").media == ()


def test_a_body_of_very_many_objects_is_not_taken_apart() -> None:
    assert chat(messages=[{}] * 100_000 + user(image(PNG))).media == ()


def test_once_the_body_is_let_go_there_is_none() -> None:
    request = chat(messages=user(image(PNG)))
    assert request.media
    request.let_go()
    assert (request.media, request.previous) == ((), "")


@given(value=VALUES)
def test_no_value_makes_the_reader_fail(value: object) -> None:
    for messages in (
        value,
        [value],
        user(value),
        user({"type": "image_url", "image_url": value}),
        [{"content": value}],
    ):
        body = json.dumps({"model": "m", "messages": messages}).encode()
        with suppress(BadRequest):  # what `read` itself refuses
            assert all(len(each) == 16 for each in read(headers(CHAT), body).media)


def responses(**fields: object) -> Request:
    return post("/v1/responses", {"model": "m", "input": "go on"} | fields)


@pytest.mark.parametrize(
    ("request_", "previous"),
    [
        (responses(previous_response_id="resp_1"), "resp_1"),
        (responses(previous_response_id="r\u00e9"), "r\u00e9"),
        (responses(), ""),
        (responses(previous_response_id=None), ""),
        (responses(previous_response_id=7), ""),
        (responses(previous_response_id={"id": "r"}), ""),
        (chat(previous_response_id="resp_1"), ""),
    ],
)
def test_a_response_goes_on_from_another(request_: Request, previous: str) -> None:
    assert request_.previous == previous
