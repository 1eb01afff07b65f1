"""The search for the smallest fleet: goals, prices, neighbours, and what a run is reduced to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from io import StringIO

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from epp.errors import ConfigError
from epp.scheduling.catalogue import catalogue
from epp.sim.experiment import R, Search, T, Trial, in_turn, policy, searched
from epp.sim.figures import FLOOR, FLOOR_A_TOKEN
from epp.sim.fleet import STEADY, Autoscale, Changes, Failure
from epp.sim.goal import Goal, Limit, parse_goal, parse_prices, price_of
from epp.sim.plan import (
    Autoscaled,
    Bounds,
    Found,
    Plan,
    Planner,
    Scaled,
    Seen,
    Sized,
    gentle,
    lives,
    plan,
    rules_for,
    seen,
    smallest,
    together,
)
from epp.sim.plan_report import document, per_hour, per_million, tables
from epp.sim.profile import load_profile
from epp.sim.scenarios import at_rates, scenario
from epp.sim.world import Stage, World
from tests.sim.worlds import ROUND, Given, To

PROMPT = FLOOR + 23 * FLOOR_A_TOKEN
"""Floor of a request of `Given`: 23 tokens."""


# -- what an operator writes -----------------------------------------------------------------------------------------


def test_a_goal_is_read() -> None:
    assert parse_goal("ttft_p90=2s, itl_p99=50ms,e2e_p50=1m") == Goal(
        (Limit("ttft", 90, 2.0), Limit("itl", 99, 0.05), Limit("e2e", 50, 60.0))
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not a duration"),
        ("ttft=2s", "'ttft' is none of ttft_p1 to ttft_p99"),
        ("ttft_p100=2s", "'ttft_p100' is none of"),
        ("ttft_p0=2s", "'ttft_p0' is none of"),
        ("ttft_p90=2", "'2' is not a duration"),
        ("ttft_p90=2s,ttft_p50=1s", "one limit for each of ttft, itl and e2e"),
    ],
)
def test_what_is_no_goal_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--slo .*{said}"):
        parse_goal(text)


def test_a_server_costs_what_its_gpus_cost() -> None:
    prices = parse_prices(("H100=2.5,l40s=0.8",))
    assert price_of(load_profile("llama-70b-h100-tp4"), prices) == 10.0
    assert price_of(load_profile("llama-8b-l40s"), prices) == 0.8
    assert price_of(load_profile("llama-8b-l40s"), {}) is None


@pytest.mark.parametrize("text", ["h100", "h100=", "h100=much", "h100=-1", "h100=inf", "h100=nan"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--price"):
        parse_prices((text,))


def test_a_gpu_without_a_price_is_named() -> None:
    with pytest.raises(ConfigError, match=r"llama-8b-l40s needs --price l40s=.*known of h100"):
        price_of(load_profile("llama-8b-l40s"), {"h100": 2.5})
    with pytest.raises(ConfigError, match=r"engine demo needs gpu: and gpus: in its profile"):
        price_of(load_profile("demo"), {"h100": 2.5})


# -- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_as_its_clients_see_it() -> None:
    """Requests of two tokens at 0 and 0.5 on one engine of steps of 1 s. The first one's tokens come at 1 and 2, the
    second's at 2 and 3: 1 s and 1.5 s to the first one, and the floor; 1 s between two."""
    goal = parse_goal(f"ttft_p50={1 + PROMPT:.6f}s,itl_p90=1s")
    world = World([ROUND], To(0), Given((0.0, 0.5)), 1).run((Stage(1.0, 4.0),), waits=False)
    got = seen(world, goal)
    assert got.met  # of two, the first is half
    assert got.reached == pytest.approx({"ttft_p50": 1 + PROMPT, "itl_p90": 1.0})
    assert (got.requests, got.failed_share, got.missed_share) == (2, 0.0, 0.5)
    assert (got.seconds, got.server_seconds, got.most_servers, got.output_tokens) == (3.0, 3.0, 1, 4)
    assert got.in_flight == got.in_flight_first == 4.5 / 4  # 2 s and 2.5 s within a stage of 4 s
    assert got.busy_share == 1.0


