"""Text and tokens of the simulation: 4 bytes are one token, blocks are named by chained hashes.

In: messages or prompts. Out: the bytes that a chat template makes of them, block keys, answers.
Rules here:
- A message starts and ends on a token: its content is padded to 4 bytes, its header is whole tokens. So the prompt of
  the next turn starts with the tokens of this turn's prompt and answer, and finds the answer's blocks too.
- The answer to everything is the same endless text, cut after n tokens: whoever knows n knows the answer, which is how
  a workload writes the next turn of a chat without waiting for this one. Chained keys keep equal answers apart.
- What makes two texts differ stands at their beginning; the rest is filler, cheap to make.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, count
from typing import Final

import numpy as np
import xxhash

TOKEN_BYTES: Final = 4

_WORDS: Final = ("the ", "sun ", "set ", "and ", "the ", "old ", "sea ", "was ", "red ", "far ", "off ", "one ", "man ")
_CYCLE: Final = "".join(_WORDS)
_FILLER: Final = "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et "


def words(start: int, count: int) -> str:
    """Tokens `start` … `start + count - 1` of every answer: 4 characters each."""
    first = start % len(_WORDS)
    repeats = (first + count) // len(_WORDS) + 1
    return (_CYCLE * repeats)[first * TOKEN_BYTES : (first + count) * TOKEN_BYTES]


def filler(tag: str, size: int) -> str:
    """Text of exactly `size` bytes that starts with `tag` (ASCII), cut where it is too short for it."""
    return f"{tag} {_FILLER * (size // len(_FILLER) + 1)}"[:size]


def count_tokens(text: bytes) -> int:
    """Tokens of a prompt; the last one may be short."""
    return -(-len(text) // TOKEN_BYTES)


def header(role: str) -> bytes:
    """What the chat template puts before a message."""
    return _padded(f"<|{role}|>\n".encode())


def chat_prompt(messages: Iterable[tuple[str, str]]) -> bytes:
    """What the chat template makes of (role, content) pairs, the opening of the answer included."""
    parts = [header(role) + _padded(content.encode()) for role, content in messages]
    return b"".join(parts) + header("assistant")


def with_answer(prompt: bytes, tokens: int) -> bytes:
    """A prompt and the first tokens of its answer, as the KV cache has them."""
    return _padded(prompt) + words(0, tokens).encode()


def block_keys(text: bytes, block_size: int, adapter: str = "", salt: str = "") -> tuple[int, ...]:
    """Chained keys of the full blocks of a text, root first.

    Equal keys: equal text up to there, same adapter, same cache salt. Source: vLLM v1 block hash chaining. A key is the
    sum of the 64-bit hashes of all blocks so far, each seeded with its place: 66 us for 775 blocks, and 90 us where
    each hash seeds the next.
    """
    size = block_size * TOKEN_BYTES
    seed = xxhash.xxh3_64_intdigest(f"{adapter}\n{salt}".encode())
    blocks: list[bytes] = np.frombuffer(text, f"V{size}", len(text) // size).tolist() if len(text) >= size else []
    return tuple(accumulate(map(xxhash.xxh3_64_intdigest, blocks, count(seed))))


def _padded(text: bytes) -> bytes:
    return text + b"\n" * (-len(text) % TOKEN_BYTES)
