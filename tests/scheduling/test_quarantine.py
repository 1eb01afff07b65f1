"""Plugins that misbehave are left out for a while, and no request is lost by them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp import picker as whole
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Bools, Candidates, Endpoint, EndpointTable, Page, Slots
from epp.errors import BadRequest, NoEndpoint
from epp.scheduling.decision import Decision, Plan
from epp.scheduling.handlers import header_profile
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import (
    Admitter,
    Chosen,
    Context,
    Filter,
    Handler,
    Instance,
    Order,
    Picker,
    PrefixMatch,
    Processor,
    Producer,
    RunProfile,
    Scorer,
    Scores,
    Screener,
    Totals,
)
from epp.scheduling.profile import Profile
from epp.scheduling.quarantine import IN_A_ROW, LONGEST, MEMORY, PAUSE, SLOW
from epp.scheduling.scheduler import Scheduler
from tests.scheduling.builders import ask, made, pool
from tests.watching import Watch

HOOKS = (None, None, None, None)


class Clock:
    """A stopwatch that plugins of these tests wind on."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


class Moody:
    """A scorer that prefers slot 1, or does what the test says."""

    def __init__(self, chosen: Chosen | None = None) -> None:
        self.mood: Callable[[Candidates], Scores] | None = None
        self.asked = 0
        self.instance = Scorer("moody", chosen, None, None, None, (), self.score)

    def score(self, request: Request, candidates: Candidates) -> Scores:
        self.asked += 1
        return prefers(1, candidates) if self.mood is None else self.mood(candidates)


def prefers(slot: int, candidates: Candidates) -> Scores:
    scores: Scores = (candidates.slots == slot).astype(np.float64)
    return scores


def raises(candidates: Candidates) -> Scores:
    raise RuntimeError("no")


def steady(request: Request, candidates: Candidates) -> Scores:
    """Prefers slot 0, a little."""
    return prefers(0, candidates) * 0.1


STEADY = Scorer("steady", *HOOKS, (), steady)


def choosing(*plugins: Filter | Scorer, picker: Picker | None = None) -> Scheduler:
    filters = [each for each in plugins if isinstance(each, Filter)]
    scorers = [(each, 1.0) for each in plugins if isinstance(each, Scorer)]
    return Scheduler(Lineup([Profile("default", filters, scorers, picker or made(max_score))]), Random(0))


TABLE = pool(*[Page(waiting=0)] * 3).table


def decide(scheduler: Scheduler, now: float, clock: Clock | None = None, request: Request | None = None) -> Decision:
    return scheduler.schedule(request or ask(), TABLE.candidates(now), (), clock or Clock())


def kinds(decision: Decision) -> list[str]:
    return [each.kind for each in decision.failures]


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_one_failure_costs_one_vote() -> None:
    moody = Moody()
    scheduler = choosing(moody.instance, STEADY)
    assert decide(scheduler, 0.0).first == 1
    moody.mood = raises
    failed = decide(scheduler, 1.0)
    assert (failed.first, kinds(failed)) == (0, ["error"])
    moody.mood = None
    assert [decide(scheduler, at).first for at in (2.0, 3.0)] == [1, 1]


def test_five_failures_in_a_row_leave_a_plugin_out_and_the_first_request_after_the_pause_tries_it() -> None:
    moody = Moody()
    moody.mood = raises
    scheduler = choosing(moody.instance, STEADY)
    told = [kinds(decide(scheduler, float(at))) for at in range(IN_A_ROW)]
    assert told == [["error"]] * 5
    assert moody.asked == 5
    out = decide(scheduler, 4.0 + PAUSE - 0.1)
    assert (kinds(out), moody.asked, out.first) == (["left-out"], 5, 0)
    assert out.failures[0].reason == "left out for 10 s after 5 failures in a row, the last: RuntimeError: no"
    moody.mood = None
    back = decide(scheduler, 4.0 + PAUSE)
    assert (kinds(back), moody.asked, back.first) == ([], 6, 1)
    moody.mood = raises
    assert kinds(decide(scheduler, 20.0)) == ["error"]  # counting begins anew
    assert kinds(decide(scheduler, 20.0)) == ["error"]


