"""The engines' own bodies: vLLM's `inference/v1/generate` and SGLang's `/generate`.

A known limit: images in vLLM's body are placeholder ids beside `features`, so prompts that differ only in their images
look alike here.
Source: vLLM's and SGLang's request types.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from epp.dialects.body import ABSENT, Body, count_tokens, first_prompt, opening, require, string, whole


class _Sampling(msgspec.Struct):
    n: Raw = ABSENT
    max_tokens: Raw = ABSENT
    max_new_tokens: Raw = ABSENT


_SAMPLING = msgspec.json.Decoder(_Sampling)


class VllmGenerate(Body):
    """Token in, token out; what limits the output is in `sampling_params`."""

    token_ids: Raw = ABSENT
    sampling_params: Raw = ABSENT

    def check(self) -> None:
        require("token_ids", self.token_ids)

    def choices(self) -> int:
        return whole(_sampling(self.sampling_params).n) or 1

    def output_limit(self) -> int | None:
        return whole(_sampling(self.sampling_params).max_tokens)

    def prompt_bytes(self, most: int) -> bytes:
        return first_prompt(self.token_ids, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.token_ids)


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


def _sampling(span: Raw) -> _Sampling:
    """Sampling parameters; without any when they are no object."""
    if opening(span) != b"{":
        return _Sampling()
    try:
        return _SAMPLING.decode(span)
    except (msgspec.DecodeError, RecursionError):
        return _Sampling()
