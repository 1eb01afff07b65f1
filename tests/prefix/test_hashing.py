"""A prompt as the hashes of its blocks."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from epp.dialects import read
from epp.dialects.body import TOKENS_PER_BLOB
from epp.dialects.request import Request
from epp.prefix.hashing import HASH_BYTES, block_hashes, prompt_to_hash, root_seed

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


# -- images and the like -----------------------------------------------------------------------------------------------

PIXELS = "iVBOR/+8" * 500
"""4,000 letters of base64."""


def parts(*said: str, pixels: str | None = None) -> Request:
    content: list[dict[str, object]] = [{"type": "text", "text": text} for text in said]
    if pixels is not None:
        content.append({"type": "image_url", "image_url": {"url": "data:image/png;base64," + pixels}})
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return read(((":path", b"/v1/chat/completions"),), json.dumps(body).encode())


def hashed(request: Request, most: int = 1_000) -> list[bytes]:
    return split(block_hashes(prompt_to_hash(request, most * 256), SEED, 64, most), HASH_BYTES)


def test_an_image_counts_as_many_bytes_as_its_tokens_have() -> None:
    without, of_4_kb, of_40_kb = parts("hello"), parts("hello", pixels=PIXELS), parts("hello", pixels=PIXELS * 10)
    around = len(', {"type": "image_url", "image_url": {"url": }}')
    for request in (of_4_kb, of_40_kb):
        grown = len(prompt_to_hash(request, 10**6)) - len(prompt_to_hash(without, 10**6))
        assert grown == around + TOKENS_PER_BLOB * 4 // 16 * 16


def test_prompts_that_differ_in_an_image_share_what_is_before_it_and_nothing_behind() -> None:
    text = "word " * 200  # about 1,050 bytes until the image begins: four whole blocks
    one, same, other = (hashed(parts(text, pixels=pixels)) for pixels in (PIXELS, PIXELS, PIXELS[::-1]))
    assert one == same
    assert shared(one, other) == 4
    assert len(set(one[4:]) & set(other[4:])) == 0


def test_an_image_beyond_what_is_looked_at_changes_nothing_and_one_that_is_cut_counts_whole() -> None:
    text = "word " * 200
    assert hashed(parts(text, pixels=PIXELS), 4) == hashed(parts(text, pixels=PIXELS[::-1]), 4)
    other_end = PIXELS[:-1] + "Z"
    assert shared(hashed(parts(text, pixels=PIXELS), 6), hashed(parts(text, pixels=other_end), 6)) == 4


def test_an_open_blob_at_the_end_of_a_prompt_is_one() -> None:
    body = json.dumps({"model": "m", "input": "data:image/png;base64," + PIXELS}).encode()
    request = read(((":path", b"/v1/responses"),), body)
    assert len(prompt_to_hash(request, 10**6)) == TOKENS_PER_BLOB * 4 // 16 * 16


def test_prose_and_token_ids_are_as_they_were() -> None:
    for prompt in ("word " * 2_000, "字" * 2_000, list(range(2_000))):
        request = read(((":path", b"/v1/completions"),), json.dumps({"model": "m", "prompt": prompt}).encode())
        assert prompt_to_hash(request, 10**6) == request.prompt


def test_vllms_own_body_tells_images_apart_by_their_hashes() -> None:
    def seed(*hashes: str) -> int:
        features = {"mm_hashes": {"image": hashes}, "mm_placeholders": {"image": [{"offset": 1, "length": 2}]}}
        body = {"model": "m", "token_ids": [1, 2, 3], "cache_salt": "s", "features": features}
        request = read(((":path", b"/inference/v1/generate"),), json.dumps(body).encode())
        return root_seed(request.model, request.cache_salt)

    assert seed("a") == seed("a")
    assert len({seed(), seed("a"), seed("b"), seed("a", "b"), root_seed("m", "s")}) == 5


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
