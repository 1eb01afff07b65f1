"""Passive ejection, over a table of ten endpoints unless a test says otherwise. Times are seconds."""

from __future__ import annotations

import numpy as np
import pytest
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


# -- who may not be known to the proxy yet -----------------------------------------------------------------------------


def pass_over(ejection: Ejection, slot: int, now: float, times: int = 5) -> None:
    for _ in range(times):
        ejection.passed_over(slot, now)


def tell(ejection: Ejection, what: str, slot: int, now: float, times: int = 5) -> None:
    match what:
        case "succeed":
            ejection.succeeded(slot, now)
        case "fail":
            fail(ejection, slot, now, times)
        case _:
            pass_over(ejection, slot, now, times)


def pool_and_new(now: float = 100.0) -> tuple[EndpointTable, Ejection, int]:
    """Four endpoints listed at 0, and one at `now`."""
    table, ejection = pool(4)
    return table, ejection, table.put(Endpoint("default/new", "10.0.9.9:80"), now)


def test_one_that_is_passed_over_while_it_is_new_is_not_blamed() -> None:
    table, ejection, new = pool_and_new()
    pass_over(ejection, new, 100.1, times=50)
    ejection.succeeded(new, 100.2)
    assert out(table, ejection, 100.2) == []
    pass_over(ejection, 0, 100.2)  # that has been there all the time
    assert out(table, ejection, 100.2) == [0]


def test_one_that_is_dead_from_the_start_is_out_soon_and_stays_out() -> None:
    """A request every half second is sent there first, and refused; those from 110.0 on count."""
    table, ejection, new = pool_and_new()
    seen = []
    for half in range(1, 200):
        now = 100.0 + half / 2
        if new not in out(table, ejection, now):
            seen.append(now)
            ejection.passed_over(new, now)
    assert seen[:24] == [100.0 + half / 2 for half in range(1, 25)]  # the last of them, at 112.0, is the fifth to count
    assert seen[24:] == [122.0, 142.0, 172.0]  # after 10, 20 and 30 seconds; then 40


def test_what_a_dead_one_attracts_while_it_is_new_is_bounded_by_slow_start() -> None:
    """The others have 20 requests in flight each; what is passed over is counted where it was served by then."""
    table, _, new = pool_and_new()
    for slot in range(4):
        for _ in range(20):
            table.admit(slot)
    sent = 0
    for tenth in range(100):
        while slow_start(table.candidates(100.0 + tenth / 10), 10.0)[-1]:
            table.admit(new)
            sent += 1
    # Its share at 9.9 s is 19.8 of 20, and while nothing answers they stay where they are.
    assert sent == 19


def test_one_that_has_answered_is_known_from_that_request_on() -> None:
    table, ejection, new = pool_and_new()
    ejection.succeeded(new, 103.0, sent_at=101.0)
    for _ in range(5):
        ejection.passed_over(new, 104.0, sent_at=100.9)  # sent before
    assert out(table, ejection, 104.0) == []
    for _ in range(5):
        ejection.passed_over(new, 104.0, sent_at=101.0)
    assert out(table, ejection, 104.0) == [new]


def test_the_earliest_request_that_was_answered_counts_whatever_came_first() -> None:
    table, ejection, new = pool_and_new()
    ejection.succeeded(new, 103.0, sent_at=102.0)
    ejection.succeeded(new, 104.0, sent_at=101.0)
    ejection.succeeded(new, 105.0, sent_at=105.0)
    for _ in range(5):
        ejection.passed_over(new, 106.0, sent_at=101.5)
    assert out(table, ejection, 106.0) == [new]


def test_an_answer_that_is_a_failure_makes_it_known_too() -> None:
    table, ejection, new = pool_and_new()
    fail(ejection, new, 101.0, times=1)
    pass_over(ejection, new, 102.0, times=3)
    assert out(table, ejection, 102.0) == []
    pass_over(ejection, new, 102.0, times=1)
    assert out(table, ejection, 102.0) == [new]


def test_its_own_failures_count_from_the_beginning() -> None:
    table, ejection, new = pool_and_new()
    fail(ejection, new, 100.1)
    assert out(table, ejection, 100.1) == [new]


def test_what_counts_is_when_a_request_was_sent_not_when_another_answered_it() -> None:
    table, ejection, new = pool_and_new()
    for _ in range(9):
        ejection.passed_over(new, 150.0, sent_at=109.9)
    assert out(table, ejection, 150.0) == []
    for _ in range(5):
        ejection.passed_over(new, 150.0, sent_at=110.0)
    assert out(table, ejection, 150.0) == [new]


