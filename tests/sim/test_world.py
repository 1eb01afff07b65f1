"""Virtual time: what happens when, and that a seed decides everything."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest

from epp.config.load import load
from epp.errors import Saturated
from epp.sim.figures import measured
from epp.sim.policies import REFERENCES, reference, routed
from epp.sim.profile import load_profile
from epp.sim.scenarios import at_rates, scenario
from epp.sim.workload import DEMO
from epp.sim.world import Asked, Order, Stage, World
from tests.sim.worlds import ROUND, Given, To


def small(policy: str, seed: int = 1) -> World:
    """Thirty seconds of the demo's workload over its four engines, the first ten to fill caches."""
    made = routed(load(""), seed) if policy == "default" else reference(policy, seed)
    return World([load_profile("demo")] * 4, made, DEMO, seed).run((Stage(14.0, 10.0, warm_up=True), Stage(28.0, 20.0)))


def p90(world: World) -> float:
    """Of the times to the first token."""
    told = measured(world).whole.ttft_p90_s
    assert told is not None
    return told


def test_a_request_is_sent_answered_and_ended_when_the_engine_says() -> None:
    """Came at 0.5 to an idle engine whose steps take 1 s: tokens at 1.5 and 2.5."""
    policy = To(0)
    world = World([ROUND], policy, Given((0.5,)), 1).run((Stage(1.0, 5.0),))
    assert policy.log == [("choose", 0, 0.5), ("answered", 0, 1.5), ("ended", 0, 2.5)]
    (asked,) = world.asked
    assert (asked.ttft, asked.itl, asked.e2e) == (1.0, 1.0, 2.0)
    assert asked.prompt_tokens == 23  # 64 characters are 16 tokens; the template adds 3 before and 4 behind


def test_a_request_waits_for_the_step_that_runs_when_it_comes() -> None:
    """The first one's steps end at 1, 2; the second comes at 0.5, is admitted at 1 and has its token at 2."""
    world = World([ROUND], To(0), Given((0.0, 0.5)), 1).run((Stage(1.0, 5.0),))
    assert [asked.first_at for asked in world.asked] == [1.0, 2.0]


def test_what_is_sent_elsewhere_does_not_wait() -> None:
    world = World([ROUND, ROUND], To(0, 1), Given((0.0, 0.5)), 1).run((Stage(1.0, 5.0),))
    assert [asked.first_at for asked in world.asked] == [1.0, 1.5]


def test_a_stage_that_waits_begins_a_second_after_the_last_answer() -> None:
    """Two stages of 2 s at the source's own rate. The first one's request of 5 tokens ends at 6; the second stage
    begins at 7, and what came 1 s into the source's third and fourth second comes at 8."""
    world = World([ROUND], To(0), Given((1.0, 3.0), output_tokens=5), 1).run((Stage(1.0, 2.0), Stage(1.0, 2.0)))
    assert [asked.came_at for asked in world.asked] == [1.0, 8.0]
    assert world.spans == [(0.0, 6.0), (7.0, 13.0)]


def test_a_stage_that_does_not_wait_begins_when_the_one_before_is_over() -> None:
    stages = (Stage(1.0, 2.0), Stage(1.0, 2.0))
    world = World([ROUND], To(0), Given((1.0, 3.0), output_tokens=5), 1).run(stages, waits=False)
    assert [asked.came_at for asked in world.asked] == [1.0, 3.0]


def test_a_stage_at_twice_the_rate_has_twice_the_requests_in_its_time() -> None:
    """Source: one a second from 0.5 on. At twice the rate 2 s are 4 s of it: requests at 0.25, 0.75, 1.25, 1.75."""
    source = Given(tuple(0.5 + second for second in range(10)))
    world = World([ROUND], To(0), source, 1).run((Stage(2.0, 2.0),))
    assert [asked.came_at for asked in world.asked] == [0.25, 0.75, 1.25, 1.75]


def test_events_of_one_moment_come_by_kind_and_then_in_the_order_in_which_they_were_put() -> None:
    happened: list[str] = []
    world = World([ROUND], To(0), Given(()), 1)
    for order, name in ((Order.LOOK, "look"), (Order.PAGE, "first page"), (Order.PAGE, "page"), (Order.STEP, "step")):
        world.at(1.0, partial(note, happened, name), order)
    world.run((Stage(1.0, 1.0),))
    assert happened == ["step", "first page", "page", "look"]


def note(happened: list[str], name: str, now: float) -> None:
    assert now == 1.0
    happened.append(name)


