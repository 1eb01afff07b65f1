"""The approximate index, by hand and against a model of plain lists and sets."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from epp.prefix.approximate import ApproximateIndex


def match(index: ApproximateIndex, hashes: list[int], slots: list[int]) -> list[int]:
    counts: list[int] = index.match(hashes, np.array(slots, np.int64)).tolist()
    return counts


def test_an_empty_index_matches_nothing() -> None:
    index = ApproximateIndex()
    assert match(index, [1, 2], [0, 1]) == [0, 0]
    assert match(index, [], [0, 1]) == [0, 0]
    assert match(index, [1], []) == []


def test_the_longest_prefix_counts_for_each_endpoint() -> None:
    index = ApproximateIndex()
    index.add([1, 2, 3], 0, 100)
    index.add([1, 2], 1, 100)
    index.add([1, 9], 3, 100)
    assert match(index, [1, 2, 3, 4], [0, 1, 2, 3]) == [3, 2, 0, 1]
    assert match(index, [1, 2, 3, 4], [3, 0]) == [1, 3]  # in the order asked for
    assert match(index, [7, 2, 3], [0, 1, 2, 3]) == [0, 0, 0, 0]


def test_a_hole_ends_the_match_whatever_later_blocks_are_held() -> None:
    index = ApproximateIndex()
    index.add([1, 2, 3, 4], 0, 100)
    index.add([1], 1, 100)
    index.add([3, 4], 1, 100)  # without block 2; the reference counts 3 here
    assert match(index, [1, 2, 3, 4], [0, 1]) == [4, 1]


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    index = ApproximateIndex()
    index.add([1, 2, 3], 0, 4)
    index.add([11, 12, 13], 0, 4)
    assert match(index, [11, 12, 13], [0]) == [3]
    assert match(index, [1, 2, 3], [0]) == [1]
    assert index.held(0) == 4


def test_a_prefix_that_is_used_again_stays() -> None:
    index = ApproximateIndex()
    index.add([1, 2], 0, 4)
    index.add([11, 12], 0, 4)
    index.add([1, 2], 0, 4)
    index.add([21, 22], 0, 4)
    assert match(index, [1, 2], [0]) == [2]
    assert match(index, [11, 12], [0]) == [0]


def test_a_prompt_longer_than_the_cache_leaves_its_beginning() -> None:
    index = ApproximateIndex()
    index.add([1, 2, 3, 4, 5], 0, 3)
    assert match(index, [1, 2, 3, 4, 5], [0]) == [3]


def test_a_cache_that_shrinks_gives_up_the_least_recent() -> None:
    index = ApproximateIndex()
    index.add([1, 2, 3, 4], 0, 10)
    index.add([5], 0, 2)
    assert index.held(0) == 2
    assert match(index, [1, 2], [0]) == [1]
    assert match(index, [5], [0]) == [1]


def test_a_forgotten_slot_holds_nothing_and_nobody_else_is_touched() -> None:
    index = ApproximateIndex()
    index.add([1, 2], 0, 10)
    index.add([1], 1, 10)
    index.forget(0)
    index.forget(0)
    index.forget(7)
    assert match(index, [1, 2], [0, 1]) == [0, 1]
    assert len(index) == 1
    index.forget(1)
    assert len(index) == 0


def test_a_thousand_endpoints_and_slots_beyond_a_machine_word() -> None:
    index = ApproximateIndex()
    index.add([1, 2, 3], 999, 10)
    index.add([1, 2], 64, 10)
    counts = index.match([1, 2, 3], np.arange(1000))
    assert {slot: int(counts[slot]) for slot in np.flatnonzero(counts)} == {64: 2, 999: 3}
    assert match(index, [1, 2, 3], [5]) == [0]  # slots below those that hold it


class AgainstSets(RuleBasedStateMachine):
    """Chains are branches of a tree: hash = the path's own number, so that prompts share prefixes and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.index = ApproximateIndex()
        self.held: dict[int, list[int]] = {slot: [] for slot in range(4)}
        """Least recent first."""

    @rule(branch=st.lists(st.integers(0, 1), max_size=6), slot=st.integers(0, 3), capacity=st.integers(1, 8))
    def add(self, branch: list[int], slot: int, capacity: int) -> None:
        hashes = chain(branch)
        self.index.add(hashes, slot, capacity)
        fitting = hashes[:capacity]
        kept = [block for block in self.held[slot] if block not in fitting] + fitting[::-1]
        self.held[slot] = kept[-capacity:]

    @rule(slot=st.integers(0, 3))
    def forget(self, slot: int) -> None:
        self.index.forget(slot)
        self.held[slot] = []

    @rule(branch=st.lists(st.integers(0, 1), max_size=6))
    def look(self, branch: list[int]) -> None:
        hashes = chain(branch)
        expected = []
        for slot in (2, 0, 3, 1):
            held = set(self.held[slot])
            expected.append(next((depth for depth, block in enumerate(hashes) if block not in held), len(hashes)))
        assert match(self.index, hashes, [2, 0, 3, 1]) == expected

    @invariant()
    def nothing_is_kept_that_nobody_holds(self) -> None:
        assert len(self.index) == len({block for held in self.held.values() for block in held})
        assert [self.index.held(slot) for slot in range(4)] == [len(self.held[slot]) for slot in range(4)]


def chain(branch: list[int]) -> list[int]:
    return [int("1" + "".join(map(str, branch[: depth + 1])), 2) for depth in range(len(branch))]


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(max_examples=60, stateful_step_count=40)
