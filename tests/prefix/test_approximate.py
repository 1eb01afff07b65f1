"""The approximate index, by hand and against a model of plain lists."""

from __future__ import annotations

import tracemalloc
from random import Random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from epp.prefix.approximate import ApproximateIndex
from epp.prefix.hashing import HASH_BYTES
from epp.prefix.places import PLACE_BYTES, STAMPS
from epp.prefix.runs import RUN_BYTES, TEXT_BYTES, _set_bytes


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


# -- age ---------------------------------------------------------------------------------------------------------------


def test_what_an_endpoint_computes_for_others_pushes_out_what_it_has_not_used_since() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2]), 0, 10)
    index.add(packed([11, 12, 13]), 0, 10)
    index.computed(0, 6, 10)  # with the three blocks since, nine were computed after [1, 2] was used
    assert match(index, [1, 2], [0]) == [2]
    index.computed(0, 1, 10)
    assert match(index, [1, 2], [0]) == [0]
    assert match(index, [11, 12, 13], [0]) == [3]
    index.computed(0, 3, 10)
    assert index.held(0) == len(index) == 0


def test_what_is_used_again_is_young_again() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2]), 0, 10)
    index.computed(0, 9, 10)
    assert index.add(packed([1, 2]), 0, 10) == 0  # nothing new to compute
    index.computed(0, 9, 10)
    assert match(index, [1, 2], [0]) == [2]


def test_computing_concerns_its_own_slot_alone_and_one_that_holds_something() -> None:
    index = ApproximateIndex()
    index.add(packed([1, 2]), 0, 10)
    index.add(packed([1, 2]), 1, 10)
    index.computed(1, 50, 10)
    index.computed(7, 50, 10)
    assert match(index, [1, 2], [0, 1, 7]) == [2, 0, 0]
    assert [index.ever(slot) for slot in (0, 1, 7)] == [2, 52, 0]


def test_ages_are_right_when_stamps_begin_anew() -> None:
    index = ApproximateIndex()
    index.add(packed([1]), 0, 10)
    index.computed(0, STAMPS - 3, 10)  # two are left before stamps begin anew
    index.add(packed([2]), 0, 10)
    index.add(packed([3, 4, 5]), 0, 10)
    assert index.ever(0) == STAMPS + 2
    index.computed(0, 6, 10)
    assert match(index, [2], [0]) == [1]  # nine since
    index.computed(0, 1, 10)
    assert match(index, [2], [0]) == [0]
    assert match(index, [3, 4, 5], [0]) == [3]


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_who_holds_most_gives_up_what_is_oldest_when_there_is_no_more_room() -> None:
    index = ApproximateIndex(limit=10 * (RUN_BYTES + PLACE_BYTES))  # ten runs of one block, or their slots' ends
    for block in range(6):
        index.add(packed([block]), 0, 100)
    index.add(packed([100]), 1, 100)
    assert index.held(0) == 6
    for block in range(101, 104):
        index.add(packed([block]), 1, 100)
    assert [match(index, [block], [0]) for block in range(6)] == [[0], [1], [1], [1], [1], [1]]
    assert (index.held(0), index.held(1)) == (5, 4)


def test_a_prompt_larger_than_the_limit_is_not_kept() -> None:
    index = ApproximateIndex(limit=1_000)
    index.add(packed(list(range(200))), 0, 1000)
    assert (len(index), index.held(0)) == (0, 0)
    index.add(packed([1, 2, 3]), 0, 1000)
    assert match(index, [1, 2, 3], [0]) == [3]


