"""The shipped cost-scorer in a world: it finds out which of two servers is three times slower, and sends it less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from epp.config.load import load
from epp.scheduling.cost import Cost
from epp.sim.policies import Routed, reference, routed
from epp.sim.profile import EngineProfile, load_profile
from epp.sim.workload import Prompts, Workload
from epp.sim.world import Policy, Stage, World

CONFIG = Path(__file__).parents[2] / "config" / "picker" / "cost.yaml"
FAST = load_profile("qwen3-32b-h100-tp2")
SLOW = msgspec.structs.replace(
    FAST, name="slow", a0=3 * FAST.a0, a1=3 * FAST.a1, a2=3 * FAST.a2, a3=3 * FAST.a3, a4=3 * FAST.a4
)
NEW = Workload(
    "new",
    model="m",
    rate=5.0,
    tenants=(Prompts("new", 1.0, groups=1, questions=0, shared_tokens=0, question_tokens=2_000, output_tokens=50),),
)
"""Prompts of 2,000 tokens, none of them cached: 84 ms each on the fast one and 0.25 s on the slow one, beside the steps
of answers. Of five a second the fast one could do all, the slow one not even those that halves would give it."""


def run(policy: Policy) -> World:
    return World((FAST, SLOW), policy, NEW, 1).run((Stage(5.0, 60.0),))


@pytest.fixture(scope="module")
def by_cost() -> tuple[World, Cost]:
    policy = routed(load(CONFIG.read_text()), 1)
    return run(policy), cost_of(policy)


def cost_of(policy: Routed) -> Cost:
    ((_, followed),) = policy.running.scheduler.lineup.followed
    found = getattr(followed, "__self__", None)
    assert isinstance(found, Cost)
    return found


def later(world: World) -> list[float]:
    """Times to the first token of those that came when half a minute had passed."""
    return [asked.ttft for asked in world.asked if asked.came_at > 30.0]


def test_the_slow_server_gets_less_than_half_of_what_the_fast_one_gets(by_cost: tuple[World, Cost]) -> None:
    world, _ = by_cost
    went = Counter(asked.server for asked in world.asked if asked.came_at > 30.0)
    assert 100 < went.total() < 200
    assert went[0] > 2 * went[1] > 0


def test_first_tokens_come_sooner_than_where_the_fewest_requests_are(by_cost: tuple[World, Cost]) -> None:
    """Known exactly and at once, but not how fast each server is."""
    world, _ = by_cost
    assert np.mean(later(world)) < 0.9 * np.mean(later(run(reference("least-request", 1))))


@pytest.mark.parametrize(("slot", "engine", "within"), [(0, FAST, 0.1), (1, SLOW, 0.35)])
def test_what_is_learned_of_each_server_foretells_its_steps(
    by_cost: tuple[World, Cost], slot: int, engine: EngineProfile, within: float
) -> None:
    """A step that computes one of these prompts while ten are answered, and one that only answers ten. Who is sent less
    is known less, and 0.65 of three times is still twice what the other takes."""
    _, cost = by_cost
    a0, a1, a2, a3, a4 = cost._speeds.of(np.array([slot]), 2)[:, 0].tolist()
    for prompt in (0, 2_000):
        pairs = prompt * (prompt + 1) / 2
        foretold = a0 + a1 * prompt + a2 * 10 + a3 * 20_500 + a4 * pairs
        assert foretold == pytest.approx(engine.step_time(prompt, 10, 20_500, pairs), rel=within)


def test_the_same_seed_sends_the_same(by_cost: tuple[World, Cost]) -> None:
    again = run(routed(load(CONFIG.read_text()), 1))
    assert [asked.server for asked in again.asked] == [asked.server for asked in by_cost[0].asked]