def test_what_an_engine_cannot_run_is_failed_and_the_policy_is_told() -> None:
    """64 blocks of 16 tokens are 1,024; the prompt alone has 1,006 and 100 are to follow."""
    policy = To(0)
    world = World([ROUND], policy, Given((0.0,), output_tokens=100, characters=4000), 1).run((Stage(1.0, 1.0),))
    assert [name for name, _, _ in policy.log] == ["choose", "ended"]
    assert world.asked[0].refusal == "BadRequest"
    assert measured(world).whole.failed == 1


def test_what_the_policy_refuses_is_failed_and_never_sent() -> None:
    class Refuses(To):
        def choose(self, asked: Asked, now: float) -> int:
            raise Saturated("full")

    policy = Refuses(0)
    world = World([ROUND], policy, Given((0.0,)), 1).run((Stage(1.0, 1.0),))
    assert policy.log == []
    assert (world.asked[0].server, world.asked[0].refusal) == (-1, Saturated.code)
    assert measured(world).whole.goodput_share == 0.0


@pytest.mark.parametrize("policy", ["default", *REFERENCES])
def test_the_same_seed_gives_the_same_requests_to_the_last_digit(policy: str) -> None:
    once, again, other = small(policy), small(policy), small(policy, seed=2)
    assert [fate(asked) for asked in once.asked] == [fate(asked) for asked in again.asked]
    assert measured(once) == measured(again)
    assert measured(once) != measured(other)


def fate(asked: Asked) -> tuple[float, int, float, float, int]:
    return asked.came_at, asked.server, asked.first_at, asked.ended_at, asked.cached_tokens


@pytest.mark.parametrize("policy", ["default", *REFERENCES])
def test_every_request_is_answered_after_it_came_and_nothing_is_left(policy: str) -> None:
    world = small(policy)
    assert len(world.asked) > 400
    assert all(asked.came_at < asked.first_at < asked.ended_at for asked in world.asked)
    assert all(0 <= asked.cached_tokens < asked.prompt_tokens for asked in world.asked)
    assert [len(engine) for engine in world.engines] == [0, 0, 0, 0]


def test_all_policies_are_asked_the_same() -> None:
    """Where stages wait for their answers they begin later for some; but what they ask stays the same."""
    asked = [[asked.arrival for asked in small(policy).asked] for policy in ("default", "random")]
    assert asked[0] == asked[1]


def test_knowing_prefixes_beats_spreading_and_knowing_everything_is_no_worse() -> None:
    ttft = {policy: p90(small(policy)) for policy in ("default", "round-robin", "oracle")}
    assert ttft["default"] < 0.5 * ttft["round-robin"]
    assert ttft["oracle"] < 1.1 * ttft["default"]


def test_the_picker_is_told_of_every_end() -> None:
    """Whatever was counted in is counted out."""
    policy = routed(load(""), 1)
    World([load_profile("demo")] * 4, policy, DEMO, 1).run((Stage(28.0, 5.0),))
    table = policy.table
    for column in ("inflight", "inflight_tokens"):
        assert table.column(column, table.listed, 0.0)[0].tolist() == [0.0] * 4


def test_pages_are_known_a_lag_after_they_were_asked_for() -> None:
    """Nobody knows anything of an engine in the first 5 ms, and everything that a page says afterwards."""
    policy = routed(load(""), 1)
    world = World([ROUND], policy, Given(()), 1)
    seen: list[bool] = []

    def look(now: float) -> None:
        seen.append(policy.table.column("waiting", policy.table.listed, now)[1].item(0))

    for at in (0.004, 0.006):
        world.at(at, look, Order.LOOK)
    world.run((Stage(1.0, 1.0),))
    assert seen == [False, True]
    assert policy.table.fact("kv_blocks", policy.table.listed.item(0)) == ROUND.kv_blocks


def test_servers_may_differ() -> None:
    """A server that is twice as slow answers half as soon."""
    slow = msgspec.structs.replace(ROUND, a0=2.0)
    world = World([ROUND, slow], To(0, 1), Given((0.0, 0.0)), 1).run((Stage(1.0, 1.0),))
    assert [asked.first_at for asked in world.asked] == [1.0, 2.0]


def test_the_published_workload_collapses_without_prefixes_and_not_with_them() -> None:
    """llm-d, 73-capacity at 40 requests a second: random 101 s at the 90th percentile, with exact prefixes 0.5 s, of
    which about 0.35 s are HTTP and the tokenizer. A third of that stage here, so random has not yet got as far."""
    tried = at_rates(scenario("73-capacity"), ("40",), 13.0)
    profiles = [load_profile(tried.engine)] * tried.servers
    worlds = {
        name: World(profiles, policy, tried.source, 1).run(tried.stages)
        for name, policy in (("random", reference("random", 1)), ("default", routed(load(""), 1)))
    }
    assert p90(worlds["default"]) < 0.3
    assert p90(worlds["random"]) > 10.0
