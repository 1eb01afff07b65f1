"""The plots of a report, of a simulation and of a load run alike.

In: what each policy (or target) did. Out: one SVG each, the same bytes for the same figures.
Rules here:
- Nothing but this file imports matplotlib, and nobody imports this file before somebody asks for a report.
- A policy is told by colour, marker and line style at once: Okabe and Ito's colours, which the colour-blind tell apart.
  Servers are shown by brightness (cividis) for the same reason, and because eight lines that cross cannot be followed.
- An axis is logarithmic where what it shows is more than tenfold, and no share.
- Nobody's own matplotlib settings, no dates and no random names in the files.
Rejected: a plot library for browsers: a page of a report must open in ten years, without a network.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from epp.sim.samples import Floats, Samples, Shown

SETTINGS: Final = {
    "svg.hashsalt": "epp",
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.markersize": 4.0,
}
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS: Final = "osD^vPX"
LINES: Final = ("-", "--", ":", "-.")
DRAWN: Final = 400
"""Points of a distribution, at most."""
PANEL: Final = (3.8, 2.9)
"""Inches of a panel."""

Panel = tuple[str, str, float]
"""A figure's name, what its axis says, and what its values are multiplied by."""
RATES: Final[tuple[Panel, ...]] = (
    ("ttft_mean_s", "TTFT mean, s", 1.0),
    ("ttft_p90_s", "TTFT p90, s", 1.0),
    ("output_tok_s", "output tokens a second", 1.0),
)
SHARES: Final[tuple[Panel, ...]] = (
    ("cached_share", "prompt tokens from cache, %", 100.0),
    ("goodput_share", "good, of all requests, %", 100.0),
    ("balance", "fullest server by mean of all", 1.0),
)
TIMES: Final = (("ttft", "TTFT, s", 1.0), ("itl", "between two tokens, ms", 1000.0), ("e2e", "whole answer, s", 1.0))


class Plot(msgspec.Struct, frozen=True):
    """A picture and what it shows."""

    file: str
    title: str
    says: str
    svg: bytes


def plots(shown: Sequence[Shown]) -> list[Plot]:
    """All plots of a report, at least one policy."""
    with style.context(["default", SETTINGS]):
        return list(_plots(shown))


def _plots(shown: Sequence[Shown]) -> Iterator[Plot]:
    says = "Bands and whiskers: 95 % intervals of the mean over seeds, where there are several."
    yield Plot("rates.svg", "Time to first token and throughput, by rate", says, _panels(shown, RATES))
    yield Plot("shares.svg", "Caches, goodput and balance, by rate", says, _panels(shown, SHARES))
    says = "Share of all requests of which it took at most so long; a line that ends lower had requests without answer."
    yield Plot("distributions.svg", "Cumulative distributions", says, _distributions(shown))
    if any(len(each.busy.counts) for each in shown):
        says = "Requests on each server, those that wait there among them, over seconds. Dark is idle."
        yield Plot("servers.svg", "Load of each server over time", says, _servers(shown))


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _grid(rows: int, columns: int, height: float = PANEL[1]) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(columns * PANEL[0], rows * height), layout=ConstrainedLayoutEngine(h_pad=0.08))
    return figure, [
        [figure.add_subplot(rows, columns, row * columns + at + 1) for at in range(columns)] for row in range(rows)
    ]


def _colour(at: int) -> str:
    """Of the policy with this number."""
    return COLOURS[at % len(COLOURS)]


