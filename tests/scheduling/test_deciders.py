"""Whether a stage is worth its transfer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Page
from epp.scheduling.deciders import PrefixBasedParams, always, multimodal, prefix_based
from epp.scheduling.decision import Decision
from tests.scheduling.builders import ask, made, pool, profile, scheduler


def chosen(prompt: float, matched: float) -> Decision:
    """A decision for an endpoint that holds so much of a prompt."""
    decision = scheduler(profile()).schedule(ask(), pool(Page()))
    decision.prompt_tokens, decision.matched_tokens = prompt, matched
    return decision


@pytest.mark.parametrize("decision", [chosen(10, 10), None])
def test_always_means_always(decision: Decision | None) -> None:
    assert made(always).decide(ask(), decision)


@pytest.mark.parametrize(
    ("non_cached", "prompt", "tokens", "matched", "remote"),
    [
        (0, 0, 100_000, 0, False),  # 0: never
        (512, 0, 511, 0, False),
        (512, 0, 512, 0, True),
        (512, 0, 1024, 512, True),
        (512, 0, 1024, 576, False),
        (512, 2000, 1999, 0, False),
        (512, 2000, 2000, 0, True),
        (512, 2000, 2000, 1489, False),
        (512, 0, 0, 0, False),  # nobody knows how long the prompt is
    ],
)
def test_a_prompt_is_computed_elsewhere_if_enough_of_it_is_not_cached(
    non_cached: int, prompt: int, tokens: float, matched: float, remote: bool
) -> None:
    decider = made(prefix_based, PrefixBasedParams(non_cached_tokens=non_cached, prompt_tokens=prompt))
    assert decider.decide(ask(), chosen(tokens, matched)) is remote


def test_without_a_decode_endpoint_nothing_is_known_to_be_uncached() -> None:
    assert not made(prefix_based, PrefixBasedParams(non_cached_tokens=1)).decide(ask(), None)


def test_a_length_without_a_number_of_uncached_tokens_is_told_to_have_no_effect() -> None:
    assert PrefixBasedParams(prompt_tokens=9).idle(["promptTokens"]).keys() == {"promptTokens"}
    assert PrefixBasedParams(prompt_tokens=9, non_cached_tokens=1).idle(["promptTokens", "nonCachedTokens"]) == {}


def chat(*contents: Any) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": content} for content in contents]}
    return read(((":path", b"/v1/chat/completions"),), json.dumps(body).encode())


TEXT = {"type": "text", "text": "what is an image_url?"}


@pytest.mark.parametrize(
    ("request_", "encoded"),
    [
        (chat("an image_url"), False),
        (chat([TEXT]), False),
        (chat([TEXT, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]), True),
        (chat([{"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}]), True),
        (chat([{"type": "audio_url", "audio_url": {"url": "https://x/y.wav"}}]), True),
        (chat("first", [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]), True),
        (chat([{"type": "file", "file": {"file_id": "f"}}]), False),
        (chat(None), False),
        (ask("a completion has no parts"), False),
    ],
)
def test_messages_with_images_video_or_audio_are_encoded_elsewhere(request_: Request, encoded: bool) -> None:
    assert made(multimodal).decide(request_, None) is encoded