def test_a_stage_alone_decides_however_good_the_others_are() -> None:
    """Nine of ten are quick, but one of the second stage's two is not."""
    source = Given((*(float(at) for at in range(0, 16, 2)), 20.0, 20.5), output_tokens=1)
    goal = parse_goal("ttft_p90=1.3s")
    whole = World([ROUND], To(0), source, 1).run((Stage(1.0, 30.0),), waits=False)
    apart = World([ROUND], To(0), source, 1).run((Stage(1.0, 19.0), Stage(1.0, 11.0)), waits=False)
    assert (seen(whole, goal).met, seen(apart, goal).met) == (True, False)


def test_what_failed_is_over_every_limit() -> None:
    changes = Changes((Failure(0, 1.5, 5.0),))
    world = World([ROUND], To(0), Given((0.0,)), 1, changes).run((Stage(1.0, 2.0),), waits=False)
    got = seen(world, parse_goal("ttft_p50=1h"))
    assert (got.met, got.failed_share, got.missed_share, got.output_tokens) == (False, 1.0, 1.0, 0)
    assert got.reached == {"ttft_p50": float("inf")}


def test_warm_up_is_not_measured() -> None:
    stages = (Stage(1.0, 2.0, warm_up=True), Stage(1.0, 2.0))
    world = World([ROUND], To(0), Given((0.0, 2.5)), 1).run(stages, waits=False)
    got = seen(world, parse_goal("ttft_p50=1h"))
    assert (got.requests, got.seconds) == (1, 2.5)  # from 2 to 4.5


def test_the_longest_stretch_over_the_goal_is_counted_in_windows_of_ten_seconds() -> None:
    """One request at a time keeps the goal. Two at once in the windows from 10, 20 and 40: the second of them does not,
    for its first token comes a step later."""
    times = [0.0, 5.0, 12.0, 12.1, 23.0, 23.1, 35.0, 44.0, 44.1, 52.0]
    world = World([ROUND], To(0), Given(tuple(times), output_tokens=1), 1).run((Stage(1.0, 60.0),), waits=False)
    assert seen(world, parse_goal("ttft_p90=1.5s")).longest_over_s == 20.0


def test_a_stopped_server_is_paid_for_until_its_last_answer() -> None:
    """See test_fleet: stopped at 20, its answer ends at 41."""
    rule = Autoscale(target=1.0, least=1, most=2, period=5.0, calm=10.0)
    source = Given((1.0,), output_tokens=40)
    world = World([ROUND, ROUND], To(1), source, 1, Changes(autoscale=rule)).run((Stage(1.0, 50.0),), waits=False)
    assert lives(world) == [(0.0, float("inf")), (0.0, 41.0)]
    got = seen(world, parse_goal("ttft_p50=1h"))
    assert got.server_seconds == 82.0  # from 0 to the last answer, both of them
    assert got.busy_share == 40 / 82


def test_several_seeds_must_all_meet_the_goal() -> None:
    once = seen(World([ROUND], To(0), Given((0.0,)), 1).run((Stage(1.0, 2.0),)), parse_goal("ttft_p50=2s"))
    worse = msgspec.structs.replace(once, met=False, reached={"ttft_p50": 3.0}, missed_share=1.0)
    both = together([once, worse])
    assert (both.met, both.reached, both.missed_share) == (False, {"ttft_p50": 3.0}, 0.5)


def test_nothing_that_counts_was_asked() -> None:
    world = World([ROUND], To(0), Given(()), 1).run((Stage(1.0, 2.0),))
    with pytest.raises(ConfigError, match="make them longer"):
        seen(world, parse_goal("ttft_p50=2s"))