def _line(at: int) -> str:
    """Each its own, so that of two that are equal both can be seen."""
    return LINES[at % len(LINES)]


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(count, 150 // (longest + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


# -- by rate -----------------------------------------------------------------------------------------------------------


def _panels(shown: Sequence[Shown], panels: Sequence[Panel]) -> bytes:
    if max(len(each.points) for each in shown) > 1:
        figure, (row,) = _grid(1, len(panels))
        for axes, panel in zip(row, panels, strict=True):
            _lines(axes, shown, panel)
        _legend(figure, row[0], len(shown))
    else:
        figure, (row,) = _grid(1, len(panels), 1.1 + 0.32 * len(shown))
        for axes, panel in zip(row, panels, strict=True):
            _bars(axes, shown, panel, named=axes is row[0])
    return _svg(figure)


def _values(each: Shown, panel: Panel) -> tuple[Floats, Floats, Floats]:
    """Rates, means and half widths, by rate; only of stages that have this figure."""
    name, _, scale = panel
    found = sorted((point.rate, *point.values[name]) for point in each.points if name in point.values)
    rates, means, halves = np.array(found, dtype=np.float64).reshape(-1, 3).T
    return rates, means * scale, halves * scale


def _lines(axes: Axes, shown: Sequence[Shown], panel: Panel) -> None:
    drawn = [_values(each, panel) for each in shown]
    together = np.concatenate([means for _, means, _ in drawn])
    share = panel[1].endswith("%")
    wide = not share and _is_wide(together)
    for at, (each, (rates, means, halves)) in enumerate(zip(shown, drawn, strict=True)):
        marker = MARKERS[at % len(MARKERS)]
        axes.plot(rates, means, label=each.name, marker=marker, color=_colour(at), linestyle=_line(at))
        if halves.any():
            low = np.maximum(means - halves, means / 10.0) if wide else means - halves  # a log axis has no room for 0
            axes.fill_between(rates, low, means + halves, color=_colour(at), alpha=0.15, linewidth=0)
    if wide:
        axes.set_yscale("log")
        _ticks(axes.yaxis, together)
    if share:
        axes.set_ylim(-2.0, 102.0)
    axes.set_xlabel("requests a second")
    axes.set_ylabel(panel[1])


def _bars(axes: Axes, shown: Sequence[Shown], panel: Panel, *, named: bool) -> None:
    """Where there is one stage a line says nothing."""
    drawn = [_values(each, panel)[1:] for each in shown]
    for at, (means, halves) in enumerate(drawn):
        if len(means):
            axes.barh(at, means[0], xerr=halves[0] or None, color=_colour(at), capsize=3.0)
            axes.annotate(f" {means[0]:.4g}", (means[0] + halves[0], at), va="center")
    axes.set_yticks(range(len(shown)), [each.name for each in shown] if named else [""] * len(shown))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(
        0.0, 1.3 * max([float(means[0] + halves[0]) for means, halves in drawn if len(means)], default=0.0) or 1.0
    )
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(panel[1])


def _ticks(axis: Axis, values: Floats) -> None:
    """Numbers as people write them on a logarithmic axis, so many that none lies on another."""
    decades = np.log10(values.max() / values[values > 0].min())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.0 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _is_wide(values: Floats) -> bool:
    above = values[values > 0]
    return len(above) > 0 and float(above.max()) > 10.0 * float(above.min())


# -- distributions -----------------------------------------------------------------------------------------------------


def _distributions(shown: Sequence[Shown]) -> bytes:
    """All stages, and below them the one with the highest rate, where there are several."""
    stages = len(shown[0].points)
    busiest = max(range(stages), key=lambda at: shown[0].points[at].rate) if stages else 0
    rows: list[tuple[str, int | None]] = [("all stages", None)]
    if stages > 1:
        rows.append((f"at {shown[0].points[busiest].rate:g} a second", busiest))
    figure, grid = _grid(len(rows), len(TIMES))
    for (title, stage), row in zip(rows, grid, strict=True):
        for axes, (name, label, scale) in zip(row, TIMES, strict=True):
            _distribution(axes, shown, name, scale, stage)
            axes.set_xlabel(label)
        row[0].set_ylabel(f"share of requests, {title}" if stages > 1 else "share of requests")
    _legend(figure, grid[0][0], len(shown))
    return _svg(figure)


def _distribution(axes: Axes, shown: Sequence[Shown], name: str, scale: float, stage: int | None) -> None:
    ends = [np.zeros(0)]
    for at, each in enumerate(shown):
        values, shares = _shares(each.samples, name, stage)
        axes.plot(scale * values, shares, label=each.name, color=_colour(at), linestyle=_line(at))
        ends.append(values[len(values) // 20 :])  # the quickest few would make every axis logarithmic
    together = scale * np.concatenate(ends)
    if _is_wide(together):
        axes.set_xscale("log")
        _ticks(axes.xaxis, together)
    axes.set_ylim(0.0, 1.02)


def _shares(samples: Sequence[Samples], name: str, stage: int | None) -> tuple[Floats, Floats]:
    """Values in order, and the share of all requests, of all seeds, that took at most so long."""
    mine = [getattr(each, name)[slice(None) if stage is None else each.stage == stage] for each in samples]
    asked = sum(int(each.asked.sum() if stage is None else each.asked[stage]) for each in samples)
    values: Floats = np.sort(np.concatenate(mine))
    values = values[~np.isnan(values)]
    shares = np.arange(1, len(values) + 1) / max(1, asked)
    keep = np.unique(np.linspace(0, len(values) - 1, min(len(values), DRAWN)).astype(np.intp))
    return values[keep], shares[keep]


# -- servers -----------------------------------------------------------------------------------------------------------


def _servers(shown: Sequence[Shown]) -> bytes:
    most = max(1, *(int(each.busy.counts.max(initial=0)) for each in shown))
    servers, end = max(len(each.busy.counts) for each in shown), max(float(each.busy.at[-1]) for each in shown)
    height = 0.75 + min(2.0, 0.11 * servers)
    figure = Figure(figsize=(3 * PANEL[0], len(shown) * height + 0.5), layout="constrained")
    panels = [figure.add_subplot(len(shown), 1, at + 1) for at in range(len(shown))]
    brightness = ScalarMappable(PowerNorm(0.5, vmin=0, vmax=most), "cividis")
    for axes, each in zip(panels, shown, strict=True):
        counts, seconds = each.busy.counts, float(each.busy.at[-1])
        if counts.size and seconds:
            extent = (0.0, seconds, len(counts) - 0.5, -0.5)
            image = axes.imshow(counts, aspect="auto", interpolation="nearest", extent=extent)
            image.set(cmap=brightness.cmap, norm=brightness.norm)
        axes.set_title(each.name, loc="left", fontsize="medium")
        axes.set_xlim(0.0, end or 1.0)
        axes.set_ylabel("server")
        axes.set_yticks(range(0, len(counts), max(1, len(counts) // 4)))
        axes.grid(visible=False)
    panels[-1].set_xlabel("seconds")
    figure.colorbar(brightness, ax=panels, label="requests")
    return _svg(figure)
