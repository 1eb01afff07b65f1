"""What each endpoint is believed to hold of earlier prompts, from what was sent to it.

In: hashes of blocks, as `block_hashes` makes them, and the slot that they were sent to. Out: for each slot, how many
leading blocks of a prompt it holds.
Rules here:
- A match is contiguous from block 0: an endpoint without block k has at most k, whatever later blocks it holds.
- Each slot has its own LRU, as large as the engine's cache; a block is at least as recent as the blocks behind it, so
  what is evicted first is the end of a prompt, never its beginning.
- Age: what a slot has not used since it computed as many blocks as it has room for is gone. Engines give their least
  recent block away for each one they compute, whatever it is; so computed blocks that no prompt can match (outputs,
  prompts that others sent) push out what is old, and they take no room here: `computed`.
- `limit` bytes are all that it takes. Beyond it whoever holds most gives up his least recent, so that small caches keep
  what they have. Slots are numbers below 65,536.
How: `runs.py` is the tree of what there is, `places.py` the LRU of each slot. A slot holds a run whole, but for the one
at the end of its LRU, which may be cut. Who holds what follows a run holds the run whole, and touched it later.
Rejected: a dict from each block's hash to its holders and an LRU of blocks for each slot (33 us for a match, 170 us for
new blocks, 144 bytes a block); holders as a Python set, copied for every block (the reference); an object a run and a
place (a new prompt in 4 us instead of 10, but four times the memory where prompts are short); computed blocks in the
LRU as stretches without a name (as exact, but a place for every answer).
Measured: `python -m bench.index`; docs/performance.md has a run of it.
Source: llm-d approx-prefix-cache-producer, without its gaps (matches with holes; capacity in the wrong unit; no decay);
vLLM's queue of free blocks, for age.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from epp.endpoints.table import Slots
from epp.prefix.hashing import HASH_BYTES
from epp.prefix.places import STAMPS, Places
from epp.prefix.runs import Runs, members, slots_in

Counts = npt.NDArray[np.int64]

LIMIT: Final = 256 << 20


class _Held:
    """What one slot holds."""

    __slots__ = ("bit", "blocks", "computed", "cut", "ends", "kept", "slot")

    def __init__(self, slot: int, ends: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.blocks = 0
        self.computed = 0
        """Blocks ever computed here."""
        self.cut = 0
        """The run of which it holds only the beginning; 0: there is none, and there is never more than one."""
        self.kept = 0
        """Leading blocks of that run that it holds."""
        self.ends = ends
        """Place where the ring begins and ends: `newer` is the least recent place, `older` the most recent."""


class ApproximateIndex:
    """Which slots are believed to hold which beginnings of prompts, bounded for each slot and in all."""

    def __init__(self, limit: int = LIMIT) -> None:
        """
        Args:
            limit: bytes of all entries.
        """
        self._limit = limit
        self._runs = Runs()
        self._held: dict[int, _Held] = {}
        self._blocks = np.zeros(64, np.int64)  # by slot, as `_Held.blocks`: to see at once who holds most
        self._places = Places()

    def __repr__(self) -> str:
        return f"<ApproximateIndex [Endpoints: {len(self._held)} | Blocks: {len(self)} | Bytes: {self.size}]>"

    def __len__(self) -> int:
        """Number of different blocks that anybody holds; one block behind two beginnings is two."""
        return self._runs.blocks

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return self._runs.size + self._places.size

    def held(self, slot: int) -> int:
        """Number of blocks that a slot is believed to hold."""
        return self._held[slot].blocks if slot in self._held else 0

    def ever(self, slot: int) -> int:
        """Blocks that a slot is believed to have computed since it was added to first."""
        return self._held[slot].computed if slot in self._held else 0

    def match(self, hashes: bytes, slots: Slots) -> Counts:
        """Count, per slot, the leading blocks of a prompt that it holds.

        Args:
            hashes: of the prompt's blocks, HASH_BYTES each, root first.
            slots: shape (N,).

        Returns:
            Shape (N,), 0 to the number of blocks, in the order of `slots`.

        Cost: O(runs on the way), and once per different depth for the endpoints that end there.
        """
        depths = self._depths(hashes)
        if not depths:
            return np.zeros(len(slots), np.int64)
        counts = np.zeros(max(ending.bit_length() for _, ending in depths) + 1, np.int64)
        for depth, ending in depths:
            counts[members(ending)] = depth
        return counts.take(slots, mode="clip")  # slots beyond those that hold something find the 0 at the end

    def add(self, hashes: bytes, slot: int, capacity: int) -> int:
        """A prompt was sent to a slot: it holds the blocks now, as far as they fit.

        Args:
            capacity: blocks that the endpoint can hold.

        Returns:
            How many of them it did not hold before.
        """
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = self._arrive(slot)
        before = held.computed
        path = self._path(hashes[: capacity * HASH_BYTES], held)
        self._compute(held, sum(self._missing(held, run) for run in path))
        for run in reversed(path):  # the root last: most recent
            self._touch(held, run)
        self._age(held, capacity)
        while self.size > self._limit and len(self):
            self._give_way()
        return held.computed - before

    def computed(self, slot: int, blocks: int, capacity: int) -> None:
        """A slot computed so many blocks that no prompt here can match: what is old has been evicted for them."""
        held = self._held.get(slot)
        if held is not None:
            held.computed += blocks
            self._age(held, capacity)

    def forget(self, slot: int) -> None:
        """The slot will mean another endpoint, or its cache is empty."""
        held = self._held.pop(slot, None)
        if held is not None:
            while held.blocks:
                self._drop(held, self._places.newer[held.ends])
            self._places.close(held.ends)
            self._blocks[slot] = 0

    # -- who holds what ------------------------------------------------------------------------------------------

    def _depths(self, hashes: bytes) -> list[tuple[int, int]]:
        """(depth, bit set of the slots whose match ends there); each slot at most once, depth 0 left out."""
        depths: list[tuple[int, int]] = []
        runs = self._runs
        run = runs.follow(0, hashes, 0)
        alive, depth = runs.holders(run), 0
        while run and alive:
            whole = runs.whole(run)
            shared = runs.shared(run, hashes, depth * HASH_BYTES)
            beginning = alive & runs.cut[run] if run in runs.cut else 0
            depths += [(depth + min(self._held[slot].kept, shared), 1 << slot) for slot in slots_in(beginning)]
            if depth and (ended := alive & ~(whole | beginning)):
                depths.append((depth, ended))
            alive &= whole
            depth += shared
            run = runs.follow(run, hashes, depth * HASH_BYTES) if shared == runs.length(run) else 0
        if alive:
            depths.append((depth, alive))
        return depths

    def _path(self, hashes: bytes, held: _Held) -> list[int]:
        """The runs that are exactly these blocks, root first: split or made where there are none."""
        path: list[int] = []
        last, at = 0, 0
        while at < len(hashes):
            run = self._runs.follow(last, hashes, at)
            if not run:
                return self._grow(path, last, hashes[at:], held)
            shared = self._runs.shared(run, hashes, at)
            last = run if shared == self._runs.length(run) else self._split(run, shared)
            path.append(last)
            at += shared * HASH_BYTES
        return path

    def _grow(self, path: list[int], last: int, tail: bytes, held: _Held) -> list[int]:
        """Put new blocks after the last run of a path: into it, where that is nobody else's business."""
        runs = self._runs
        if last and runs.holders(last) == held.bit and held.cut != last and runs.is_last(last):
            runs.lengthen(last, tail)  # the next turn of a conversation
            self._compute(held, len(tail) // HASH_BYTES)
            return path
        return [*path, runs.make(last, tail)]

    def _split(self, run: int, blocks: int) -> int:
        """Make the first blocks of a run one of their own, and return it; the run becomes what follows it."""
        runs, places = self._runs, self._places
        whole, cut = runs.whole(run), runs.cut.get(run, 0)
        front = runs.split(run, blocks)
        front_cut = run_cut = 0
        for slot in slots_in(whole | cut):
            held = self._held[slot]
            place = places.find(slot, run)
            if held.cut != run or held.kept > blocks:
                places.link(places.enter(slot, front), place, places.stamp[place])
            else:
                places.move(place, front)
            if held.cut == run:
                run_cut, front_cut = self._cut_elsewhere(held, front, blocks, run_cut, front_cut)
        runs.hold(run, whole, run_cut)
        runs.hold(front, (whole | cut) & ~front_cut, front_cut)
        return front

    @staticmethod
    def _cut_elsewhere(held: _Held, front: int, blocks: int, run_cut: int, front_cut: int) -> tuple[int, int]:
        """Of a run that a slot holds cut, the first `blocks` blocks became `front`; returns who holds which one cut."""
        if held.kept > blocks:
            held.kept -= blocks
            return run_cut | held.bit, front_cut
        held.cut = front if held.kept < blocks else 0
        return run_cut, front_cut | held.bit if held.cut else front_cut

    # -- the LRU of a slot ---------------------------------------------------------------------------------------

    def _arrive(self, slot: int) -> _Held:
        if slot >= len(self._blocks):
            self._blocks = np.append(self._blocks, np.zeros(slot, np.int64))
        return _Held(slot, self._places.open(slot))

    def _missing(self, held: _Held, run: int) -> int:
        """Blocks of a run that the slot does not hold."""
        if self._runs.whole(run) & held.bit:
            return 0
        return self._runs.length(run) - (held.kept if held.cut == run else 0)

    @staticmethod
    def _compute(held: _Held, blocks: int) -> None:
        """The slot computes blocks that it will hold."""
        held.blocks += blocks
        held.computed += blocks

    def _touch(self, held: _Held, run: int) -> None:
        """The slot holds all of the run, used just now."""
        runs, places = self._runs, self._places
        whole = runs.whole(run)
        if whole & held.bit or held.cut == run:
            place = places.find(held.slot, run)
            places.unlink(place)
        else:
            place = places.enter(held.slot, run)
        if not whole & held.bit:
            held.cut = 0 if held.cut == run else held.cut
            runs.hold(run, whole | held.bit, runs.cut.get(run, 0) & ~held.bit)
        places.link(place, places.older[held.ends], held.computed % STAMPS)

    def _age(self, held: _Held, capacity: int) -> None:
        """Evict what does not fit, and what was not used since as many blocks were computed as fit."""
        places = self._places
        while held.blocks:
            oldest = places.newer[held.ends]
            if (held.computed - places.stamp[oldest]) % STAMPS >= capacity:
                self._drop(held, oldest)
            elif held.blocks > capacity:
                self._evict(held, oldest, held.blocks - capacity)
            else:
                break
        self._blocks[held.slot] = held.blocks

    def _give_way(self) -> None:
        """Who holds most gives up his least recent run."""
        held = self._held[int(self._blocks.argmax())]
        self._drop(held, self._places.newer[held.ends])
        self._blocks[held.slot] = held.blocks

    def _evict(self, held: _Held, place: int, blocks: int) -> None:
        """Take the last blocks of what a slot holds of a run, all if they are no more than asked for."""
        run, runs = self._places.run[place], self._runs
        there = held.kept if held.cut == run else runs.length(run)
        if there <= blocks:
            self._drop(held, place)
            return
        held.blocks -= blocks
        held.cut, held.kept = run, there - blocks
        whole, cut = runs.whole(run) & ~held.bit, runs.cut.get(run, 0) | held.bit
        runs.hold(run, whole, cut)
        if not whole:
            self._shrink(run, cut)

    def _drop(self, held: _Held, place: int) -> None:
        """The slot holds nothing of a run any more."""
        run, runs = self._places.run[place], self._runs
        held.blocks -= held.kept if held.cut == run else runs.length(run)
        if held.cut == run:
            held.cut = 0
        self._places.leave(place)
        whole, cut = runs.whole(run) & ~held.bit, runs.cut.get(run, 0) & ~held.bit
        if whole | cut:
            runs.hold(run, whole, cut)
        if not whole:
            self._shrink(run, cut)

    def _shrink(self, run: int, cut: int) -> None:
        """Forget the end of a run that nobody holds whole, and these slots cut; all of it, if there are none."""
        if not cut:
            self._runs.remove(run)
            return
        holders = [self._held[slot] for slot in slots_in(cut)]
        longest = max(held.kept for held in holders)
        whole = 0
        for held in holders:
            if held.kept == longest:
                whole |= held.bit
                held.cut = 0
        self._runs.hold(run, whole, cut & ~whole)
        self._runs.shorten(run, longest)
