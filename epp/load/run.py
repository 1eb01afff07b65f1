"""`epp load`: a workload through one target or two, and what it says.

In: what to ask of whom. Out: a document or tables, and an exit code.
Rules here: a run that is stopped has no report, for what had not ended is what took longest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from epp.errors import ConfigError
from epp.load.client import Client, Load, run_load
from epp.load.course import Block, blocks, streams
from epp.load.figures import Goal
from epp.load.report import Measured, document, shown, tables
from epp.load.results import percentile
from epp.sim.outside.folder import written
from epp.sim.scenarios import Scenario, at_rates, scenario
from epp.sim.traces import Trace
from epp.sim.workload import Workload
from epp.sim.world import Stage

PATIENCE: Final = 600.0
"""Seconds after which an answer is given up. A router that lets queues grow must be seen to do so: published times to
the first token are up to three minutes."""
SECONDS: Final = 60.0
"""Of a stage at a rate that was asked for."""
LOOK: Final = 0.5
"""Seconds between two looks at the progress."""
RECENT: Final = 200
"""Answers that the shown median is about."""


class Run(msgspec.Struct, frozen=True):
    """What to ask of whom, and how long."""

    source: Workload | Trace
    stages: tuple[Stage, ...]
    targets: tuple[str, ...]
    """One URL, or two that are compared."""
    turn: float
    """Of a block, where two targets take turns."""
    waits: bool = True
    """A stage begins when all of the one before it is answered. Else stages are steps of one load; of two targets each
    waits anyway, for the other's turn must not begin in it."""
    seed: int = 0
    goal: Goal = Goal()
    client: Client = Client(answer_within=PATIENCE)

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        for url in self.targets:
            if not _is_target(url):
                raise ConfigError(f"{url!r} is not a target: give the URL of a gateway or a server, http://host:port")
        if not all(0 < seconds < math.inf for seconds in (self.turn, *(stage.seconds for stage in self.stages))):
            raise ConfigError("--seconds and --block must be over 0, and end")


def _is_target(url: str) -> bool:
    """Whether a path can be put behind it: a host, a port that may be or none, and neither query nor fragment."""
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0 and not {"?", "#"} & set(url)
        return parts.scheme in ("http", "https") and whole
    except ValueError:
        return False


def chosen(
    name: str, trace: str = "", rates: Sequence[str] = (), seconds: float | None = None, model: str = ""
) -> Scenario:
    """Who asks, and in which stages, as `epp sim` has them.

    Args:
        name: of a built-in workload.
        trace: file of the requests, where the workload is one.
        rates: requests a second, or "1.5x" the workload's own; none: the workload's own stages.
        seconds: of each stage; None: `SECONDS` where there are rates. Without rates: one stage at the workload's own.
        model: what the target calls the base model; empty: as the workload does.

    Raises:
        ConfigError: there is no such workload or rate; the trace cannot be read.
    """
    found = scenario(name, trace)
    if rates or seconds is not None:
        found = at_rates(found, rates or ("1x",), SECONDS if seconds is None else seconds)
    source = msgspec.structs.replace(found.source, model=model or found.source.model)
    return msgspec.structs.replace(found, source=source)


async def measure(
    run: Run, begun: Callable[[Block, Load], None], clock: Callable[[], float] = time.monotonic
) -> list[Measured]:
    """Send everything, block after block, and wait for every answer; tells `begun` of each block that is to begin."""
    sources = streams(run.source, run.seed, len(run.targets))
    measured: list[Measured] = []
    start: float | None = None
    async with asyncio.TaskGroup() as tasks:
        for block in blocks(run.stages, len(run.targets), run.turn, waits=run.waits):
            load = Load()
            begun(block, load)
            measured.append((block, load))
            arrivals, url = sources[block.target].take(block), run.targets[block.target]
            asking = run_load(arrivals, url, load=load, start=start, client=run.client, clock=clock)
            answered = tasks.create_task(asking)
            if block.waits:
                await answered
                start = None
            else:
                await load.all_sent.wait()
                start = load.began + block.seconds
    return measured


async def run_and_report(run: Run, *, as_json: bool, folder: Path | None = None) -> int:
    """Run it under a progress bar and print what it says.

    Args:
        as_json: one line of JSON on standard output, and nothing else there.
        folder: where a page with plots is written to; None: nowhere.

    Returns:
        The exit code: 0; 1 when the client was too slow to tell, nobody answered, or the page could not be written.
    """
    _open_all_files()
    console = Console(stderr=as_json)
    watch = Watch(run, Console(stderr=True))
    measuring = asyncio.create_task(measure(run, watch.begun))
    try:
        await watch.until(measuring)
    except asyncio.CancelledError:
        console.print("stopped: no report, for what had not ended is what took longest", style="yellow")
        raise
    finally:
        measuring.cancel()
        await asyncio.wait([measuring])
    measured = measuring.result()
    told = document(run.source.name, run.targets, run.goal, measured)
    if as_json:
        print(json.dumps(told), flush=True)
    else:
        console.print(tables(told))
    if folder and not written(folder, f"epp load {run.source.name}", told, [tables(told)], shown(told, measured)):
        return 1
    return _exit_code(told.get("targets", ()))


def _open_all_files() -> None:
    """Each request in flight is an open file, and shells allow a program 1,024 where the system allows many more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems say "no limit" and have one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _exit_code(targets: Sequence[dict[str, int]]) -> int:
    return 0 if any(target["requests"] > target["failed"] for target in targets) else 1


class Watch:
    """Shows how far a run is: a bar on a terminal, a line a block elsewhere."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run = run
        self._console = console
        self._load = Load()
        self._done = self._here = 0.0
        """Seconds of blocks that are over, and of this one."""
        self._began = 0.0

    def begun(self, block: Block, load: Load) -> None:
        """A block begins."""
        self._done += self._here
        self._here, self._began, self._load = block.seconds, time.monotonic(), load
        if not self._console.is_terminal:
            target, what = self._run.targets[block.target], "warm-up, " if block.stage.warm_up else ""
            told = f"{what}{block.seconds:g} s at {block.stage.rate:g} requests/s to {target}"
            self._console.print(told, highlight=False)

    async def until(self, measuring: asyncio.Task[list[Measured]]) -> None:
        """Show it until it is over. Raises what ended it."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, auto_refresh=False
        ) as bar:
            total = sum(stage.seconds for stage in self._run.stages) * len(self._run.targets)
            shown = bar.add_task("", total=total)
            while not measuring.done():
                await asyncio.wait([measuring], timeout=LOOK)
                bar.update(shown, completed=self._seconds(), description=self._says(), refresh=True)
        await measuring

    def _seconds(self) -> float:
        return self._done + min(self._here, time.monotonic() - self._began)

    def _says(self) -> str:
        load = self._load
        ttfts = [result.ttft for result in load.results[-RECENT:] if result.ttft is not None]
        median = percentile(ttfts, 0.5)
        quick = "" if median is None else f", TTFT p50 {median:.2f} s"
        return f"{load.sent} sent, {load.in_flight} in flight, {load.errors} failed{quick}"
