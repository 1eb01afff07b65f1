"""Filters, weighted sums, what is unknown, and plugins that fail."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Endpoint, EndpointTable, Page
from epp.errors import BadRequest, NoEndpoint
from epp.scheduling.decision import Exclusion
from epp.scheduling.plugin import (
    Filter,
    NoParams,
    Order,
    Picker,
    PickerParams,
    Scorer,
    Scores,
    Totals,
    filter_,
    picker,
    scorer,
)
from epp.scheduling.profile import capped
from epp.scheduling.scorers import kv_cache, queue
from tests.scheduling.builders import ask, made, pool, profile, scheduler, winners


def keeps(*kept: bool, name: str = "some-filter") -> Filter:
    """A filter that keeps these of the whole pool, by slot."""

    @filter_(name, params=NoParams)
    def keep(request: Request, candidates: Candidates, params: NoParams) -> Bools:
        """Keep what the test says."""
        return np.array(kept)[candidates.slots]

    return made(keep)


def says(*values: float, name: str = "some-scorer", needs: tuple[str, ...] = ()) -> Scorer:
    """A scorer that says this, by slot."""

    @scorer(name, params=NoParams, needs=needs)
    def score(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        """Say what the test says."""
        return np.array(values)[candidates.slots]

    return made(score)


def fails(error: Exception, name: str = "broken-scorer") -> Scorer:
    @scorer(name, params=NoParams)
    def score(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        """Fail."""
        raise error

    return made(score)


def orders(*positions: int, endpoints: int = 1) -> Picker:
    @picker("broken-picker", params=PickerParams)
    def order(request: Request, candidates: Candidates, totals: Totals, params: PickerParams, rng: Random) -> Order:
        """Order as the test says."""
        return np.array(positions, np.int64)

    return made(order, PickerParams(max_num_of_endpoints=endpoints))


EMPTY_PAGES = [Page(), Page(), Page()]


def test_totals_are_the_weighted_sum_of_clamped_scores() -> None:
    chosen = profile((says(0.5, 1.0, 0.0), 2.0), (says(-3.0, 0.25, 7.0), 4.0), endpoints=3)
    decision = scheduler(chosen).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.raw.tolist() == [[0.5, 1.0, 0.0], [0.0, 0.25, 1.0]]
    assert decision.totals.tolist() == [1.0, 3.0, 4.0]
    assert decision.order.tolist() == [2, 1, 0]
    assert decision.endpoints == ("192.168.1.3:8000", "192.168.1.2:8000", "192.168.1.1:8000")
    assert decision.failures == ()


@pytest.mark.parametrize(("said", "scored"), [(7.0, 1.0), (1.5, 1.0), (-3.0, 0.0), (-0.5, 0.0)])
def test_one_score_out_of_bounds_is_clamped_and_fails_nobody(said: float, scored: float) -> None:
    decision = scheduler(profile((says(0.5, said, 0.25), 2.0))).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.raw.tolist() == [[0.5, scored, 0.25]]
    assert decision.totals.tolist() == [1.0, 2 * scored, 0.5]
    assert decision.failures == ()


def test_a_profile_without_scorers_spreads() -> None:
    counts = winners(profile(), pool(*EMPTY_PAGES), ask(), 300)
    assert all(68 <= count <= 132 for count in counts)  # 100 each, four times 8.2


def test_endpoints_sent_are_as_many_as_asked_for_or_as_there_are() -> None:
    candidates = pool(*EMPTY_PAGES)
    scored = (says(0.1, 0.3, 0.2), 1.0)
    for asked, sent in ((1, 1), (2, 2), (9, 3)):
        decision = scheduler(profile(scored, endpoints=asked)).schedule(ask(), candidates)
        assert decision.endpoints == ("192.168.1.2:8000", "192.168.1.3:8000", "192.168.1.1:8000")[:sent]
        assert decision.order.tolist() == [1, 2, 0][:sent]


def test_filters_run_in_order_and_each_is_named_with_what_it_left_out() -> None:
    chosen = profile(
        (says(0.1, 0.2, 0.9, 1.0), 1.0),
        filters=[keeps(True, True, True, False, name="first"), keeps(True, True, False, True, name="second")],
    )
    decision = scheduler(chosen).schedule(ask(), pool(*EMPTY_PAGES, Page()))
    assert [(each.name, each.slots.tolist()) for each in decision.exclusions] == [("first", [3]), ("second", [2])]
    assert decision.slots.tolist() == [0, 1]
    assert decision.first == 1


def test_a_filter_that_keeps_all_is_not_named() -> None:
    assert scheduler(profile(filters=[keeps(True, True)])).schedule(ask(), pool(Page(), Page())).exclusions == ()


def test_nothing_left_says_who_left_out_the_last_ones() -> None:
    everybody = pool(*EMPTY_PAGES)
    guarded = everybody.keep(np.array([True, False, True]))
    chosen = profile(
        filters=[keeps(False, True, False, name="decode-filter"), keeps(True, True, True, name="never-run")]
    )
    with pytest.raises(NoEndpoint) as caught:
        scheduler(chosen).schedule(ask(), guarded, [Exclusion("ejected", np.array([1]))])
    assert caught.value.message == (
        "no endpoint may serve this request: of 3 endpoints, ejected left out 1, then decode-filter left out 2"
    )
    assert caught.value.status == 503
    assert caught.value.retry_after == 1.0


def test_an_empty_pool_is_no_endpoint() -> None:
    with pytest.raises(NoEndpoint, match="the pool has no endpoints"):
        scheduler(profile()).schedule(ask(), EndpointTable().candidates(0.0))


# -- what is unknown ---------------------------------------------------------------------------------------------------


def test_an_unknown_total_is_at_most_the_mean_of_the_known() -> None:
    unknown = np.array([True, False, False, True])
    assert capped(np.array([9.0, 1.0, 3.0, 0.5]), unknown).tolist() == [2.0, 1.0, 3.0, 0.5]


def test_without_anything_unknown_or_anything_known_totals_stay() -> None:
    totals = np.array([3.0, 1.0])
    assert capped(totals, np.array([False, False])).tolist() == [3.0, 1.0]
    assert capped(totals, np.array([True, True])).tolist() == [3.0, 1.0]


@given(st.floats(0.001, 100), st.integers(1, 60))
def test_where_the_known_tie_an_unknown_one_never_beats_them_by_rounding(total: float, count: int) -> None:
    totals = np.array([200.0] + [total] * count)
    unknown = np.array([True] + [False] * count)
    assert capped(totals, unknown)[0] == total


def test_a_server_that_never_answered_does_not_win_though_it_holds_the_prefix() -> None:
    pages = [None, Page(waiting=9, kv_usage=0.9), Page(waiting=1, kv_usage=0.5)]
    chosen = profile((made(queue), 2.0), (made(kv_cache), 2.0), (says(1.0, 0.0, 0.0), 3.0))
    decision = scheduler(chosen).schedule(ask(), pool(*pages))
    # Unknown: 2 * 0.5 + 2 * 0.5 + 3 = 5. Known: 0 + 0.2 and 2 + 1; their mean is 1.6.
    assert decision.totals == pytest.approx([1.6, 0.2, 3.0])
    assert decision.unknown.tolist() == [True, False, False]
    assert decision.first == 2


def test_a_gauge_that_a_fresh_page_lacks_is_average_and_caps_nothing() -> None:
    pages = [Page(waiting=0), Page(waiting=1, kv_usage=0.9)]
    decision = scheduler(profile((made(queue), 2.0), (made(kv_cache), 1.0))).schedule(ask(), pool(*pages))
    assert decision.unknown.tolist() == [True, False]
    assert decision.totals == pytest.approx([2.1, 0.1])  # KV use: 0.1 as the other one, rather than 0.5


def test_a_signal_that_no_scorer_needs_may_be_unknown() -> None:
    pages = [Page(waiting=0), Page(waiting=1, kv_usage=0.1)]
    decision = scheduler(profile((made(queue), 1.0))).schedule(ask(), pool(*pages))
    assert decision.unknown.tolist() == [False, False]
    assert decision.first == 0


def test_a_server_whose_page_hangs_gets_no_more_than_its_share_when_all_tie() -> None:
    table = EndpointTable(freshness=2.0)
    for i in range(4):
        slot = table.put(Endpoint(f"p{i}", f"10.0.0.{i}:1"), 0.0)
        # The last values of slot 0 are the best there are; its page is 10 s old.
        at, kv = (90.0, 0.0) if i == 0 else (100.0, 0.5)
        table.page_told(slot, table.generation(slot), Page(waiting=0, kv_usage=kv), at)
    counts = winners(profile((made(kv_cache), 1.0)), table.candidates(100.0), ask(), 400)
    assert 65 <= counts[0] <= 135  # 0.5 like the others: 100 each, four times 8.7


# -- plugins that fail -------------------------------------------------------------------------------------------------


def wrong_shape() -> Scorer:
    @scorer("broken-scorer", params=NoParams)
    def score(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        """Return one score too many."""
        return np.ones(len(candidates) + 1)

    return made(score)


def writes_into_a_column() -> Scorer:
    @scorer("broken-scorer", params=NoParams, needs=("waiting",))
    def score(request: Request, candidates: Candidates, params: NoParams) -> Scores:
        """Change what everybody reads."""
        values = candidates.column("waiting")[0]
        values[:] = 1.0
        return values

    return made(score)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (fails(KeyError("no_such_column")), "KeyError: 'no_such_column'"),
        (says(np.nan, 1.0, 1.0, name="broken-scorer"), "returned NaN"),
        (wrong_shape(), "returned shape (4,), not (3,)"),
        (writes_into_a_column(), "ValueError: assignment destination is read-only"),
    ],
)
def test_a_scorer_that_fails_loses_its_vote_and_is_named(broken: Scorer, reason: str) -> None:
    chosen = profile((broken, 100.0), (says(0.1, 0.2, 0.0), 1.0))
    decision = scheduler(chosen).schedule(ask(), pool(*EMPTY_PAGES))
    assert [(failure.plugin, failure.reason) for failure in decision.failures] == [("broken-scorer", reason)]
    assert decision.totals.tolist() == [0.1, 0.2, 0.0]
    assert decision.first == 1


def test_infinite_scores_are_clamped_like_any() -> None:
    decision = scheduler(profile((says(np.inf, -np.inf, 0.5), 1.0))).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.totals.tolist() == [1.0, 0.0, 0.5]


def test_a_refusal_of_a_plugin_reaches_the_client() -> None:
    with pytest.raises(BadRequest):
        scheduler(profile((fails(BadRequest("no")), 1.0))).schedule(ask(), pool(Page()))


def test_a_filter_that_fails_lets_everybody_through_and_is_named() -> None:
    @filter_("broken-filter", params=NoParams)
    def keep(request: Request, candidates: Candidates, params: NoParams) -> Bools:
        """Return a mask for one candidate."""
        return np.zeros(1, np.bool_)

    decision = scheduler(profile(filters=[made(keep)])).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.slots.tolist() == [0, 1, 2]
    assert [failure.plugin for failure in decision.failures] == ["broken-filter"]


@pytest.mark.parametrize("positions", [(0,), (0, 0, 1), (0, 1, 3), (0, 1, -1), (2, 1, 0, 0)])
def test_a_picker_that_fails_is_replaced_by_the_highest_total(positions: tuple[int, ...]) -> None:
    chosen = profile((says(0.1, 0.2, 0.0), 1.0), picker=orders(*positions, endpoints=3))
    decision = scheduler(chosen).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.order.tolist() == [1, 0, 2]
    assert [failure.plugin for failure in decision.failures] == ["broken-picker"]


@pytest.mark.parametrize("positions", [(), (3,), (-1,)])
def test_a_picker_that_cannot_name_one_endpoint_is_replaced_by_the_highest_total(positions: tuple[int, ...]) -> None:
    chosen = profile((says(0.1, 0.2, 0.0), 1.0), picker=orders(*positions))
    decision = scheduler(chosen).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.order.tolist() == [1]
    assert [failure.plugin for failure in decision.failures] == ["broken-picker"]


def test_a_picker_may_order_more_than_are_sent() -> None:
    chosen = profile((says(0.1, 0.2, 0.0), 1.0), picker=orders(2, 0, 1, endpoints=2))
    decision = scheduler(chosen).schedule(ask(), pool(*EMPTY_PAGES))
    assert decision.order.tolist() == [2, 0]
    assert decision.endpoints == ("192.168.1.3:8000", "192.168.1.1:8000")
    assert decision.failures == ()
