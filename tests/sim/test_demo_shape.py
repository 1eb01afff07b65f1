"""What the demo shows lies in its workload and its engine profile, not in luck: four engines in virtual time."""

from __future__ import annotations

import pytest

from epp.sim.profile import load_profile
from epp.sim.workload import DEMO, NO_SHARING, Workload
from tests.sim.fleet import Fleet, Policy, prefix_and_load, round_robin

SEEDS = (1, 2, 3)
PHASE = 20.0


def fleet(workload: Workload, policy: Policy, seed: int) -> Fleet:
    return Fleet(load_profile("demo"), 4, policy).run(workload, seed, PHASE)


@pytest.mark.parametrize("seed", SEEDS)
def test_prefix_and_load_beat_round_robin_on_the_demo_and_neither_collapses(seed: int) -> None:
    blind, aware = fleet(DEMO, round_robin(), seed), fleet(DEMO, prefix_and_load, seed)
    assert aware.ttft_percentile(0.9) < 0.7 * blind.ttft_percentile(0.9)
    assert aware.ttft_percentile(0.5) < 0.5 * blind.ttft_percentile(0.5)
    assert aware.cached_share > 1.5 * blind.cached_share
    assert blind.ttft_percentile(0.9) < 2.0


@pytest.mark.parametrize("seed", SEEDS)
def test_without_sharing_all_is_calm_and_no_policy_is_better(seed: int) -> None:
    blind, aware = fleet(NO_SHARING, round_robin(), seed), fleet(NO_SHARING, prefix_and_load, seed)
    assert blind.cached_share == aware.cached_share == 0.0
    assert aware.ttft_percentile(0.9) == pytest.approx(blind.ttft_percentile(0.9), rel=0.05)
    assert blind.ttft_percentile(0.9) < 0.25
