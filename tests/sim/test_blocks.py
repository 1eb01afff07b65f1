"""The KV-cache blocks: what is found again, what goes first, and that none is lost."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from epp.sim.blocks import BlockPool


def hold(pool: BlockPool, *keys: int) -> list[int]:
    """Use what is there of a chain and compute the rest."""
    found, _ = pool.match(keys)
    held = pool.use(keys[:found])
    assert pool.grow(held, len(keys) - found, keys[found:])
    return held


def found(pool: BlockPool, *keys: int) -> int:
    return pool.match(keys)[0]


def test_released_blocks_are_found_again() -> None:
    pool = BlockPool(4)
    pool.release(hold(pool, 1, 2, 3))
    assert (pool.used, pool.free) == (0, 4)
    assert pool.match([1, 2, 3, 4]) == (3, 3)


def test_a_match_ends_at_the_first_block_that_is_missing() -> None:
    pool = BlockPool(4)
    pool.release(hold(pool, 1, 3))
    assert found(pool, 1, 2, 3) == 1


def test_blank_blocks_are_taken_before_those_that_hold_something() -> None:
    pool = BlockPool(4)
    pool.release(hold(pool, 1, 2))
    hold(pool, 3, 4)
    assert found(pool, 1, 2) == 2


def test_the_leaf_of_the_chain_freed_first_goes_first() -> None:
    pool = BlockPool(4)
    first, second = hold(pool, 1, 2), hold(pool, 3, 4)
    pool.release(first)  # order of taking now: 2, 1
    pool.release(second)  # 2, 1, 4, 3
    hold(pool, 5)
    assert (found(pool, 1, 2), found(pool, 3, 4)) == (1, 2)
    hold(pool, 6, 7)
    assert (found(pool, 1, 2), found(pool, 3, 4)) == (0, 1)


def test_a_chain_that_is_used_again_goes_last() -> None:
    pool = BlockPool(4)
    pool.release(hold(pool, 1, 2))
    pool.release(hold(pool, 3, 4))
    pool.release(hold(pool, 1, 2))  # 4, 3, 2, 1
    hold(pool, 5, 6)
    assert (found(pool, 1, 2), found(pool, 3, 4)) == (2, 0)


def test_a_shared_block_is_free_when_its_last_user_leaves() -> None:
    pool = BlockPool(3)
    first, second = hold(pool, 1, 2), hold(pool, 1, 3)
    assert pool.used == 3
    pool.release(first)
    assert (pool.used, pool.match([1, 2])) == (2, (2, 1))
    pool.release(second)
    assert pool.used == 0


def test_more_than_is_free_changes_nothing() -> None:
    pool = BlockPool(3)
    held = hold(pool, 1, 2)
    assert not pool.grow(held, 2, (3, 4))
    assert (held, pool.used, pool.free) == ([1, 2], 2, 1)


def test_a_copy_takes_room_and_is_not_found_twice() -> None:
    """Two requests compute the same block at the same time: both need one, the first one is found."""
    pool = BlockPool(3)
    first = hold(pool, 1)
    copy: list[int] = []
    pool.grow(copy, 1, (1,))
    assert pool.used == 2
    pool.release(first)
    pool.release(copy)
    assert (pool.free, found(pool, 1)) == (3, 1)


def test_a_block_is_found_once_it_is_full() -> None:
    pool = BlockPool(2)
    held: list[int] = []
    pool.grow(held, 1)
    assert found(pool, 7) == 0
    pool.name(held, 0, [7])
    assert found(pool, 7) == 1


class Blocks(RuleBasedStateMachine):
    """Chains of a small tree of keys, used and released in any order: nothing is lost, and a model agrees."""

    holders = Bundle("holders")
    chains = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(
        lambda turns: tuple(int("1" + "".join(map(str, turns[: n + 1]))) for n in range(len(turns)))
    )

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.held: list[list[int]] = []

    @rule(target=holders, keys=chains, extra=st.integers(0, 2))
    def begin(self, keys: tuple[int, ...], extra: int) -> object:
        there, free = self.pool.match(keys)
        assert free <= there <= len(keys)
        room = self.pool.free - free
        held = self.pool.use(keys[:there])
        grown = self.pool.grow(held, len(keys) - there + extra, keys[there:])
        assert grown == (len(keys) - there + extra <= room)
        if not grown:
            self.pool.release(held)
            return multiple()
        assert self.pool.match(keys) == (len(keys), 0)
        self.held.append(held)
        return held

    @rule(held=consumes(holders))
    def end(self, held: list[int]) -> None:
        keys = [key for key in held if key >= 0]
        self.held = [other for other in self.held if other is not held]
        self.pool.release(held)
        assert held == []
        assert self.pool.match(keys)[0] == len(keys)

    @invariant()
    def none_is_lost(self) -> None:
        assert self.pool.used == len({key for held in self.held for key in held})
        assert self.pool.used + self.pool.free == 9


TestBlocks = Blocks.TestCase


@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 5))), max_size=40))
def test_going_on_is_naming_the_last_block_and_taking_one_more(steps: list[tuple[int, int | None]]) -> None:
    """Three requests in two pools of six blocks: one pool goes on, the other names and grows."""
    pools = BlockPool(6), BlockPool(6)
    held: tuple[list[list[int]], list[list[int]]] = ([[], [], []], [[], [], []])
    for pool, requests in zip(pools, held, strict=True):
        for request in requests:
            pool.grow(request, 1)
    for who, key in steps:
        one, other = held[0][who], held[1][who]
        if not one:  # it gave everything back
            assert pools[0].grow(one, 1) == pools[1].grow(other, 1)
            continue
        has = pools[0].go_on(one, key)
        pools[1].name(other, len(other) - 1, () if key is None else (key,))
        assert has == pools[1].grow(other, 1)
        if not has:
            pools[0].release(one)
            pools[1].release(other)
        assert one == other
        assert (pools[0].used, pools[0].free) == (pools[1].used, pools[1].free)
        assert [pools[0].match([key]) for key in range(6)] == [pools[1].match([key]) for key in range(6)]