def test_a_plugin_that_fails_when_it_is_tried_is_left_out_twice_as_long_up_to_a_limit() -> None:
    moody = Moody()
    moody.mood = raises
    scheduler = choosing(moody.instance)
    now = 0.0
    for _ in range(IN_A_ROW):
        decide(scheduler, now)
    pauses = []
    for _ in range(8):
        asked, began = moody.asked, now
        while moody.asked == asked:
            now += 5.0
            decide(scheduler, now)
        pauses.append(now - began)
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]
    assert LONGEST == 300.0


def test_a_success_between_failures_begins_the_count_anew() -> None:
    moody = Moody()
    scheduler = choosing(moody.instance, STEADY)
    for at in range(40):
        moody.mood = None if at % IN_A_ROW == IN_A_ROW - 1 else raises
        assert "left-out" not in kinds(decide(scheduler, at * 0.1))
    assert moody.asked == 40


def test_failures_that_are_far_apart_are_not_in_a_row() -> None:
    moody = Moody()
    moody.mood = raises
    scheduler = choosing(moody.instance)
    for at in range(20):
        assert kinds(decide(scheduler, at * (MEMORY + 1.0))) == ["error"]


def test_a_request_that_does_not_ask_a_plugin_says_nothing_of_it() -> None:
    """Two profiles behind a header: the other profile's requests are no successes of this one's plugin."""
    moody = Moody()
    moody.mood = raises
    alone = Profile("default", [], [(moody.instance, 1.0)], made(max_score))
    other = Profile("other", [], [(STEADY, 1.0)], made(max_score))
    handler = made(
        header_profile, header_profile.params(default_profile="default"), Context(profiles=("default", "other"))
    )
    scheduler = Scheduler(Lineup([alone, other], handler=handler), Random(0))
    elsewhere = ask()
    elsewhere.headers = (("epp-profile", b"other"),)
    for at in range(IN_A_ROW):
        assert kinds(decide(scheduler, float(at))) == ["error"]
        assert decide(scheduler, float(at), request=elsewhere).profile == "other"
    assert kinds(decide(scheduler, 5.0)) == ["left-out"]


@pytest.mark.parametrize(
    ("mood", "kind"),
    [
        (raises, "error"),
        (lambda candidates: np.full(len(candidates), np.nan), "invalid"),
        (lambda candidates: np.ones(len(candidates) + 1), "invalid"),
        (lambda candidates: None, "error"),
    ],
)
def test_whatever_a_plugin_does_wrong_is_told_and_counts(mood: Callable[[Candidates], Scores], kind: str) -> None:
    moody = Moody()
    moody.mood = mood
    scheduler = choosing(moody.instance, STEADY)
    decisions = [decide(scheduler, 0.0) for _ in range(IN_A_ROW + 1)]
    assert [kinds(each) for each in decisions] == [[kind]] * IN_A_ROW + [["left-out"]]
    assert {each.first for each in decisions} == {0}


def test_a_hook_that_fails_is_a_failure_of_its_plugin_and_is_left_out_with_it() -> None:
    told: list[int] = []

    def chosen(request: Request, candidates: Candidates, slots: Slots) -> None:
        told.append(1)
        raise RuntimeError("no")

    scheduler = choosing(Moody(chosen).instance, STEADY)
    for _ in range(IN_A_ROW):
        assert decide(scheduler, 0.0).first == 1  # its score counts
    out = decide(scheduler, 0.0)
    assert (kinds(out), out.first, len(told)) == (["left-out"], 0, 5)


def test_a_refusal_is_no_failure() -> None:
    def refuses(candidates: Candidates) -> Scores:
        raise BadRequest("no")

    moody = Moody()
    moody.mood = refuses
    scheduler = choosing(moody.instance)
    for _ in range(IN_A_ROW * 2):
        with pytest.raises(BadRequest):
            decide(scheduler, 0.0)
    moody.mood = None
    assert decide(scheduler, 0.0).first == 1


