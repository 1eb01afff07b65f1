"""Passive ejection, over a table of ten endpoints unless a test says otherwise. Times are seconds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.slowstart import slow_start
from epp.endpoints.table import Endpoint, EndpointTable

PARAMS = EjectionParams(failures=5, pause=10.0, longest=300.0, share=0.5)


def pool(size: int = 10) -> tuple[EndpointTable, Ejection]:
    table = EndpointTable()
    table.replace(endpoints(size), 0.0)
    return table, Ejection(table, PARAMS)


def endpoints(size: int, first: int = 0) -> list[Endpoint]:
    return [Endpoint(f"default/s{i}", f"10.0.0.{i}:80") for i in range(first, first + size)]


def fail(ejection: Ejection, slot: int, now: float, times: int = 5) -> None:
    for _ in range(times):
        ejection.failed(slot, now)


def out(table: EndpointTable, ejection: Ejection, now: float) -> list[int]:
    slots: list[int] = table.listed[ejection.out(table.listed, now)].tolist()
    return slots


def test_five_failures_in_a_row_eject_for_the_first_pause() -> None:
    table, ejection = pool()
    fail(ejection, 3, 100.0, times=4)
    assert out(table, ejection, 100.0) == []
    fail(ejection, 3, 101.0, times=1)
    assert out(table, ejection, 101.0) == [3]
    assert out(table, ejection, 110.9) == [3]
    assert out(table, ejection, 111.0) == []


def test_anyone_says_whether_anybody_is_out() -> None:
    table, ejection = pool()
    assert not ejection.anyone(100.0)
    fail(ejection, 3, 100.0, times=4)
    assert not ejection.anyone(100.0)
    fail(ejection, 3, 100.0, times=1)
    assert ejection.anyone(109.9)
    assert not ejection.anyone(110.0)
    fail(ejection, 3, 110.0, times=1)
    assert ejection.anyone(110.0)
    table.drop("default/s3")
    assert not ejection.anyone(111.0)


def test_a_success_in_between_starts_the_count_anew() -> None:
    table, ejection = pool()
    for _ in range(10):
        fail(ejection, 3, 100.0, times=4)
        ejection.succeeded(3, 100.0)
    assert out(table, ejection, 100.0) == []


def test_on_probation_one_failure_ejects_for_twice_as_long() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)
    fail(ejection, 3, 10.0, times=1)
    assert out(table, ejection, 29.9) == [3]
    assert out(table, ejection, 30.0) == []
    fail(ejection, 3, 30.0, times=1)
    assert out(table, ejection, 59.9) == [3]
    assert out(table, ejection, 60.0) == []


def test_a_success_ends_the_probation() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)
    for _ in range(3):
        ejection.succeeded(3, 10.0)
        fail(ejection, 3, 10.0, times=4)
    assert out(table, ejection, 10.0) == []


def test_good_behaviour_takes_ejections_off_the_row() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)  # out until 10
    fail(ejection, 3, 10.0, times=1)  # second in a row: until 30
    fail(ejection, 3, 30.0, times=1)  # third: until 60
    ejection.succeeded(3, 60.0)
    fail(ejection, 3, 85.0)  # 25 s well: two of three are forgiven, this is the second again: until 105
    assert out(table, ejection, 104.9) == [3]
    assert out(table, ejection, 105.0) == []


def test_after_long_good_behaviour_nothing_is_left_of_it() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)
    ejection.succeeded(3, 10.0)
    ejection.succeeded(3, 20.0)
    assert repr(ejection).endswith("Watched: 0]>")
    fail(ejection, 3, 20.0)
    assert out(table, ejection, 29.9) == [3]
    assert out(table, ejection, 30.0) == []


def test_it_is_in_again_even_where_nobody_asked_in_between() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)
    ejection.succeeded(3, 10.0)
    ejection.succeeded(3, 20.0)
    assert out(table, ejection, 20.0) == []


def test_no_pause_is_longer_than_the_longest() -> None:
    table, ejection = pool()
    now = 0.0
    fail(ejection, 3, now)
    for _ in range(60):
        while out(table, ejection, now):
            now += 10.0
        fail(ejection, 3, now, times=1)
    assert out(table, ejection, now + 299.9) == [3]
    assert out(table, ejection, now + 300.0) == []


def test_results_that_arrive_during_the_pause_change_nothing() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)
    fail(ejection, 3, 5.0, times=50)
    ejection.succeeded(3, 6.0)
    assert out(table, ejection, 9.9) == [3]
    assert out(table, ejection, 10.0) == []
    fail(ejection, 3, 10.0, times=1)  # still on probation: the success was of a request sent before
    assert out(table, ejection, 29.9) == [3]


def test_a_late_failure_of_an_old_request_does_not_eject_again() -> None:
    table, ejection = pool()
    fail(ejection, 3, 0.0)
    ejection.failed(3, 60.0, sent_at=1.0)
    ejection.succeeded(3, 60.0, sent_at=9.9)
    assert out(table, ejection, 60.0) == []
    ejection.failed(3, 61.0, sent_at=60.5)
    assert out(table, ejection, 61.0) == [3]


def test_never_more_than_the_share_is_out_and_the_rest_is_not_remembered_as_ejected() -> None:
    table, ejection = pool(10)
    for slot in range(10):
        fail(ejection, slot, 0.0)
    assert out(table, ejection, 0.0) == [0, 1, 2, 3, 4]
    assert out(table, ejection, 10.0) == []


def test_the_last_endpoint_stays_in() -> None:
    table, ejection = pool(1)
    fail(ejection, 0, 0.0, times=100)
    assert out(table, ejection, 0.0) == []


def test_of_candidates_that_are_all_out_the_one_back_soonest_remains() -> None:
    _, ejection = pool(10)
    fail(ejection, 7, 0.0)
    fail(ejection, 2, 1.0)
    subset = np.array([2, 7])
    assert subset[ejection.out(subset, 2.0)].tolist() == [2]
    assert ejection.out(np.array([], np.int64), 2.0).tolist() == []


def test_when_the_pool_shrinks_those_back_soonest_come_back_now() -> None:
    table, ejection = pool(10)
    for slot in range(5):
        fail(ejection, slot, float(slot))
    assert out(table, ejection, 5.0) == [0, 1, 2, 3, 4]
    table.replace(endpoints(5), 5.0)
    assert out(table, ejection, 5.0) == [3, 4]


def test_another_endpoint_in_the_same_slot_starts_clean() -> None:
    table, ejection = pool(4)
    fail(ejection, 1, 0.0)
    table.drop("default/s1")
    assert table.put(Endpoint("default/new", "10.0.9.9:80"), 1.0) == 1
    assert out(table, ejection, 1.0) == []
    fail(ejection, 1, 1.0, times=4)
    table.drop("default/new")
    assert table.put(Endpoint("default/newer", "10.0.9.8:80"), 1.0) == 1
    fail(ejection, 1, 1.0, times=4)
    assert out(table, ejection, 1.0) == []
    fail(ejection, 1, 1.0, times=1)
    assert out(table, ejection, 1.0) == [1]


def test_one_that_left_while_out_takes_nobodys_place_in_the_share() -> None:
    table, ejection = pool(4)
    fail(ejection, 0, 0.0)
    fail(ejection, 1, 0.0)
    table.admit(0)
    table.replace(endpoints(4, first=1), 1.0)
    fail(ejection, 2, 1.0)
    assert out(table, ejection, 1.0) == [1, 2]


def test_an_endpoint_that_flaps_while_out_is_still_out() -> None:
    table, ejection = pool(4)
    table.admit(1)
    fail(ejection, 1, 0.0)
    table.drop("default/s1")
    assert out(table, ejection, 1.0) == []
    table.put(endpoints(1, first=1)[0], 2.0)
    assert out(table, ejection, 2.0) == [1]


def test_an_endpoint_that_comes_back_starts_slowly() -> None:
    table, ejection = pool(4)
    for slot in (0, 2, 3):
        for _ in range(8):
            table.admit(slot)
    fail(ejection, 1, 100.0)
    table.admit(1)
    allowed = slow_start(table.candidates(110.0), 10.0)
    assert allowed.tolist() == [True, False, True, True]
    allowed = slow_start(table.candidates(115.0), 10.0)  # half way: 4 of the others' 8
    assert allowed.tolist() == [True, True, True, True]


steps = st.lists(
    st.tuples(
        st.sampled_from(["fail", "fail", "fail", "succeed", "put", "drop"]), st.integers(0, 5), st.floats(0.0, 20.0)
    ),
    max_size=60,
)


@given(steps=steps)
def test_whatever_happens_the_share_holds_and_everybody_comes_back(steps: list[tuple[str, int, float]]) -> None:
    table, ejection = pool(6)
    now = 0.0
    for what, which, seconds in steps:
        now += seconds
        endpoint = endpoints(1, first=which)[0]
        slot = table.slot_at(endpoint.address)
        if what == "put":
            table.put(endpoint, now)
        elif what == "drop" and len(table) > 1:
            table.drop(endpoint.name)
        elif slot is not None:
            fail(ejection, slot, now) if what == "fail" else ejection.succeeded(slot, now)
        gone = ejection.out(table.listed, now)
        assert gone.shape == (len(table),)
        assert gone.sum() <= len(table) * 0.5
    assert not ejection.out(table.listed, now + 300.0).any()
