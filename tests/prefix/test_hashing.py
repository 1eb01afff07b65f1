"""A prompt as the hashes of its blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from epp.prefix.hashing import HASH_BYTES, block_hashes, root_seed

SEED = root_seed("m", "")


def test_each_block_is_hashed_by_itself_and_the_first_with_the_seed() -> None:
    expected = xxh3_64_digest(b"abcd", seed=7) + xxh3_64_digest(b"efgh") + xxh3_64_digest(b"abcd")
    assert block_hashes(b"abcdefghabcd", 7, 1, 10) == expected


def test_a_block_is_four_bytes_a_token_and_the_partial_last_one_is_left_out() -> None:
    for length, blocks in ((0, 0), (255, 0), (256, 1), (511, 1), (512, 2)):
        assert len(block_hashes(b"x" * length, SEED, 64, 100)) == blocks * HASH_BYTES


def test_no_more_blocks_than_asked_for() -> None:
    assert len(block_hashes(b"x" * 4096, SEED, 64, 3)) == 3 * HASH_BYTES
    assert block_hashes(b"x" * 4096, SEED, 64, 0) == b""


def test_models_and_salts_never_share() -> None:
    seeds = [root_seed(*who) for who in (("m", ""), ("m2", ""), ("m", "salt"), ("", "m"), ("msalt", ""), ("salt", "m"))]
    assert len({block_hashes(b"x" * 256, seed, 64, 1) for seed in seeds}) == len(seeds)


@given(st.binary(max_size=600), st.binary(max_size=600), st.binary(max_size=600), st.integers(1, 8))
def test_two_prompts_share_hashes_exactly_as_far_as_they_share_whole_blocks(
    same: bytes, one: bytes, other: bytes, tokens: int
) -> None:
    pair = same + one, same + other
    left, right = (split(block_hashes(prompt, SEED, tokens, 10_000), HASH_BYTES) for prompt in pair)
    assert shared(left, right) == shared(*(split(prompt, 4 * tokens) for prompt in pair))


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]


def shared(left: list[bytes], right: list[bytes]) -> int:
    """How many leading items are the same."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