def test_warm_up_is_no_faster_than_the_first_stage_and_asks_as_much() -> None:
    tried = at_rates(scenario("73-capacity"), ("5,40",), 10.0)  # warm-up: 50 s of 15
    assert gentle(tried).stages == (Stage(5.0, 150.0, warm_up=True), Stage(5.0, 10.0), Stage(40.0, 10.0))
    faster = at_rates(scenario("73-capacity"), ("20",), 10.0)
    assert gentle(faster) == faster


# -- the search ------------------------------------------------------------------------------------------------------


def smallest_of(meets: Callable[[int], bool], most: int, guess: int = 1) -> Found:
    """The search, answered at once."""

    def all_of(sizes: Sequence[int]) -> Search[None, list[bool]]:
        yield []
        return list(map(meets, sizes))

    (found,) = searched([smallest(all_of, most, guess)])
    return found


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300))
def test_where_more_is_always_better_the_smallest_is_found_in_few_tries(enough: int, most: int, guess: int) -> None:
    asked: list[int] = []

    def meets(size: int) -> bool:
        asked.append(size)
        return size >= enough

    found = smallest_of(meets, most, guess)
    assert found.servers == (enough if enough <= most else None)
    assert found.monotone
    assert len(asked) == len(set(asked)) <= 18  # 9 to double or halve, 7 to bisect, 2 neighbours
    assert all(1 <= size <= most for size in asked)


def test_a_search_begins_where_it_is_told_and_keeps_away_from_what_is_far_too_small() -> None:
    """8 is enough, 4 is not, 6 is, 5 is not; then 7. Beginning at 3: 6 is enough, 4 and 5 are not; then 7 and 4."""
    assert [size for size, _ in smallest_of(lambda size: size >= 6, 64, 8).tried] == [4, 5, 6, 7, 8]
    assert [size for size, _ in smallest_of(lambda size: size >= 6, 64, 3).tried] == [3, 4, 5, 6, 7]


def test_neighbours_show_where_more_is_not_better() -> None:
    """Doubling: 1, 2, 4, 8; bisecting: 6, 5; then 7 and, two below 6, 4, which is known."""
    found = smallest_of(lambda size: size in (6, 8), most=64)
    assert found.servers == 6
    assert found.tried == ((1, False), (2, False), (4, False), (5, False), (6, True), (7, False), (8, True))
    assert not found.monotone


def test_a_smaller_neighbour_that_is_enough_is_taken() -> None:
    """Doubling ends at 16; bisecting: 12 is not enough, 14 is, 13 is. 14 is known, and two below 13 is 11."""
    found = smallest_of(lambda size: size in (11, 13, 14, 16), most=64)
    assert (found.servers, found.monotone) == (11, False)


# -- plans -----------------------------------------------------------------------------------------------------------


def planner() -> Planner:
    """The demo's workload at half of what its four servers are for, and then at nearly all of it, for ten seconds."""
    tried = at_rates(scenario("demo"), ("14,25",), 10.0)
    return Planner(tried, load_profile("demo"), parse_goal("ttft_p90=1s,itl_p90=100ms"), 1)


def answered(search: Search[R, T]) -> T:
    """What a search finds when its runs are made here."""
    (found,) = searched([search])
    return found


def test_the_plan_is_the_smallest_fleet_and_what_its_neighbours_do() -> None:
    made = answered(planner().size(policy("default", catalogue(())), most=8, cold_start=5.0))
    n = made.found.servers
    assert n is not None
    assert 1 < n < 8
    fewer, own = answered(planner().look(policy("default", catalogue(())), (n - 1, STEADY), (n, STEADY)))
    assert (fewer.met, own.met) == (False, True)
    assert made.seen == own
    assert [risk.servers for risk in made.risks] == [n, n + 1]
    assert all(risk.failure == Failure(0, 72.5, 5.0) for risk in made.risks)  # 60 s of warm-up, 10 of 14/s, 2.5 of 25/s
    assert all(risk.seen.failed_share > 0 for risk in made.risks)


