"""The prefix index with a million entries: what it takes, and what it costs, beside the number of endpoints.

`python -m bench.index [ENTRIES]` fills an index with a million blocks that endpoints hold (or ENTRIES), in prompts of
different shapes, and prints bytes an entry, by the growth of the process (RSS) and as the index counts itself; then,
with everybody's cache full, microseconds for a look-up of a prompt that is held and for a new one that pushes as many
blocks out, and milliseconds of a full collection of garbage. Below that: a body of 100 KB from its bytes to a match,
at 100 and 1,000 endpoints of which a third hold beginnings of it, each as long as no other's. Four minutes.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Final

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.prompt import best, chat, hashes_of, text
from bench.subjects import resident
from epp.dialects import read
from epp.prefix.approximate import ApproximateIndex
from epp.prefix.hashing import HASH_BYTES

ENTRIES: Final = 1_000_000
LOOKS: Final = 300


class Shape(msgspec.Struct, frozen=True):
    """Prompts of one kind."""

    name: str
    own: int
    """Blocks of each prompt that are its own."""
    shared: int = 0
    """Blocks before them that are one of ten beginnings."""
    holders: int = 1
    """Endpoints that each prompt goes to."""


SHAPES: Final = (
    Shape("390 blocks (100 KB)", 390),
    Shape("40 blocks behind 20 shared", 40, 20),
    Shape("4 blocks behind 20 shared", 4, 20),
    Shape("1 block behind 20 shared", 1, 20),
    Shape("1 block", 1),
    Shape("1 block, on two endpoints", 1, 0, 2),
)


class Prompts:
    """Random hashes of prompts of one shape, and the slots that they go to."""

    def __init__(self, shape: Shape, slots: int) -> None:
        self._shape = shape
        self._slots = slots
        self._rng = random.Random(0)
        self._beginnings = [self._rng.randbytes(HASH_BYTES * shape.shared) for _ in range(10)]

    def next(self) -> tuple[bytes, list[int]]:
        own = self._rng.randbytes(HASH_BYTES * self._shape.own)
        return self._rng.choice(self._beginnings) + own, self._rng.sample(range(self._slots), self._shape.holders)


def fill(index: ApproximateIndex, prompts: Prompts, shape: Shape, entries: int, capacity: int) -> None:
    for _ in range(entries // (shape.own * shape.holders)):
        hashes, slots = prompts.next()
        for slot in slots:
            index.add(hashes, slot, capacity)


def measure(shape: Shape, slots: int, entries: int) -> tuple[str, ...]:
    """One line of the table, in a process of its own, so that no other line's memory is counted."""
    gc.collect()
    before = resident(os.getpid())
    index, prompts = ApproximateIndex(1 << 40), Prompts(shape, slots)
    fill(index, prompts, shape, entries, entries)
    taken = resident(os.getpid()) - before
    held = sum(index.held(slot) for slot in range(slots))
    began = time.perf_counter()
    gc.collect()
    collection = time.perf_counter() - began
    match, add = times(index, prompts, slots, held // slots)
    figures = taken / held, index.size / held, match, add, collection * 1e3
    return f"{held:,}", *(f"{figure:.1f}" for figure in figures)


def times(index: ApproximateIndex, prompts: Prompts, slots: int, capacity: int) -> tuple[float, float]:
    """Microseconds of a match and of an add, in the best of a few rounds; everybody is as full as his capacity."""
    for slot in range(slots):
        index.computed(slot, 0, capacity)
    everybody = np.arange(slots)
    match = add = float("inf")
    for _ in range(5):
        new = [prompts.next() for _ in range(LOOKS)]
        add = min(add, timed(functools.partial(add_all, index, new, capacity)))
        match = min(match, timed(functools.partial(match_all, index, new, everybody)))
    return match, add


def add_all(index: ApproximateIndex, new: list[tuple[bytes, list[int]]], capacity: int) -> None:
    for hashes, slots in new:
        index.add(hashes, slots[0], capacity)


def match_all(
    index: ApproximateIndex, new: list[tuple[bytes, list[int]]], everybody: np.typing.NDArray[np.int64]
) -> None:
    for hashes, _ in new:
        index.match(hashes, everybody)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) / LOOKS * 1e6


def look_up(size: int, slots: int) -> tuple[float, float, float]:
    """Microseconds for a body of text: reading it, its prompt's hashes, and a match; a third of the slots hold it."""
    sent, body = chat(text(size))
    request = read(sent, body)
    hashes = hashes_of(request)
    index, everybody = ApproximateIndex(), np.arange(slots)
    for slot in range(0, slots, 3):
        index.add(hashes[: HASH_BYTES * (1 + slot * len(hashes) // HASH_BYTES // slots)], slot, 10_000)
    return (
        best(lambda: read(sent, body)),
        best(lambda: hashes_of(request)),
        best(lambda: index.match(hashes, everybody)),
    )


def main() -> None:
    entries = int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES
    table = Table("prompts", "endpoints", "entries", "B each", "counted", "match", "add", "gc, ms", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for shape in SHAPES:
        for slots in (100, 1_000):
            with get_context("fork").Pool(1) as process:
                table.add_row(shape.name, f"{slots:,}", *process.apply(measure, (shape, slots, entries)))
    console = Console(width=120)
    console.print(table)
    for slots in (100, 1_000):
        reading, hashing, match = look_up(100_000, slots)
        total = reading + hashing + match
        stages = f"read {reading:.0f} us, hash {hashing:.0f}, match {match:.0f}"
        console.print(f"100 KB at {slots:,} endpoints: {stages}; {total:.0f} us in all")


if __name__ == "__main__":
    main()
