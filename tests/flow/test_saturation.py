"""How full a pool is: tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page
from epp.flow.saturation import Concurrency, Counted, Saturation, Utilization

Told = tuple[float | None, float | None, float]
"""Waiting, KV usage, age of the page in seconds."""
FULL: Told = 5, 0.0, 0.0
IDLE: Told = 0, 0.0, 0.0
NOW = 100.0


def pool(*pages: Told | None) -> Candidates:
    table = EndpointTable(freshness=2.0)
    for i, told in enumerate(pages):
        slot = table.put(Endpoint(f"default/pod{i}-rank-0", f"192.168.1.{i + 1}:8000"), 0.0)
        if told is not None:
            waiting, kv, age = told
            table.page_told(slot, table.generation(slot), Page(waiting=waiting, kv_usage=kv), NOW - age)
    return table.candidates(NOW)


@pytest.mark.parametrize(
    ("pages", "value", "unknown"),
    [
        ([IDLE], 0.0, 0),
        ([FULL], 1.0, 0),
        ([(0, 0.8, 0.0)], 1.0, 0),
        ([(4, 0.2, 0.0)], 0.8, 0),  # 4/5 is more than 0.2/0.8
        ([(1, 0.4, 0.0)], 0.5, 0),  # 1/5 is less than 0.4/0.8
        ([(10, 0.0, 0.0)], 2.0, 0),  # twice as full as full
        ([FULL, IDLE], 0.5, 0),
        ([(10, 0.0, 0.0), IDLE], 1.0, 0),  # one idle endpoint does not keep a pool open
        ([(6, 0.2, 0.0), (0, 0.88, 0.0), (10, 0.9, 0.0)], (1.2 + 1.1 + 2.0) / 3, 0),
        ([None], 1.0, 1),
        ([None, IDLE], 0.5, 1),
        ([(0, 0.0, 0.19)], 0.0, 0),
        ([(0, 0.0, 0.21)], 1.0, 1),  # older than 200 ms
        ([(50, 0.0, 0.21)], 1.0, 1),  # what it said is too old to believe, whichever way
        ([(4, None, 0.0)], 0.8, 0),  # Triton tells no KV usage
        ([(None, 0.4, 0.0)], 0.5, 0),
        ([(None, None, 0.0), IDLE], 0.5, 1),
        ([], 1.0, 0),
    ],
)
def test_utilization_is_the_mean_of_queue_or_cache(pages: list[Told | None], value: float, unknown: int) -> None:
    saturation = Utilization().saturation(pool(*pages))
    assert saturation.value == pytest.approx(value, rel=1e-12)
    assert (saturation.endpoints, saturation.unknown) == (len(pages), unknown)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 100, 1000])
def test_a_pool_that_is_exactly_full_is_exactly_full(count: int) -> None:
    assert Utilization().saturation(pool(*[FULL] * count)).value == 1.0
    assert Utilization().saturation(pool(*[(0, 0.8, 0.0)] * count)).value == 1.0


def test_thresholds_are_the_operators() -> None:
    candidates = pool((2, 0.25, 0.5))
    assert Utilization(queue_depth=10, kv_usage=1.0, staleness=1.0).saturation(candidates) == Saturation(0.25, 1)
    assert Utilization(queue_depth=2, kv_usage=1.0, staleness=1.0).saturation(candidates) == Saturation(1.0, 1)
    assert Utilization(queue_depth=10, kv_usage=1.0, staleness=0.4).saturation(candidates) == Saturation(1.0, 1, 1)


def test_a_longer_patience_than_the_scorers_is_possible() -> None:
    """The table calls this page too old after 2 s; the detector has its own limit."""
    assert Utilization(staleness=10.0).saturation(pool((1, 0.0, 5.0))) == Saturation(0.2, 1)


def test_what_was_sent_since_the_page_is_not_yet_a_queue() -> None:
    candidates = pool(IDLE)
    for _ in range(20):
        candidates.table.admit(0)
    assert Utilization().saturation(candidates.table.candidates(NOW)).value == 0.0


def test_only_the_candidates_count() -> None:
    table = pool(FULL, IDLE).table
    assert Utilization().saturation(table.candidates(NOW, table.listed[:1])).value == 1.0
    assert Utilization().saturation(table.candidates(NOW, table.listed[1:])).value == 0.0


def test_an_endpoint_is_judged_by_its_own_page_wherever_it_stands() -> None:
    """Three of four in another order than their slots: full for its queue, idle, full for its age."""
    table = pool(IDLE, (0, 0.0, 0.5), (9, 0.0, 0.5), FULL).table
    assert Utilization().saturation(table.candidates(NOW, np.array([3, 0, 2]))) == Saturation(2 / 3, 3, 1)


@given(
    st.lists(st.none() | st.tuples(st.integers(0, 20), st.floats(0, 1), st.sampled_from([0.0, 0.1, 5.0])), max_size=9)
)
def test_utilization_against_one_endpoint_at_a_time(pages: list[Told | None]) -> None:
    def load(told: Told | None) -> float:
        if told is None or told[2] > 0.2:
            return 1.0
        assert told[0] is not None
        assert told[1] is not None
        return max(told[0] / 5, told[1] / 0.8)

    expected = sum(map(load, pages)) / len(pages) if pages else 1.0
    assert Utilization().saturation(pool(*pages)).value == pytest.approx(expected, rel=1e-9)


# -- concurrency -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "value"),
    [
        (Counted.REQUESTS, (3 + 1) / (10 * 2)),
        (Counted.TOKENS, (30 + 600) / (1000 * 2)),
        (Counted.HYBRID, (0.3 + 0.6) / 2),  # 3/10 is more than 30/1000, 1/10 less than 600/1000
    ],
)
def test_concurrency_is_what_runs_of_what_may_run(counted: Counted, value: float) -> None:
    table = pool(None, None).table
    for slot, tokens in ((0, 10.0), (0, 10.0), (0, 10.0), (1, 600.0)):
        table.admit(slot, tokens)
    detector = Concurrency(counted, requests=10, tokens=1000)
    saturation = detector.saturation(table.candidates(NOW))
    assert saturation.value == pytest.approx(value, rel=1e-12)
    assert (saturation.endpoints, saturation.unknown) == (2, 0)


def test_concurrency_asks_no_page_and_falls_when_requests_end() -> None:
    table = pool(None).table
    holds = [table.admit(0) for _ in range(100)]
    assert Concurrency().saturation(table.candidates(NOW)) == Saturation(1.0, 1)
    table.release(holds[0])
    assert Concurrency().saturation(table.candidates(NOW)) == Saturation(0.99, 1)
    assert Concurrency().saturation(pool()) == Saturation(1.0, 0)


def test_only_who_counts_tokens_needs_the_length_of_prompts() -> None:
    assert not Utilization().weighs
    assert [Concurrency(counted).weighs for counted in Counted] == [False, True, True]
