"""Engines that are unlike what cost-scorer begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from epp.config.load import load_file
from epp.scheduling.catalogue import catalogue
from epp.scheduling.speeds import PRIOR, Speeds
from epp.sim.figures import measured
from epp.sim.policies import reference, routed
from epp.sim.profile import load_profile
from epp.sim.workload import DEMO
from epp.sim.world import Policy, Stage, World
from tests.scheduling.test_speeds import HEAVY, LIGHT, LONG, of, seconds, taught

COST = Path(__file__).parents[2] / "config/picker/cost.yaml"


def test_an_engine_that_is_eight_times_slower_in_everything_is_known_as_soon_as_any() -> None:
    """After twenty pieces what it will take is known within a fifth, as of other engines."""
    speeds, constants = Speeds(), [8.0 * float(each) for each in PRIOR]
    taught(speeds, 0, constants, pieces=20)
    for did in (LIGHT, HEAVY, LONG):
        assert seconds(of(speeds, 0), did) == pytest.approx(seconds(constants, did), rel=0.2)


def begun_cold(policy: Policy) -> float:
    """TTFT p90 of the first eight seconds on four engines of `demo`, at half of what they can do."""
    found = measured(World([load_profile("demo")] * 4, policy, DEMO, 1).run((Stage(14.0, 8.0),))).whole.ttft_p90_s
    assert found is not None
    return found


def test_the_first_seconds_on_slow_engines_are_not_much_worse_than_with_least_request() -> None:
    config = load_file(str(COST), catalogue())
    assert begun_cold(routed(config, 1)) <= 1.5 * begun_cold(reference("least-request", 1))
