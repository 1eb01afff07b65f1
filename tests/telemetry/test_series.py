from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from epp.telemetry.series import OTHER, Capped, Counter, Histogram, LabelSets, cut


def test_a_value_equal_to_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.5, 2.0, 4.0, 4.5):
        histogram.observe(value)
    # le=1: 0.5 and 1.0; le=2: two more; le=4: one more; +Inf: all six.
    assert list(histogram.cumulative()) == [2, 4, 5, 6]
    assert histogram.total == 13.5


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 100), max_size=50))
def test_a_merged_histogram_is_as_if_all_had_been_observed_in_one(first: list[float], second: list[float]) -> None:
    merged, other, together = (Histogram((0.1, 1, 10)) for _ in range(3))
    for value in first:
        merged.observe(value)
        together.observe(value)
    for value in second:
        other.observe(value)
        together.observe(value)
    merged.merge(other)
    assert merged.counts == together.counts
    assert abs(merged.total - together.total) < 1e-6


@given(st.lists(st.floats(0, 100)))
def test_the_last_cumulative_count_is_the_number_of_observations(values: list[float]) -> None:
    histogram = Histogram((0.1, 1, 10))
    for value in values:
        histogram.observe(value)
    counts = list(histogram.cumulative())
    assert counts[-1] == len(values)
    assert counts == sorted(counts)


def test_values_over_the_cap_are_other_and_those_under_it_stay_themselves() -> None:
    capped = Capped(2)
    assert [capped.bound(value) for value in ("a", "b", "c", "a", "c")] == ["a", "b", OTHER, "a", OTHER]


def test_label_sets_over_the_limit_share_one_accumulator() -> None:
    counter = Counter(2, limit=2)
    for labels in (("a", "1"), ("b", "1"), ("c", "1"), ("d", "2"), ("a", "1")):
        counter.add(*labels)
    assert list(counter) == [(("a", "1"), 2.0), (("b", "1"), 1.0), ((OTHER, OTHER), 2.0)]


def test_a_cell_that_is_remembered_is_the_one_that_is_told() -> None:
    counter = Counter(1, limit=1)
    cell, over = counter.cell("a"), counter.cell("b")
    cell[0] += 2
    over[0] += 3
    counter.add("a")
    assert list(counter) == [(("a",), 3.0), ((OTHER,), 3.0)]


def test_sets_may_be_added_while_somebody_goes_through_them() -> None:
    counter = Counter(1)
    counter.add("a")
    counter.add("b")
    seen = []
    for labels, count in counter:
        seen.append((labels, count))
        counter.add("b")
        counter.add(f"new-{len(seen)}")
    # "b" is read when its turn comes: once counted before, once while "a" was looked at.
    assert seen == [(("a",), 1.0), (("b",), 2.0)]
    assert [labels for labels, _ in counter] == [("a",), ("b",), ("new-1",), ("new-2",)]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=100))
def test_what_is_counted_up_under_some_labels_is_counted_down_under_the_same(moves: list[tuple[str, bool]]) -> None:
    """A set admitted stays admitted, and one refused stays refused: gauges never drift."""
    sets: LabelSets[list[int]] = LabelSets(1, 3, lambda _: [0])
    up: list[str] = []
    for label, ends in moves:
        if ends and up:
            sets.get((up.pop(),))[0] -= 1
        else:
            sets.get((label,))[0] += 1
            up.append(label)
        assert all(cell[0] >= 0 for _, cell in sets)
    while up:
        sets.get((up.pop(),))[0] -= 1
    assert all(cell[0] == 0 for _, cell in sets)


def test_a_long_value_is_cut_and_half_a_surrogate_pair_becomes_encodable() -> None:
    assert cut("x" * 200, 128) == "x" * 128
    assert cut("a\ud800b", 128) == "a?b"
    assert cut("modèle", 128) == "modèle"
    assert cut("modèle", 4) == "modè"
