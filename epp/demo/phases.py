"""The demo's course: the same arrivals at the same time through both gateways, phase after phase.

In: a site, seconds, a seed. Out: what each phase measured on each side.
Rules: a phase ends when its last answer has come, so that phases do not disturb each other; a phase that is cancelled
keeps what it had.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from epp.demo.site import Site
from epp.load.client import Load, run_load
from epp.load.results import summarize
from epp.sim.workload import DEMO, NO_SHARING, Workload

LEAD = 0.2
"""Seconds between setting a phase up and its first arrival, so that both sides start together."""
ENDLESS = (60.0, 20.0)
"""Seconds of the two phases when the demo runs until Ctrl-C."""


class Phase:
    """One workload through both gateways."""

    def __init__(self, workload: Workload, seconds: float, seed: int) -> None:
        self.workload = workload
        self.seconds = seconds
        self.seed = seed
        self.started_at = time.monotonic() + LEAD
        self.picker = Load()
        self.round_robin = Load()

    async def run(self, site: Site) -> None:
        """Send everything and wait for every answer."""
        async with asyncio.TaskGroup() as tasks:
            for load, url in ((self.picker, site.picker_url), (self.round_robin, site.round_robin_url)):
                arrivals = self.workload.arrivals(self.seed, self.seconds)
                tasks.create_task(run_load(arrivals, url, load=load, start=self.started_at))


MEASURED: Final = ("ttft_p50_s", "ttft_p90_s", "cached_share")
"""Of `Summary`: what the demo tells of one side of one kind of phase."""


def course(seconds: float | None, seed: int) -> Iterator[Phase]:
    """The phases in order: shared prefixes, then nothing shared; again and again without `seconds`."""
    shared, unshared = (seconds, seconds) if seconds is not None else ENDLESS
    while True:
        yield Phase(DEMO, shared, seed)
        yield Phase(NO_SHARING, unshared, seed)
        if seconds is not None:
            return
        seed += 1


async def run(site: Site, seconds: float | None, seed: int, begun: Callable[[Phase], None]) -> None:
    """Run the course, telling `begun` of each phase."""
    for phase in course(seconds, seed):
        begun(phase)
        await phase.run(site)


def report(phases: list[Phase]) -> dict[str, Any]:
    """The demo's line of JSON."""
    results = [result for phase in phases for load in (phase.picker, phase.round_robin) for result in load.results]
    ended = [result for result in results if result.error != "cancelled"]  # Ctrl-C is nobody's failure
    return {
        "requests": len(ended),
        "errors": sum(bool(result.error) for result in ended),
        **_sides(phases, DEMO),
        "no_sharing": _sides(phases, NO_SHARING),
    }


def _sides(phases: list[Phase], workload: Workload) -> dict[str, Any]:
    mine = [phase for phase in phases if phase.workload is workload]
    return {
        "picker": _measured([phase.picker for phase in mine]),
        "round_robin": _measured([phase.round_robin for phase in mine]),
    }


def _measured(loads: list[Load]) -> dict[str, float | None]:
    summary = summarize([result for load in loads for result in load.results])
    values = {name: getattr(summary, name) for name in MEASURED}
    return {name: None if value is None else round(value, 4) for name, value in values.items()}
