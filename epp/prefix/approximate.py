"""What each endpoint is believed to hold of earlier prompts, from what was sent to it.

In: block hashes and the slot they were sent to. Out: for each slot, how many leading blocks of a prompt it holds.
Rules here:
- A match is contiguous from block 0: an endpoint without block k has at most k, whatever later blocks it holds.
- Each slot has its own LRU, as large as the engine's cache; a block is at least as recent as the blocks behind it, so
  what is evicted first is the end of a prompt, never its beginning.
- Memory is bounded by the sum of the capacities; a hash that nobody holds takes none.
Rejected: one set of endpoints per hash, copied for every block (the reference): a Python int is a set of slots whose
intersection is one operation, however many endpoints there are.
Source: llm-d approx-prefix-cache-producer, without its gaps (matches with holes; capacity in the wrong unit).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epp.endpoints.table import Bools, Slots

Counts = npt.NDArray[np.int64]


class ApproximateIndex:
    """Block hash -> the slots believed to hold it, bounded for each slot."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        """Hash -> bit set of slots; never 0."""
        self._lru: dict[int, OrderedDict[int, None]] = {}
        """Slot -> its hashes, least recent first."""

    def __repr__(self) -> str:
        return f"<ApproximateIndex [Endpoints: {len(self._lru)} | Blocks: {len(self._holders)}]>"

    def __len__(self) -> int:
        """Number of different blocks that anybody holds."""
        return len(self._holders)

    def held(self, slot: int) -> int:
        """Number of blocks that a slot is believed to hold."""
        return len(self._lru.get(slot, ()))

    def match(self, hashes: Sequence[int], slots: Slots) -> Counts:
        """Count, per slot, the leading blocks of a prompt that it holds.

        Args:
            hashes: chained block hashes, root first.
            slots: shape (N,).

        Returns:
            Shape (N,), 0..len(hashes), in the order of `slots`.

        Cost: O(matched blocks); once per different depth for the endpoints that end there.
        """
        counts = np.zeros(int(slots.max()) + 1 if len(slots) else 0, np.int64)
        for depth, ending in self._depths(hashes):
            mask = _members(ending, len(counts))
            counts[: len(mask)][mask] = depth
        return counts[slots]

    def add(self, hashes: Sequence[int], slot: int, capacity: int) -> None:
        """A prompt was sent to a slot: it holds the blocks now, as far as they fit.

        Args:
            capacity: blocks that the endpoint can hold.
        """
        recent = self._lru.setdefault(slot, OrderedDict())
        holders, bit = self._holders, 1 << slot
        for block in reversed(hashes[:capacity]):  # the root last: it is the most recent
            if block in recent:
                recent.move_to_end(block)
            else:
                recent[block] = None
                holders[block] = holders.get(block, 0) | bit
        while len(recent) > capacity:
            self._release(recent.popitem(last=False)[0], bit)

    def forget(self, slot: int) -> None:
        """The slot will mean another endpoint, or its cache is empty."""
        for block in self._lru.pop(slot, ()):
            self._release(block, 1 << slot)

    # -- inside --------------------------------------------------------------------------------------------------

    def _depths(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """(depth, bit set of the slots whose match ends there), depths rising, no set empty."""
        depths: list[tuple[int, int]] = []
        alive = self._holders.get(hashes[0], 0) if hashes else 0
        for depth, block in enumerate(hashes):
            if not alive:
                return depths
            still = alive & self._holders.get(block, 0)
            if still != alive:
                depths.append((depth, alive ^ still))
                alive = still
        if alive:
            depths.append((len(hashes), alive))
        return depths

    def _release(self, block: int, bit: int) -> None:
        rest = self._holders[block] & ~bit
        if rest:
            self._holders[block] = rest
        else:
            del self._holders[block]


def _members(bits: int, size: int) -> Bools:
    """The slots below `size` in a bit set, as a mask of at most `size`."""
    raw = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
    return np.unpackbits(raw, bitorder="little")[:size].view(np.bool_)
