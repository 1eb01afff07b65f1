"""`epp sim` and `epp plan` from the command line, on a workload of a few hundred requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHORT = ("demo", "--rate", "20", "--seconds", "5")
PD = str(Path(__file__).parents[2] / "config" / "picker" / "well-known" / "pd-disaggregation.yaml")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epp", *words], capture_output=True, text=True, timeout=120, check=False
    )


def told(*words: str) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_server_that_fails_costs_requests_of_every_policy() -> None:
    """The warm-up of demo is 60 s and its last answers; at 63 s every server is busy."""
    configs = ("--config", "default", "--config", "round-robin")
    failed = [policy["failed"] for policy in told("sim", *SHORT, *configs, "--fail", "1@63:60")["policies"]]
    assert min(failed) > 0
    assert [policy["failed"] for policy in told("sim", *SHORT, *configs)["policies"]] == [0, 0]


def test_prefill_servers_make_no_answers_so_a_fleet_of_them_is_refused() -> None:
    (policy,) = told("sim", *SHORT, "--config", PD, "--prefill", "2")["policies"]
    assert policy["failed"] == 0
    assert policy["requests"] > 50
    refused = run("sim", *SHORT, "--prefill", "4")
    assert refused.returncode == 2
    assert "one at least must answer" in refused.stderr


def test_a_plan_names_the_fewest_servers_of_both_policies() -> None:
    plan = told("plan", *SHORT, "--slo", "ttft_p90=2s")
    servers = [each["servers"] for each in plan["policies"]]
    assert len(servers) == 2
    assert 1 <= servers[0] <= servers[1]


def test_a_goal_that_no_fleet_meets_ends_with_1_and_says_what_the_largest_one_comes_to() -> None:
    done = run("plan", *SHORT, "--slo", "ttft_p90=1ms", "--most", "1", "--autoscale", "--json")
    assert done.returncode == 1
    plan = json.loads(done.stdout)
    assert [each["servers"] for each in plan["policies"]] == [None, None]
    assert all(each["reached"]["ttft_p90"] > 0.001 for each in plan["policies"])
    assert plan["autoscale"] is None  # nobody said what to steer for


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "demo", "--slo", "speed=9"),
        ("plan", "demo", "--jobs", "-1"),
        ("plan", "demo", "--rate", "5", "--seconds", "0"),
        ("plan", "demo", "--output-tokens", "-1"),
        ("sim", "demo", "--fail", "x"),
        ("sim", "demo", "--jobs", "-1"),
    ],
)
def test_what_is_asked_wrongly_ends_with_2(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
