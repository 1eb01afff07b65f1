"""The contract check: every way to break the contract is found, and told once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Endpoint, Slots
from epp.errors import NoEndpoint, Saturated
from epp.headers import Headers
from epp.scheduling.cases import ask, changed, page, pool
from epp.scheduling.check import Finding, check
from epp.scheduling.decision import Decision, Plan
from epp.scheduling.plugin import (
    Answer,
    Context,
    Instance,
    NoParams,
    Order,
    Params,
    PickerParams,
    Plugin,
    PrefixMatch,
    RunProfile,
    Scores,
    Totals,
    admitter,
    decider,
    filter_,
    handler,
    picker,
    producer,
    scorer,
)

ScoreCall = Callable[[Request, Candidates, NoParams], Scores]


def told(plugin: Plugin[Instance]) -> list[tuple[str, str]]:
    """Severity and the beginning of each finding, without its corner and advice."""
    return [(each.severity, each.message.split(", for ")[0].split(";")[0]) for each in check(plugin)]


def scoring(body: ScoreCall, *needs: str) -> Plugin[Instance]:
    body.__doc__ = "Score somehow."
    return scorer("tried-scorer", params=NoParams, needs=needs)(body)


def a_list(request: Request, candidates: Candidates, params: NoParams) -> Any:
    return [0.5] * len(candidates)


def one_number(request: Request, candidates: Candidates, params: NoParams) -> Any:
    return 0.5


def divides_by_a_difference(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    counts, _ = candidates.column("inflight")
    with np.errstate(all="ignore"):
        scores: Scores = (counts.max() - counts) / (counts.max() - counts.min())
    return scores


def over_one(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    return np.full(len(candidates), 1.5)


def raises(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    return np.full(len(candidates), 1 / len(request.prompt))


def at_random(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    return np.full(len(candidates), random.random())  # noqa: TID251 - what the check is there to find


def by_position(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    return np.linspace(0.0, 1.0, len(candidates))


def writes_a_column(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    counts, _ = candidates.column("inflight")
    counts /= 10
    return counts


def writes_slots(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    candidates.slots.sort()
    return np.ones(len(candidates))


def changes_the_request(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    request.target_model = "another"
    return np.ones(len(candidates))


def changes_labels(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    candidates.endpoints()[0].labels.update(seen=str(len(candidates.endpoints()[0].labels)))
    return np.ones(len(candidates))


def seeks_the_unknown(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    usage, known = candidates.column("kv_usage")
    return np.where(known, 1 - usage, 0.5)


def takes_logarithms(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    counts, _ = candidates.column("inflight")
    return np.where(counts > 0, 1 / (1 + np.log(np.maximum(counts, 1))), np.log(counts) * 0 == 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (a_list, [("error", "returned a list, not scores: numbers of shape (1,)")]),
        (one_number, [("error", "returned a float, not scores: numbers of shape (1,)")]),
        (divides_by_a_difference, [("error", "returned NaN")]),
        (over_one, [("error", "returned scores from 1.5 to 1.5, not within 0..1")]),
        (raises, [("error", "raised ZeroDivisionError: division by zero")]),
        (at_random, [("error", "said two things of one request")]),
        (by_position, [("error", "said other things of the same candidates in another order")]),
        (writes_a_column, [("error", "raised ValueError: output array is read-only")]),
        (writes_slots, [("error", "raised ValueError: sort array is read-only")]),
        (changes_the_request, [("error", "changed the request (target_model)")]),
        (changes_labels, [("error", "changed the labels of an endpoint")]),
        (
            seeks_the_unknown,
            [
                ("warning", "reads kv_usage, not named in its needs"),
                ("error", "prefers an endpoint whose kv_usage is not known"),
            ],
        ),
        (takes_logarithms, [("warning", "made Python warn: divide by zero encountered in log")]),
    ],
)
def test_what_a_scorer_does_wrong_is_found(body: ScoreCall, expected: list[tuple[str, str]]) -> None:
    assert told(scoring(body)) == expected


def test_a_finding_names_the_first_corner_in_which_it_was_found_and_what_to_do() -> None:
    (finding,) = check(scoring(divides_by_a_difference))
    assert finding == Finding(
        "tried-scorer",
        "error",
        "returned NaN, for a completion and one endpoint; where a value is not known, or all are equal, give a neutral "
        "score: lowest_first and with_unknown in epp.scheduling.scorers do",
    )


def test_a_value_that_is_not_known_may_score_what_the_known_ones_have_on_average() -> None:
    def free(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        usage, known = candidates.column("kv_usage")
        return np.where(known, 1 - usage, (1 - usage[known]).mean() if known.any() else 0.5)

    assert told(scoring(free, "kv_usage")) == []


def test_equal_scores_for_all_prefer_nobody() -> None:
    def same(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return np.where(candidates.column("kv_usage")[1], 0.5, 0.5)

    assert told(scoring(same, "kv_usage")) == []


def test_a_need_that_is_no_column_is_an_attribute_and_is_told() -> None:
    def warm(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        values, known = candidates.column("warmth")
        return np.where(known, values, 0.0)

    ((severity, message),) = told(scoring(warm, "warmth"))
    assert severity == "warning"
    assert message.startswith("needs warmth, which is no column: there are adapters, block_size")


class Remembers:
    """Prefer zone a, by labels that were looked at once."""

    def __init__(self, params: NoParams, context: Context) -> None:
        self._zones: dict[int, bool] = {}

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        for slot in candidates.slots.tolist():
            if slot not in self._zones:
                self._zones[slot] = candidates.table.endpoint(slot).labels.get("zone") == "a"
        return np.array([float(self._zones[slot]) for slot in candidates.slots.tolist()])


class Follows(Remembers):
    """The same, looked at again whenever the pool has changed."""

    _listed: Slots | None = None

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        if self._listed is not candidates.table.listed:
            self._listed = candidates.table.listed
            self._zones.clear()
        return super().__call__(request, candidates, params)


def test_facts_that_outlive_their_endpoint_are_found() -> None:
    assert told(scorer("x", params=NoParams)(Remembers)) == [("warning", "keeps facts of endpoints that have changed")]
    assert told(scorer("x", params=NoParams)(Knows)) == []


def test_what_is_slow_among_1000_candidates_is_found_by_the_quickest_of_its_calls() -> None:
    def ones(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return np.ones(len(candidates))

    def stopwatch(seconds: Sequence[float]) -> Callable[[], float]:
        def times() -> Iterator[float]:
            now = 0.0
            for took in seconds:
                yield now
                now += took
                yield now

        read = times()
        return lambda: next(read)

    slow = [0.0002] * 10
    (finding,) = check(scoring(ones), stopwatch=stopwatch(slow))
    assert finding.message.startswith("takes 200 us among 1,000 candidates, more than 100; work on whole columns")
    assert check(scoring(ones), stopwatch=stopwatch([*slow[1:], 0.00009])) == []


# -- other kinds -------------------------------------------------------------------------------------------------------


def test_a_mask_that_is_none_is_found() -> None:
    @filter_("x", params=NoParams)
    def numbers(request: Request, candidates: Candidates, params: NoParams) -> Any:
        """Keep all."""
        return np.ones(len(candidates))

    assert told(numbers) == [
        ("error", "returned an array of float64 of shape (1,), not a mask: booleans of shape (1,)")
    ]


def test_a_filter_that_refuses_is_none_that_fails() -> None:
    @filter_("x", params=NoParams)
    def full(request: Request, candidates: Candidates, params: NoParams) -> Bools:
        """Keep nobody."""
        raise Saturated("full")

    assert told(full) == []


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (lambda count: np.empty(0, np.int64), "returned [], not the best 1 of positions 0..0, none twice"),
        (lambda count: np.array([count]), "returned [1], not the best 1 of positions 0..0, none twice"),
        (lambda count: np.array([-1]), "returned [-1], not the best 1 of positions 0..0, none twice"),
        (lambda count: np.array([0.0]), "returned an array of float64 of shape (1,), not positions"),
        (lambda count: 0, "returned an int, not positions"),
    ],
)
def test_an_order_that_is_none_is_found(order: Callable[[int], object], expected: str) -> None:
    @picker("x", params=PickerParams)
    def wrong(request: Request, candidates: Candidates, totals: Totals, params: PickerParams, rng: Random) -> Any:
        """Pick wrongly."""
        return order(len(candidates))

    ((severity, message),) = told(wrong)
    assert severity == "error"
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (lambda count: np.zeros(2, np.int64), "returned [0, 0], not the best 1 of positions 0..0, none twice"),
        (
            lambda count: np.zeros(min(2, count), np.int64),
            "returned [0, 0], not the best 2 of positions 0..2, none twice",
        ),
        (lambda count: np.arange(1), "returned [0], not the best 2 of positions 0..2, none twice"),
    ],
)
def test_an_order_of_two_is_two_different_ones(order: Callable[[int], Order], expected: str) -> None:
    @picker("x", params=PickerParams)
    def wrong(request: Request, candidates: Candidates, totals: Totals, params: PickerParams, rng: Random) -> Order:
        """Pick wrongly."""
        return order(len(candidates))

    (finding,) = check(wrong, PickerParams(max_num_of_endpoints=2))
    assert finding.message.startswith(expected)


class Holds:
    """Find the whole prompt where it was sent, and forget what it is told to."""

    blocks_of_a_prompt = 10

    def __init__(self, params: NoParams, context: Context) -> None:
        self._slots: set[int] = set()

    def match(self, request: Request, candidates: Candidates) -> PrefixMatch:
        found = [self.blocks_of_a_prompt * (slot in self._slots) for slot in candidates.slots.tolist()]
        return PrefixMatch(np.array(found, np.int32), 10, 16)

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        self._slots.update(slots.tolist())

    def forget(self, slot: int) -> None:
        self._slots.discard(slot)

    def blocks(self) -> int:
        return 10 * len(self._slots)


class HoldsTooMuch(Holds):
    """More than the prompt has."""

    def match(self, request: Request, candidates: Candidates) -> PrefixMatch:
        return PrefixMatch(np.full(len(candidates), 11, np.int32), 10, 16)


class NeverForgets(Holds):
    """A slot keeps its prompts."""

    def forget(self, slot: int) -> None:
        pass


class FindsNothing(Holds):
    """It learns nothing."""

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        pass


class BreaksOnStrangers(Holds):
    """It expects to know whom it forgets."""

    def forget(self, slot: int) -> None:
        self._slots.remove(slot)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Holds, []),
        (HoldsTooMuch, [("error", "returned more blocks than the 10 of the prompt, or fewer than 0")]),
        (NeverForgets, [("error", "finds a prompt in a slot that it was told to forget")]),
        (FindsNothing, [("warning", "finds nothing of a prompt where it has just been sent")]),
        (BreaksOnStrangers, [("error", "raised KeyError when told of a request: 1001")]),
    ],
)
def test_what_a_producer_does_wrong_is_found(kind: type[Holds], expected: list[tuple[str, str]]) -> None:
    assert told(producer("x", params=NoParams)(kind)) == expected


class Knows:
    """Count the requests that run."""

    def __init__(self, params: NoParams, context: Context) -> None:
        self._running: dict[Request, int] = {}

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return np.ones(len(candidates))

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        self._running[request] = slots.item(0)

    def followed(self, request: Request, over: bool, now: float) -> None:
        if over:
            self._running.pop(request, None)


class KnowsNoStrangers(Knows):
    """It expects to know whom it follows."""

    def followed(self, request: Request, over: bool, now: float) -> None:
        if over:
            del self._running[request]


def test_a_scorer_may_be_told_how_requests_go_on_of_which_it_knows_nothing() -> None:
    assert told(scorer("x", params=NoParams)(Knows)) == []
    ((severity, message),) = told(scorer("x", params=NoParams)(KnowsNoStrangers))
    assert severity == "error"
    assert message.startswith("raised KeyError when told of a request")


def test_a_decider_says_yes_or_no() -> None:
    @decider("x", params=NoParams)
    def unsure(request: Request, decode: Decision | None, params: NoParams) -> Any:
        """Perhaps."""
        return decode is not None or (None)

    assert told(unsure) == [("error", "returned nothing, not True or False")]


def test_an_admitter_refuses_by_raising() -> None:
    @admitter("x", params=NoParams)
    def says_no(request: Request, candidates: Candidates, params: NoParams) -> Any:
        """Say no."""
        return False

    assert told(says_no) == [("error", "returned a bool")]


class Plans:
    """Run one profile, if it can be had."""

    profiles: tuple[str, ...] = ("decode",)

    def __init__(self, params: NoParams, context: Context) -> None:
        pass

    def plan(self, request: Request, run: RunProfile) -> Plan:
        return Plan(run("decode"))


class PlansNothing(Plans):
    """Run it for nothing."""

    def plan(self, request: Request, run: RunProfile) -> Any:
        run("decode")
        return None


class NeedsBoth(Plans):
    """Expect two profiles."""

    def plan(self, request: Request, run: RunProfile) -> Plan:
        decode = run("decode")
        try:
            return Plan(decode, run("prefill"))
        except Exception as error:
            raise ValueError("no prefill endpoint") from error


class BreaksOnBoth(Plans):
    """Expect one profile."""

    def plan(self, request: Request, run: RunProfile) -> Plan:
        decode = run("decode")
        try:
            run("prefill")
        except NoEndpoint:
            return Plan(decode)
        raise ValueError("two profiles have an endpoint")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Plans, []),
        (PlansNothing, [("error", "returned nothing, not a Plan")]),
        (NeedsBoth, [("error", "raised ValueError: no prefill endpoint")]),
        (BreaksOnBoth, [("error", "raised ValueError: two profiles have an endpoint")]),
    ],
)
def test_what_a_handler_does_wrong_is_found(kind: type[Plans], expected: list[tuple[str, str]]) -> None:
    assert told(handler("x", params=NoParams)(kind)) == expected


class Says:
    """Keep all, and say something on the response."""

    value = b"1"

    def __init__(self, params: NoParams, context: Context) -> None:
        pass

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
        return np.ones(len(candidates), np.bool_)

    def answered(self, request: Request, answer: Answer) -> Headers:
        return (("x-said", self.value),)

    def pins(self, request: Request) -> bool:
        return False


class SaysTwoLines(Says):
    """A header that Envoy would fail the response for."""

    value = b"1\r\n"


class PinsSomehow(Says):
    """It returns what it found."""

    def pins(self, request: Request) -> Any:
        return request.headers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Says, []),
        (
            SaysTwoLines,
            [("error", "at a response: ValueError: cannot set the response header 'x-said' to b'1\\r\\n'")],
        ),
        (PinsSomehow, [("error", "returned something else than True or False from pins")]),
    ],
)
def test_what_hooks_do_wrong_is_found(kind: type[Says], expected: list[tuple[str, str]]) -> None:
    assert told(filter_("x", params=NoParams)(kind)) == expected


class Required(Params, frozen=True):
    zone: str
    """Who is kept."""


def test_what_has_no_defaults_is_tried_with_parameters_only() -> None:
    @filter_("x", params=Required)
    def zone(request: Request, candidates: Candidates, params: Required) -> Any:
        """Keep a zone."""
        return [endpoint.labels.get("zone") == params.zone for endpoint in candidates.endpoints()]

    (finding,) = check(zone)
    assert finding.severity == "warning"
    assert finding.message.startswith("was not tried, for it cannot be made with its defaults: Missing required")
    (finding,) = check(zone, Required(zone="a"))
    assert finding.message.startswith("returned a list, not a mask")


def test_each_role_of_a_plugin_is_tried() -> None:
    both = msgspec.structs.replace(scoring(over_one), also=(filter_("x", params=NoParams)(Says), scoring(a_list)))
    assert [message for _, message in told(both)] == [
        "returned scores from 1.5 to 1.5, not within 0..1",
        "returned a list, not scores: numbers of shape (1,)",
    ]


# -- pools to work out by hand -----------------------------------------------------------------------------------------


def test_a_pool_has_what_its_pages_told_and_nothing_else() -> None:
    candidates = pool(page(0.5), None, page(1.0), labels=[{"zone": "a"}, {}, {}], inflight=[0, 2, 1], ages=[0, 0, 3])
    waiting, known = candidates.column("waiting")
    assert known.tolist() == [True, False, False]  # never told; 3 s old
    assert waiting[0] == 5.0
    assert candidates.column("inflight")[0].tolist() == [0.0, 2.0, 1.0]
    assert [each.address for each in candidates.endpoints()] == ["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]
    assert candidates.endpoints()[0].labels == {"zone": "a"}
    assert ask("hi", model="m", headers=(("x-zone", b"a"),)).headers[-1] == ("x-zone", b"a")


def test_a_changed_pool_has_another_endpoint_in_the_first_slot_and_other_labels_in_the_last() -> None:
    before = pool(page(0.1), page(0.2), page(0.3), labels=[{"zone": "a"}, {"zone": "b"}, {"zone": "a"}])
    forgotten: list[int] = []
    after = changed(before, forgotten.append)
    assert forgotten == [0]
    assert {slot: after.table.endpoint(slot) for slot in after.slots.tolist()} == {
        1: Endpoint("default/pod1-rank-0", "10.0.0.2:8000", {"zone": "b"}),
        2: Endpoint("default/pod2-rank-0", "10.0.0.3:8000", {"llm-d.ai/role": "prefill", "zone": "c"}),
        0: Endpoint("default/new-rank-0", "10.1.0.1:8000", {"llm-d.ai/role": "decode", "zone": "c"}),
    }
