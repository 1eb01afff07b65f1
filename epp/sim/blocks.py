"""The KV cache of one engine in blocks: who uses them, which of them a prompt finds again, which go first.

In: chained block keys (a key stands for all tokens up to the end of its block, adapter and cache salt included).
Out: counts, and what each request holds.
Rules here:
- A block is in use (by one request or several), or free; free blocks keep what they hold until they are taken.
- Blocks that never held anything are taken first, then the others in the order in which they were freed; a request
  frees its last block first, so a leaf goes before what it continues.
- A block that is not full yet, or a copy of one that is already there, has no name: nothing finds it. vLLM lists copies
  beside the original; here only the original is found, which differs when it goes before its copy.
- Used + free = total, always.
- Keys are given numbers (`Names`), so a request's 480 blocks are one array, and to match, use, grow and release them is
  a few operations of numpy.
Rejected: dictionaries by key, which are seen to be right (the tests have them): all of 73-capacity with random routing
took 7.8 s of CPU with them and 3.2 with this; a tree of runs of blocks with one count of users each: a copy may outlive
its original and be followed by a block with a name, so a run may end and begin anywhere.
Source: vLLM v1 `BlockPool` (free queue, reference counts, lookup by hash chain).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
"""Of blocks, by what they hold; 0: a block without a name."""

FORGET: Final = 16
"""Names that are kept, at most, for each block that there is: names of what was evicted cost memory alone."""


class Held:
    """The blocks of one request, root first. Made, changed and emptied by a pool."""

    __slots__ = ("count", "named", "names")

    def __init__(self, names: Numbers, found: int, room: int) -> None:
        self.names = names
        """Of the blocks it has and will have, as far as they can be found."""
        self.count = found
        """Blocks that it holds."""
        self.named = np.zeros(room, np.int64)
        """The name of each of them; those that it will have are 0."""
        self.named[:found] = names[:found]

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"<Held [Blocks: {self.count} | Named: {np.count_nonzero(self.named[: self.count])}]>"


class BlockPool:
    """All KV-cache blocks of one engine."""

    def __init__(self, total: int, forget: int = FORGET) -> None:
        """
        Args:
            forget: names a block after which those that nobody needs are forgotten.
        """
        self.total = total
        self._blank = total
        """Free blocks that hold nothing."""
        self._kept = 0
        """Free blocks that hold something."""
        self._names = Names()
        self._most = self._forget = forget * total
        self._state: Numbers
        """By number: requests that use the block; 0: no block holds this; less: it is free since that release."""
        self._cells: memoryview
        """The same, for one number: 23 ns to read, an array's are 50."""
        self._remember(np.zeros(1024, np.int64))
        self._releases = 0
        self._freed: deque[tuple[int, Numbers]] = deque()
        """Free blocks by release, the first one first, the root of each first; those that are used again stay there,
        but their state is another then."""
        self._left = 0
        """How many of the first release were not looked at to be taken; those behind them were."""
        self._holders: set[Held] = set()

    def __repr__(self) -> str:
        return f"<BlockPool [Blocks: {self.total} | In use: {self.used} | Held: {self._kept}]>"

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return self._blank + self._kept

    @property
    def used(self) -> int:
        return self.total - self._blank - self._kept

    @property
    def names(self) -> int:
        """Blocks, here or not, whose names are remembered."""
        return self._names.count - 1

    def match(self, keys: Sequence[int]) -> tuple[int, int]:
        """How many leading blocks are here, and how many of those are free. Changes nothing."""
        states = self._state[self._names.known(keys)]
        there = states != 0
        found = len(states) if there.all() else int(there.argmin())
        return found, int(np.count_nonzero(states[:found] < 0))

    def use(self, keys: Sequence[int], found: int, room: int) -> Held:
        """Begin to use blocks.

        Args:
            keys: of all full blocks that the request has and will have, as far as they can be found.
            found: how many of them to use; all of those must be here.
            room: blocks that the request has in the end, at most.
        """
        if self._names.count > self._most:
            self._forget_names()
        held = Held(self._names.numbers(keys), found, room)
        while self._names.count >= len(self._state):
            self._remember(np.concatenate((self._state, np.zeros_like(self._state))))
        states = self._state[held.names[:found]]
        assert states.all(), "a block that is not here cannot be used"
        self._kept -= int(np.count_nonzero(states < 0))
        self._state[held.names[:found]] = np.maximum(states, 0) + 1
        self._holders.add(held)
        return held

    def grow(self, held: Held, count: int) -> bool:
        """Take `count` more blocks for a request; False, and nothing changes: there are not so many free ones."""
        if count > self.free:
            return False
        blank = min(count, self._blank)
        self._blank -= blank
        self._take(count - blank)
        held.count += count
        return True

    def name(self, held: Held, start: int, stop: int) -> None:
        """Blocks `start` … `stop - 1` of a request are full: they can be found from now on, where they have keys."""
        names = held.names[start:stop]
        new = self._state[names] == 0
        self._state[names[new]] = 1
        held.named[start : start + len(names)][new] = names[new]

    def go_on(self, held: Held) -> bool:
        """The last block of a request is full; take one more for it.

        As `name` and `grow` for one block, which is what decoding does nearly always: 0.5 us here, 5 us there.
        False: there is no free one. The block has its name all the same.
        """
        last, state = held.count - 1, self._cells
        if last < len(held.names):
            name = held.names.item(last)
            if not state[name]:
                state[name] = 1
                held.named[last] = name
        if self._blank:
            self._blank -= 1
        elif self._kept:
            self._take_one()
        else:
            return False
        held.count += 1
        return True

    def release(self, held: Held) -> None:
        """A request uses its blocks no more: the last is the first to be taken by others."""
        assert held.count <= len(held.named), "a request has more blocks than it was said to have in the end"
        named, state = held.named[: held.count], self._state
        state[0] = 1  # who has no name has one user
        left = state[named] - 1
        state[named] = left
        freed = named[left == 0]
        self._releases += 1
        state[freed] = -self._releases
        if len(freed):
            if not self._freed:
                self._left = len(freed)
            self._freed.append((-self._releases, freed))
        self._kept += len(freed)
        held.count = 0
        self._holders.discard(held)

    # -- inside --------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> None:
        """Empty the free blocks that are next to be taken; there must be so many."""
        state, freed = self._state, self._freed
        self._kept -= count
        while count:
            since, named = freed[0]
            named = named[: self._left]
            state[0] = since  # blocks without a name are as free as they were
            still = (state[named] == since).nonzero()[0]
            taken = still[-count:]
            state[named[taken]] = 0
            count -= len(taken)
            if len(taken) == len(still):
                freed.popleft()
                self._left = len(freed[0][1]) if freed else 0
            else:
                self._left = int(taken[0])

    def _take_one(self) -> None:
        """As `_take` of one, which answers ask for most; here without a look at all that was freed with it."""
        state, freed, left = self._cells, self._freed, self._left
        self._kept -= 1
        since, named = freed[0]
        while True:
            left -= 1
            name = named.item(left)
            taken = not name or state[name] == since
            if not left:
                freed.popleft()
                if freed:
                    since, named = freed[0]
                    left = len(named)
            if taken:
                break
        state[name] = 0
        self._left = left

    def _remember(self, state: Numbers) -> None:
        self._state, self._cells = state, state.data

    def _forget_names(self) -> None:
        """Number anew what is here, and what requests hold or will hold."""
        old = self._state[: self._names.count]
        needed = old != 0
        for held in self._holders:
            needed[held.names] = True
        number = self._names.keep(needed)
        old[0] = 0
        self._remember(np.zeros_like(self._state))
        self._state[number[needed]] = old[needed]
        self._freed = deque((since, number[named]) for since, named in self._freed)
        for held in self._holders:
            held.names, held.named = number[held.names], number[held.named]
        self._most = max(self._forget, 2 * self._names.count)


