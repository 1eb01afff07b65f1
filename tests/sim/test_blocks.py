"""The KV-cache blocks: what is found again, what goes first, and that none is lost."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from epp.sim.blocks import BlockPool, Held, Names


def hold(pool: BlockPool, *keys: int) -> Held:
    """Use what is there of a chain and compute the rest."""
    found, _ = pool.match(keys)
    held = pool.use(keys, found, len(keys) + 2)
    assert pool.grow(held, len(keys) - found)
    pool.name(held, found, len(keys))
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
    assert not pool.grow(held, 2)
    assert (len(held), pool.used, pool.free) == (2, 2, 1)


def test_a_copy_takes_room_and_is_not_found_twice() -> None:
    """Two requests compute the same block at the same time: both need one, the first one is found."""
    pool = BlockPool(3)
    first = hold(pool, 1)
    copy = pool.use((1,), 0, 1)
    pool.grow(copy, 1)
    pool.name(copy, 0, 1)
    assert pool.used == 2
    pool.release(first)
    pool.release(copy)
    assert (pool.free, found(pool, 1)) == (3, 1)


def test_a_block_is_found_once_it_is_full() -> None:
    pool = BlockPool(2)
    held = pool.use((7,), 0, 1)
    pool.grow(held, 1)
    assert found(pool, 7) == 0
    pool.name(held, 0, 1)
    assert found(pool, 7) == 1


def test_a_full_pool_goes_on_in_what_was_freed_first_and_then_not_at_all() -> None:
    pool = BlockPool(4)
    pool.release(hold(pool, 1, 2))
    held = hold(pool, 3, 4)
    assert [pool.go_on(held) for _ in range(3)] == [True, True, False]  # in place of 2, then of 1
    assert (len(held), pool.free, found(pool, 1), found(pool, 3, 4)) == (4, 0, 0, 2)


def test_a_child_may_stay_when_the_blocks_before_it_are_gone_and_is_found_with_them() -> None:
    """Another's copy of 2 has no name, so 3 is named behind it; then the 2 that was found is taken by others."""
    pool = BlockPool(6)
    first = hold(pool, 1, 2)
    second = pool.use((1, 2, 3), 1, 3)
    pool.grow(second, 2)
    pool.name(second, 1, 3)  # 3 is new; 2 is not: a copy
    pool.release(first)  # 2 is free, 1 is used by the second
    assert pool.match((1, 2, 3)) == (3, 1)
    other = hold(pool, 7, 8, 9)  # takes the two blank ones and 2
    assert found(pool, 1, 2, 3) == 1
    pool.release(other)
    pool.release(second)  # order of taking now: 9, 8, 7, 3, the copy, 1
    hold(pool, 1, 2)  # takes 9
    assert pool.match((1, 2, 3)) == (3, 1)


def test_names_of_what_is_gone_are_forgotten_and_what_is_here_is_found_as_before() -> None:
    pool = BlockPool(4, forget=1)
    kept = hold(pool, 1, 2)
    for key in range(10, 90, 2):
        pool.release(hold(pool, key, key + 1))
        assert found(pool, 1, 2) == 2
    assert (found(pool, 88, 89), found(pool, 86, 87), pool.used) == (2, 0, 2)
    assert pool.names < 20
    pool.release(kept)
    assert pool.match((1, 2)) == (2, 2)


chains = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12).map(
    lambda paths: [tuple(int("1" + "".join(map(str, path[: at + 1]))) for at in range(len(path))) for path in paths]
)


@given(chains)
def test_each_key_has_a_number_of_its_own_however_chains_fork(given: list[tuple[int, ...]]) -> None:
    names, numbers = Names(), dict[int, int]()
    for keys in given:
        known = sum(1 for key in keys if key in numbers)
        assert [numbers[key] for key in keys[:known]] == names.known(keys).tolist()
        for key, number in zip(keys, names.numbers(keys).tolist(), strict=True):
            assert numbers.setdefault(key, number) == number
    assert sorted(numbers.values()) == list(range(1, names.count))