def test_an_entry_takes_no_more_than_64_bytes_and_what_is_counted_is_what_it_takes() -> None:
    rng = Random(7)
    for blocks in (1, 4, 40):
        tracemalloc.start()
        index = ApproximateIndex()
        for _ in range(20_000 // blocks):
            index.add(rng.randbytes(HASH_BYTES * blocks), rng.randrange(10), 10_000)
        taken = tracemalloc.get_traced_memory()[0] / len(index)
        tracemalloc.stop()
        counted = (index.size - 10 * PLACE_BYTES) / len(index)
        assert counted <= 64
        assert abs(taken - counted) < 8, (blocks, taken, counted)  # the slots' own objects, and arrays with reserve


def test_rows_are_used_again() -> None:
    index = ApproximateIndex()
    for block in range(10_000):
        index.add(packed([block]), block % 3, 4)
    assert len(index._runs._whole) <= 3 * 4 + 2
    assert len(index._places.run) <= 3 * 5 + 2


def runs(index: ApproximateIndex) -> list[int]:
    """Every run that there is."""
    tree, free, row = index._runs, {0}, index._runs._free
    while row:
        free.add(row)
        row = tree._before[row]
    return [run for run in range(len(tree._whole)) if run not in free]


class Model:
    """What one slot holds, block by block: each is named by all that leads to it, least recent first."""

    def __init__(self) -> None:
        self.held: list[tuple[int, ...]] = []
        self.used_at: dict[tuple[int, ...], int] = {}
        self.computed = 0

    def add(self, prompt: list[int], capacity: int) -> None:
        fitting = chain(prompt)[:capacity]
        self.computed += sum(block not in self.held for block in fitting)
        self.held = [block for block in self.held if block not in fitting] + fitting[::-1]
        self.used_at |= dict.fromkeys(fitting, self.computed)
        self.age(capacity)

    def age(self, capacity: int) -> None:
        young = [block for block in self.held if self.computed - self.used_at[block] < capacity]
        self.held = young[-capacity:]


class AgainstLists(RuleBasedStateMachine):
    """Prompts of two letters, so that they share beginnings."""

    PROMPTS = st.lists(st.integers(0, 1), max_size=8) | st.integers(0, 12).map(lambda length: [0] * length)

    SLOTS: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.index = ApproximateIndex()
        self.slots: dict[int, Model] = {}

    def slot(self, at: int) -> int:
        return self.SLOTS[at % len(self.SLOTS)]

    def held(self, slot: int) -> list[tuple[int, ...]]:
        return self.slots[slot].held if slot in self.slots else []

    @rule(prompt=PROMPTS, at=st.integers(0, 5), capacity=st.integers(1, 16))
    def add(self, prompt: list[int], at: int, capacity: int) -> None:
        slot = self.slot(at)
        self.index.add(packed(prompt), slot, capacity)
        self.slots.setdefault(slot, Model()).add(prompt, capacity)

    @rule(at=st.integers(0, 5), blocks=st.integers(0, 10), capacity=st.integers(1, 16))
    def compute(self, at: int, blocks: int, capacity: int) -> None:
        slot = self.slot(at)
        self.index.computed(slot, blocks, capacity)
        if slot in self.slots:
            self.slots[slot].computed += blocks
            self.slots[slot].age(capacity)

    @rule(at=st.integers(0, 5))
    def forget(self, at: int) -> None:
        slot = self.slot(at)
        self.index.forget(slot)
        self.slots.pop(slot, None)

    @rule(prompt=PROMPTS)
    def look(self, prompt: list[int]) -> None:
        blocks = chain(prompt)
        expected = []
        for slot in self.SLOTS[::-1]:
            held = set(self.held(slot))
            expected.append(next((depth for depth, block in enumerate(blocks) if block not in held), len(blocks)))
        assert match(self.index, prompt, list(self.SLOTS[::-1])) == expected

    @invariant()
    def nothing_is_kept_that_nobody_holds(self) -> None:
        assert len(self.index) == len({block for slot in self.slots for block in self.held(slot)})
        assert [self.index.held(slot) for slot in self.SLOTS] == [len(self.held(slot)) for slot in self.SLOTS]
        assert [self.index.ever(slot) for slot in self.slots] == [model.computed for model in self.slots.values()]

    @invariant()
    def it_is_sound(self) -> None:
        check(self.index)


class FarApart(AgainstLists):
    """Slots so high that sets of a few are kept as digits."""

    SLOTS = (0, 700, 701, 999, 1_500, 65_535)


class WithinALimit(RuleBasedStateMachine):
    """Never larger than it may be, and sound; what it gives up is the least recent of whoever holds most."""

    LIMIT = 1_000

    def __init__(self) -> None:
        super().__init__()
        self.index = ApproximateIndex(self.LIMIT)
        self.unlimited = ApproximateIndex()

    @rule(prompt=st.lists(st.integers(0, 2), max_size=12), slot=st.integers(0, 5))
    def add(self, prompt: list[int], slot: int) -> None:
        self.index.add(packed(prompt), slot, 1000)
        self.unlimited.add(packed(prompt), slot, 1000)

    @rule(slot=st.integers(0, 5))
    def forget(self, slot: int) -> None:
        self.index.forget(slot)
        self.unlimited.forget(slot)

    @rule(prompt=st.lists(st.integers(0, 2), max_size=12))
    def look(self, prompt: list[int]) -> None:
        some, every = (match(index, prompt, [0, 1, 2, 3, 4, 5]) for index in (self.index, self.unlimited))
        assert all(np.array(some) <= np.array(every))

    @invariant()
    def it_is_sound_and_small_enough(self) -> None:
        check(self.index)
        assert self.index.size <= self.LIMIT


def check(index: ApproximateIndex) -> None:
    """What the tree, the rings and the counts say of one another is true."""
    tree = index._runs
    there = runs(index)
    held_by: dict[int, dict[int, int]] = {run: {} for run in there}
    for slot, held in index._held.items():
        ring = ring_of(index, held.ends)
        assert sorted({index._places.run[place] for place in ring}) == sorted(
            index._places.run[place] for place in ring
        )
        stamps = [index._places.stamp[place] for place in ring]
        assert stamps == sorted(stamps)
        for place in ring:
            run = index._places.run[place]
            assert index._places.find(slot, run) == place
            held_by[run][slot] = held.kept if held.cut == run else tree.length(run)
        assert held.blocks == sum(held_by[run].get(slot, 0) for run in there) == index._blocks[slot]
    assert len(index) == sum(map(tree.length, there))
    for run in there:
        whole = [slot for slot, blocks in held_by[run].items() if blocks == tree.length(run)]
        assert whole  # or its end would be forgotten
        assert tree.whole(run) == sum(1 << slot for slot in whole)
        assert tree.cut.get(run, 0) == sum(1 << slot for slot in held_by[run] if slot not in whole)
        assert tree.follow(tree._before[run], tree._first[run].to_bytes(HASH_BYTES, "little"), 0) == run
        assert tree._following[run] == sum(tree._before[other] == run for other in there)
        before = tree._before[run]
        assert not before or set(held_by[run]) <= {slot for slot in held_by[before] if tree.whole(before) >> slot & 1}
    assert set(tree.cut) <= set(there)
    texts = sum(TEXT_BYTES + len(tree._rest[run]) for run in there if tree._rest[run])
    sets = sum(_set_bytes(tree._whole[run]) for run in there)
    places = len(index._held) + sum(map(len, held_by.values()))
    assert index.size == RUN_BYTES * len(there) + texts + sets + PLACE_BYTES * places


def ring_of(index: ApproximateIndex, ends: int) -> list[int]:
    """Places, least recent first."""
    places: list[int] = []
    at = index._places.newer[ends]
    while at != ends:
        assert index._places.older[index._places.newer[at]] == at
        places.append(at)
        at = index._places.newer[at]
    return places


def chain(prompt: list[int]) -> list[tuple[int, ...]]:
    return [tuple(prompt[: depth + 1]) for depth in range(len(prompt))]


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(max_examples=60, stateful_step_count=40)
TestFarApart = FarApart.TestCase
TestFarApart.settings = settings(max_examples=40, stateful_step_count=40)
TestWithinALimit = WithinALimit.TestCase
TestWithinALimit.settings = settings(max_examples=40, stateful_step_count=40)