class _Stretch:
    """A piece of one or several chains without a fork in it."""

    __slots__ = ("begin", "end", "first", "keys", "then")

    def __init__(self, keys: Sequence[int], begin: int, end: int, first: int, then: dict[int, _Stretch]) -> None:
        self.keys = keys
        """A whole chain; this is its part from `begin` to `end`."""
        self.begin = begin
        self.end = end
        self.first = first
        """Number of the first key; the others have the next ones."""
        self.then = then
        """What follows, by its first key."""

    def __len__(self) -> int:
        return self.end - self.begin

    def common(self, keys: Sequence[int], start: int) -> int:
        """How many keys are equal from `start` on. Keys are chained: where two are equal, all before them are."""
        ahead = start - self.begin
        low, high = self.begin, min(self.end, len(keys) - ahead)
        if keys[high - 1 + ahead] == self.keys[high - 1]:
            return high - low
        while low < high:
            middle = (low + high) // 2
            if keys[middle + ahead] == self.keys[middle]:
                low = middle + 1
            else:
                high = middle
        return low - self.begin

    def split(self, length: int) -> None:
        """Let something else follow after so many keys."""
        middle = self.begin + length
        tail = _Stretch(self.keys, middle, self.end, self.first + length, self.then)
        self.end, self.then = middle, {self.keys[middle]: tail}


