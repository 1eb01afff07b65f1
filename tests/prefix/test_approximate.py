"""The approximate index, by hand and against a model of plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from epp.prefix.approximate import ApproximateIndex, _Run
from epp.prefix.hashing import HASH_BYTES


def packed(blocks: list[int]) -> bytes:
    """Small numbers as hashes."""
    return b"".join(block.to_bytes(HASH_BYTES, "big") for block in blocks)


def match(index: ApproximateIndex, blocks: list[int], slots: list[int]) -> list[int]:
    counts: list[int] = index.match(packed(blocks), np.array(slots, np.int64)).tolist()
    return counts


def test_an_empty_index_matches_nothing() -> None:
    index = ApproximateIndex()
    assert match(index, [1, 2], [0, 1]) == [0, 0]
    assert match(index, [], [0, 1]) == [0, 0]
    assert match(index, [1], []) == []


def test_the_longest_prefix_counts_for_each_endpoint() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3]), 0, 100)
    index.add(packed([1, 2]), 1, 100)
    index.add(packed([1, 9]), 3, 100)
    assert match(index, [1, 2, 3, 4], [0, 1, 2, 3]) == [3, 2, 0, 1]
    assert match(index, [1, 2, 3, 4], [3, 0]) == [1, 3]  # in the order asked for
    assert match(index, [7, 2, 3], [0, 1, 2, 3]) == [0, 0, 0, 0]


def test_a_hole_ends_the_match_whatever_later_blocks_are_held() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3, 4]), 0, 100)
    index.add(packed([1]), 1, 100)
    index.add(packed([3, 4]), 1, 100)  # without block 2; the reference counts 3 here
    assert match(index, [1, 2, 3, 4], [0, 1]) == [4, 1]


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3]), 0, 4)
    index.add(packed([11, 12, 13]), 0, 4)
    assert match(index, [11, 12, 13], [0]) == [3]
    assert match(index, [1, 2, 3], [0]) == [1]
    assert index.held(0) == 4


def test_a_prefix_that_is_used_again_stays() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2]), 0, 4)
    index.add(packed([11, 12]), 0, 4)
    index.add(packed([1, 2]), 0, 4)
    index.add(packed([21, 22]), 0, 4)
    assert match(index, [1, 2], [0]) == [2]
    assert match(index, [11, 12], [0]) == [0]


def test_a_prompt_longer_than_the_cache_leaves_its_beginning() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3, 4, 5]), 0, 3)
    assert match(index, [1, 2, 3, 4, 5], [0]) == [3]


def test_a_cache_that_shrinks_gives_up_the_least_recent() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3, 4]), 0, 10)
    index.add(packed([5]), 0, 2)
    assert index.held(0) == 2
    assert match(index, [1, 2], [0]) == [1]
    assert match(index, [5], [0]) == [1]


def test_a_slot_whose_prompt_was_cut_matches_no_more_than_the_prompt_shares() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3, 4, 5]), 0, 10)
    index.add(packed([1, 2, 3, 4, 5]), 1, 10)
    index.add(packed([7]), 1, 4)
    assert match(index, [1, 2, 3, 4, 5], [0, 1]) == [5, 3]
    assert match(index, [1, 2, 9], [0, 1]) == [2, 2]


def test_a_forgotten_slot_holds_nothing_and_nobody_else_is_touched() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2]), 0, 10)
    index.add(packed([1]), 1, 10)
    index.forget(0)
    index.forget(0)
    index.forget(7)
    assert match(index, [1, 2], [0, 1]) == [0, 1]
    assert len(index) == 1
    index.forget(1)
    assert len(index) == 0


def test_a_thousand_endpoints_and_slots_beyond_a_machine_word() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3]), 999, 10)
    index.add(packed([1, 2]), 64, 10)
    counts = index.match(packed([1, 2, 3]), np.arange(1000))
    assert {slot: int(counts[slot]) for slot in np.flatnonzero(counts)} == {64: 2, 999: 3}
    assert match(index, [1, 2, 3], [5]) == [0]  # slots below those that hold it


def test_the_same_block_behind_another_beginning_is_another() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 5, 6]), 0, 100)
    assert match(index, [2, 5, 6], [0]) == [0]
    assert match(index, [5, 6], [0]) == [0]
    index.add(packed([2, 5, 6]), 0, 100)
    assert len(index) == 6


def test_a_conversation_of_many_turns_is_held_as_one_prompt_and_split_where_others_leave_it() -> None:
    index = ApproximateIndex()
    for turn in range(1, 50):
        index.add(packed(list(range(10 * turn))), 0, 1000)
    assert len(runs(index)) == 1
    index.add(packed([*range(100), 7777]), 1, 1000)
    assert len(runs(index)) == 3
    assert match(index, list(range(500)), [0, 1]) == [490, 100]
    index.add(packed(list(range(2000, 2600))), 0, 1000)  # 90 blocks too many: the conversation's last
    assert match(index, list(range(500)), [0, 1]) == [400, 100]
    assert index.held(0) == 1000


def test_the_tail_that_a_prompt_leaves_behind_grows_old_while_its_beginning_is_used() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2, 3, 4, 5, 6]), 0, 10)
    index.add(packed([1, 2, 3, 4, 5, 6]), 1, 10)
    index.add(packed([1, 2]), 0, 10)  # splits what slot 1 holds, too, and says nothing of its age there
    index.add(packed([11, 12, 13]), 0, 8)
    index.add(packed([11, 12, 13]), 1, 8)
    assert match(index, [1, 2, 3, 4, 5, 6], [0, 1]) == [5, 5]
    index.add(packed([1, 2]), 0, 5)
    index.add(packed([11, 12, 13]), 1, 3)
    assert match(index, [1, 2, 3, 4, 5, 6], [0, 1]) == [2, 0]
    assert match(index, [11, 12, 13], [0, 1]) == [3, 3]


def runs(index: ApproximateIndex) -> list[_Run]:
    found: list[_Run] = []
    to_see = [index._root]
    while to_see:
        after = list(to_see.pop().after.values())
        found += after
        to_see += after
    return found


class AgainstLists(RuleBasedStateMachine):
    """Prompts of two letters, so that they share beginnings; the model names a block by all that leads to it."""

    PROMPTS = st.lists(st.integers(0, 1), max_size=8) | st.integers(0, 12).map(lambda length: [0] * length)

    def __init__(self) -> None:
        super().__init__()
        self.index = ApproximateIndex()
        self.held: dict[int, list[tuple[int, ...]]] = {slot: [] for slot in range(4)}
        """Least recent first."""

    @rule(prompt=PROMPTS, slot=st.integers(0, 3), capacity=st.integers(1, 16))
    def add(self, prompt: list[int], slot: int, capacity: int) -> None:
        self.index.add(packed(prompt), slot, capacity)
        fitting = chain(prompt)[:capacity]
        kept = [block for block in self.held[slot] if block not in fitting] + fitting[::-1]
        self.held[slot] = kept[-capacity:]

    @rule(slot=st.integers(0, 3))
    def forget(self, slot: int) -> None:
        self.index.forget(slot)
        self.held[slot] = []

    @rule(prompt=PROMPTS)
    def look(self, prompt: list[int]) -> None:
        blocks = chain(prompt)
        expected = []
        for slot in (2, 0, 3, 1):
            held = set(self.held[slot])
            expected.append(next((depth for depth, block in enumerate(blocks) if block not in held), len(blocks)))
        assert match(self.index, prompt, [2, 0, 3, 1]) == expected

    @invariant()
    def nothing_is_kept_that_nobody_holds(self) -> None:
        assert len(self.index) == len({block for held in self.held.values() for block in held})
        assert [self.index.held(slot) for slot in range(4)] == [len(self.held[slot]) for slot in range(4)]
        assert sum(map(len, runs(self.index))) == len(self.index)

    @invariant()
    def runs_say_who_holds_them(self) -> None:
        for run in runs(self.index):
            blocks = {slot: held.places[run].blocks for slot, held in self.index._held.items() if run in held.places}
            assert run.whole == sum(1 << slot for slot, count in blocks.items() if count == len(run))
            assert run.cut == sum(1 << slot for slot, count in blocks.items() if 0 < count < len(run))
            assert run.whole  # or its end would be forgotten


def chain(prompt: list[int]) -> list[tuple[int, ...]]:
    return [tuple(prompt[: depth + 1]) for depth in range(len(prompt))]


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(max_examples=60, stateful_step_count=40)
