"""Slow start: window 10 s, hand-worked ramps."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.slowstart import anyone_new, slow_start
from epp.endpoints.table import Endpoint, EndpointTable


def pool(joined: list[float], inflight: list[int]) -> EndpointTable:
    table = EndpointTable()
    for i, (at, count) in enumerate(zip(joined, inflight, strict=True)):
        slot = table.put(Endpoint(f"default/s{i}", f"10.0.0.{i}:80"), at)
        for _ in range(count):
            table.admit(slot)
    return table


def allowed(table: EndpointTable, now: float, window: float = 10.0) -> list[bool]:
    mask: list[bool] = slow_start(table.candidates(now), window).tolist()
    return mask


def test_a_new_endpoint_may_have_its_ages_share_of_the_others_load() -> None:
    table = pool(joined=[0.0, 0.0, 100.0], inflight=[8, 12, 3])  # the others' mean is 10
    assert allowed(table, 103.9) == [True, True, False]  # its share is 3.9, it would get to 4
    assert allowed(table, 104.0) == [True, True, True]


def test_a_new_endpoint_always_gets_one() -> None:
    table = pool(joined=[0.0, 100.0, 100.0], inflight=[50, 0, 1])
    assert allowed(table, 100.0) == [True, True, False]


def test_beside_an_idle_pool_one_request_at_a_time_is_its_share() -> None:
    table = pool(joined=[0.0, 100.0], inflight=[0, 1])
    assert allowed(table, 109.0) == [True, False]


def test_after_the_window_it_is_like_the_others() -> None:
    table = pool(joined=[0.0, 100.0], inflight=[1, 90])
    assert allowed(table, 109.9) == [True, False]
    assert allowed(table, 110.0) == [True, True]


def test_where_everybody_is_new_nobody_is_left_out() -> None:
    table = pool(joined=[100.0, 101.0], inflight=[0, 9])
    assert allowed(table, 102.0) == [True, True]


def test_only_candidates_are_compared() -> None:
    table = pool(joined=[0.0, 100.0, 101.0], inflight=[1, 9, 9])
    new_ones = table.candidates(102.0, np.array([1, 2]))
    assert slow_start(new_ones, 10.0).tolist() == [True, True]


def test_no_window_is_no_slow_start() -> None:
    table = pool(joined=[0.0, 100.0], inflight=[1, 90])
    assert allowed(table, 100.0, window=0.0) == [True, True]
    table.rejoin(1, 105.0)
    assert allowed(table, 100.0, window=0.0) == [True, True]


def test_anyone_new_says_whether_anybody_can_be_held_back() -> None:
    assert not anyone_new(EndpointTable(), 10.0, 0.0)
    table = pool(joined=[0.0, 100.0], inflight=[0, 0])
    assert anyone_new(table, 10.0, 109.9)
    assert not anyone_new(table, 10.0, 110.0)
    assert not anyone_new(table, 0.0, 100.0)
    table.rejoin(0, 120.0)  # lies ahead: it is ejected until then
    assert anyone_new(table, 10.0, 110.0)


def test_no_candidates_are_no_mistake() -> None:
    assert allowed(EndpointTable(), 0.0) == []
    table = pool(joined=[0.0], inflight=[0])
    assert slow_start(table.candidates(0.0, np.array([], np.int64)), 10.0).tolist() == []


@given(
    servers=st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 5)), min_size=1, max_size=8),
    window=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_somebody_is_always_left_and_the_old_ones_are_never_left_out(
    servers: list[tuple[float, int]], window: float
) -> None:
    table = pool([at for at, _ in servers], [count for _, count in servers])
    mask = slow_start(table.candidates(30.0), window)
    assert mask.any()
    assert all(mask[30.0 - table.joined(table.listed) >= window])
