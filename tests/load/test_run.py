"""A whole run against simulated servers, and what may be asked of it."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path

import pytest
from rich.console import Console

from epp.errors import ConfigError
from epp.load.client import Client, parse_header
from epp.load.report import document
from epp.load.run import Run, Watch, chosen, measure, run_and_report
from epp.sim.serve.faults import Faults
from epp.sim.workload import Prompts, Workload
from epp.sim.world import Stage
from tests.sim.serving import profile, server

pytestmark = pytest.mark.anyio

SHARED = Workload("test", "tiny", 40.0, (Prompts("team", 1.0, 2, 3, 100, 40, output_tokens=5),))
STAGES = (Stage(40.0, 0.2, warm_up=True), Stage(40.0, 0.5), Stage(80.0, 0.5))


async def test_two_servers_are_compared_in_turns_and_both_get_the_same_requests() -> None:
    began: list[tuple[int, int]] = []
    async with server() as one, server() as other:
        targets = (f"http://{one.address}", f"http://{other.address}")
        run = Run(SHARED, STAGES, targets, turn=0.3, seed=1)
        measured = await measure(run, lambda block, _: began.append((block.at, block.target)))
    assert began == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1), (1, 0), (2, 0), (2, 1), (2, 1), (2, 0)]
    # The stream runs at its own rate: 0.2 s of warm-up, 0.5 s, then a second at twice the rate.
    warm, slow, quick = (sum(1 for _ in SHARED.arrivals(1, until)) for until in (0.2, 0.7, 1.7))
    for target, served in enumerate((one, other)):
        mine = [(block, load) for block, load in measured if block.target == target]
        counts = [sum(load.sent for block, load in mine if block.at == at) for at in range(3)]
        assert counts == [warm, slow - warm, quick - slow]
        results = [result for _, load in mine for result in load.results]
        assert {(result.error, result.served_by) for result in results} == {("", served.address)}


async def test_refusals_are_figures_and_an_answer_is_enough_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    async with server(faults=Faults(error=0.5)) as served:
        run = Run(SHARED, (Stage(40.0, 1.0),), (f"http://{served.address}",), turn=1.0, seed=2)
        code = await run_and_report(run, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    if "refused" in told:  # a machine that is busy with others: nothing is told, and the exit code says so
        assert (code, "targets" in told) == (1, False)
        return
    (target,) = told["targets"]
    assert code == 0
    assert target["requests"] == sum(1 for _ in SHARED.arrivals(2, 1.0))
    assert 0 < target["failed"] < target["requests"]
    assert target["errors"] == {"http_500": target["failed"]}
    assert target["goodput_share"] == pytest.approx(1 - target["failed"] / target["requests"])


async def test_a_report_is_written_and_holds_what_was_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with server() as served:
        run = Run(SHARED, STAGES, (f"http://{served.address}",), turn=1.0, seed=2)
        code = await run_and_report(run, as_json=True, folder=tmp_path)
    out = capsys.readouterr().out
    assert (tmp_path / "report.json").read_text() == out
    page = (tmp_path / "index.html").read_text()
    if "refused" in json.loads(out):  # a machine that is busy with others
        assert code == 1
        assert "no report: the client itself was late" in page
        assert "<svg" not in page
        return
    assert code == 0
    assert page.count("<svg ") == 4
    assert f"<p>http://{served.address}</p>" in page


async def test_a_report_that_cannot_be_written_is_told_after_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").mkdir()
    async with server() as served:
        run = Run(SHARED, (Stage(40.0, 0.3),), (f"http://{served.address}",), turn=1.0)
        assert await run_and_report(run, as_json=True, folder=tmp_path) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["workload"] == "test"
    assert "report.json cannot be written: Is a directory" in told.err


async def test_a_dead_server_is_told_by_its_errors_and_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    async with server() as served:
        url = f"http://{served.address}"
    code = await run_and_report(Run(SHARED, (Stage(40.0, 0.3),), (url,), turn=1.0), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert code == 1
    if "refused" not in told:
        (target,) = told["targets"]
        assert target["errors"] == {"connect": target["requests"]}
        assert (target["ttft_p50_s"], target["goodput_share"]) == (None, 0.0)


async def test_by_a_clock_that_runs_ahead_of_the_loop_nothing_is_reported() -> None:
    """Each sleep of the loop is overslept threefold by it: 50 ms late, and then 100."""
    async with server() as served:
        run = Run(SHARED, (Stage(40.0, 0.5),), (f"http://{served.address}",), turn=1.0)
        measured = await measure(run, lambda *_: None, clock=lambda: 3.0 * time.monotonic())
    told = document("test", run.targets, run.goal, measured)
    assert "targets" not in told
    assert told["client"]["lag_p99_s"] >= 0.05


async def test_progress_is_a_line_a_block_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    async with server() as served:
        url = f"http://{served.address}"
        run = Run(SHARED, STAGES, (url,), turn=1.0)
        await measure(run, Watch(run, Console(file=out, width=120)).begun)
    assert out.getvalue().splitlines() == [
        f"warm-up, 0.2 s at 40 requests/s to {url}",
        f"0.5 s at 40 requests/s to {url}",
        f"0.5 s at 80 requests/s to {url}",
    ]


def test_a_workload_has_its_own_stages_unless_rates_are_given() -> None:
    asked = chosen("73-capacity")
    assert (asked.source.name, asked.source.model, asked.waits) == ("73-capacity", "qwen3-32b", True)
    assert (asked.stages[0].warm_up, asked.stages[-1].rate) == (True, 60.0)
    asked = chosen("73-capacity", rates=("3", "0.5x"), seconds=20.0, model="served")
    assert asked.source.model == "served"
    assert [(stage.rate, stage.seconds) for stage in asked.stages if not stage.warm_up] == [(3.0, 20.0), (30.0, 20.0)]
    asked = chosen("73-capacity", seconds=20.0)
    assert [(stage.rate, stage.seconds) for stage in asked.stages if not stage.warm_up] == [(60.0, 20.0)]


def test_steps_of_one_load_wait_for_nothing() -> None:
    assert not chosen("bursty").waits
    assert not chosen("bursty", rates=("2x",), seconds=20.0).waits


async def test_a_step_begins_when_the_one_before_is_over_whatever_is_being_answered() -> None:
    """Answers take 2 s and more (five tokens, 0.4 s each); six steps of half a second begin before the second ends."""
    steps = (Stage(10.0, 0.5, warm_up=True), *(Stage(rate, 0.5) for rate in (10.0, 20.0) * 3))
    sessions = []
    async with server(profile(a0=0.4)) as served:
        run = Run(SHARED, steps, (f"http://{served.address}",), turn=1.0, waits=False)
        measured = await measure(run, lambda *_: None)
    warm, *loads = [load for _, load in measured]
    begun = [load.began - loads[0].began for load in loads]
    assert begun == pytest.approx([0.5 * at for at in range(6)], abs=1e-6)
    assert loads[0].began - warm.began >= 2.0  # the caches are full before it begins
    for load in loads:
        sessions += [result.scheduled_at for result in load.results]
        assert all(not result.error and result.ended_at >= 2.0 for result in load.results)
    assert all(0.0 <= at < 0.5 for at in sessions)


@pytest.mark.parametrize(
    "url",
    [
        *("nonsense", "ftp://h:1", "http://", "127.0.0.1:8000"),
        *("http://:8000", "http://h:x", "http://h:0", "http://h:99999", "http://h/v1?key=x", "http://h#there"),
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a target: give the URL"):
        Run(SHARED, STAGES, (url,), turn=1.0)


def test_lengths_must_be_over_0() -> None:
    with pytest.raises(ConfigError, match="--seconds and --block must be over 0"):
        Run(SHARED, STAGES, ("http://h",), turn=0.0)
    with pytest.raises(ConfigError, match="--seconds and --block must be over 0"):
        Run(SHARED, (Stage(1.0, 0.0),), ("http://h",), turn=1.0)
    for endless in (math.inf, math.nan):
        with pytest.raises(ConfigError, match="--seconds and --block must be over 0, and end"):
            Run(SHARED, (Stage(1.0, endless),), ("http://h",), turn=1.0)
        with pytest.raises(ConfigError, match="--seconds and --block must be over 0, and end"):
            Run(SHARED, STAGES, ("http://h",), turn=endless)


def test_headers_are_read_as_they_are_written() -> None:
    assert parse_header("Authorization: Bearer a:b") == ("Authorization", "Bearer a:b")
    for wrong in ("token", ": x", "a b: c", "a: b\r\nc: d", "\u00e4: b"):
        with pytest.raises(ConfigError, match="expected as in 'authorization: Bearer TOKEN'"):
            parse_header(wrong)
    assert Client().headers == ()
