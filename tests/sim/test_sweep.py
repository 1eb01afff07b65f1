"""Runs by other processes: the same figures in the same order, and no process left."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import joblib
import pytest
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.reduction import dumps

from epp.errors import ConfigError
from epp.scheduling.catalogue import catalogue
from epp.sim import plan_report
from epp.sim.experiment import Named, Outcome, R, Trial, document, fleet, in_turn, policy, tried
from epp.sim.goal import parse_goal
from epp.sim.outside import sweep
from epp.sim.outside.sweep import spread
from epp.sim.plan import Bounds, Planner, plan
from epp.sim.profile import load_profile
from epp.sim.scenarios import at_rates, scenario
from epp.sim.world import Policy

ROOT = Path(__file__).parents[2]
DEMO = at_rates(scenario("demo"), ("10",), 2.0)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    get_reusable_executor().shutdown(wait=True)


def outcomes(jobs: int, done: list[int]) -> list[Outcome]:
    policies = [policy(name, catalogue()) for name in ("default", "round-robin")]
    return tried(DEMO, fleet(("demo",), 2), policies, 2, lambda: done.append(1), spread(jobs))


def test_runs_by_other_processes_are_those_of_this_one_to_the_last_digit() -> None:
    here: list[int] = []
    there: list[int] = []
    one, other = outcomes(1, here), outcomes(2, there)
    assert [each.runs for each in one] == [each.runs for each in other]
    assert document(DEMO, one) == document(DEMO, other)
    assert len(here) == len(there) == 4


def test_a_plan_by_other_processes_is_that_of_this_one_to_the_last_digit() -> None:
    planner = Planner(DEMO, load_profile("demo"), parse_goal("ttft_p90=1s"), 1)
    policies = [policy(name, catalogue()) for name in ("default", "round-robin")]
    bounds = Bounds(most=2, cold_start=1.0)
    one, other = (plan(planner, policies, None, bounds, autoscale=True, through=spread(jobs)) for jobs in (1, 2))
    assert one.scaled is not None
    assert plan_report.document(one) == plan_report.document(other)


def test_runs_that_end_in_another_order_are_put_in_their_places() -> None:
    def backwards(trials: Sequence[Trial[R]]) -> list[tuple[int, R]]:
        return list(in_turn(trials))[::-1]

    policies = [policy(name, catalogue()) for name in ("random", "round-robin")]
    servers = fleet(("demo",), 2)
    assert [each.runs for each in tried(DEMO, servers, policies, 2, through=backwards)] == [
        each.runs for each in tried(DEMO, servers, policies, 2)
    ]


@pytest.mark.parametrize("file", ["", *sorted(f"{path}" for path in (ROOT / "config/picker").rglob("*.yaml"))])
def test_every_shipped_configuration_can_be_sent_to_another_process(file: str) -> None:
    named = policy(file or "default", catalogue())
    sent = pickle.loads(dumps(named))
    assert isinstance(sent, Named)
    assert sent.name == named.name
    sent.make(1)


def test_a_backend_that_somebody_chose_takes_the_runs() -> None:
    with joblib.parallel_config(backend="threading", n_jobs=2):
        chosen = outcomes(0, [])
    assert document(DEMO, chosen) == document(DEMO, outcomes(1, []))


def test_what_goes_wrong_in_another_process_is_told_here() -> None:
    class Broken(Named, frozen=True, eq=False):
        def make(self, seed: int) -> Policy:
            raise ConfigError("it cannot be used", file="broken.yaml", line=3)

    with pytest.raises(ConfigError, match=r"broken\.yaml:3: it cannot be used"):
        tried(DEMO, fleet(("demo",), 2), [Broken("broken", None)], 2, through=spread(2))


def test_a_process_that_is_killed_is_told_with_what_to_do() -> None:
    class Killed(Named, frozen=True, eq=False):
        def make(self, seed: int) -> Policy:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    with pytest.raises(ConfigError, match="lower --jobs"):
        tried(DEMO, fleet(("demo",), 2), [Killed("killed", None)], 2, through=spread(2))


def test_without_joblib_runs_are_made_here_unless_several_at_once_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda _: None)
    assert spread() is in_turn
    assert spread(1) is in_turn
    with pytest.raises(ConfigError, match=r"--jobs 2 needs joblib: pip install 'epp\[sim\]'"):
        spread(2)


def test_jobs_below_0_are_refused() -> None:
    with pytest.raises(ConfigError, match="--jobs -1: a number of runs"):
        spread(-1)


def processes(group: int) -> list[tuple[int, str]]:
    """Seconds of CPU and command line of each process of a group."""
    told = subprocess.run(["ps", "-ww", "-eo", "pgid=,stat=,times=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in told.stdout.splitlines()]
    return [(int(row[2]), row[3]) for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


def until(holds: Callable[[], bool], within: float) -> None:
    ends = time.monotonic() + within
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("words", "sent", "code"),
    [
        ("sim 73-capacity --config random --seeds 2", signal.SIGINT, 130),
        ("sim 73-capacity --config random --seeds 2", signal.SIGKILL, -signal.SIGKILL),
        ("plan 73-capacity --seconds 600", signal.SIGINT, 130),
    ],
)
def test_a_sweep_that_is_stopped_ends_at_once_and_leaves_no_process(
    words: str, sent: signal.Signals, code: int
) -> None:
    """SIGINT to the command alone, while two others are at work: a terminal sends it to all, which is easier."""
    command = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from epp.cli import main; "
        f"sys.argv[1:] = '{words} --jobs 2'.split(); main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        until(lambda: sum("LokyProcess" in what and cpu > 1 for cpu, what in processes(process.pid)) == 2, 40.0)
        process.send_signal(sent)
        assert process.wait(10.0) == code
        until(lambda: not processes(process.pid), 10.0)


@pytest.mark.timeout(60)
def test_a_second_ctrl_c_does_not_keep_a_sweep_from_ending() -> None:
    """To the command, and 20 ms later to all that it started: to the `pgrep`, too, by which joblib is looking for what
    to kill. So does `timeout -s INT`, and who presses it twice."""
    words = ("sim", "73-capacity", "--config", "random", "--seeds", "2", "--jobs", "2")
    command = [sys.executable, "-m", "epp", *words]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        until(lambda: sum("LokyProcess" in what and cpu > 1 for cpu, what in processes(process.pid)) == 2, 40.0)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
        os.killpg(process.pid, signal.SIGINT)
        try:
            assert process.wait(10.0) == 130
            until(lambda: not processes(process.pid), 10.0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
