"""Small worlds: an engine whose steps take a round second a prompt token, and requests given by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import msgspec

from epp.sim.profile import EngineProfile
from epp.sim.workload import Arrival
from epp.sim.world import Asked, Reference

ROUND = EngineProfile(
    name="round",
    a0=1.0,
    a1=0.0,
    a2=0.0,
    a3=0.0,
    a4=0.0,
    kv_blocks=64,
    max_num_batched_tokens=1024,
    max_num_seqs=8,
    max_lora=1,
    lora_load_s=0.0,
)
"""Every step takes a second, whatever is in it; 64 blocks of 16 tokens."""


class Given(msgspec.Struct, frozen=True):
    """A source of requests at given times."""

    times: tuple[float, ...]
    output_tokens: int = 2
    characters: int = 64
    same: bool = False
    """All ask the same."""
    name: str = "given"
    model: str = "base"
    rate: float = 1.0

    def arrivals(self, seed: int, duration: float = math.inf, rate: float | None = None) -> Iterator[Arrival]:
        for number, at in enumerate(self.times):
            said = f"{0 if self.same else number:04}".ljust(self.characters, ".")
            yield Arrival(at, "tenant", self.model, (("user", said),), self.output_tokens, f"{number}")


class To(Reference):
    """Sends each request where it is told, in turn, and remembers what it was told."""

    def __init__(self, *servers: int) -> None:
        super().__init__(Random(0))
        self._servers = servers
        self.log: list[tuple[str, int, float]] = []

    def choose(self, asked: Asked, now: float) -> int:
        self.log.append(("choose", asked.number, now))
        return self._servers[asked.number % len(self._servers)]

    def answered(self, asked: Asked, now: float) -> None:
        self.log.append(("answered", asked.number, now))

    def ended(self, asked: Asked, now: float) -> None:
        self.log.append(("ended", asked.number, now))
