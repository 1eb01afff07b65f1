"""The reference that knows everything: what each cache holds, what waits where, how long each answer will be.

In: requests of a world. Out: the server where the sum of what the request waits and what it makes others wait is least.
Cost of a server, in seconds, by the engine's own constants:
- what is left to compute of the prompts that were sent there before it, with the quadratic term;
- its own prefill: of what neither the cache holds nor a prompt before it will bring;
- `EFFORT` times its own prefill again: work that another server need not do is work that others wait for;
- what the steps of all this take besides, for what decodes there;
- where the KV cache is full: until so much has ended that it fits;
- `PACE` times how much longer the answer takes for what decodes there already: else all that begin alike go to one.
Greedy, and so no bound: a policy may beat it that looks ahead. It is what perfect signals are worth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import Final

import msgspec

from epp.sim.profile import EngineProfile
from epp.sim.world import Asked, Reference, World

EFFORT: Final = 1.0
PACE: Final = 0.05


class Sent(msgspec.Struct, frozen=True):
    """A request whose first token has not come."""

    keys: Sequence[int]
    cached: int
    """Tokens found, as foreseen when it was sent."""
    prompt_tokens: int


class Oracle(Reference):
    """See above."""

    def __init__(self, rng: Random, effort: float = EFFORT, pace: float = PACE) -> None:
        super().__init__(rng)
        self._effort = effort
        self._pace = pace

    def begin(self, world: World) -> None:
        super().begin(world)
        self._sent: defaultdict[int, dict[str, Sent]] = defaultdict(dict)

    def choose(self, asked: Asked, now: float) -> int:
        cached = {server: self._cached(server, asked) for server in self.listed()}
        costs = {server: self._cost(server, asked, held) for server, held in cached.items()}
        least = min(costs.values())
        server = self.rng.choice([at for at, cost in costs.items() if cost == least])
        self._sent[server][f"{asked.number}"] = Sent(asked.prepared.keys, cached[server], asked.prompt_tokens)
        return server

    def answered(self, asked: Asked, now: float) -> None:
        del self._sent[asked.server][f"{asked.number}"]

    def ended(self, asked: Asked, now: float) -> None:
        self._sent[asked.server].pop(f"{asked.number}", None)

    def _cached(self, server: int, asked: Asked) -> int:
        """Tokens of a prompt that need not be computed there."""
        size = self.world.profiles[server].block_size
        keys = asked.prepared.keys[: (asked.prompt_tokens - 1) // size]
        found, _ = self.world.engines[server].blocks.match(keys)
        for sent in self._sent[server].values():
            found = max(found, common(keys, sent.keys[: sent.prompt_tokens // size]))
        return found * size

    def _cost(self, server: int, asked: Asked, cached: int) -> float:
        profile, engine = self.world.profiles[server], self.world.engines[server]
        load = engine.load()
        tokens, before = 0, 0.0
        for name, sent in self._sent[server].items():
            done = max(sent.cached, load.prefilled) if name == load.prefilling else sent.cached
            tokens += sent.prompt_tokens - done
            before += prefill(profile, done, sent.prompt_tokens)
        own = prefill(profile, cached, asked.prompt_tokens)
        tokens += asked.prompt_tokens - cached
        step = profile.step_time(0, load.decodes, load.context, 0.0)
        steps = tokens / max(1, profile.max_num_batched_tokens - load.decodes)
        slower = asked.output_tokens * (step - profile.a0)
        first = before + own + (0.5 + steps) * step + self._wait(server, tokens, step)
        return first + self._effort * own + self._pace * slower

    def _wait(self, server: int, tokens: int, step: float) -> float:
        """Seconds until so many tokens fit beside what decodes."""
        profile, engine = self.world.profiles[server], self.world.engines[server]
        lacking = -(-tokens // profile.block_size) - engine.blocks.free
        if lacking <= 0:
            return 0.0
        return engine.steps_until(lacking) * step


def prefill(profile: EngineProfile, cached: int, prompt_tokens: int) -> float:
    """Seconds to compute what is left of a prompt."""
    tokens = prompt_tokens - cached
    return profile.a1 * tokens + profile.a4 * tokens * (cached + (tokens + 1) / 2)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading keys that are equal. Keys are chained: where two are equal, all before them are."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
