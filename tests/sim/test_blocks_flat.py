"""The block pool against one that is seen to be right: a dictionary of users and a list of free blocks, by key."""

from __future__ import annotations

from collections import Counter
from itertools import count

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from epp.sim.blocks import BlockPool, Held

BRANCHES = 2
DEPTH = 6

Chain = tuple[int, ...]


def chain(turns: list[int]) -> Chain:
    """Keys of a path in a tree: each says the whole path to it."""
    return tuple(int("1" + "".join(map(str, turns[: at + 1]))) for at in range(len(turns)))


def every_chain() -> list[Chain]:
    paths: list[list[int]] = [[]]
    for _ in range(DEPTH):
        paths = [[*path, turn] for path in paths for turn in range(BRANCHES)]
    return [chain(path) for path in paths]


EVERY_CHAIN = every_chain()


class FlatPool:
    """Blocks one by one. A key that is negative is one that nothing finds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.users: Counter[int] = Counter()
        self.kept: list[int] = []
        """Free blocks that hold something, the next to be taken first."""
        self.nameless = count(-1, -1)

    @property
    def free(self) -> int:
        return self.total - len(self.users)

    def match(self, keys: Chain) -> tuple[int, int]:
        found = free = 0
        for key in keys:
            if key not in self.users and key not in self.kept:
                break
            found, free = found + 1, free + (key in self.kept)
        return found, free

    def use(self, keys: Chain, found: int) -> list[int]:
        for key in keys[:found]:
            self.users[key] += 1
            if key in self.kept:
                self.kept.remove(key)
        return list(keys[:found])

    def grow(self, held: list[int], blocks: int) -> bool:
        if blocks > self.free:
            return False
        for _ in range(blocks):
            if len(self.users) + len(self.kept) == self.total:
                self.kept.pop(0)
            held.append(next(self.nameless))
            self.users[held[-1]] = 1
        return True

    def name(self, held: list[int], keys: Chain, start: int, stop: int) -> None:
        for at in range(start, min(stop, len(keys))):
            if keys[at] not in self.users and keys[at] not in self.kept:
                del self.users[held[at]]
                self.users[keys[at]] = 1
                held[at] = keys[at]

    def release(self, held: list[int]) -> None:
        for key in reversed(held):
            self.users[key] -= 1
            if not self.users[key]:
                del self.users[key]
                self.kept.append(key)


class Holder:
    """One request in both pools."""

    def __init__(self, keys: Chain, held: Held, flat: list[int]) -> None:
        self.keys = keys
        self.held = held
        self.flat = flat


class BothPools(RuleBasedStateMachine):
    """Whatever requests do: both find the same, and have the same room."""

    holders = Bundle("holders")
    chains = st.lists(st.integers(0, BRANCHES - 1), max_size=DEPTH).map(chain)

    @initialize(total=st.integers(4, 14), forget=st.sampled_from([0, 1, 16]))
    def start(self, total: int, forget: int) -> None:
        self.pool = BlockPool(total, forget)
        self.flat = FlatPool(total)
        self.holding: list[Holder] = []

    @rule(target=holders, keys=chains, look=st.integers(0, DEPTH), more=st.integers(0, DEPTH))
    def begin(self, keys: Chain, look: int, more: int) -> Holder:
        """Look up a part of what may be there, use it, compute the next blocks."""
        found, _ = self.pool.match(keys[:look])
        holder = Holder(keys, self.pool.use(keys, found, 2 * DEPTH), self.flat.use(keys, found))
        self.holding.append(holder)
        self.compute(holder, more)
        return holder

    @rule(holder=holders, more=st.integers(1, 3))
    def compute(self, holder: Holder, more: int) -> None:
        """Some blocks more, all of them full."""
        self.grow(holder, more)
        self.name(holder, 0, len(holder.flat))

    @rule(holder=holders, more=st.integers(1, 3))
    def grow(self, holder: Holder, more: int) -> None:
        more = min(more, 2 * DEPTH - len(holder.flat))
        assert self.pool.grow(holder.held, more) == self.flat.grow(holder.flat, more)

    @rule(holder=holders, start=st.integers(0, 2 * DEPTH), blocks=st.integers(0, 3))
    def name(self, holder: Holder, start: int, blocks: int) -> None:
        stop = min(start + blocks, len(holder.flat))
        start = min(start, stop)
        self.pool.name(holder.held, start, stop)
        self.flat.name(holder.flat, holder.keys, start, stop)

    @rule(holder=holders, times=st.integers(1, 4))
    def go_on(self, holder: Holder, times: int) -> None:
        """Is naming the last block and taking one more."""
        for _ in range(min(times, 2 * DEPTH - len(holder.flat)) if holder.flat else 0):
            last = len(holder.flat)
            self.flat.name(holder.flat, holder.keys, last - 1, last)
            assert self.pool.go_on(holder.held) == self.flat.grow(holder.flat, 1)

    @rule(holder=consumes(holders))
    def end(self, holder: Holder) -> None:
        self.holding.remove(holder)
        self.pool.release(holder.held)
        self.flat.release(holder.flat)
        assert len(holder.held) == 0

    @invariant()
    def agree(self) -> None:
        assert (self.pool.used, self.pool.free) == (len(self.flat.users), self.flat.free)
        for keys in EVERY_CHAIN:
            assert self.pool.match(keys) == self.flat.match(keys)
        for holder in self.holding:
            assert len(holder.held) == len(holder.flat)
            assert [name > 0 for name in holder.held.named[: len(holder.held)]] == [key > 0 for key in holder.flat]


BothPools.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBothPools = BothPools.TestCase
