"""`epp demo`: from nothing to a moving picture, and back to nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.table import Table

from epp.demo import phases
from epp.demo.phases import Phase
from epp.demo.site import Site, running
from epp.demo.view import INTERVAL, View, try_it
from epp.sim.workload import DEMO


async def run_demo(*, seconds: float | None, seed: int, as_json: bool) -> int:
    """Run the demo; returns the exit code: 0, or 1 when a request failed.

    Args:
        seconds: of each of the two phases; None: until Ctrl-C.
        as_json: print one line of JSON at the end, and nothing else on standard output.

    Raises:
        ConfigError: a part does not start.
    """
    console = Console(stderr=as_json)
    done: list[Phase] = []
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    with tempfile.TemporaryDirectory(prefix="epp-demo-") as folder:
        (Path(folder) / "eds").mkdir()
        try:
            console.print("starting two fleets of model servers, the picker and Envoy…", style="dim")
            async with running(Path(folder), DEMO, seed) as site:
                for note in site.notes:
                    console.print(note, style="yellow")
                console.print(f"gateway with the picker: {site.picker_url}, with round robin: {site.round_robin_url}")
                console.print(f"try it: {try_it(site)}", soft_wrap=True, highlight=False)
                await _watched(site, seconds, seed, console, done)
        except asyncio.CancelledError:
            console.print("stopped", style="dim")
    told = phases.report(done)
    if as_json:
        print(json.dumps(told), file=sys.stdout, flush=True)
    else:
        console.print(_table(told))
    return 1 if told["errors"] else 0


async def _watched(site: Site, seconds: float | None, seed: int, console: Console, done: list[Phase]) -> None:
    """Run the phases under a live view, where there is a terminal to show it."""
    view = View(site)

    def begun(phase: Phase) -> None:
        done.append(phase)
        view.phase = phase
        if not console.is_terminal:
            console.print(f"phase {phase.workload.name}: {phase.seconds:g} s at {phase.workload.rate:g} requests/s")

    course = asyncio.create_task(phases.run(site, seconds, seed, begun))
    try:
        if console.is_terminal:
            await _draw(view, console, course)
        await course
    finally:
        course.cancel()
        await asyncio.wait([course])


async def _draw(view: View, console: Console, course: asyncio.Task[None]) -> None:
    limits = aiohttp.ClientTimeout(total=2.0)
    async with aiohttp.ClientSession(timeout=limits) as session:
        with Live(console=console, auto_refresh=False) as live:
            while not course.done():
                await view.look(session)
                live.update(view.draw(), refresh=True)
                await asyncio.wait([course], timeout=INTERVAL)


def _table(told: dict[str, object]) -> Table:
    table = Table(title=f"{told['requests']} requests, {told['errors']} failed")
    for column in ("", "TTFT p50", "TTFT p90", "prompt tokens from cache"):
        table.add_column(column, justify="right" if column else "left")
    for title, sides in (("shared prefixes", told), ("nothing shared", told["no_sharing"])):
        assert isinstance(sides, dict)
        for side in ("picker", "round_robin"):
            measured = sides[side]
            if measured["ttft_p50_s"] is not None:
                table.add_row(
                    f"{title}: {side.replace('_', ' ')}",
                    f"{measured['ttft_p50_s'] * 1000:.0f} ms",
                    f"{measured['ttft_p90_s'] * 1000:.0f} ms",
                    f"{measured['cached_share']:.0%}",
                )
    return table