def test_a_slot_that_a_plugin_fails_to_forget_is_forgotten_by_the_others_and_told_once() -> None:
    forgot: list[int] = []

    def fails(slot: int) -> None:
        raise RuntimeError("no")

    scorers = (
        Scorer("bad", None, fails, None, None, (), steady),
        Scorer("good", None, forgot.append, None, None, (), steady),
    )
    scheduler = choosing(*scorers)
    table = EndpointTable(on_forget=scheduler.forget)
    table.put(Endpoint("a", "10.0.0.1:1"), 0.0)
    table.drop("a")
    table.put(Endpoint("b", "10.0.0.2:1"), 0.0)
    forgotten = [*forgot]
    decisions = [scheduler.schedule(ask(), table.candidates(0.0)) for _ in range(2)]
    assert forgotten == [0]
    assert [[(each.plugin, each.reason) for each in decision.failures] for decision in decisions] == [
        [("bad", "RuntimeError: no")],
        [],
    ]


# -- what takes too long -----------------------------------------------------------------------------------------------


def slow_scorer(clock: Clock, took: float) -> tuple[Moody, Scheduler]:
    moody = Moody()

    def slow(candidates: Candidates) -> Scores:
        clock.at += took
        return prefers(1, candidates)

    moody.mood = slow
    return moody, choosing(moody.instance, STEADY)


def test_a_slow_decision_makes_calls_timed_and_then_the_slow_plugin_loses_its_vote() -> None:
    clock = Clock()
    moody, scheduler = slow_scorer(clock, SLOW + 0.01)
    first = decide(scheduler, 0.0, clock)
    assert (first.first, kinds(first)) == (1, [])
    for _ in range(IN_A_ROW):
        late = decide(scheduler, 1.0, clock)
        assert (late.first, kinds(late), late.failures[0].reason) == (0, ["slow"], "took 60 ms")
    assert kinds(decide(scheduler, 2.0, clock)) == ["left-out"]
    assert moody.asked == 6


def test_the_picker_lends_its_stopwatch() -> None:
    clock = Clock()
    _, scheduler = slow_scorer(clock, SLOW + 0.01)
    table = pool(*[Page(waiting=0)] * 3).table
    ejection = Ejection(table, EjectionParams())
    picker = whole.Picker(table, scheduler, ejection, Watch(), clock, whole.PickerOptions(slow_start=0.0))
    told = [kinds(picker.decide(ask(), None, 100.0, 100.0)[0].decision) for _ in range(IN_A_ROW + 2)]
    assert told == [[], *[["slow"]] * IN_A_ROW, ["left-out"]]


def test_a_plugin_that_is_just_in_time_keeps_its_vote() -> None:
    clock = Clock()
    _, scheduler = slow_scorer(clock, SLOW / 2)
    assert [decide(scheduler, 0.0, clock).first for _ in range(9)] == [1] * 9


def test_calls_are_timed_for_a_while_only() -> None:
    clock = Clock()
    moody, scheduler = slow_scorer(clock, 0.2)
    decide(scheduler, 0.0, clock)
    moody.mood = None
    decide(scheduler, MEMORY - 1.0, clock)
    decide(scheduler, MEMORY, clock)  # the last one that is watched ends the watch
    assert not scheduler._quarantine.alert


def test_reading_a_large_body_takes_its_time() -> None:
    clock = Clock()
    _, scheduler = slow_scorer(clock, SLOW + 0.1)
    large = ask()
    large.size_bytes = 32 << 20
    assert [decide(scheduler, 0.0, clock, large).first for _ in range(9)] == [1] * 9


def test_who_calls_others_is_not_slow_for_them() -> None:
    """A handler takes as long as its profiles."""
    clock = Clock()
    moody, _ = slow_scorer(clock, SLOW + 0.01)
    alone = Profile("default", [], [(moody.instance, 1.0), (STEADY, 1.0)], made(max_score))
    handler = made(header_profile, header_profile.params(default_profile="default"), Context(profiles=("default",)))
    scheduler = Scheduler(Lineup([alone], handler=handler), Random(0))
    decide(scheduler, 0.0, clock)
    assert [each.plugin for each in decide(scheduler, 0.0, clock).failures] == ["moody"]


# -- every kind --------------------------------------------------------------------------------------------------------


