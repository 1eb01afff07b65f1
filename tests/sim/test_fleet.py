"""Servers that fail, come back, start and stop, and who decides that."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.config.load import load
from epp.errors import ConfigError
from epp.sim.figures import measured
from epp.sim.fleet import Autoscale, Autoscaler, Changes, Failure, State, parse_failures
from epp.sim.policies import REFERENCES, Quiet, RoundRobin, Routed, reference, routed
from epp.sim.profile import load_profile
from epp.sim.workload import DEMO
from epp.sim.world import CONNECT, RESET, Asked, Policy, Stage, World
from epp.ticket import Outcome, Ticket
from tests.sim.worlds import ROUND, Given, To

RULE = Autoscale(target=10.0, least=1, most=20)


# -- the autoscaler's rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "in_flight", "wanted"),
    [
        (4, 40, 4),
        (4, 43, 4),  # 7.5 % over the target: within the tolerance
        (4, 45, 5),  # 12.5 % over: ceil(45 / 10)
        (4, 61, 7),
        (1, 500, 5),  # four at a time
        (8, 500, 16),  # or twice as many
        (16, 500, 20),  # never over the most
        (4, 0, 4),  # not yet: it has just begun
    ],
)
def test_so_many_servers_are_wanted_that_each_has_the_target_in_flight(
    current: int, in_flight: int, wanted: int
) -> None:
    assert Autoscaler(RULE).wanted(current, in_flight, 0.0) == wanted


def test_servers_are_stopped_when_fewer_have_been_enough_for_five_minutes() -> None:
    autoscaler = Autoscaler(RULE)
    wanted = [autoscaler.wanted(4, 15, 15.0 * look) for look in range(22)]
    assert wanted == [4] * 21 + [2]  # the first look, which found four, is 300 s old at the 21st


def test_a_short_peak_keeps_its_servers_for_five_minutes_more() -> None:
    autoscaler = Autoscaler(RULE)
    for look in range(21):
        autoscaler.wanted(4, 38 if look == 10 else 15, 15.0 * look)
    assert autoscaler.wanted(4, 15, 450.0) == 4  # four were right at 150 s
    assert autoscaler.wanted(4, 15, 465.0) == 2


def test_the_last_server_stays() -> None:
    autoscaler = Autoscaler(RULE)
    assert [autoscaler.wanted(1, 0, 400.0 * look) for look in range(3)] == [1, 1, 1]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 1000)), min_size=1, max_size=50))
def test_what_is_wanted_is_always_between_the_least_and_the_most(looks: list[tuple[int, int]]) -> None:
    autoscaler = Autoscaler(Autoscale(target=7.0, least=2, most=9))
    for number, (current, in_flight) in enumerate(looks):
        assert 2 <= autoscaler.wanted(current, in_flight, 15.0 * number) <= 9


@pytest.mark.parametrize(("target", "least", "most"), [(0.0, 1, 2), (1.0, 0, 2), (1.0, 3, 2)])
def test_an_autoscaler_that_cannot_be_is_refused(target: float, least: int, most: int) -> None:
    with pytest.raises(ValueError, match="an autoscaler"):
        Autoscale(target, least, most)


# -- failures --------------------------------------------------------------------------------------------------------


def lasting(*failures: Failure, detection: float = 1.0) -> Changes:
    return Changes(failures, detection=detection)


def test_what_runs_on_a_server_that_fails_is_lost_and_the_policy_is_told_once() -> None:
    """Steps end at 1 and 2. The first has a token of three at 1, the second was admitted then and has none."""
    policy = To(0)
    source = Given((0.0, 0.5), output_tokens=3)
    world = World([ROUND], policy, source, 1, lasting(Failure(0, 1.5, 5.0))).run((Stage(1.0, 5.0),))
    assert policy.log == [
        ("choose", 0, 0.0),
        ("choose", 1, 0.5),
        ("answered", 0, 1.0),
        ("ended", 0, 1.5),
        ("ended", 1, 1.5),
    ]
    assert [(asked.refusal, asked.ended_at) for asked in world.asked] == [(RESET, 1.5), (RESET, 1.5)]
    assert measured(world).whole.failed == 2


def test_a_dead_server_is_listed_until_it_is_noticed_and_loses_what_it_is_sent() -> None:
    """Round robin over two. The even ones go to server 0, which fails at 1.5 and is off the list at 2.5."""
    source = Given((1.6, 1.7, 2.4, 2.6, 2.7), output_tokens=1)
    world = World([ROUND, ROUND], RoundRobin(Random(0)), source, 1, lasting(Failure(0, 1.5, 60.0)))
    world.run((Stage(1.0, 5.0),))
    assert [asked.refusal for asked in world.asked] == [CONNECT, "", CONNECT, "", ""]
    assert [asked.server for asked in world.asked] == [0, 1, 0, 1, 1]
    assert [asked.ended_at for asked in world.asked if asked.refusal] == [1.6, 2.4]


def test_it_comes_back_with_an_empty_cache() -> None:
    """23 tokens of prompt are one full block of 16, which is found when the same is asked again."""
    cached = {}
    for name, changes in (("steady", lasting()), ("failed", lasting(Failure(0, 5.0, 10.0)))):
        source = Given((0.0, 20.0), same=True)
        world = World([ROUND], To(0), source, 1, changes).run((Stage(1.0, 30.0),))
        cached[name] = [asked.cached_tokens for asked in world.asked]
    assert cached == {"steady": [0, 16], "failed": [0, 0]}


def listings(changes: Changes, until: float = 100.0, servers: int = 2) -> list[tuple[int, bool, float]]:
    """What discovery says in a world in which one request is asked, at its very end."""
    world = World([ROUND] * servers, RoundRobin(Random(0)), Given((until,)), 1, changes)
    said: list[tuple[int, bool, float]] = []
    world.watchers.append(lambda server, listed, now: said.append((server, listed, now)))
    world.run((Stage(1.0, until + 1.0),))
    return said


def test_discovery_tells_of_a_failure_after_a_second_and_of_the_return() -> None:
    assert listings(lasting(Failure(1, 10.0, 60.0))) == [(1, False, 11.0), (1, True, 70.0)]


def test_who_is_back_before_it_is_noticed_was_never_away() -> None:
    assert listings(lasting(Failure(1, 10.0, 60.0), detection=90.0)) == []


def test_a_server_may_fail_again_but_not_while_it_is_down() -> None:
    failures = (Failure(0, 10.0, 20.0), Failure(0, 15.0, 80.0), Failure(0, 40.0, 20.0))
    assert [(listed, now) for _, listed, now in listings(lasting(*failures))] == [
        *((False, 11.0), (True, 30.0)),
        *((False, 41.0), (True, 60.0)),
    ]


def test_the_notice_of_a_failure_that_is_over_says_nothing_of_the_next_one() -> None:
    """Down from 10 to 12 and from 13 on; each is noticed 5 s later, so the first never is."""
    failures = (Failure(0, 10.0, 2.0), Failure(0, 13.0, 30.0))
    assert listings(lasting(*failures, detection=5.0)) == [(0, False, 18.0), (0, True, 43.0)]


def test_without_any_server_everything_is_refused() -> None:
    source = Given((0.0, 5.0), output_tokens=1)
    world = World([ROUND], RoundRobin(Random(0)), source, 1, lasting(Failure(0, 2.0))).run((Stage(1.0, 6.0),))
    assert [asked.refusal for asked in world.asked] == ["", "ServiceUnavailable"]


# -- under every policy ----------------------------------------------------------------------------------------------

TROUBLE = Changes(
    (Failure(1, 8.0, 6.0), Failure(3, 9.5, 0.5), Failure(1, 25.0)),
    Autoscale(target=3.0, least=2, most=6, cold_start=5.0, period=2.0, calm=4.0),
)


def troubled(policy: Policy, changes: Changes = TROUBLE, seed: int = 1) -> World:
    stages = (Stage(14.0, 10.0), Stage(28.0, 20.0), Stage(5.0, 10.0))
    return World([load_profile("demo")] * 4, policy, DEMO, seed, changes).run(stages, waits=False)


def made(policy: str) -> Policy:
    return routed(load(""), 1) if policy == "default" else reference(policy, 1)


@pytest.mark.parametrize("policy", ["default", *REFERENCES])
def test_whoever_decides_every_request_ends_and_a_seed_decides_all(policy: str) -> None:
    once, again = troubled(made(policy)), troubled(made(policy))
    assert all(asked.refusal or asked.came_at < asked.first_at < asked.ended_at for asked in once.asked)
    assert {asked.refusal for asked in once.asked} >= {"", RESET}
    assert all(len(engine) == 0 for engine in once.engines)
    assert [fate(asked) for asked in once.asked] == [fate(asked) for asked in again.asked]


def fate(asked: Asked) -> tuple[float, int, float, float, str]:
    return asked.came_at, asked.server, asked.first_at, asked.ended_at, asked.refusal


def test_the_picker_counts_out_what_was_lost() -> None:
    policy = routed(load(""), 1)
    troubled(policy)
    for column in ("inflight", "inflight_tokens"):
        assert set(policy.table.column(column, policy.table.listed, 0.0)[0].tolist()) == {0.0}


class Statuses(Quiet):
    """Remembers what the picker knew of each answer when it ended."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        self.seen.append(ticket.status)