def test_one_that_comes_back_is_new_again() -> None:
    """The proxy took it off its list, too; what it was sent before says nothing of what it will be sent."""
    table, ejection, new = pool_and_new()
    ejection.succeeded(new, 101.0)
    table.admit(new)  # keeps the slot and its generation
    table.drop("default/new")
    assert table.put(Endpoint("default/new", "10.0.9.9:80"), 102.0) == new
    ejection.succeeded(new, 103.0, sent_at=101.5)
    ejection.passed_over(new, 103.0, sent_at=101.5)
    pass_over(ejection, new, 103.0, times=9)
    assert out(table, ejection, 103.0) == []
    pass_over(ejection, new, 112.0)
    assert out(table, ejection, 112.0) == [new]


def test_an_answer_to_what_was_sent_before_it_left_does_not_make_a_known_one_unknown() -> None:
    table, ejection, new = pool_and_new()
    table.admit(new)
    table.drop("default/new")
    table.put(Endpoint("default/new", "10.0.9.9:80"), 102.0)
    ejection.succeeded(new, 103.0)
    ejection.succeeded(new, 104.0, sent_at=101.5)
    pass_over(ejection, new, 105.0)
    assert out(table, ejection, 105.0) == [new]


def test_other_labels_do_not_make_it_new_and_neither_does_the_end_of_a_pause() -> None:
    table, ejection, new = pool_and_new()
    table.put(Endpoint("default/new", "10.0.9.9:80", {"role": "decode"}), 109.0)
    pass_over(ejection, new, 110.0)
    assert out(table, ejection, 119.9) == [new]
    pass_over(ejection, new, 120.0, times=1)
    assert out(table, ejection, 139.9) == [new]


def test_another_endpoint_in_the_slot_of_one_that_was_known_is_not_known() -> None:
    table, ejection, new = pool_and_new()
    ejection.succeeded(new, 101.0)
    table.drop("default/new")
    assert table.put(Endpoint("default/newer", "10.0.9.8:80"), 101.0) == new
    pass_over(ejection, new, 101.0, times=50)
    assert out(table, ejection, 101.0) == []


@pytest.mark.parametrize(("lag", "back"), [(15.0, 20.0), (20.5, 40.0), (39.0, 40.0), (41.0, 70.0)])
def test_a_gateway_that_lags_longer_costs_pauses_that_end_before_twice_the_lag(lag: float, back: float) -> None:
    """Ten requests a second that prefer the new one, which the gateway knows after `lag` seconds."""
    table, ejection, new = pool_and_new(0.0)
    for tenth in range(1, 1000):
        now = tenth / 10
        if new in out(table, ejection, now):
            continue
        if now >= lag:
            break
        ejection.passed_over(new, now)
    assert now == pytest.approx(back + 0.4, abs=0.11)  # the first pause begins with the fifth from 10.0 on, at 10.4
    for tenth in range(600):
        ejection.succeeded(new, now + tenth / 10)
    assert repr(ejection) == "<Ejection [Out: 0 | Watched: 0]>"


lags = st.floats(0.0, PARAMS.unknown_for)
requests = st.lists(st.tuples(st.floats(0.0, 30.0), st.floats(0.0, 60.0)), max_size=60)


@given(lag=lags, requests=requests)
def test_a_proxy_that_learns_in_time_never_gets_a_sound_endpoint_ejected(
    lag: float, requests: list[tuple[float, float]]
) -> None:
    """Requests are sent some seconds after the endpoint was listed, and answered some seconds later, in any order."""
    _, ejection, new = pool_and_new(0.0)
    for answered, sent in sorted((sent + takes, sent) for sent, takes in requests):
        if sent < lag:
            ejection.passed_over(new, answered, sent_at=sent)
        else:
            ejection.succeeded(new, answered, sent_at=sent)
    assert ejection.total == 0


@given(answers=st.lists(st.sampled_from(["succeed", "fail", "pass over"]), max_size=60))
def test_of_one_that_is_known_being_passed_over_is_a_failure_like_any_other(answers: list[str]) -> None:
    pools = [pool(), pool()]
    for second, answer in enumerate(answers, 10):
        for (_, ejection), named in zip(pools, (answer, answer.replace("pass over", "fail")), strict=True):
            tell(ejection, named, 3, float(second), times=1)
    masks = [[out(table, ejection, now / 2) for now in range(600)] for table, ejection in pools]
    assert masks[0] == masks[1]


# -- whatever happens --------------------------------------------------------------------------------------------------


steps = st.lists(
    st.tuples(
        st.sampled_from(["fail", "fail", "pass over", "pass over", "succeed", "put", "drop"]),
        st.integers(0, 5),
        st.floats(0.0, 20.0),
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
            tell(ejection, what, slot, now)
        gone = ejection.out(table.listed, now)
        assert gone.shape == (len(table),)
        assert gone.sum() <= len(table) * 0.5
    assert not ejection.out(table.listed, now + 300.0).any()