class Names:
    """Numbers for chained keys, from 1 on: a tree, for a number a key in a dictionary is what takes long."""

    def __init__(self) -> None:
        self.count = 1
        """One more than the last number."""
        self._roots: dict[int, _Stretch] = {}

    def known(self, keys: Sequence[int]) -> Numbers:
        """Numbers of the leading keys that have one."""
        return self._find(keys)[0]

    def numbers(self, keys: Sequence[int]) -> Numbers:
        """Numbers of all keys; those that have none are given one."""
        known, last, common = self._find(keys)
        start, new = len(known), len(keys) - len(known)
        if not new:
            return known
        if last is not None and common < len(last):
            last.split(common)
        then = self._roots if last is None else last.then
        then[keys[start]] = _Stretch(keys, start, len(keys), self.count, {})
        self.count += new
        return np.concatenate((known, np.arange(self.count - new, self.count)))

    def keep(self, needed: npt.NDArray[np.bool_]) -> Numbers:
        """Forget keys that are not needed, and that nothing needed follows in its stretch or behind it.

        Returns:
            The new number of each old one; 0: it has none any more.
        """
        places = [(self._roots, key) for key in self._roots]
        for then, key in places:  # it grows: every stretch, those that follow behind
            behind = then[key].then
            places += [(behind, each) for each in behind]
        for then, key in reversed(places):
            stretch = then[key]
            if not stretch.then and not needed[stretch.first : stretch.first + len(stretch)].any():
                del then[key]
        number = np.zeros(self.count, np.int64)
        self.count = 1
        for stretch in [then[key] for then, key in places if key in then]:
            number[stretch.first : stretch.first + len(stretch)] = np.arange(self.count, self.count + len(stretch))
            stretch.first = self.count
            self.count += len(stretch)
        return number

    def _find(self, keys: Sequence[int]) -> tuple[Numbers, _Stretch | None, int]:
        """Numbers of the leading keys that have one, the stretch of the last of them, and how many it has of them."""
        numbers: list[Numbers] = []
        then, at, last, common = self._roots, 0, None, 0
        while at < len(keys) and (stretch := then.get(keys[at])) is not None:
            last, common = stretch, stretch.common(keys, at)
            numbers.append(np.arange(stretch.first, stretch.first + common))
            at += common
            if common < len(stretch):
                break
            then = stretch.then
        return np.concatenate(numbers) if numbers else _NONE, last, common


_NONE: Final[Numbers] = np.zeros(0, np.int64)
