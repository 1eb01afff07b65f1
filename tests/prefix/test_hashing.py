"""A prompt as a chain of block hashes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from epp.prefix.hashing import block_hashes, chain_seed

SEED = chain_seed("m", "")


def test_each_hash_is_seeded_with_the_one_before() -> None:
    first = xxh3_64_intdigest(b"abcd", seed=7)
    assert block_hashes(b"abcdefgh", 7, 1, 10) == [first, xxh3_64_intdigest(b"efgh", seed=first)]


def test_a_block_is_four_bytes_a_token_and_the_partial_last_one_is_left_out() -> None:
    for length, blocks in ((0, 0), (255, 0), (256, 1), (511, 1), (512, 2)):
        assert len(block_hashes(b"x" * length, SEED, 64, 100)) == blocks


def test_no_more_blocks_than_asked_for() -> None:
    assert len(block_hashes(b"x" * 4096, SEED, 64, 3)) == 3
    assert block_hashes(b"x" * 4096, SEED, 64, 0) == []


def test_models_and_salts_never_share() -> None:
    seeds = [
        chain_seed(*who) for who in (("m", ""), ("m2", ""), ("m", "salt"), ("", "m"), ("msalt", ""), ("salt", "m"))
    ]
    hashes = {block_hashes(b"x" * 256, seed, 64, 1)[0] for seed in seeds}
    assert len(hashes) == len(seeds)


@given(st.binary(max_size=600), st.binary(max_size=600), st.binary(max_size=600), st.integers(1, 8))
def test_two_prompts_share_hashes_exactly_as_far_as_they_share_whole_blocks(
    same: bytes, one: bytes, other: bytes, tokens: int
) -> None:
    left, right = same + one, same + other
    hashes = block_hashes(left, SEED, tokens, 10_000), block_hashes(right, SEED, tokens, 10_000)
    size = 4 * tokens
    blocks = [[prompt[i : i + size] for i in range(0, len(prompt) - size + 1, size)] for prompt in (left, right)]
    shared = next((i for i, (a, b) in enumerate(zip(*blocks, strict=False)) if a != b), min(map(len, blocks)))
    assert hashes[0][:shared] == hashes[1][:shared]
    assert set(hashes[0][shared:]).isdisjoint(hashes[1][shared:])
