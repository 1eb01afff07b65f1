"""What identifies a prompt, how many tokens it is, and the messages in it."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects import Message, Part, read
from epp.errors import BadRequest
from tests.dialects.requests import CHAT, TEXTS, chat, headers, post

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}]
EMOJI = "\N{GRINNING FACE}"


def ids(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def test_the_prompt_of_a_chat_is_its_tools_and_messages_as_the_client_wrote_them() -> None:
    body = b'{"messages": [ {"role":"user", "content":"\\u00e9"} ],"model":"m","tools": [{"b":1, "a":2}]}'
    assert read(headers(), body).prompt == b'[{"b":1, "a":2}][ {"role":"user", "content":"\\u00e9"}'


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_and_tools_that_are_empty_are_the_same_prompt(tools: object) -> None:
    assert chat(tools=tools).prompt == chat().prompt


@pytest.mark.parametrize(
    ("path", "field"), [(CHAT, "messages"), ("/v1/messages", "messages"), ("/v1/responses", "input")]
)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), TEXTS), min_size=1, max_size=6),
    spaces=st.sampled_from([None, 0, 2]),
    compact=st.booleans(),
    tools=st.booleans(),
)
def test_a_conversations_next_turn_begins_with_its_prompt(
    path: str, field: str, turns: list[tuple[str, str]], spaces: int | None, compact: bool, tools: bool
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    extra = {"tools": TOOLS, "system": "s", "instructions": "i"} if tools else {}
    prompts = []
    for count in range(1, len(messages) + 1):
        body = {"model": "m", field: messages[:count]} | extra
        written = json.dumps(body, indent=spaces, separators=(",", ":") if compact else None)
        prompts.append(read(headers(path), written.encode()).prompt)
    for shorter, longer in pairwise(prompts):
        assert longer.startswith(shorter)
        assert len(longer) > len(shorter)


def test_the_first_conversation_of_a_batch_is_the_prompt() -> None:
    first, second = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    request = post("/v1/chat/completions/batch", {"model": "m", "messages": [first, second]})
    assert request.prompt == chat(messages=first).prompt
    assert request.messages == chat(messages=first).messages


def test_the_prompt_of_anthropic_messages_begins_with_system_and_tools() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"name": "f"}],
        "system": "be kind",
    }
    prompt = b'"be kind"[{"name": "f"}][{"role": "user", "content": "hi"}'
    assert post("/v1/messages", body).prompt == prompt


def test_marks_and_hashes_that_change_from_turn_to_turn_are_no_part_of_an_anthropic_prompt() -> None:
    def turn(number: int, contents: list[str]) -> bytes:
        blocks: list[dict[str, object]] = [{"type": "text", "text": text} for text in contents]
        blocks[-1]["cache_control"] = {"type": "ephemeral"}
        messages = [{"role": "user", "content": [block]} for block in blocks]
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={number};"}
        system = [billing, {"type": "text", "text": 'it says "cache_control"'}]
        return post("/v1/messages", {"model": "m", "system": system, "messages": messages}).prompt

    assert turn(2, ["a", "b"]).startswith(turn(1, ["a"]))
    assert b"cch" not in turn(1, ["a"])
    assert b'it says \\"cache_control\\"' in turn(1, ["a"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("given_prompt", "prompt", "tokens"),
    [
        ("hello", b"hello", 7 // 4 + 1),
        ("a\n\"b'", b"a\\n\\\"b'", 9 // 4 + 1),
        (["hello", "world"], b"hello", 18 // 4 + 1),
        ([1, 2, 3], ids(1, 2, 3), 3),
        ([[1, 2], [3]], ids(1, 2), 3),
        ([[70_000]], ids(70_000), 1),
        ([2**32 - 1], ids(2**32 - 1), 1),
        ([2**32], b"[4294967296", 1),
        ([-1], b"[-1", 1),
        ([1, "a"], b'[1, "a"', 2),
        ([1.5], b"[1.5", 1),
        ([1, True], b"[1, true", 2),
        ([1, None], b"[1, null", 2),
        ([1, [2]], b"[1, [2]", 2),
        ([1, {}], b"[1, {}", 2),
        ([1e300], b"[1e+300", 1),
    ],
)
def test_every_prompt_shape_is_read(path: str, given_prompt: object, prompt: bytes, tokens: int) -> None:
    field = "prompt" if path.endswith("completions") else "input"
    request = post(path, {"model": "m", field: given_prompt})
    assert (request.prompt, request.tokens) == (prompt, tokens)


def test_token_ids_are_read_whatever_the_white_space() -> None:
    request = read(headers("/v1/completions"), b'{"model":"m","prompt": [ \n [ 1 ,\t2 ] , [3] ] }')
    assert (request.prompt, request.tokens) == (ids(1, 2), 3)


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), min_size=1, max_size=4))
def test_token_ids_are_counted_exactly(batch: list[list[int]]) -> None:
    request = post("/v1/completions", {"model": "m", "prompt": batch})
    assert (request.prompt, request.tokens) == (ids(*batch[0]), sum(map(len, batch)))


def test_the_engines_own_bodies_hold_ids_or_text() -> None:
    vllm = post("/inference/v1/generate", {"model": "m", "token_ids": [5, 6]})
    assert (vllm.prompt, vllm.tokens) == (ids(5, 6), 2)
    flat, batch = post("/generate", {"input_ids": [5, 6]}), post("/generate", {"input_ids": [[5, 6], [7]]})
    assert (flat.prompt, flat.tokens) == (ids(5, 6), 2)
    assert (batch.prompt, batch.tokens) == (ids(5, 6), 3)
    assert post("/generate", {"text": "abc"}).prompt == b"abc"
    assert post("/generate", {"text": ["abc", "def"]}).prompt == b"abc"
    assert post("/generate", {"input_embeds": [[0.5]]}).prompt == b""


def test_other_inputs_count_too() -> None:
    assert post("/v1/images/generations", {"model": "m", "prompt": "a cat"}).prompt == b"a cat"
    assert post("/v1/audio/speech", {"model": "m", "input": "say"}).prompt == b"say"
    assert post("/v1/embeddings", {"model": "m", "messages": [{"role": "user"}]}).prompt == b'[{"role": "user"}'
    assert post("/v1/completions", {"model": "m", "prompt_embeds": "AAAA"}).prompt == b""


def test_text_is_four_bytes_a_token() -> None:
    # [{"role": "user", "content": "xxxx...x"}]: 33 bytes around 3,967 letters
    assert chat(messages=[{"role": "user", "content": "x" * 1_967}]).tokens == 2_000 // 4 + 1
    assert chat().tokens == 35 // 4 + 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBO+/" * 50_000 + "=="}},
        {"type": "image_url", "image_url": {"url": "data:image\\/png;base64," + "iVBO+\\/" * 50_000 + "=="}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO" * 50_000}},
        {"type": "input_audio", "input_audio": {"data": "UklG" * 50_000, "format": "wav"}},
    ],
)
def test_an_image_inside_the_body_counts_as_an_image_not_as_text(part: dict[str, object]) -> None:
    question = {"type": "text", "text": "what is it? " * 100}  # 1,200 bytes
    body = {"model": "m", "messages": [{"role": "user", "content": [question, part]}]}
    tokens = post(CHAT, json.dumps(body).replace("\\\\/", "\\/").encode()).tokens  # PHP escapes slashes
    assert 225 + 1_200 // 4 < tokens < 225 + 1_200 // 4 + 75


def test_a_long_text_without_spaces_is_text() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "你好" * 10_000}]}
    for ascii_only in (True, False):  # 6 or 3 bytes a character
        assert post(CHAT, json.dumps(body, ensure_ascii=ascii_only).encode()).tokens >= 15_000


@pytest.mark.parametrize("end", [" and more", "\n", "\N{GRINNING FACE}", "\\"])
def test_a_text_that_begins_like_base64_is_text(end: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 4_000 + end}]}
    for ascii_only in (True, False):
        assert post(CHAT, json.dumps(body, ensure_ascii=ascii_only).encode()).tokens >= 1_000


def test_each_of_several_images_counts() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3_000}}] * 3
    assert 3 * 225 < chat(messages=[{"role": "user", "content": parts}]).tokens < 3 * 225 + 75


def test_messages_are_read_from_every_kind_of_content() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "look: " + EMOJI}, {"type": "image_url", "image_url": {}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert chat(messages=messages).messages == (
        Message("system", (Part("text", "be kind"),)),
        Message("user", (Part("text", "look: " + EMOJI), Part("image_url", ""))),
        Message("assistant", ()),
        Message("tool", (Part("text", "42"),)),
    )


def test_messages_are_read_from_anthropic_and_responses_bodies() -> None:
    user = Message("user", (Part("text", "hi"),))
    turns = [{"role": "user", "content": "hi"}]
    anthropic = post("/v1/messages", {"model": "m", "messages": turns, "system": [{"type": "text", "text": "be kind"}]})
    assert anthropic.messages == (Message("system", (Part("text", "be kind"),)), user)
    assert post("/v1/messages", {"model": "m", "messages": turns}).messages == (user,)
    assert post("/v1/responses", {"model": "m", "input": "hi"}).messages == (user,)
    items = [*turns, {"type": "function_call_output", "call_id": "1", "output": "42"}]
    read_items = post("/v1/responses", {"model": "m", "input": items}).messages
    assert read_items == (user, Message("", (Part("text", "42"),)))


def test_messages_that_no_conversation_has_are_not_read() -> None:
    assert chat(messages=[{}] * 100_001).messages == ()
    assert chat(messages=[5]).messages == ()
    assert post("/v1/completions", {"model": "m", "prompt": "hi"}).messages == ()


def test_what_was_asked_once_is_not_computed_again() -> None:
    request = chat()
    assert request.prompt is request.prompt
    assert request.messages is request.messages
    assert request.tokens == request.tokens


TURNS = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS}), min_size=1, max_size=3)
PROMPTS: st.SearchStrategy[tuple[str, dict[str, object]]] = st.one_of(
    TURNS.map(lambda turns: ("/v1/chat/completions", {"tools": [1], "messages": turns})),
    TURNS.map(lambda turns: ("/v1/responses", {"instructions": "be kind", "input": turns})),
    TURNS.map(lambda turns: ("/v1/messages", {"system": "be kind", "messages": turns})),
    st.text(min_size=1).map(lambda text: ("/v1/completions", {"prompt": text})),
    st.lists(st.integers(0, 2**32 - 1), min_size=1).map(lambda found: ("/v1/completions", {"prompt": found})),
    st.lists(st.integers(0, 9), min_size=1).map(lambda found: ("/generate", {"input_ids": [found, [1]]})),
    st.lists(st.integers(0, 9), min_size=1).map(lambda found: ("/inference/v1/generate", {"token_ids": found})),
)


@given(PROMPTS, st.integers(0, 80), st.sampled_from([None, 0, 1]))
def test_the_start_of_a_prompt_is_what_all_of_it_begins_with(
    asked: tuple[str, dict[str, object]], most: int, indent: int | None
) -> None:
    path, fields = asked
    request = read(headers(path), json.dumps({"model": "m"} | fields, indent=indent).encode())
    start = request.prompt_start(most)
    assert start[:most].rstrip() == request.prompt[:most].rstrip()  # the last bracket has white space before it
    assert request.prompt_start(most) is request.prompt


@pytest.mark.parametrize("space", ["", " ", "\n            "])
def test_of_many_token_ids_only_those_at_the_start_are_read(space: str) -> None:
    text = "[" + f",{space}".join(str(number % 100_000) for number in range(200_000)) + "]"
    request = post("/v1/completions", f'{{"model":"m","prompt":{text}}}'.encode())
    start = request.prompt_start(4_000)
    assert start[:4_000] == ids(*range(1_000))
    assert len(start) < 4 * 4_000
    assert request.prompt == ids(*range(100_000), *range(100_000))


def test_nesting_that_was_read_never_fails_a_caller_further_down() -> None:
    def deeper(levels: int) -> bytes:
        return request.prompt if levels == 0 else deeper(levels - 1)

    for depth in range(700, 1_000, 20):
        nested = b"[" * depth + b'"x"' + b"]" * depth
        try:
            request = read(headers("/v1/completions"), b'{"model":"m","prompt":[[' + nested + b"]]}")
        except BadRequest:
            break
        assert isinstance(deeper(50), bytes)
        assert request.messages == ()
