"""Plots: what they show, and that they are the same bytes each time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from epp.sim.outside.plots import _shares, plots
from epp.sim.samples import Point, Shown, busy, samples

ROOT = Path(__file__).parents[2]


def drawn(name: str, *rates: float, ttft: float = 0.2, half: float = 0.01, refused: int = 0) -> Shown:
    """Ten requests a stage to two servers."""
    values = {"ttft_mean_s": (ttft, half), "ttft_p90_s": (3 * ttft, half), "output_tok_s": (100.0, half)}
    shares = {"cached_share": (0.5, half), "goodput_share": (0.0, 0.0), "balance": (1.5, half)}
    points = tuple(Point(rate, {**values, **shares}) for rate in rates)
    times = [(ttft * (1 + at), 0.03, 1.0 + at) for at in range(10)]
    columns = samples([[*times, *[None] * refused] for _ in rates])
    requests = [(at % 2, float(at), at + 5.0) for at in range(10)]
    return Shown(name, points, (columns, columns), busy(requests, 2, 0.0, 15.0))


def texts(svg: bytes) -> str:
    """A comment says each text, which is drawn by its outlines."""
    return " | ".join(re.findall(r"<!-- (.*?) -->", svg.decode()))


@pytest.mark.parametrize("rates", [(10.0,), (10.0, 20.0, 40.0)])
def test_a_report_has_four_plots_that_name_every_policy(rates: tuple[float, ...]) -> None:
    told = plots([drawn("one", *rates), drawn("two", *rates, ttft=9.0)])
    assert [plot.file for plot in told] == ["rates.svg", "shares.svg", "distributions.svg", "servers.svg"]
    for plot in told:
        assert "one" in texts(plot.svg)
        assert "two" in texts(plot.svg)
    assert "TTFT p90, s" in texts(told[0].svg)
    assert ("at 40 a second" in texts(told[2].svg)) is (len(rates) > 1)


def test_the_same_figures_are_the_same_bytes_in_another_process_too() -> None:
    code = (
        "import hashlib; from epp.sim.outside.plots import plots; from tests.sim.test_plots import drawn;"
        "print([hashlib.sha256(each.svg).hexdigest() for each in plots([drawn('a', 1.0, 2.0), drawn('b', 1.0, 2.0)])])"
    )
    printed = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(printed) == 1


def test_no_plot_says_when_or_by_what_it_was_made() -> None:
    for plot in plots([drawn("a", 1.0)]):
        assert b"<dc:date>" not in plot.svg
        assert b"Matplotlib v" not in plot.svg


def test_what_nobody_measured_is_not_drawn() -> None:
    """A policy without answers: no times, and nobody was on a server."""
    nothing = Shown(
        "nothing",
        (Point(1.0, {"failed": (2.0, 0.0)}), Point(2.0, {"failed": (2.0, 0.0)})),
        (samples([[None], [None]]),),
        busy([], 0, 0.0, 0.0),
    )
    assert [plot.file for plot in plots([nothing])] == ["rates.svg", "shares.svg", "distributions.svg"]
    assert [plot.file for plot in plots([drawn("some", 1.0, 2.0), nothing])][-1] == "servers.svg"


def test_many_policies_and_many_servers_are_drawn() -> None:
    many = [drawn(f"a-policy-with-a-rather-long-name-{at}.yaml", 1.0, 2.0) for at in range(12)]
    wide = Shown("wide", many[0].points, many[0].samples, busy([(7, 0.0, 1.0)], 100, 0.0, 2.0))
    for plot in plots([*many, wide]):
        assert "long-name-11" in texts(plot.svg)


def test_a_distribution_ends_where_answers_do() -> None:
    """Ten of twenty requests were answered, in each of two seeds."""
    values, shares = _shares(drawn("a", 1.0, refused=10).samples, "ttft", None)
    assert (values[0], values[-1]) == (pytest.approx(0.2), pytest.approx(2.0))
    assert shares[-1] == 0.5
    assert np.all(np.diff(values) >= 0)
    values, shares = _shares(drawn("a", 1.0, 2.0).samples, "e2e", 1)
    assert (len(values), shares[-1]) == (20, 1.0)
