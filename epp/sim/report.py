"""What a person reads of an experiment: tables.

In: outcomes. Out: rich tables, 120 columns and more.
Rules here: with several seeds a figure is its mean and half the width of its 95 % interval; the second table holds each
policy against the first one, seed by seed; and a difference that its interval does not exclude says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from statistics import fmean
from typing import Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from epp.sim.experiment import Outcome, versus
from epp.sim.figures import Figures, interval, known
from epp.sim.samples import Point, Shown
from epp.sim.scenarios import BUILT_IN, TRACED, Scenario
from epp.sim.world import CONNECT, RESET

NOTE = (
    "Times are seconds without what no router can change: HTTP and the tokenizer take about {floor:.2f} s more a "
    "request.\ngood: of all requests, refused ones too, those with a first token within 2 s and then one each 25 ms. "
    "fullest: requests on\nthe fullest server by the mean of all."
)

WHY: Final = {
    "BadRequest": "BadRequest (more tokens than an engine's KV cache holds)",
    "ResourceExhausted": "ResourceExhausted (the picker shed them)",
    "ServiceUnavailable": "ServiceUnavailable (no server was listed, or filters left none)",
    RESET: "reset (their server failed)",
    CONNECT: "connect (sent to a server that had failed)",
}

APART: Final = "{} has no prefill profile, or did not use it: its prefill servers answered like the others, if at all."


@contextmanager
def progress(runs: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, where there is one; call what is yielded after each run."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal)
    with bar:
        task = bar.add_task("simulating", total=runs)
        yield lambda: bar.advance(task)


def tables(scenario: Scenario, servers: int, outcomes: Sequence[Outcome]) -> Iterator[Table | Text | str]:
    """All there is to read, in order."""
    if scenario.is_file:
        yield Text(f"{scenario.name}: {scenario.about}")
    yield _whole(scenario, servers, outcomes)
    yield _answers(outcomes)
    if len(outcomes[0].runs[0].stages) > 1:
        yield _stages(outcomes)
    if len(outcomes) > 1:
        yield _differences(outcomes)
    yield from _failed(outcomes)
    if scenario.changes.prefill:
        yield from (Text(APART.format(short(each.name))) for each in outcomes if not any(r.apart for r in each.runs))
    yield NOTE.format(floor=max(outcome.mean.whole.floor_s for outcome in outcomes))


def _failed(outcomes: Sequence[Outcome]) -> Iterator[Text]:
    """Why requests got no answer."""
    for outcome in outcomes:
        if outcome.mean.whole.failed:
            reasons = Counter[str]()
            for run in outcome.runs:
                reasons.update(dict(run.refusals))
            told = ", ".join(f"{count:,} {WHY.get(reason, reason)}" for reason, count in reasons.most_common())
            yield Text(f"Without an answer from {short(outcome.name)}, in all seeds: {told}")


def shown(outcomes: Sequence[Outcome]) -> list[Shown]:
    """What plots are drawn of."""
    names = labels([outcome.name for outcome in outcomes])
    return [
        Shown(
            name,
            tuple(_point([run.stages[at] for run in outcome.runs]) for at in range(len(outcome.runs[0].stages))),
            tuple(run.samples for run in outcome.runs),
            outcome.runs[0].busy,
        )
        for name, outcome in zip(names, outcomes, strict=True)
    ]


def _point(stage: Sequence[tuple[float, Figures]]) -> Point:
    seeds = [figures for _, figures in stage]
    found = {name: known(seeds, name) for name in Figures.__struct_fields__}
    return Point(stage[0][0], {name: (fmean(those), interval(those)) for name, those in found.items() if those})


def labels(names: Sequence[str]) -> list[str]:
    """Short names, where they differ."""
    briefly = [short(name) for name in names]
    return briefly if len(set(briefly)) == len(set(names)) else list(names)


def listed() -> Table:
    """What can be simulated."""
    table = Table("workload", "what it is", "servers", "engine", title="Workloads", title_justify="left")
    for each in BUILT_IN.values():
        table.add_row(each.name, each.about, f"{each.servers}", each.engine)
    for name, about in TRACED.items():
        table.add_row(name, about, "8", "qwen3-32b-h100-tp2")
    return table


def _numbers(title: str, texts: int, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[texts:]:
        column.justify = "right"
    return table


def _whole(scenario: Scenario, servers: int, outcomes: Sequence[Outcome]) -> Table:
    runs = outcomes[0].runs
    title = f"{scenario.name}: {runs[0].whole.requests:,.0f} requests, {servers} servers, {len(runs)} seed(s)"
    columns = ("TTFT mean", "p50", "p90", "p99", "tok/s", "good", "cached", "fullest", "failed", "GPU h")
    table = _numbers(title, 1, "policy", *columns)
    for outcome in outcomes:
        whole = [run.whole for run in outcome.runs]
        table.add_row(
            short(outcome.name),
            *(_told(whole, name, 3) for name in ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s")),
            _told(whole, "output_tok_s", 0),
            *(_told(whole, name, 3) for name in ("goodput_share", "cached_share")),
            _told(whole, "balance", 2),
            _told(whole, "failed", 0),
            _told(whole, "gpu_hours", 2),
        )
    return table


def _answers(outcomes: Sequence[Outcome]) -> Table:
    columns = ("ITL p50", "p90", "p99", "E2E p50", "p90", "p99")
    table = _numbers("Between two tokens in ms, and from the request to the last one in s", 1, "policy", *columns)
    for outcome in outcomes:
        whole = [run.whole for run in outcome.runs]
        table.add_row(
            short(outcome.name),
            *(_told(whole, name, 1, 1000.0) for name in ("itl_p50_s", "itl_p90_s", "itl_p99_s")),
            *(_told(whole, name, 1) for name in ("e2e_p50_s", "e2e_p90_s", "e2e_p99_s")),
        )
    return table


def _stages(outcomes: Sequence[Outcome]) -> Table:
    columns = [short(outcome.name) for outcome in outcomes]
    table = _numbers("By stage: TTFT mean / p90, tok/s", 0, "rate", *columns)
    means = [outcome.mean.stages for outcome in outcomes]
    for row in zip(*means, strict=True):
        table.add_row(f"{row[0][0]:g}", *(_stage(figures) for _, figures in row))
    return table


def _stage(figures: Figures) -> str:
    if figures.ttft_mean_s is None:
        return "no answer"
    return f"{figures.ttft_mean_s:.3f} / {figures.ttft_p90_s:.3f}  {figures.output_tok_s:,.0f}"


def _differences(outcomes: Sequence[Outcome]) -> Table:
    base = outcomes[0]
    title = f"Against {short(base.name)}, seed by seed"
    table = _numbers(title, 1, "policy", "TTFT mean", "TTFT p90", "E2E p90", "tok/s", "good")
    names = ("ttft_mean_s", "ttft_p90_s", "e2e_p90_s", "output_tok_s", "goodput_share")
    for outcome in outcomes[1:]:
        table.add_row(short(outcome.name), *(_difference(base, outcome, name) for name in names))
    return table


def _difference(base: Outcome, other: Outcome, name: str) -> str:
    compared = versus(base, other, name)
    if compared is None:
        return "-"
    more, half = compared
    if half is None:
        return f"x {1 + more:.3g}"
    return f"x {1 + more:.3g} ± {half:.2g}{'' if abs(more) > half else ', may be none'}"


def _told(figures: Sequence[Figures], name: str, digits: int, scale: float = 1.0) -> str:
    values = [scale * value for value in known(figures, name)]
    if not values:
        return "-"
    half = interval(values)
    told = f"{sum(values) / len(values):,.{digits}f}"
    return f"{told} ± {half:,.{digits}f}" if half else told


def short(name: str) -> str:
    """A file's name without where it lies."""
    return PurePath(name).name
