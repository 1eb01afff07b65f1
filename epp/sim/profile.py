"""What one model server can do: the constants of its step time and its limits.

In: a name of a profile that comes with the package, or a path to a YAML file. Out: an `EngineProfile`.
Rules here: every constant in a profile file says where it is from; a profile that cannot be right is refused.
Rejected: constant time to first token plus constant time per token (llm-d-inference-sim): no queueing, no batching
effect, no cache, hence nothing that routing could improve.
Source of the form: `t_step = a0 + a1 prefill tokens + a2 decodes + a3 context + a4 attention pairs`, linear fits of
vLLM v1 steps as in BLIS (Apache-2.0, inference-sim/inference-sim) and Vidur.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import yaml
from msgspec import Meta

from epp.errors import ConfigError

PROFILES: Final = Path(__file__).parent / "profiles"

Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Count = Annotated[int, Meta(ge=1)]


class EngineProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one kind of server."""

    name: str
    a0: Seconds
    """Seconds a step, whatever is in it: weights are read once."""
    a1: Seconds
    """Seconds a prefill token."""
    a2: Seconds
    """Seconds a decoding request."""
    a3: Seconds
    """Seconds a token of context of every decoding request: its keys and values are read."""
    a4: Seconds
    """Seconds a query-key pair of prefill: attention grows with the square of the prompt."""
    kv_blocks: Count
    max_num_batched_tokens: Count
    """Token budget of a step."""
    max_num_seqs: Count
    """Requests in one batch."""
    max_lora: Count
    """Distinct adapters in one batch."""
    lora_load_s: Seconds
    """Seconds that a step lasts longer when it brings an adapter to the GPU."""
    block_size: Count = 16
    """Tokens a KV-cache block."""
    gpu: str = ""
    """Kind of GPU, by the name under which `epp plan --price` knows it, in lower case; empty: none that has a price."""
    gpus: Count = 1
    """GPUs a server."""

    def __post_init__(self) -> None:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError("max_num_seqs must not be over max_num_batched_tokens: every decode needs one token")
        if self.a0 + self.a2 <= 0:
            raise ValueError("a step of decodes must take time: a0 or a2 must be over 0")

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache: the longest prompt and answer together."""
        return self.kv_blocks * self.block_size

    def step_time(self, prefill_tokens: int, decodes: int, context: int, pairs: float) -> float:
        """Seconds of one step.

        Args:
            prefill_tokens: prompt tokens computed in it.
            decodes: requests that get one token each.
            context: tokens of context of those requests, summed.
            pairs: query-key pairs of the prefill tokens.
        """
        linear = self.a0 + self.a1 * prefill_tokens + self.a2 * decodes
        return linear + self.a3 * context + self.a4 * pairs


def load_profile(name_or_path: str) -> EngineProfile:
    """Read a profile by its name (see `profile_names`) or from a YAML file.

    Raises:
        ConfigError: no such profile, or a value is missing, unknown or impossible.
    """
    path = PROFILES / f"{name_or_path}.yaml" if name_or_path in profile_names() else Path(name_or_path)
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        known = ", ".join(profile_names())
        raise ConfigError(f"no engine profile {name_or_path!r}: give a YAML file or one of {known}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error
    try:
        return msgspec.convert(yaml.safe_load(text), EngineProfile, strict=False)  # 40e-6 is a string in YAML 1.1
    except msgspec.ValidationError as error:
        raise ConfigError(f"not an engine profile: {error}", file=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        told = getattr(error, "problem", None) or f"{error}"
        raise ConfigError(
            f"not an engine profile: {told}", file=str(path), line=mark.line + 1 if mark else 0
        ) from error


def profile_names() -> tuple[str, ...]:
    """Profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.yaml")))