def test_a_goal_that_nobody_meets_has_no_fleet() -> None:
    hopeless = msgspec.structs.replace(planner(), goal=parse_goal("ttft_p90=1ms"))
    made = answered(hopeless.size(policy("round-robin", catalogue(())), most=2))
    assert (made.found.servers, made.seen, made.risks) == (None, None, ())
    assert made.found.tried == ((2, False),)  # the demo has four servers, but two are the most
    assert made.reached["ttft_p90"] > 0.015 + 46e-6 * 100
    assert rules_for(made, Bounds()) == rules_for(made, Bounds(most=2)) == rules_for(made, Bounds(target=4.0)) == ()
    assert rules_for(made, Bounds(1, 3, 4.0, 5.0)) == (Autoscale(4.0, 1, 3, 5.0),)


def test_autoscalers_steer_for_parts_of_what_the_fixed_fleet_has() -> None:
    """34.2 requests on each of 10 servers, 2.5 on each of two: whole numbers, and each once."""
    full = Sized("default", Found(10, ()), like(in_flight=342.0), (), {})
    assert [rule.target for rule in rules_for(full, Bounds())] == [34, 27, 22, 17, 13, 10, 6, 3]
    assert {(rule.least, rule.most, rule.cold_start) for rule in rules_for(full, Bounds())} == {(1, 10, 180.0)}
    assert rules_for(full, Bounds(2, 12, 7.5, 30.0)) == (Autoscale(7.5, 2, 12, 30.0),)
    assert {rule.most for rule in rules_for(full, Bounds(least=11))} == {11}
    calm = Sized("default", Found(2, ()), like(in_flight=5.0), (), {})
    assert [rule.target for rule in rules_for(calm, Bounds())] == [2, 1]


def test_an_autoscaler_begins_with_what_its_first_stage_needs_and_stays_within_its_bounds() -> None:
    rules = [Autoscale(4.0, 1, 3, 5.0), Autoscale(2.0, 2, 3, 5.0), Autoscale(100.0, 2, 3, 5.0)]
    scaled = answered(planner().scale(policy("default", catalogue(())), rules, 7.9))
    assert [each.begin for each in scaled.tried] == [2, 3, 2]
    assert [each.rule for each in scaled.tried] == rules
    assert all(each.begin <= each.seen.most_servers <= 3 for each in scaled.tried)


def like(**known: float | bool) -> Seen:
    """A run of which so much matters."""
    once = seen(World([ROUND], To(0), Given((0.0,)), 1).run((Stage(1.0, 2.0),)), parse_goal("ttft_p50=2s"))
    return msgspec.structs.replace(once, **known)


def test_the_best_autoscaler_is_the_cheapest_that_meets_the_goal_or_misses_it_least() -> None:
    def best(*looks: Seen) -> int:
        tried = tuple(Scaled(Autoscale(9.0 - at), 1, look) for at, look in enumerate(looks))
        return tried.index(Autoscaled("default", tried).best)

    cheap, dear = like(met=True, server_seconds=50.0), like(met=True, server_seconds=70.0)
    bad, worse = (like(met=False, server_seconds=10.0, missed_share=share) for share in (0.2, 0.3))
    assert best(worse, dear, cheap, bad) == 2
    assert best(worse, bad, worse) == 1
    assert best(cheap, cheap) == 0  # of equals the one with the higher target


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (
            {"met": True, "server_seconds": 50.0},
            "met by steering for 9 requests in flight a server, 50% cheaper than 2",
        ),
        ({"met": True, "server_seconds": 100.0}, "meets the goal saves nothing: 2 servers all the time"),
        ({"met": False, "missed_share": 0.125}, "Steering for 9 requests in flight a server misses it with 12.5%"),
    ],
)
def test_a_plan_says_whether_to_scale(best: dict[str, float], said: str) -> None:
    sized = Sized("default", Found(2, ((2, True),)), like(server_seconds=100.0), (), {"ttft_p50": 1.0})
    scaled = Autoscaled("default", (Scaled(Autoscale(9.0, 1, 2), 1, like(**best)),))
    made = Plan(planner().scenario, load_profile("demo"), Goal((Limit("ttft", 50, 2.0),)), 1, None, (sized,), scaled)
    assert any(said in each for each in tables(made) if isinstance(each, str))


