"""Tokens, the chat template, and block keys."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from epp.sim import text

roles = st.sampled_from(["system", "user", "assistant"])


def test_four_bytes_are_a_token() -> None:
    assert [text.count_tokens(b"x" * size) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_headers_are_whole_tokens() -> None:
    assert text.header("user") == b"<|user|>\n\n\n\n"
    assert [len(text.header(role)) for role in ("system", "user", "assistant")] == [12, 12, 16]


def test_every_word_of_an_answer_is_a_token() -> None:
    assert [text.words(at, 1) for at in range(3)] == ["the ", "sun ", "set "]
    assert text.words(0, 0) == ""


@given(start=st.integers(0, 500), count=st.integers(0, 100), more=st.integers(0, 100))
def test_an_answer_is_the_same_text_however_it_is_cut(start: int, count: int, more: int) -> None:
    assert text.words(start, count) + text.words(start + count, more) == text.words(start, count + more)
    assert len(text.words(start, count)) == 4 * count


@given(size=st.integers(0, 500), tag=st.text("abc-1", max_size=20))
def test_filler_has_exactly_the_size_asked_for(size: int, tag: str) -> None:
    assert len(text.filler(tag, size).encode()) == size
    assert text.filler(tag, size).startswith(tag[:size])


@given(said=st.lists(st.tuples(roles, st.text(max_size=40)), max_size=5), answer=st.integers(1, 40))
def test_the_next_turn_begins_with_this_turn_and_its_answer(said: list[tuple[str, str]], answer: int) -> None:
    prompt = text.chat_prompt(said)
    next_turn = text.chat_prompt([*said, ("assistant", text.words(0, answer)), ("user", "and then?")])
    assert len(prompt) % 4 == 0
    assert next_turn.startswith(text.with_answer(prompt, answer))


def test_an_answer_begins_on_a_token() -> None:
    assert text.with_answer(b"hello", 2) == b"hello\n\n\nthe sun "


def test_keys_name_full_blocks_only() -> None:
    assert [len(text.block_keys(b"x" * size, 2)) for size in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


def test_equal_blocks_after_different_ones_have_different_keys() -> None:
    first, second = text.block_keys(b"a" * 8 + b"c" * 8, 2), text.block_keys(b"b" * 8 + b"c" * 8, 2)
    assert first[1] != second[1]


@given(shared=st.binary(max_size=60), one=st.binary(max_size=30), other=st.binary(max_size=30))
def test_texts_share_keys_as_far_as_they_share_blocks(shared: bytes, one: bytes, other: bytes) -> None:
    full = len(shared) // 8
    assert text.block_keys(shared + one, 2)[:full] == text.block_keys(shared + other, 2)[:full]


def test_adapter_and_salt_are_in_every_key() -> None:
    prompt = b"x" * 16
    kinds = [text.block_keys(prompt, 2, *names) for names in ((), ("a",), ("", "a"), ("a", "a"))]
    assert len({key for keys in kinds for key in keys}) == 8
