"""How many tokens there really are for each one that is estimated, learned of every model.

In: what answers say of their prompts' tokens; where answers are not seen, what engines count. Out: a factor by model.
Where it counts: in `Request.tokens`, and so in what a request weighs in flight and in whatever asks how long a prompt
is; in what a block of a prefix index is worth; and in how many of these blocks fit into an engine's cache. It does not
change how large a block is in bytes: every hash would be another one.
Rules here:
- It is real tokens over estimated ones, sums of both, so a long prompt says more than a short one; for long prompts
  are what load and caches are made of, and what templates add to each prompt matters less there. The sums are halved
  whenever WINDOW tokens are in them: a change of what is asked shows within a few hundred prompts.
- It begins at 1, with the weight of one prompt of PRIOR tokens. Prompts of token ids are counted, never estimated, and
  teach nothing.
- An answer that is out of all proportion teaches nothing either: a stored prompt, or one that is counted in part.
- What engines count is what all their prompts have, whoever sent them. So the mean of theirs is held against the mean
  of ours in the same time, over prompts enough to be alike; it teaches every model that was asked for then.
Rejected: a tokenizer (costs more than the decision, and engines have many); a factor by endpoint (its models differ).
Source: ours. The reference takes 4 bytes for a token whatever the language.
"""

from __future__ import annotations

import math
from typing import Final

WINDOW: Final = 1_000_000.0
"""Estimated tokens."""
PRIOR: Final = 2_000.0
MOST_MODELS: Final = 1_000
"""Models remembered: names that engines have answered for. Who was taught least recently gives way."""
LEAST: Final = 0.125
MOST: Final = 8.0
ENOUGH: Final = 64
"""Prompts between two readings of an engine's counters that are compared."""


class _Since:
    """What was sent to an endpoint since a reading of its counters."""

    __slots__ = ("estimates", "exact", "prompts", "prompts_then", "tokens_then")

    def __init__(self, tokens: float, prompts: float) -> None:
        self.tokens_then = tokens
        self.prompts_then = prompts
        self.prompts = 0
        self.exact = 0.0
        """Tokens of prompts that came as ids."""
        self.estimates: dict[str, float] = {}
        """Estimated tokens by model."""


class TokenRatios:
    """Real tokens for each estimated one."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # real, estimated
        self._since: dict[int, _Since] = {}
        self._generated: dict[int, float] = {}

    def of(self, model: str) -> float:
        """The factor of a model; 1 where nothing is known."""
        sums = self._sums.get(model)
        return 1.0 if sums is None else sums[0] / sums[1]

    def learn(self, model: str, estimated: float, real: float) -> None:
        """Prompts that were estimated at so many tokens had so many."""
        if estimated <= 0 or not LEAST <= real / estimated <= MOST:
            return
        sums = self._sums.pop(model, (PRIOR, PRIOR))
        while len(self._sums) >= MOST_MODELS:
            del self._sums[next(iter(self._sums))]
        scale = 0.5 if sums[1] > WINDOW else 1.0
        self._sums[model] = scale * sums[0] + real, scale * sums[1] + estimated

    def ran(self, slot: int, model: str, estimated: float, exact: float = 0.0) -> None:
        """A prompt whose answer was not seen has run on a slot: estimated at so many tokens, or exactly so many."""
        since = self._since.get(slot)
        if since is not None and len(since.estimates) < MOST_MODELS:
            since.prompts += 1
            since.exact += exact
            since.estimates[model] = since.estimates.get(model, 0.0) + estimated

    def counted(self, slot: int, tokens: float, prompts: float) -> None:
        """What a slot's engine has counted of prompts since its start; fewer than before: it started anew."""
        since = self._since.get(slot)
        if since is None or tokens < since.tokens_then or prompts < since.prompts_then:
            self._since[slot] = _Since(tokens, prompts)
            return
        theirs = prompts - since.prompts_then
        estimated = sum(since.estimates.values())
        if theirs < ENOUGH or since.prompts < ENOUGH:
            return
        self._since[slot] = _Since(tokens, prompts)
        real = (tokens - since.tokens_then) / theirs * since.prompts - since.exact
        for model, share in since.estimates.items():
            self.learn(model, share, share / estimated * real if estimated else 0.0)

    def answered(self, slot: int, generated: float) -> float:
        """Tokens of answers that a slot's engine has counted since the last time.

        Args:
            generated: since its start; fewer than before: it started anew. NaN: it does not tell.
        """
        if math.isnan(generated):
            return 0.0
        more = generated - self._generated.get(slot, generated)
        self._generated[slot] = generated
        return max(0.0, more)

    def forget(self, slot: int) -> None:
        """The slot will mean another endpoint."""
        self._generated.pop(slot, None)
        self._since.pop(slot, None)