@pytest.mark.parametrize(
    "bounds",
    [
        {"least": 0},
        {"least": 3, "most": 2},
        {"most": -1},
        {"target": -1.0},
        {"target": float("nan")},
        {"cold_start": -1.0},
        {"cold_start": float("inf")},
    ],
)
def test_bounds_that_cannot_be_are_refused_before_anything_runs(bounds: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        msgspec.structs.replace(Bounds(), **bounds)


def test_a_plan_needs_a_seed() -> None:
    with pytest.raises(ConfigError, match="--seeds 0: at least 1"):
        msgspec.structs.replace(planner(), seeds=0)


def test_prices_are_of_paid_time() -> None:
    """Two servers at 36 an hour, for 100 s: 2 in all; 50,000 tokens: 40 a million."""
    once = seen(World([ROUND], To(0), Given((0.0,)), 1).run((Stage(1.0, 2.0),)), parse_goal("ttft_p50=2s"))
    made = msgspec.structs.replace(once, seconds=100.0, server_seconds=200.0, output_tokens=50_000)
    assert per_hour(made, 36.0) == 72.0
    assert per_million(made, 36.0) == pytest.approx(40.0)
    assert (per_hour(made, None), per_million(made, None)) == (None, None)
    assert per_million(msgspec.structs.replace(made, output_tokens=0), 36.0) is None


def test_one_plan_is_another_to_the_last_digit_whoever_makes_its_runs_and_can_be_read() -> None:
    """The next steps of both searches are made together."""
    steps: list[list[tuple[str, int]]] = []
    done: list[None] = []

    def backwards(trials: Sequence[Trial[R]]) -> list[tuple[int, R]]:
        steps.append([(trial.policy.name, len(trial.profiles)) for trial in trials])
        return list(in_turn(trials))[::-1]

    policies = [policy(name, catalogue(())) for name in ("default", "round-robin")]
    bounds = Bounds(least=2, most=8, target=8.0, cold_start=5.0)
    first = plan(planner(), policies, 2.0, bounds, autoscale=True)
    second = plan(planner(), policies, 2.0, bounds, autoscale=True, through=backwards, done=lambda: done.append(None))
    told = document(first)
    assert json.dumps(told) == json.dumps(document(second))
    assert steps[0] == [("default", 4), ("round-robin", 4)]
    assert sum(map(len, steps)) == len(done)
    assert [each["config"] for each in told["policies"]] == ["default", "round-robin"]
    assert told["policies"][0]["servers"] < told["policies"][1]["servers"]
    assert told["policies"][0]["price_per_hour"] == pytest.approx(2.0 * told["policies"][0]["servers"])
    assert 2 <= told["autoscale"]["most_servers"] <= 8
    assert [each["target"] for each in told["autoscale"]["tried"]] == [8.0]
    console = Console(width=160, record=True, file=StringIO())
    for each in tables(first):
        console.print(each)
    assert "autoscaled 2 to 8 at 8 in flight each" in console.export_text()


def test_a_run_is_a_function_of_data_and_its_stages_do_not_wait() -> None:
    """One server where three are needed: answers of the first stage come long into the second."""
    tried, servers, goal = planner().scenario, (planner().engine,), planner().goal
    by_name = policy("default", catalogue(()))
    once, again = answered(planner().look(by_name, (1, STEADY), (1, STEADY)))
    assert once == again
    here, waited = (
        together([seen(World(servers, by_name.make(1), tried.source, 1).run(tried.stages, waits=waits), goal)])
        for waits in (False, True)
    )
    assert once == here
    assert once != waited
