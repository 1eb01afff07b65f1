"""Prompts that one server computes and another one answers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from epp.config.load import load_file
from epp.errors import ConfigError
from epp.scheduling.catalogue import catalogue
from epp.sim.fleet import Changes, Failure
from epp.sim.policies import routed
from epp.sim.profile import load_profile
from epp.sim.scenarios import NO_SHARING, disaggregated, failing
from epp.sim.vllm import Engine, EngineRequest
from epp.sim.workload import DEMO
from epp.sim.world import CONNECT, RESET, TRANSFER, TRANSFER_TOKEN, Asked, Stage, World
from tests.sim.worlds import ROUND, Given, To

PAIR = Changes(prefill=1)
CONFIG = Path(__file__).parents[2] / "config" / "picker" / "well-known" / "pd-disaggregation.yaml"


class Both(To):
    """Prompts on server 0, answers on server 1."""

    def choose(self, asked: Asked, now: float) -> int:
        asked.prefill = 0
        return super().choose(asked, now)


def test_the_first_token_comes_a_transfer_and_a_step_after_the_prompt_is_computed() -> None:
    """A step takes a second: one for the prompt on server 0, then the way, then one for each token on server 1."""
    policy = Both(1)
    world = World([ROUND, ROUND], policy, Given((1.0,), output_tokens=3), 1, PAIR).run([Stage(1.0, 5.0)])
    (asked,) = world.asked
    way = TRANSFER + TRANSFER_TOKEN * asked.prompt_tokens
    assert (asked.first_at, asked.ended_at) == pytest.approx((1.0 + 1.0 + way + 1.0, 1.0 + 1.0 + way + 3.0))
    assert [what for what, _, _ in policy.log] == ["choose", "answered", "ended"]  # once, though two servers had it
    assert (world.worked[0], world.worked[1]) == (1.0, 3.0)


def test_what_the_first_server_holds_counts_as_cached_and_the_second_holds_it_too_afterwards() -> None:
    world = World([ROUND, ROUND], Both(1), Given((1.0, 20.0), characters=640, same=True), 1, PAIR)
    first, second = world.run([Stage(1.0, 40.0)]).asked
    assert first.cached_tokens == 0
    assert second.cached_tokens == (second.prompt_tokens - 1) // 16 * 16
    assert {engine.stats().prefix_hits for engine in world.engines} == {second.cached_tokens}


def test_a_prompt_that_comes_whole_costs_its_last_token_alone_and_all_of_its_room() -> None:
    """0.1 s a prompt token and 0.01 s a pair: one token, which looks at all 40."""
    profile = msgspec.structs.replace(ROUND, a1=0.1, a4=0.01)
    engine = Engine(profile)
    engine.submit(EngineRequest("r", 40, 2, (1, 2), sent=True))
    step = engine.step()
    assert step is not None
    assert step.duration == pytest.approx(1.0 + 0.1 + 0.4)
    assert step.first == ("r",)
    assert engine.blocks.used == 3
    while engine.step() is not None:
        pass
    assert engine.stats().processed == 1 + 2
    assert engine.blocks.match((1, 2)) == (2, 2)


def test_a_prompt_that_comes_whole_waits_where_there_is_no_room_for_it() -> None:
    engine = Engine(msgspec.structs.replace(ROUND, kv_blocks=4))
    engine.submit(EngineRequest("a", 40, 3, sent=True))
    engine.submit(EngineRequest("b", 40, 3, sent=True))
    steps = 0
    while engine.step() is not None:
        steps += 1
        assert engine.blocks.used <= 4
    assert steps == 6  # one after the other


def test_one_that_was_preempted_is_computed_anew_here() -> None:
    """Two of 30 tokens with 4 blocks between them: at 32 tokens each takes a third one, and the later one loses its."""
    engine = Engine(msgspec.structs.replace(ROUND, kv_blocks=4, a1=1.0))
    engine.submit(EngineRequest("a", 30, 6, sent=True))
    engine.submit(EngineRequest("b", 30, 6, sent=True))
    durations = []
    while (step := engine.step()) is not None:
        durations.append(step.duration)
    assert engine.stats().preemptions == 1
    assert max(durations) >= 1.0 + 30.0


@pytest.mark.parametrize(("dies", "refusal"), [(0, RESET), (1, CONNECT)])
def test_a_server_that_dies_takes_what_it_has_and_what_is_on_its_way_to_it(dies: int, refusal: str) -> None:
    """At 1.5 s the prompt is on server 0; at 2.01 s it is on its way to server 1."""
    at = 1.5 if dies == 0 else 2.01
    changes = Changes((Failure(dies, at, 100.0),), prefill=1)
    policy = Both(1)
    world = World([ROUND, ROUND], policy, Given((1.0,)), 1, changes).run([Stage(1.0, 5.0)])
    assert [asked.refusal for asked in world.asked] == [refusal]
    assert [what for what, _, _ in policy.log] == ["choose", "ended"]
    assert world.over


def test_the_picker_sends_prompts_to_prefill_servers_and_answers_come_from_the_others() -> None:
    config = load_file(str(CONFIG), catalogue(), experimental=True)
    policy = routed(config, 1)
    world = World([load_profile("demo")] * 4, policy, DEMO, 1, Changes(prefill=2)).run([Stage(10.0, 5.0)])
    assert len(world.asked) > 30
    assert {asked.prefill for asked in world.asked} == {0, 1}
    assert {asked.server for asked in world.asked} == {2, 3}
    assert not any(asked.refusal for asked in world.asked)
    table = policy.table
    assert [table.column(name, table.listed, world.now)[0].tolist() for name in ("inflight", "inflight_tokens")] == [
        [0.0] * 4
    ] * 2


def test_a_fleet_must_have_somebody_who_answers() -> None:
    assert disaggregated(NO_SHARING, 7, 8).changes.prefill == 7
    assert failing(disaggregated(NO_SHARING, 2, 8), [Failure(0, 1.0, 1.0)]).changes.prefill == 2
    with pytest.raises(ConfigError, match="one at least must answer"):
        disaggregated(NO_SHARING, 8, 8)
