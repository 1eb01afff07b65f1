"""The order in which endpoints are offered, and how chance decides among equals.

Bounds on counts are four standard deviations, sqrt(n p (1-p)) each.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.table import Page
from epp.scheduling.pickers import at_random, max_score, weighted_random
from epp.scheduling.plugin import Picker, PickerParams, Plugin
from tests.scheduling.builders import ask, made, pool


def order(plugin: Plugin[Picker], totals: list[float], rng: Random, endpoints: int | None = None) -> list[int]:
    """The best `endpoints`; None: all of them."""
    candidates = pool(*[Page()] * len(totals))
    picker = made(plugin, PickerParams(max_num_of_endpoints=endpoints or len(totals)))
    got: list[int] = picker.order(ask(), candidates, np.array(totals), rng).tolist()
    return got


def firsts(plugin: Plugin[Picker], totals: list[float], draws: int = 3000) -> Counter[int]:
    picker, candidates, rng = made(plugin), pool(*[Page()] * len(totals)), Random(11)
    return Counter(int(picker.order(ask(), candidates, np.array(totals), rng)[0]) for _ in range(draws))


def test_the_highest_total_comes_first_and_the_lowest_last() -> None:
    assert order(max_score, [1.0, 3.0, 0.0, 2.0], Random(0)) == [1, 3, 0, 2]


def test_equals_are_spread_evenly_and_keep_their_place_in_the_order() -> None:
    rng = Random(7)
    orders = [tuple(order(max_score, [2.0, 5.0, 2.0, 5.0, 2.0], rng)) for _ in range(600)]
    assert {frozenset(each[:2]) for each in orders} == {frozenset((1, 3))}
    counts = Counter(orders)
    assert len(counts) == 2 * 6  # every order of the two best, times every order of the three others
    assert all(23 <= count <= 77 for count in counts.values())  # 50 each, four times 6.8


def test_the_best_one_is_any_of_those_that_share_the_highest_total() -> None:
    counts = firsts(max_score, [2.0, 5.0, 2.0, 5.0, 5.0])
    assert set(counts) == {1, 3, 4}
    assert all(897 <= counts[i] <= 1103 for i in (1, 3, 4))  # 1000 each, four times 25.8


def test_equals_at_the_end_of_what_is_sent_are_spread_too() -> None:
    rng = Random(7)
    orders = Counter(tuple(order(max_score, [2.0, 5.0, 2.0, 1.0, 2.0], rng, endpoints=3)) for _ in range(600))
    assert set(orders) == {(1, i, j) for i in (0, 2, 4) for j in (0, 2, 4) if i != j}
    assert all(64 <= count <= 136 for count in orders.values())  # 100 each, four times 9.1


@given(totals=st.lists(st.integers(0, 5).map(float), min_size=1, max_size=40), endpoints=st.integers(1, 41))
def test_what_is_sent_is_the_beginning_of_a_whole_sort(totals: list[float], endpoints: int) -> None:
    got = order(max_score, totals, Random(0), endpoints)
    assert [totals[i] for i in got] == sorted(totals, reverse=True)[:endpoints]


def test_one_endpoint_is_the_order() -> None:
    for plugin in (max_score, at_random, weighted_random):
        assert order(plugin, [0.0], Random(0)) == [0]


def test_the_random_picker_ignores_totals() -> None:
    counts = firsts(at_random, [9.0, 0.0, 1.0])
    assert all(897 <= counts[i] <= 1103 for i in range(3))  # 1000 each, four times 25.8


def test_the_weighted_picker_picks_in_proportion_to_the_totals() -> None:
    counts = firsts(weighted_random, [1.0, 3.0, 0.0, 4.0])
    assert counts[2] == 0
    assert 302 <= counts[0] <= 448  # 1/8 of 3000 is 375, four times 18.1
    assert 1019 <= counts[1] <= 1231  # 3/8: 1125, four times 26.5
    assert 1390 <= counts[3] <= 1610  # 4/8: 1500, four times 27.4


def test_the_weighted_pickers_second_place_is_in_proportion_too() -> None:
    rng = Random(3)
    orders = Counter(tuple(order(weighted_random, [1.0, 1.0, 2.0], rng)) for _ in range(3000))
    # First 2 with 1/2, then 0 with 1/2: 750 expected, four times 23.7.
    assert 655 <= orders[(2, 0, 1)] <= 845
    # First 0 with 1/4, then 2 with 2/3: 500 expected, four times 20.4.
    assert 418 <= orders[(0, 2, 1)] <= 582


def test_totals_of_zero_are_as_good_as_any_and_come_last() -> None:
    counts = firsts(weighted_random, [0.0, 0.0, 0.0])
    assert all(897 <= counts[i] <= 1103 for i in range(3))
    assert all(order(weighted_random, [0.0, 1e-9, 0.0], Random(seed))[0] == 1 for seed in range(50))


@pytest.mark.parametrize("plugin", [max_score, at_random, weighted_random])
@given(totals=st.lists(st.floats(0, 100), min_size=1, max_size=40), seed=st.integers(0, 2**32))
def test_any_totals_give_an_order_and_the_same_seed_gives_it_again(
    plugin: Plugin[Picker], totals: list[float], seed: int
) -> None:
    got = order(plugin, totals, Random(seed))
    assert sorted(got) == list(range(len(totals)))
    assert order(plugin, totals, Random(seed)) == got
