"""The order in which endpoints are offered, and how chance decides among equals.

Bounds on counts are four standard deviations, sqrt(n p (1-p)) each.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.table import Page
from epp.scheduling.pickers import SoftmaxParams, at_random, max_score, power_of_two, softmax, weighted_random
from epp.scheduling.plugin import Picker, Plugin
from epp.scheduling.scorers import queue
from tests.scheduling.builders import ask, made, pool, profile, winners

EVERY = [max_score, at_random, weighted_random, softmax, power_of_two]


def order(plugin: Plugin[Picker], totals: list[float], rng: Random, endpoints: int | None = None) -> list[int]:
    """The best `endpoints`; None: all of them."""
    candidates = pool(*[Page()] * len(totals))
    picker = made(plugin, plugin.params(max_num_of_endpoints=endpoints or len(totals)))
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
    for plugin in EVERY:
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


@pytest.mark.parametrize("plugin", EVERY)
@given(totals=st.lists(st.floats(0, 100), min_size=1, max_size=40), seed=st.integers(0, 2**32))
def test_any_totals_give_an_order_and_the_same_seed_gives_it_again(
    plugin: Plugin[Picker], totals: list[float], seed: int
) -> None:
    got = order(plugin, totals, Random(seed))
    assert sorted(got) == list(range(len(totals)))
    assert order(plugin, totals, Random(seed)) == got


# -- softmax-picker: in proportion to exp(total / temperature) ---------------------------------------------------------


def softmax_firsts(totals: list[float], temperature: float, draws: int = 3000) -> Counter[int]:
    picker, candidates, rng = made(softmax, SoftmaxParams(temperature=temperature)), pool(*[Page()] * 3), Random(11)
    return Counter(int(picker.order(ask(), candidates, np.array(totals), rng)[0]) for _ in range(draws))


def test_a_total_that_is_one_temperature_lower_is_chosen_e_times_as_rarely() -> None:
    for totals in ([5.0, 4.0, 3.0], [2.0, 1.0, 0.0]):  # differences alone count
        counts = softmax_firsts(totals, temperature=1.0)
        # 1 / (1 + 1/e + 1/e^2) = 0.66524, then 0.24473 and 0.09003; of 3000, four times 25.8, 23.5 and 15.7
        assert 1892 <= counts[0] <= 2099
        assert 640 <= counts[1] <= 829
        assert 207 <= counts[2] <= 333


def test_by_default_a_tenth_is_one_temperature() -> None:
    counts = firsts(softmax, [0.7, 0.8])
    assert 710 <= counts[0] <= 904  # 1 / (1 + e) = 0.26894: 807, four times 24.3


def test_a_cold_picker_takes_the_highest_total_and_a_hot_one_anybody() -> None:
    assert softmax_firsts([1.0, 1.1, 0.0], temperature=1e-6) == {1: 3000}
    counts = softmax_firsts([1.0, 1.1, 0.0], temperature=1e6)
    assert all(897 <= counts[i] <= 1103 for i in range(3))  # 1000 each, four times 25.8
    counts = softmax_firsts([1.0, 1.0, 0.0], temperature=1e-6)
    assert set(counts) == {0, 1}
    assert 1390 <= counts[0] <= 1610  # equals are spread: 1500, four times 27.4


def test_the_softmax_pickers_second_place_is_in_proportion_too() -> None:
    rng, picker = Random(3), made(softmax, SoftmaxParams(temperature=1.0, max_num_of_endpoints=2))
    totals, candidates = np.log(np.array([1.0, 1.0, 2.0])), pool(*[Page()] * 3)
    orders = Counter(tuple(picker.order(ask(), candidates, totals, rng).tolist()) for _ in range(3000))
    assert 655 <= orders[(2, 0)] <= 845  # 1/2 * 1/2: 750, four times 23.7
    assert 418 <= orders[(0, 2)] <= 582  # 1/4 * 2/3: 500, four times 20.4


@pytest.mark.parametrize("temperature", [0, -1, 1e-7, 1e7])
def test_a_temperature_that_numbers_cannot_bear_is_refused(temperature: float) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"temperature": temperature}, SoftmaxParams)


# -- power-of-two-picker: the higher total of two ----------------------------------------------------------------------


def test_the_higher_total_of_two_drawn_ones_comes_first() -> None:
    counts = firsts(power_of_two, [0.0, 2.0, 1.0])
    # Of the pairs {0,1}, {0,2}, {1,2}, each 1/3: the highest wins two, the middle one, the lowest none.
    assert counts[0] == 0
    assert 1897 <= counts[1] <= 2103  # 2000, four times 25.8
    assert 897 <= counts[2] <= 1103  # 1000, likewise


def test_of_two_equals_either_comes_first() -> None:
    counts = firsts(power_of_two, [1.0, 1.0, 1.0])
    assert all(897 <= counts[i] <= 1103 for i in range(3))  # 1000 each, four times 25.8


def test_of_two_endpoints_the_higher_total_always_wins() -> None:
    assert firsts(power_of_two, [1.0, 1.5]) == {1: 3000}


def test_each_further_place_goes_to_two_of_those_left() -> None:
    rng = Random(3)
    orders = Counter(tuple(order(power_of_two, [0.0, 2.0, 1.0], rng)) for _ in range(3000))
    # First 1 with 2/3, and of the two left the higher; first 2 with 1/3, then 1.
    assert set(orders) == {(1, 2, 0), (2, 1, 0)}
    assert 1897 <= orders[(1, 2, 0)] <= 2103


def test_the_picker_changes_the_decision() -> None:
    candidates, request, by_queue = pool(*(Page(waiting=i) for i in range(4))), ask(), (made(queue), 1.0)
    best = winners(profile(by_queue), candidates, request, 300)
    two = winners(profile(by_queue, picker=made(power_of_two)), candidates, request, 300)
    soft = winners(profile(by_queue, picker=made(softmax, SoftmaxParams(temperature=1.0))), candidates, request, 300)
    assert best == [300, 0, 0, 0]
    assert 116 <= two[0] <= 184  # in 3 of 6 pairs: 150, four times 8.7
    assert two[3] == 0
    assert min(soft) > 0
