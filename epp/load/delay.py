"""The load client's own delay: a client that is late measures itself.

In: how late each request was sent, how late the event loop was. Out: both in four figures, and whether they are too
large to say anything of the server.
The rule: the 99th percentile of either must not be over 20 ms, or over a twentieth of the median time to the first
token where that is longer. What is measured is then wrong by 5 %, or by 20 ms where the servers are that quick.
Rejected: sampling the lag alone. A loop that stands for a second is one sample of twenty, and everything due in that
second waited: so each sample that was missed counts with what was left of the wait (coordinated omission).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from epp.load.results import percentile

INTERVAL: Final = 0.05
"""Seconds between two looks at the loop."""
LEAST_LIMIT: Final = 0.02
SHARE_OF_TTFT: Final = 0.05


class Delay(msgspec.Struct, frozen=True):
    """Seconds; 0 where nothing was measured."""

    late_p99_s: float
    """Requests sent after they were due."""
    late_max_s: float
    lag_p99_s: float
    """Event loop."""
    lag_max_s: float


def delay(late: Iterable[float], lag: Iterable[float]) -> Delay:
    """Sum up what was measured, in seconds."""
    sent, loop = list(late), list(lag)
    return Delay(
        percentile(sent, 0.99) or 0.0, max(sent, default=0.0), percentile(loop, 0.99) or 0.0, max(loop, default=0.0)
    )


def too_slow(measured: Delay, ttft_p50: float | None) -> str:
    """Why figures measured with this delay are the client's own; empty: they are the server's.

    Args:
        ttft_p50: seconds; None: no answer came, and the limit is the least one.
    """
    limit = max(LEAST_LIMIT, SHARE_OF_TTFT * (ttft_p50 or 0.0))
    worst = max(measured.late_p99_s, measured.lag_p99_s)
    if worst <= limit:
        return ""
    late, lag, most = (f"{seconds * 1000:.0f} ms" for seconds in (measured.late_p99_s, measured.lag_p99_s, limit))
    return (
        f"the client itself was late: 1 % of its requests by {late} or more, its event loop by {lag}, and over {most} "
        "the figures are its own. Lower --rate, or give it a core that nobody else uses"
    )


async def watch_loop(clock: Callable[[], float], lag: list[float]) -> None:
    """Append how late the event loop is, a sample an `INTERVAL`, until cancelled."""
    while True:
        due = clock() + INTERVAL
        await asyncio.sleep(INTERVAL)
        late = max(0.0, clock() - due)
        lag.append(late)
        while (late := late - INTERVAL) > 0:
            lag.append(late)
