"""The client's own delay, and when it says nothing rather than its own figures."""

from __future__ import annotations

import asyncio
import time

import pytest

from epp.load import run_load
from epp.load.delay import Delay, delay, too_slow, watch_loop
from tests.load.test_client import arrival
from tests.sim.serving import server

pytestmark = pytest.mark.anyio


def test_delay_is_the_99th_percentile_and_the_worst() -> None:
    late = [0.001] * 98 + [0.3, 0.5]
    assert delay(late, [0.002]) == Delay(0.3, 0.5, 0.002, 0.002)
    assert delay([], []) == Delay(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("late", "lag", "ttft_p50", "slow"),
    [
        (0.020, 0.020, 0.1, False),
        (0.021, 0.0, 0.1, True),
        (0.0, 0.021, 0.1, True),
        (0.0, 0.021, None, True),
        (0.100, 0.100, 2.0, False),  # a twentieth of two seconds
        (0.101, 0.0, 2.0, True),
    ],
)
def test_over_20_ms_or_a_twentieth_of_the_median_nothing_is_told(
    late: float, lag: float, ttft_p50: float | None, slow: bool
) -> None:
    why = too_slow(Delay(late, 9.9, lag, 9.9), ttft_p50)
    assert bool(why) is slow
    if slow:
        assert f"by {late * 1000:.0f} ms or more, its event loop by {lag * 1000:.0f} ms" in why


async def test_a_loop_that_stood_is_late_by_every_sample_that_it_missed() -> None:
    """The clock stands at 0, and 180 ms later after each sleep of 50 ms: 130 ms late, then 80, then 30."""
    ticks = iter((0.0, 0.180))
    read = asyncio.Event()

    def clock() -> float:
        try:
            return next(ticks)
        except StopIteration:
            read.set()
            return 99.0

    lag: list[float] = []
    watching = asyncio.create_task(watch_loop(clock, lag))
    await read.wait()
    watching.cancel()
    assert lag[:3] == pytest.approx([0.130, 0.080, 0.030])


async def test_the_lag_of_a_run_is_measured_by_the_clock_that_is_passed_in() -> None:
    """A clock three times as fast as the loop's: a sleep of 50 ms lasts 150 ms by it, so the loop is 100 ms late."""
    async with server() as served:
        load = await run_load([arrival(1.0)], f"http://{served.address}", clock=lambda: 3.0 * time.monotonic())
    assert max(load.lag) >= 0.1
    measured = delay((result.sent_at - result.scheduled_at for result in load.results), load.lag)
    assert "its event loop by" in too_slow(measured, 0.2)
