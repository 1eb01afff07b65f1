"""What a run tells: one document for programs, tables for people.

In: what each block measured. Out: the document, whose `targets` have the keys of the simulator's `policies`; tables of
it. Where the client itself was too slow, both say so and have no figures. Warm-up is not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import geometric_mean
from typing import Any, Final

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epp.load.client import NO_SOCKET, Load
from epp.load.course import Block
from epp.load.delay import Delay, delay, too_slow
from epp.load.figures import Figures, Goal, balance, by_server, figures, on_servers
from epp.load.results import Result, percentile
from epp.sim.samples import Busy, Point, Shown, Times, busy, samples

DIGITS: Final = 6
COMPARED: Final = ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "itl_p50_s", "e2e_p50_s")

Measured = tuple[Block, Load]


def document(workload: str, targets: Sequence[str], goal: Goal, measured: Sequence[Measured]) -> dict[str, Any]:
    """The whole of a run.

    Returns:
        `workload`, `goal`, `client` (its own delay) and `targets` in the order of the flags; `versus`, where there are
        two. `refused` instead of the last two where the client was too slow to tell.
    """
    measured = [(block, load) for block, load in measured if not block.stage.warm_up]
    own = _delay(measured)
    told: dict[str, Any] = {"workload": workload, "goal": _plain(goal), "client": _plain(own)}
    if refused := _refused(own, measured, len(targets)):
        return {**told, "refused": refused}
    told["targets"] = [_target(url, goal, _of(measured, at)) for at, url in enumerate(targets)]
    if len(targets) > 1:
        told["versus"] = _versus(measured, goal)
    return told


def _of(measured: Sequence[Measured], target: int) -> list[Measured]:
    return [(block, load) for block, load in measured if block.target == target]


def _results(measured: Sequence[Measured]) -> list[Result]:
    return [result for _, load in measured for result in load.results]


def _delay(measured: Sequence[Measured]) -> Delay:
    late = (result.sent_at - result.scheduled_at for result in _results(measured))
    return delay(late, (lag for _, load in measured for lag in load.lag))


def _refused(own: Delay, measured: Sequence[Measured], targets: int) -> str:
    """Each target must be worth telling by its own median: the quicker one of two asks more of the client."""
    if lacked := sum(result.error == NO_SOCKET for result in _results(measured)):
        return (
            f"this machine had no more files or ports for {lacked} requests, so what was measured is the client's "
            "limit. Raise it (ulimit -n), lower --rate, or ask from several machines"
        )
    for target in range(targets):
        ttfts = [result.ttft for result in _results(_of(measured, target)) if result.ttft is not None]
        if why := too_slow(own, percentile(ttfts, 0.5)):
            return why
    return ""


def _target(url: str, goal: Goal, measured: Sequence[Measured]) -> dict[str, Any]:
    servers = by_server(_results(measured))
    return {
        "target": url,
        **_figures(measured, goal, list(servers)),
        "servers": {name: _plain(server) for name, server in servers.items()},
        "stages": [
            {"rate": parts[0][0].stage.rate, **_figures(parts, goal, list(servers))} for parts in _stages(measured)
        ],
    }


def _stages(measured: Sequence[Measured]) -> list[list[Measured]]:
    stages: dict[int, list[Measured]] = {}
    for block, load in measured:
        stages.setdefault(block.at, []).append((block, load))
    return list(stages.values())


def _figures(measured: Sequence[Measured], goal: Goal, servers: Sequence[str]) -> dict[str, Any]:
    """`floor_s` is what a simulator leaves out of its times; here all of it was measured."""
    even = balance([(load.results, block.seconds) for block, load in measured], servers)
    told = {**_plain(_sum_up(measured, goal)), "balance": None if even is None else round(even, DIGITS)}
    return {**told, "floor_s": 0.0}


def _sum_up(measured: Sequence[Measured], goal: Goal) -> Figures:
    ends = (begin + _seconds_of(load) for begin, load in _laid(measured))
    return figures(_results(measured), max(ends, default=0.0), goal)


def _laid(measured: Sequence[Measured]) -> Iterator[tuple[float, Load]]:
    """A target's blocks and when each begins, one after the other: what lies between two, as the other target's turn,
    is cut out. Steps of one load overlap by what was still being answered."""
    begin = 0.0
    for block, load in measured:
        yield begin, load
        begin += _seconds_of(load) if block.waits else block.seconds


def _seconds_of(load: Load) -> float:
    """From its first second to the end of its last answer."""
    return max((result.ended_at for result in load.results), default=0.0)


def _versus(measured: Sequence[Measured], goal: Goal) -> dict[str, Any]:
    """Second target over first, pair of blocks by pair: below 1 the second one is quicker."""
    pairs = list(zip(_of(measured, 0), _of(measured, 1), strict=True))
    both = [(_sum_up([first], goal), _sum_up([second], goal)) for first, second in pairs]
    told: dict[str, Any] = {"blocks": len(pairs)}
    for name in COMPARED:
        ratios = [getattr(b, name) / getattr(a, name) for a, b in both if getattr(a, name) and getattr(b, name)]
        if ratios:
            spread = {"ratio": geometric_mean(ratios), "least": min(ratios), "most": max(ratios)}
            told[name] = {key: round(value, DIGITS) for key, value in spread.items()}
    return told


def _plain(struct: msgspec.Struct) -> dict[str, Any]:
    values = msgspec.structs.asdict(struct)
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in values.items()}


# -- for plots -----------------------------------------------------------------------------------------------------


def shown(told: Mapping[str, Any], measured: Sequence[Measured]) -> list[Shown]:
    """What plots are drawn of; nothing where the client was too slow to tell.

    Args:
        told: the document.
    """
    measured = [(block, load) for block, load in measured if not block.stage.warm_up]
    return [_shown(target, _of(measured, at)) for at, target in enumerate(told.get("targets", ()))]


def _shown(target: Mapping[str, Any], measured: Sequence[Measured]) -> Shown:
    return Shown(
        target["target"],
        tuple(_point(stage) for stage in target["stages"]),
        (samples([[_times(result) for result in _results(parts)] for parts in _stages(measured)]),),
        _busy(measured, list(target["servers"])),
    )


def _point(stage: Mapping[str, Any]) -> Point:
    values = {name: (float(value), 0.0) for name, value in stage.items() if isinstance(value, int | float)}
    return Point(stage["rate"], values)


def _times(result: Result) -> Times | None:
    """Of whole answers. One that broke off has a first token, but as its end would be that of another length."""
    if result.error or result.ttft is None:
        return None
    return result.ttft, result.itl_mean, result.e2e


def _busy(measured: Sequence[Measured], servers: Sequence[str]) -> Busy:
    """Over a target's blocks, as they are laid."""
    requests: list[tuple[int, float, float]] = []
    end = 0.0
    for begin, load in _laid(measured):
        requests += on_servers(load.results, servers, begin)
        end = max(end, begin + _seconds_of(load))
    return busy(requests, len(servers), 0.0, end)


