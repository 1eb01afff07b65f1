"""What each endpoint is believed to hold of earlier prompts, from what was sent to it.

In: hashes of blocks, as `block_hashes` makes them, and the slot that they were sent to. Out: for each slot, how many
leading blocks of a prompt it holds.
Rules here:
- A match is contiguous from block 0: an endpoint without block k has at most k, whatever later blocks it holds.
- Each slot has its own LRU, as large as the engine's cache; a block is at least as recent as the blocks behind it, so
  what is evicted first is the end of a prompt, never its beginning.
- Memory is bounded by the sum of the capacities; a block that nobody holds takes none.
How: a radix tree of runs. A run is a stretch of blocks in which no prompt has ended or branched off, so a prompt costs
a few steps however long it is, and 8 bytes a block. A slot holds a run whole, but for the one at the end of its LRU,
which may be cut. Who holds a run's successor holds the run whole, and touched it later.
Measured with 390 blocks (100 KB), the index full, on one of two shared cores: a match 2.5 us, new blocks that evict as
many 5.5 us, 9 bytes a block (239 where every prompt is one block). Rejected: a dict from each block's hash to its
holders and an LRU of blocks for each slot (33 us, 170 us, 144 bytes); holders as a Python set, copied for every block
(the reference): a Python int is a set of slots whose intersection is one operation, however many endpoints there are.
Source: llm-d approx-prefix-cache-producer, without its gaps (matches with holes; capacity in the wrong unit); SGLang's
radix cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from epp.endpoints.table import Slots
from epp.prefix.hashing import HASH_BYTES

Counts = npt.NDArray[np.int64]


class _Run:
    """Blocks that follow one another; a node of the tree."""

    __slots__ = ("after", "before", "cut", "hashes", "whole")

    def __init__(self, hashes: bytes, before: _Run | None) -> None:
        self.hashes = hashes
        self.before = self if before is None else before
        """The root of the tree, of no blocks, is its own."""
        self.after = _NOTHING
        """The runs that follow, by the hash of their first block."""
        self.whole = 0
        """Bit set of the slots that hold all of it."""
        self.cut = 0
        """Bit set of the slots that hold only its beginning; their places say how much."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.hashes) // HASH_BYTES

    def follow(self, hashes: bytes, at: int) -> _Run | None:
        """The run after this one that begins with the block at byte `at`."""
        return self.after.get(hashes[at : at + HASH_BYTES])

    def shared(self, hashes: bytes, at: int) -> int:
        """How many leading blocks of the run are those that begin at byte `at`."""
        if hashes.startswith(self.hashes, at):
            return len(self)
        low, high = 0, len(self)
        while high - low > 1:
            middle = (low + high) // 2
            known = low * HASH_BYTES
            if hashes.startswith(self.hashes[known : middle * HASH_BYTES], at + known):
                low = middle
            else:
                high = middle
        return low

    def put_after(self, run: _Run) -> None:
        run.before = self
        if self.after is _NOTHING:
            self.after = {}  # most runs never need one of their own
        self.after[run.hashes[:HASH_BYTES]] = run


_NOTHING: Final[dict[bytes, _Run]] = {}


class _Place:
    """A run in the LRU of a slot: a doubly linked ring, in which a split run takes two places side by side."""

    __slots__ = ("blocks", "newer", "older", "run")

    def __init__(self, run: _Run, blocks: int) -> None:
        self.run = run
        self.blocks = blocks
        """How many leading blocks of the run the slot holds."""
        self.newer = self.older = self

    def link(self, older: _Place) -> None:
        """Come right after `older`."""
        self.older, self.newer = older, older.newer
        older.newer.older = self
        older.newer = self

    def unlink(self) -> None:
        self.older.newer, self.newer.older = self.newer, self.older


class _Held:
    """What one slot holds."""

    __slots__ = ("bit", "blocks", "ends", "places")

    def __init__(self, slot: int, root: _Run) -> None:
        self.bit = 1 << slot
        self.blocks = 0
        self.places: dict[_Run, _Place] = {}
        self.ends = _Place(root, 0)
        """Where the ring begins and ends: `newer` is the least recent place, `older` the most recent."""

    def touch(self, run: _Run) -> None:
        """The slot holds all of the run, used just now."""
        place = self.places.get(run)
        if place is None:
            place = self.places[run] = _Place(run, 0)
        else:
            place.unlink()
        place.link(self.ends.older)
        self.blocks += len(run) - place.blocks
        place.blocks = len(run)
        run.whole |= self.bit
        run.cut &= ~self.bit

    def drop(self, place: _Place) -> None:
        place.unlink()
        self.blocks -= place.blocks
        del self.places[place.run]
        place.run.whole &= ~self.bit
        place.run.cut &= ~self.bit

    def shorten(self, place: _Place, blocks: int) -> None:
        """The slot no longer holds the last `blocks` blocks of what it holds of a run, which are not all."""
        self.blocks -= blocks
        place.blocks -= blocks
        place.run.whole &= ~self.bit
        place.run.cut |= self.bit

    def split(self, run: _Run, front: _Run, blocks: int) -> None:
        """The first `blocks` blocks of a run became one of their own."""
        place = self.places[run]
        if place.blocks > blocks:
            place.blocks -= blocks
            self.places[front] = _Place(front, blocks)
            self.places[front].link(place)
        else:
            self.places[front] = self.places.pop(run)
            place.run = front