class Broken:
    """Counts how often it is asked, and raises."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, *given: object) -> None:
        self.asked += 1
        raise RuntimeError("no")

    def mask(self, request: Request, candidates: Candidates) -> Bools:
        self()
        return np.zeros(len(candidates), np.bool_)

    def order(self, request: Request, candidates: Candidates, totals: Totals, rng: Random) -> Order:
        self()
        return np.zeros(1, np.int64)

    def match(self, request: Request, candidates: Candidates) -> PrefixMatch:
        self()
        return PrefixMatch(np.zeros(len(candidates), np.int64), 0, 64)

    def plan(self, request: Request, run: RunProfile) -> Plan:
        self()
        return Plan(run("default"))


def broken_of(kind: str, broken: Broken) -> Instance:
    hooks = ("broken", *HOOKS, ())
    return {
        "filter": Filter(*hooks, broken.mask),
        "picker": Picker(*hooks, broken.order, 1),
        "screener": Screener(*hooks, broken.mask),
        "admitter": Admitter(*hooks, broken),
        "processor": Processor(*hooks, broken),
        "producer": Producer(*hooks, broken.match, lambda: 0),
        "handler": Handler(*hooks, broken.plan, ("default",), "broken"),
    }[kind]


@pytest.mark.parametrize("kind", ["filter", "picker", "screener", "admitter", "processor", "producer", "handler"])
def test_a_plugin_of_every_kind_is_left_out_and_the_rest_decides(kind: str) -> None:
    broken = Broken()
    each = broken_of(kind, broken)
    reads_prompts = Scorer("steady", *HOOKS, ("prefix-match",), steady)
    picker = each if isinstance(each, Picker) else made(max_score)
    profile = Profile("default", [each] if isinstance(each, Filter) else [], [(reads_prompts, 1.0)], picker)
    scheduler = Scheduler(
        Lineup(
            [profile],
            [each] if isinstance(each, Producer) else [],
            handler=each if isinstance(each, Handler) else None,
            processors=[each] if isinstance(each, Processor) else [],
            admitters=[each] if isinstance(each, Admitter) else [],
            screeners=[each] if isinstance(each, Screener) else [],
        ),
        Random(0),
    )
    decisions = [decide(scheduler, 0.0) for _ in range(IN_A_ROW + 3)]
    assert [each.first for each in decisions] == [0] * 8
    assert [kinds(each) for each in decisions] == [["error"]] * 5 + [["left-out"]] * 3
    assert broken.asked == 5


# -- whatever happens --------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["fine", "raises", "nan", "slow", "empty"]), st.floats(0.0, 40.0)), max_size=60
    )
)
def test_no_request_is_lost_and_who_is_fine_is_asked_again(steps: list[tuple[str, float]]) -> None:
    """A filter and a scorer in any mood: only a filter that says so leaves nobody, and a pause always ends."""
    clock, moody, now = Clock(), Moody(), 0.0
    mood = "fine"

    def keep(request: Request, candidates: Candidates) -> Bools:
        return np.full(len(candidates), mood != "empty")

    def slow(candidates: Candidates) -> Scores:
        clock.at += SLOW * 2
        return np.ones(len(candidates))

    moods = {"raises": raises, "nan": lambda candidates: np.full(len(candidates), np.nan), "slow": slow}
    scheduler = choosing(Filter("moody-filter", *HOOKS, (), keep), moody.instance, STEADY)
    for mood, later in steps:
        now += later
        moody.mood = moods.get(mood)
        try:
            decision = decide(scheduler, now, clock)
        except NoEndpoint:
            assert mood == "empty"
        else:
            assert mood != "empty"
            assert decision.first in (0, 1, 2)
    mood, moody.mood = "fine", None
    assert decide(scheduler, now + LONGEST, clock).first == 1
    assert kinds(decide(scheduler, now + LONGEST, clock)) == []
    decide(scheduler, now + LONGEST + MEMORY, clock)
    assert not scheduler._quarantine.alert


def test_a_watched_decision_is_the_same_decision() -> None:
    """Nothing but the watching differs: same order, same draws."""

    def run(watched: bool) -> list[str]:
        scheduler = Scheduler(Lineup([Profile("default", [], [(STEADY, 0.0)], made(max_score))]), Random(7))
        scheduler._quarantine.alert = watched
        found = []
        for _ in range(50):
            found.append(decide(scheduler, 0.0).endpoints[0])
            scheduler._quarantine.alert = watched
        return found

    assert run(True) == run(False)
