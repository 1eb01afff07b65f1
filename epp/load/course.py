"""The order of a run: stages of a workload, and for two targets blocks that take turns.

In: a workload or a trace, its stages, targets. Out: `Block`s in order, and the arrivals of each.
Rules here:
- A block ends when its last answer has come: neither stages nor targets disturb each other. But where stages are the
  steps of one load, and there is one target, each begins when the one before it is over, answered or not.
- Stages are one stream of requests played faster or slower, as in the simulator: so what one stage has asked the next
  may ask again, and what is new is new in every stage.
- Two targets take turns in the order A B B A, so that whatever drifts (clocks of GPUs, other tenants, caches that
  fill) is on both sides alike. Both get the same requests at the same times; only what each request begins with
  differs, so that neither finds its prompts in a cache that the other filled, where both share servers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from epp.sim.workload import Arrival
from epp.sim.world import Source, Stage

LETTERS: Final = "AB"


class Block(msgspec.Struct, frozen=True):
    """One target gets a part of a stage."""

    at: int
    """Number of the stage."""
    stage: Stage
    target: int
    seconds: float
    """From its first second to the last arrival, at most."""
    waits: bool = True
    """The next block begins when the last answer of this one has come; else when its time is over."""


def blocks(stages: Sequence[Stage], targets: int, turn: float, *, waits: bool = True) -> Iterator[Block]:
    """Blocks in order.

    Args:
        targets: 1 or 2, of which each gets every stage whole.
        turn: seconds of a block where two targets take turns; the last one of a stage may be shorter.
        waits: each stage does for the one before it; else they are steps of one load.
    """
    for at, stage in enumerate(stages):
        length = turn if targets > 1 and not stage.warm_up else stage.seconds
        for part in range(math.ceil(stage.seconds / length)):
            order = range(targets) if part % 2 == 0 else reversed(range(targets))
            for target in order:
                seconds = min(length, stage.seconds - part * length)
                yield Block(at, stage, target, seconds, waits or stage.warm_up or targets > 1)


class Stream:
    """One target's requests, taken block by block."""

    def __init__(self, source: Source, seed: int, letter: str = "") -> None:
        self._rate = source.rate
        self._arrivals = source.arrivals(seed, rate=source.rate)
        self._letter = letter
        self._next = next(self._arrivals, None)
        self._taken = 0.0
        """Seconds of the stream that earlier blocks took."""

    def take(self, block: Block) -> Iterator[Arrival]:
        """Arrivals of the next block, timed from its first second. Take all of one before the next."""
        begins, pace = self._taken, self._rate / block.stage.rate
        self._taken = ends = begins + block.seconds / pace
        while (arrival := self._next) is not None and arrival.at < ends:
            self._next = next(self._arrivals, None)
            yield _own(msgspec.structs.replace(arrival, at=(arrival.at - begins) * pace), self._letter)


def streams(source: Source, seed: int, targets: int) -> tuple[Stream, ...]:
    """One stream for each target: the same requests; of two, each begins in its own letter."""
    letters = LETTERS if targets > 1 else [""]
    return tuple(Stream(source, seed, letter) for letter in letters)


def _own(arrival: Arrival, letter: str) -> Arrival:
    """The request moved by one byte: as long, and what shared a beginning still does, but with this letter's only."""
    if not letter or not arrival.messages or not arrival.messages[0][1]:
        return arrival
    (role, content), *rest = arrival.messages
    return msgspec.structs.replace(arrival, messages=((role, letter + content[:-1]), *rest))
