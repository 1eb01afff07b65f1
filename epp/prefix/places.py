"""The LRU of every slot: rings of places, rows of arrays.

A place says that a slot holds some of a run. Rules here:
- The places of a slot are a ring, from its least recent to its most recent one, closed by an end that is no run's.
- Row 0 is no place. Rows are used again. A slot is a number below 65,536.
Rejected: an object a place (64 bytes, and as much again in the dict that finds it).
"""

from __future__ import annotations

from array import array
from typing import Final

from epp.prefix.lookup import Lookup

PLACE_BYTES: Final = 24
"""Columns and cells of a place: 18, 6 more to look it up, and what growing arrays have in reserve."""
STAMPS: Final = 1 << 32
"""Stamps count up to this, and then from 0."""


class Places:
    """Every slot's ring. Whoever asks about a place has it from here and knows that it is still there."""

    def __init__(self) -> None:
        self.run = array("I", (0,))
        """By place: the run. Read only."""
        self.stamp = array("I", (0,))
        """By place: when the slot used the run last, by its own count."""
        self.newer = array("I", (0,))
        """By place: the next one in the ring; of an end the least recent place. Read only."""
        self.older = array("I", (0,))
        """By place: the one before it; of an end the most recent place. Read only."""
        self._slot = array("H", (0,))
        self._free = 0  # the next free row is its `newer`
        self._lookup = Lookup(self._slot, self.run, lambda row: hash((self._slot[row], self.run[row])))
        self._rows = 0

    @property
    def size(self) -> int:
        """Bytes, but for what takes them while there is no place."""
        return PLACE_BYTES * self._rows

    def find(self, slot: int, run: int) -> int:
        """The place of a run in a slot's ring; 0: the slot holds nothing of it."""
        return self._lookup.find(hash((slot, run)), slot, run)

    def open(self, slot: int) -> int:
        """The end of a new ring, without places."""
        return self._row(slot, 0)

    def close(self, end: int) -> None:
        """A ring without places is there no more."""
        self._release(end)

    def enter(self, slot: int, run: int) -> int:
        """A place for a run, which is to be linked."""
        place = self._row(slot, run)
        self._lookup.put(hash((slot, run)), place)
        return place

    def leave(self, place: int) -> None:
        """A place is there no more."""
        self.unlink(place)
        self._lookup.drop(hash((self._slot[place], self.run[place])), place)
        self._release(place)

    def move(self, place: int, run: int) -> None:
        """A place is another run's from now on, where it is."""
        slot = self._slot[place]
        self._lookup.drop(hash((slot, self.run[place])), place)
        self.run[place] = run
        self._lookup.put(hash((slot, run)), place)

    def link(self, place: int, older: int, stamp: int) -> None:
        """Put a place right after `older`."""
        newer = self.newer[older]
        self.older[place], self.newer[place] = older, newer
        self.newer[older] = self.older[newer] = place
        self.stamp[place] = stamp

    def unlink(self, place: int) -> None:
        """Take a place out of its ring, to be linked elsewhere."""
        older, newer = self.older[place], self.newer[place]
        self.newer[older], self.older[newer] = newer, older

    # -- inside --------------------------------------------------------------------------------------------------

    def _row(self, slot: int, run: int) -> int:
        """A ring of its own."""
        row = self._free
        if row:
            self._free = self.newer[row]
            self._slot[row], self.run[row], self.newer[row], self.older[row] = slot, run, row, row
        else:
            row = len(self.run)
            for column, value in ((self._slot, slot), (self.run, run), (self.newer, row), (self.older, row)):
                column.append(value)
            self.stamp.append(0)
        self._rows += 1
        return row

    def _release(self, row: int) -> None:
        self.newer[row], self._free = self._free, row
        self._rows -= 1
