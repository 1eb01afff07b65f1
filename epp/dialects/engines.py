"""The engines' own bodies: vLLM's `inference/v1/generate` and SGLang's `/generate`.

Images in vLLM's body are placeholder ids beside `features`, which name each by a hash. These hashes are part of what
separates prompts from the start, so prompts with other images share nothing, not even the text before the first one.
Source: vLLM's and SGLang's request types.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from epp.dialects.body import (
    ABSENT,
    Body,
    are_ids,
    count_tokens,
    digest,
    first_prompt,
    opening,
    require,
    string,
    whole,
)


class _Sampling(msgspec.Struct):
    n: Raw = ABSENT
    max_tokens: Raw = ABSENT
    max_new_tokens: Raw = ABSENT


class _Features(msgspec.Struct):
    mm_hashes: Raw = ABSENT


_FEATURES = msgspec.json.Decoder(_Features)
_HASHES = msgspec.json.Decoder(dict[str, list[Raw]])
_SAMPLING = msgspec.json.Decoder(_Sampling)


class VllmGenerate(Body):
    """Token in, token out; what limits the output is in `sampling_params`."""

    token_ids: Raw = ABSENT
    features: Raw = ABSENT
    sampling_params: Raw = ABSENT

    def check(self) -> None:
        require("token_ids", self.token_ids)

    def salt(self) -> str:
        return string(self.cache_salt) + _media(self.features)

    def choices(self) -> int:
        return whole(_sampling(self.sampling_params).n) or 1

    def output_limit(self) -> int | None:
        return whole(_sampling(self.sampling_params).max_tokens)

    def prompt_bytes(self, most: int) -> bytes:
        return first_prompt(self.token_ids, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.token_ids)

    def has_ids(self) -> bool:
        return are_ids(self.token_ids)

    def media(self) -> tuple[bytes, ...]:
        try:
            hashes = _HASHES.decode(_FEATURES.decode(self.features).mm_hashes)
        except (msgspec.DecodeError, RecursionError):
            return ()
        return tuple(dict.fromkeys(digest(each) for kind in hashes.values() for each in kind))


class SglangGenerate(Body):
    """Text or ids, one or a batch. A batch may bring a list of sampling parameters: then nothing is known of them."""

    text: Raw = ABSENT
    input_ids: Raw = ABSENT
    input_embeds: Raw = ABSENT
    sampling_params: Raw = ABSENT
    extra_key: Raw = ABSENT

    def check(self) -> None:
        require("text` or `input_ids", self.text, self.input_ids, self.input_embeds)

    def salt(self) -> str:
        return string(self.extra_key) or string(self.cache_salt)

    def choices(self) -> int:
        return whole(_sampling(self.sampling_params).n) or 1

    def output_limit(self) -> int | None:
        return whole(_sampling(self.sampling_params).max_new_tokens)

    def prompt_bytes(self, most: int) -> bytes:
        return first_prompt(self.input_ids or self.text, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.input_ids) or count_tokens(self.text)

    def has_ids(self) -> bool:
        return are_ids(self.input_ids)


def _media(features: Raw) -> str:
    """What tells the images, audio and video of a prompt from those of another; empty: it has none."""
    if opening(features) != b"{":
        return ""
    try:
        return bytes(_FEATURES.decode(features).mm_hashes).decode("utf-8", "replace")
    except (msgspec.DecodeError, RecursionError):
        return ""


def _sampling(span: Raw) -> _Sampling:
    """Sampling parameters; without any when they are no object."""
    if opening(span) != b"{":
        return _Sampling()
    try:
        return _SAMPLING.decode(span)
    except (msgspec.DecodeError, RecursionError):
        return _Sampling()
