"""Who is full is left out."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.errors import Saturated
from epp.scheduling.detectors import ConcurrencyDetector, UtilizationDetector, concurrency, utilization
from epp.scheduling.plugin import Filter, Params, Plugin
from epp.scheduling.scorers import queue
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler


def kept(plugin: Plugin[Filter], candidates: Candidates, **parameters: Any) -> list[int]:
    """Slots that stay."""
    params: Params = msgspec.convert(parameters, plugin.params)
    mask = made(plugin, params).keep(ask(), candidates)
    assert mask.dtype == np.bool_
    slots: list[int] = candidates.slots[mask].tolist()
    return slots


# -- utilization-detector ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "slots"),
    [
        ([Page(waiting=4, kv_usage=0.5), Page(waiting=5, kv_usage=0.5)], [0]),  # at the threshold is full
        ([Page(waiting=0, kv_usage=0.8), Page(waiting=0, kv_usage=0.79)], [1]),
        ([Page(waiting=4), Page(waiting=6)], [0]),  # judged by the queue alone
        ([Page(kv_usage=0.9), Page(kv_usage=0.1)], [1]),
        ([Page(waiting=0, kv_usage=0.0), None], [0]),  # unknown counts as full
        ([Page(waiting=0, kv_usage=0.0), Page()], [0]),
        ([Page(waiting=9, kv_usage=0.9), None], [0, 1]),  # everybody is full: nobody is left out
        ([Page(waiting=9, kv_usage=0.9)], [0]),
        ([None], [0]),
    ],
)
def test_who_is_full_by_its_page_is_left_out(pages: list[Page | None], slots: list[int]) -> None:
    assert kept(utilization, pool(*pages)) == slots


def test_headroom_raises_both_thresholds() -> None:
    pages = [Page(waiting=5, kv_usage=0.85), Page(waiting=6, kv_usage=0.5), Page(waiting=0, kv_usage=0.96)]
    assert kept(utilization, pool(*pages), headroom=0.2) == [0]  # below 6 waiting and 0.96


def test_a_page_older_than_the_threshold_counts_as_full() -> None:
    table = EndpointTable(freshness=2.0)
    pool(Page(waiting=0), Page(waiting=0), table=table)
    table.page_told(1, table.generation(1), Page(waiting=4), NOW + 0.25)
    assert kept(utilization, table.candidates(NOW + 0.25)) == [1]  # 200 ms, by default
    assert kept(utilization, table.candidates(NOW + 0.25), metricsStalenessThreshold="1s") == [0, 1]


def test_a_burst_since_the_last_page_counts() -> None:
    assert kept(utilization, pool(Page(waiting=0), Page(waiting=0), inflight=[5, 4])) == [1]


def test_being_full_changes_where_a_request_goes() -> None:
    candidates = pool(Page(waiting=0, kv_usage=0.9), Page(waiting=3, kv_usage=0.2))
    by_queue = (made(queue), 1.0)
    assert scheduler(profile(by_queue)).schedule(ask(), candidates).first == 0
    assert scheduler(profile(by_queue, filters=[made(utilization)])).schedule(ask(), candidates).first == 1


def test_a_staleness_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be longer than 0"):
        UtilizationDetector(metrics_staleness_threshold="0s")


# -- concurrency-detector ----------------------------------------------------------------------------------------------


def sent(*work: tuple[int, float]) -> Candidates:
    """Endpoints with so many requests, and so many prompt tokens in all, in flight."""
    table = EndpointTable()
    pool(*[None] * len(work), table=table)
    for slot, (requests, tokens) in enumerate(work):
        for i in range(requests):
            table.admit(slot, tokens if i == 0 else 0.0)
    return table.candidates(NOW)


@pytest.mark.parametrize(
    ("parameters", "slots"),
    [
        ({"maxConcurrency": 2}, [0]),  # at the limit is full
        ({"maxConcurrency": 3}, [0, 1]),
        ({"maxConcurrency": 2, "headroom": 0.5}, [0, 1]),
        ({"concurrencyMode": "tokens", "maxTokenConcurrency": 500}, [1, 2]),
        ({"concurrencyMode": "hybrid", "maxTokenConcurrency": 500, "maxConcurrency": 3}, [1]),
    ],
)
def test_who_is_full_by_what_was_sent_is_left_out(parameters: dict[str, Any], slots: list[int]) -> None:
    assert kept(concurrency, sent((1, 500.0), (2, 499.0), (3, 0.0)), **parameters) == slots


def test_everybody_full_is_a_429_that_says_of_what() -> None:
    with pytest.raises(Saturated, match=r"is full \(inflight 2, inflight_tokens 9\)") as caught:
        kept(concurrency, sent((2, 0.0)), concurrencyMode="hybrid", maxConcurrency=2, maxTokenConcurrency=9)
    assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
    choosing = scheduler(profile(filters=[made(concurrency, ConcurrencyDetector(max_concurrency=1))]))
    assert choosing.schedule(ask(), sent((1, 0.0), (0, 0.0))).first == 1
    with pytest.raises(Saturated):
        choosing.schedule(ask(), sent((1, 0.0)))