# -- for people ----------------------------------------------------------------------------------------------------


def tables(told: Mapping[str, Any]) -> RenderableType:
    """The document for a terminal."""
    own = _own(told["client"])
    if "refused" in told:
        return Group(own, Text(f"no report: {told['refused']}", "bold red"))
    goal = told["goal"]
    title = (
        f"{told['workload']}: times in seconds, ITL p50 and p90; good: TTFT <= {goal['ttft']:g}, ITL <= {goal['itl']:g}"
    )
    parts = [Text(title), *(part for target in told["targets"] for part in _main(target)), own]
    if "versus" in told:
        parts.append(_second_over_first(told["versus"]))
    return Group(*parts)


def _own(client: Mapping[str, float]) -> Text:
    late, lag = (
        f"p99 {client[f'{name}_p99_s'] * 1000:.0f} ms, max {client[f'{name}_max_s'] * 1000:.0f} ms"
        for name in ("late", "lag")
    )
    return Text(f"this client sent late by {late}; its event loop was late by {lag}", "dim")


def _main(target: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Of one target. Three or two percentiles a cell, so that it fits a terminal of 80 columns."""
    yield Text(target["target"], "bold")
    table = _table("rate", "failed", "TTFT p50 p90 p99", "ITL ms", "E2E p50 p90", "tok/s", "cached", "good")
    for stage in target["stages"]:
        table.add_row(f"{stage['rate']:g}", *_cells(stage))
    if len(target["stages"]) > 1:
        table.add_row("all", *_cells(target))
    yield table
    if target["errors"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in target["errors"].items())
        yield Text(f"failed: {kinds}\n", "red")
    if target["servers"]:
        yield _servers(target["servers"])


def _cells(told: Mapping[str, Any]) -> Iterator[str]:
    yield f"{told['failed']}/{told['requests']}"
    yield " ".join(_seconds(told[f"ttft_{rank}_s"]) for rank in ("p50", "p90", "p99"))
    yield " ".join(_seconds(told[f"itl_{rank}_s"], 1000, 0) for rank in ("p50", "p90"))
    yield " ".join(_seconds(told[f"e2e_{rank}_s"]) for rank in ("p50", "p90"))
    yield "-" if told["output_tok_s"] is None else f"{told['output_tok_s']:.0f}"
    yield _share(told["cached_share"])
    yield _share(told["goodput_share"])


def _servers(servers: Mapping[str, Any]) -> Table:
    table = _table("server", "requests", "TTFT p50 p90", "cached")
    for name, server in servers.items():
        times = " ".join(_seconds(server[f"ttft_{rank}_s"]) for rank in ("p50", "p90"))
        table.add_row(name, f"{server['requests']}", times, _share(server["cached_share"]))
    return table


def _second_over_first(versus: Mapping[str, Any]) -> Table:
    table = _table(f"second over first, {versus['blocks']} pairs of blocks", "ratio", "least", "most")
    for name in COMPARED:
        if name in versus:
            table.add_row(name, *(f"{versus[name][key]:.2f}" for key in ("ratio", "least", "most")))
    return table


def _table(first: str, *rest: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in rest:
        table.add_column(column, justify="right")
    return table


def _seconds(seconds: float | None, units: int = 1, digits: int = 2) -> str:
    return "-" if seconds is None else f"{seconds * units:.{digits}f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