def test_the_picker_sees_a_503_of_the_proxy_unless_the_answer_had_begun() -> None:
    """As in the first test of failures: one has a token when its server fails, the other has none; a third comes before
    the failure is noticed."""
    statuses = Statuses()
    policy = Routed(load(""), Random(1), Random(1), observer=statuses)
    source = Given((0.0, 0.5, 2.0), output_tokens=3)
    World([ROUND], policy, source, 1, lasting(Failure(0, 1.5, 5.0))).run((Stage(1.0, 5.0),))
    assert statuses.seen == [200, 503, 503]


def test_the_picker_ejects_a_dead_server_that_discovery_still_names() -> None:
    """Five failures in a row eject for 10 s; then one more does, for 20 s: six or seven are lost in 20 s, and besides
    what ran when it failed. Round robin sends it every fourth request of 28 a second."""
    lost = {}
    for policy in ("default", "round-robin"):
        world = troubled(made(policy), Changes((Failure(2, 10.0, 60.0),), detection=60.0))
        lost[policy] = sum(asked.refusal == CONNECT for asked in world.asked)
    assert lost["default"] <= 8
    assert lost["round-robin"] > 100


# -- servers that start and stop -------------------------------------------------------------------------------------


def test_a_server_that_starts_is_listed_after_its_cold_start_and_paid_for_from_its_beginning() -> None:
    """30 requests of 10 s at 0 on one server with a target of 10: three are wanted when the autoscaler looks at 15."""
    slow = Given((0.0,) * 30, output_tokens=1000)
    rule = Autoscale(target=10.0, least=1, most=3, cold_start=40.0)
    world = World([ROUND], To(0), slow, 1, Changes(autoscale=rule))
    said: list[tuple[int, bool, float]] = []
    world.watchers.append(lambda server, listed, now: said.append((server, listed, now)))
    world.run((Stage(1.0, 1.0),))
    assert said[:2] == [(1, True, 55.0), (2, True, 55.0)]
    assert [life.since for life in world.fleet.lives[:3]] == [0.0, 15.0, 15.0]