class ApproximateIndex:
    """Which slots are believed to hold which beginnings of prompts, bounded for each slot."""

    def __init__(self) -> None:
        self._root = _Run(b"", None)
        self._held: dict[int, _Held] = {}
        self._blocks = 0

    def __repr__(self) -> str:
        return f"<ApproximateIndex [Endpoints: {len(self._held)} | Blocks: {self._blocks}]>"

    def __len__(self) -> int:
        """Number of different blocks that anybody holds; one block behind two beginnings is two."""
        return self._blocks

    def held(self, slot: int) -> int:
        """Number of blocks that a slot is believed to hold."""
        return self._held[slot].blocks if slot in self._held else 0

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
            counts[_members(ending)] = depth
        return counts.take(slots, mode="clip")  # slots beyond those that hold something find the 0 at the end

    def add(self, hashes: bytes, slot: int, capacity: int) -> None:
        """A prompt was sent to a slot: it holds the blocks now, as far as they fit.

        Args:
            capacity: blocks that the endpoint can hold.
        """
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = _Held(slot, self._root)
        for run in reversed(self._path(hashes[: capacity * HASH_BYTES], held.bit)):  # the root last: most recent
            held.touch(run)
        while (excess := held.blocks - capacity) > 0:
            self._evict(held, held.ends.newer, excess)

    def forget(self, slot: int) -> None:
        """The slot will mean another endpoint, or its cache is empty."""
        held = self._held.pop(slot, None)
        if held is not None:
            while held.blocks:
                self._evict(held, held.ends.newer, held.blocks)
            del held.ends.newer, held.ends.older  # a ring is freed by nobody but the garbage collector

    # -- inside --------------------------------------------------------------------------------------------------

    def _depths(self, hashes: bytes) -> list[tuple[int, int]]:
        """(depth, bit set of the slots whose match ends there); each slot at most once, depth 0 left out."""
        depths: list[tuple[int, int]] = []
        run = self._root.follow(hashes, 0)
        alive, depth = (run.whole | run.cut, 0) if run is not None else (0, 0)
        while run is not None and alive:
            shared = run.shared(hashes, depth * HASH_BYTES)
            if cut := alive & run.cut:
                depths += [
                    (depth + min(self._held[slot].places[run].blocks, shared), 1 << slot) for slot in _slots(cut)
                ]
            if depth and (ended := alive & ~(run.whole | run.cut)):
                depths.append((depth, ended))
            alive &= run.whole
            depth += shared
            run = run.follow(hashes, depth * HASH_BYTES) if shared == len(run) else None
        if alive:
            depths.append((depth, alive))
        return depths

    def _path(self, hashes: bytes, bit: int) -> list[_Run]:
        """The runs that are exactly these blocks, root first: split or made where there are none."""
        path: list[_Run] = []
        last, at = self._root, 0
        while at < len(hashes):
            run = last.follow(hashes, at)
            if run is None:
                return self._grow(path, last, hashes[at:], bit)
            shared = run.shared(hashes, at)
            last = run if shared == len(run) else self._split(run, shared)
            path.append(last)
            at += len(last.hashes)
        return path

    def _grow(self, path: list[_Run], last: _Run, tail: bytes, bit: int) -> list[_Run]:
        """Put new blocks after the last run of a path: into it, where that is nobody else's business."""
        self._blocks += len(tail) // HASH_BYTES
        if last.whole == bit and not last.cut and not last.after:  # the next turn of a conversation
            last.hashes += tail
            return path
        run = _Run(tail, last)
        last.put_after(run)
        return [*path, run]

    def _split(self, run: _Run, blocks: int) -> _Run:
        """Make the first blocks of a run one of their own, and return it; the run becomes what follows it."""
        cut = blocks * HASH_BYTES
        front = _Run(run.hashes[:cut], run.before)
        run.before.put_after(front)
        run.hashes = run.hashes[cut:]
        front.put_after(run)
        for slot in _slots(run.whole | run.cut):
            self._held[slot].split(run, front, blocks)
        front.whole, run_cut = run.whole, run.cut
        for slot in _slots(run_cut):
            self._mark(front, slot)
            self._mark(run, slot)
        return front

    def _mark(self, run: _Run, slot: int) -> None:
        """Say anew whether a slot holds a run whole, its beginning, or nothing."""
        place, bit = self._held[slot].places.get(run), 1 << slot
        run.whole &= ~bit
        run.cut &= ~bit
        if place is not None and place.blocks == len(run):
            run.whole |= bit
        elif place is not None:
            run.cut |= bit

    def _evict(self, held: _Held, place: _Place, blocks: int) -> None:
        """Take the last blocks of what a slot holds of a run, all if they are no more than asked for."""
        run = place.run
        if place.blocks <= blocks:
            held.drop(place)
        else:
            held.shorten(place, blocks)
        if not run.whole:
            self._shrink(run)

    def _shrink(self, run: _Run) -> None:
        """Forget the end of a run that nobody holds whole, or all of it."""
        holders = list(_slots(run.cut))
        longest = max((self._held[slot].places[run].blocks for slot in holders), default=0)
        self._blocks -= len(run) - longest
        if not longest:
            del run.before.after[run.hashes[:HASH_BYTES]]
        run.hashes = run.hashes[: longest * HASH_BYTES]
        for slot in holders:
            self._mark(run, slot)


def _slots(bits: int) -> Iterator[int]:
    """The slots in a bit set, rising."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _members(bits: int) -> npt.NDArray[np.intp] | int:
    """The slots in a bit set, as an index into an array."""
    if not bits & (bits - 1):  # one alone needs no array: 3 us less, and most prompts are held by one
        return bits.bit_length() - 1
    raw = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))
