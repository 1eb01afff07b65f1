"""Rows by two numbers, against a dict."""

from __future__ import annotations

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from epp.prefix.lookup import LOAD, Lookup


class AgainstADict(RuleBasedStateMachine):
    """Hashes of three bits, so that buckets are long and every growth puts rows elsewhere."""

    KEYS = st.tuples(st.integers(0, 5), st.integers(0, 5))

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = array("I", (0,)), array("Q", (0,))
        self.lookup = Lookup(self.one, self.other, lambda row: self.hash_of(self.one[row], self.other[row]))
        self.rows: dict[tuple[int, int], int] = {}
        self.free: list[int] = []

    @staticmethod
    def hash_of(one: int, other: int) -> int:
        return (one * 7 + other) % 8 - 4

    @rule(key=KEYS)
    def put(self, key: tuple[int, int]) -> None:
        if key in self.rows:
            return
        row = self.free.pop() if self.free else len(self.one)
        if row == len(self.one):
            self.one.append(0)
            self.other.append(0)
        self.one[row], self.other[row] = key
        self.lookup.put(self.hash_of(*key), row)
        self.rows[key] = row

    @rule(key=KEYS)
    def drop(self, key: tuple[int, int]) -> None:
        if key in self.rows:
            self.lookup.drop(self.hash_of(*key), self.rows[key])
            self.free.append(self.rows.pop(key))

    @invariant()
    def every_row_is_found_and_no_other(self) -> None:
        for key in ((one, other) for one in range(6) for other in range(6)):
            assert self.lookup.find(self.hash_of(*key), *key) == self.rows.get(key, 0)

    @invariant()
    def there_are_buckets_enough(self) -> None:
        assert len(self.rows) <= LOAD * len(self.lookup._heads)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=50)


def test_a_row_is_found_by_both_numbers_among_rows_of_one_hash() -> None:
    one, other = array("I", (0, 1, 1, 2)), array("Q", (0, 5, 6, 5))
    lookup = Lookup(one, other, lambda row: -1)
    for row in (1, 2, 3):
        lookup.put(-1, row)
    assert [lookup.find(-1, *key) for key in ((1, 5), (1, 6), (2, 5), (2, 6))] == [1, 2, 3, 0]
    lookup.drop(-1, 2)
    assert [lookup.find(-1, *key) for key in ((1, 5), (1, 6), (2, 5))] == [1, 0, 3]