def test_the_youngest_server_is_stopped_first_and_ends_what_it_has() -> None:
    """Two servers, one long request on the second: one is enough, and after the calm of 10 s the second is stopped."""
    rule = Autoscale(target=1.0, least=1, most=2, period=5.0, calm=10.0)
    source = Given((1.0,), output_tokens=40)
    world = World([ROUND, ROUND], To(1), source, 1, Changes(autoscale=rule)).run((Stage(1.0, 50.0),))
    assert world.fleet.states == [State.UP, State.STOPPED]
    assert world.fleet.lives[1].until == 20.0  # found two at 5; that is more than 10 s ago at 20
    assert (world.asked[0].refusal, world.asked[0].ended_at) == ("", 41.0)


def test_who_is_starting_is_stopped_before_who_serves() -> None:
    """Nine at once make the autoscaler start two more; they have their answers long before those are there."""
    rule = Autoscale(target=3.0, least=1, most=3, cold_start=100.0, period=1.0, calm=5.0)
    world = World([ROUND], To(0), Given((0.5,) * 8 + (60.0,)), 1, Changes(autoscale=rule)).run((Stage(1.0, 61.0),))
    assert world.fleet.states == [State.UP, State.STOPPED, State.STOPPED]
    assert world.fleet.listed == (0,)


def test_who_has_failed_is_stopped_before_who_serves() -> None:
    """Server 0 is older, but away from 2 on: when one is enough, at 20, it is the one that goes, and it stays away."""
    rule = Autoscale(target=1.0, least=1, most=2, period=5.0, calm=10.0)
    changes = Changes((Failure(0, 1.0, 60.0),), rule)
    world = World([ROUND, ROUND], To(1), Given((2.5,), output_tokens=80), 1, changes).run((Stage(1.0, 50.0),))
    assert world.fleet.states == [State.STOPPED, State.UP]
    assert world.fleet.listed == (1,)


# -- what an operator writes -----------------------------------------------------------------------------------------


def test_failures_are_read() -> None:
    assert parse_failures(("2@60:120", "0@1.5,1@7"), 3) == (
        Failure(2, 60.0, 120.0),
        Failure(0, 1.5, 180.0),
        Failure(1, 7.0, 180.0),
    )


@pytest.mark.parametrize("text", ["", "2", "2@", "@60", "a@60", "-1@60", "1@-5", "1@nan", "1@5:x", "1.5@5"])
def test_what_is_no_failure_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--fail .*expected SERVER@SECOND.* 2@60:120"):
        parse_failures((text,), 3)


@pytest.mark.parametrize("texts", [("2@60:120", "2@100:200"), ("2@180,2@60:120",), ("0@5", "2@60", "2@60")])
def test_a_server_that_is_down_cannot_fail(texts: tuple[str, ...]) -> None:
    """The second failure would change nothing, and whoever asks for it thinks that it does."""
    with pytest.raises(ConfigError, match=r"server 2 fails at 60 s and is back at (180|240) s: say it once"):
        parse_failures(texts, 3)
    assert len(parse_failures(("2@60:120,1@60", "2@181"), 3)) == 3


def test_a_server_that_is_not_there_cannot_fail() -> None:
    with pytest.raises(ConfigError, match="there are servers 0 to 2"):
        parse_failures(("3@60",), 3)
