"""Who is turned away, and how often."""

from __future__ import annotations

from random import Random

import pytest

from epp.config.build import build
from epp.config.load import load
from epp.endpoints.table import Candidates, Page
from epp.errors import Saturated
from epp.scheduling.admitters import ProbabilisticParams, chance, probabilistic
from epp.scheduling.plugin import Admitter, Context
from tests.scheduling.builders import NOW, ask, made, pool

DRAWS = 2000


def admitter(params: ProbabilisticParams | None = None) -> Admitter:
    return made(probabilistic, params, Context(rng=Random(1)))


def refused(candidates: Candidates, priority: int, params: ProbabilisticParams | None = None) -> int:
    """Of DRAWS requests."""
    each, request, count = admitter(params), ask(), 0
    request.priority = priority
    for _ in range(DRAWS):
        try:
            each.admit(request, candidates)
        except Saturated:
            count += 1
    return count


@pytest.mark.parametrize(
    ("saturation", "expected"),
    [
        (0.0, 0.0),
        (0.15, 0.02278),  # 0.15^5 = 7.59e-5, times 300
        (0.2, 0.096),  # 3.2e-4 * 300
        (0.3, 0.729),  # 2.43e-3 * 300
        (0.32, 1.0),  # 3.355e-3 * 300 = 1.0066
        (1e9, 1.0),
    ],
)
def test_the_chance_follows_the_curve(saturation: float, expected: float) -> None:
    assert chance(saturation, ProbabilisticParams()) == pytest.approx(expected, rel=1e-3)


def test_no_power_is_too_much_for_it() -> None:
    steep = ProbabilisticParams(power=1e6, k=1e-300)
    assert chance(10.0, steep) == 1.0
    assert chance(0.5, steep) == 0.0


@pytest.mark.parametrize(
    ("pages", "saturation"),
    [
        ((Page(waiting=1, kv_usage=0.0),), 0.2),  # 1/5
        ((Page(waiting=0, kv_usage=0.16),), 0.2),  # 0.16/0.8
        ((Page(waiting=1, kv_usage=0.12),), 0.2),  # the fuller of 0.2 and 0.15
        ((Page(waiting=1, kv_usage=0.0), Page(waiting=0, kv_usage=0.24)), 0.25),  # (0.2 + 0.3) / 2
        ((Page(waiting=1),), 0.2),  # a page without the one is judged by the other
        ((None, *[Page(waiting=0, kv_usage=0.0)] * 4), 0.2),  # one of five without a page counts as full
        ((None,), 1.0),
        ((Page(),), 1.0),
    ],
)
def test_as_many_are_refused_as_the_saturation_says(pages: tuple[Page | None, ...], saturation: float) -> None:
    expected = min(1.0, saturation**5 * 300)
    count = refused(pool(*pages), -1)
    deviation = (DRAWS * expected * (1 - expected)) ** 0.5
    assert abs(count - DRAWS * expected) <= 4 * deviation


@pytest.mark.parametrize("priority", [0, 1, 7])
def test_nobody_of_priority_0_or_more_is_refused(priority: int) -> None:
    assert refused(pool(Page(waiting=100, kv_usage=1.0)), priority) == 0


def test_an_idle_pool_refuses_nobody() -> None:
    assert refused(pool(Page(waiting=0, kv_usage=0.0)), -5) == 0


def test_a_refusal_is_429_and_says_when_to_try_again() -> None:
    request = ask()
    request.priority = -1
    with pytest.raises(Saturated, match=r"priority is -1: .* saturation is 20\.00") as caught:
        admitter().admit(request, pool(Page(waiting=100)))
    assert (caught.value.status, caught.value.reason, caught.value.retry_after) == (429, "rejected-saturated", 1.0)


def test_what_was_sent_since_the_page_does_not_refuse_anybody() -> None:
    """As for the detector: it may run at once."""
    assert refused(pool(Page(waiting=0, kv_usage=0.0), inflight=[50]), -1) == 0


def test_an_idle_page_that_is_too_old_counts_as_full() -> None:
    """The same page, a moment before and a moment after its freshness has run out (2 s)."""
    table = pool(Page(waiting=0, kv_usage=0.0)).table
    assert refused(table.candidates(NOW + 1.9), -1) == 0
    assert refused(table.candidates(NOW + 2.1), -1) == DRAWS


def test_a_configuration_that_declares_it_refuses_by_it() -> None:
    scheduler = build(
        load("{apiVersion: llm-d.ai/v1alpha1, kind: EndpointPickerConfig, plugins: [{type: probabilistic-admitter}]}"),
        Random(0),
    )
    full = pool(Page(waiting=4, kv_usage=0.1))  # 0.8: certain
    request = ask()
    assert scheduler.schedule(request, full).first == 0
    request.priority = -1
    with pytest.raises(Saturated):
        scheduler.schedule(request, full)
    assert scheduler.schedule(request, pool(Page(waiting=0, kv_usage=0.0))).first == 0
    assert full.now == NOW
