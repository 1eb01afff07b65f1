"""A row by two numbers that stand in it, at 6 bytes a row.

In: two columns, which belong to whoever asks, and rows that he says are there now, or are not any more. Out: the row
that has two numbers in these columns, or 0.
Rules here:
- Row 0 is no row. A row's two numbers do not change while it is here.
- A row's number is all that is kept: what it is looked up by stands in the columns.
- It grows by one bucket whenever there are more than LOAD rows a bucket, so that no call pays for all the others.
Rejected: a dict (110 to 160 bytes a row with its key and value, all of it looked through by the garbage collector);
open addressing (as small where it is 80 % full, but long misses, and gaps to close: a new prompt cost the index 21 us
with it where it costs 10).
Source: linear hashing, Litwin 1980.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

LOAD: Final = 2


class Lookup:
    """Where a row is, by what `one` and `other` say in it."""

    __slots__ = ("_hash_of", "_heads", "_mask", "_next", "_one", "_other", "_rows")

    def __init__(self, one: array[int], other: array[int], hash_of: Callable[[int], int]) -> None:
        """
        Args:
            hash_of: the hash of a row by its two numbers, which is what `hashed` is below.
        """
        self._one = one
        self._other = other
        self._hash_of = hash_of
        self._heads = array("I", (0,))  # first row of each bucket
        self._next = array("I", (0,))  # by row: the next one of its bucket
        self._mask = 0  # 2^k - 1, at least the number of the last bucket
        self._rows = 0

    def find(self, hashed: int, one: int, other: int) -> int:
        """The row with these numbers; 0: there is none."""
        at = hashed & self._mask
        row = self._heads[at if at < len(self._heads) else at & self._mask >> 1]
        while row and (self._other[row] != other or self._one[row] != one):
            row = self._next[row]
        return row

    def put(self, hashed: int, row: int) -> None:
        """The row is there; no other one has its two numbers."""
        while row >= len(self._next):
            self._next.append(0)
        self._rows += 1
        if self._rows > LOAD * len(self._heads):
            self._add_bucket()
        at = self._bucket(hashed)
        self._next[row], self._heads[at] = self._heads[at], row

    def drop(self, hashed: int, row: int) -> None:
        """The row, which is there, is not any more."""
        self._rows -= 1
        at, following = self._bucket(hashed), self._next
        found = self._heads[at]
        if found == row:
            self._heads[at] = following[row]
            return
        while following[found] != row:
            found = following[found]
        following[found] = following[row]

    # -- inside --------------------------------------------------------------------------------------------------

    def _bucket(self, hashed: int) -> int:
        at = hashed & self._mask
        return at if at < len(self._heads) else at & self._mask >> 1

    def _add_bucket(self) -> None:
        """One more: some rows of the one that it is split from belong into it."""
        heads, following = self._heads, self._next
        if len(heads) > self._mask:
            self._mask = 2 * self._mask + 1
        split = len(heads) & self._mask >> 1
        row, heads[split] = heads[split], 0
        heads.append(0)
        while row:
            at, after = self._hash_of(row) & self._mask, following[row]
            following[row], heads[at] = heads[at], row
            row = after
