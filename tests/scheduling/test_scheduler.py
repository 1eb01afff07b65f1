"""One call, one decision; what is remembered of it, and what is rendered."""

from __future__ import annotations

import json
import sys
from random import Random

import numpy as np
import pytest
from google.protobuf.json_format import ParseDict

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page, Slots
from epp.pb import decision_pb2
from epp.scheduling.decision import Exclusion
from epp.scheduling.lineup import Lineup
from epp.scheduling.plugin import Context, Filter, NoParams, Params, Scorer, Scores, scorer
from epp.scheduling.producers import ApproximateParams
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import kv_cache, prefix_cache, queue
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler, with_prefix

BLOCK = "ab c" * 64
"""256 bytes, 64 tokens."""


def by_default(params: ApproximateParams | None = None) -> Scheduler:
    """What runs when nothing is configured."""
    producer, context = with_prefix(params)
    scorers = (made(queue), 2.0), (made(kv_cache), 2.0), (made(prefix_cache, None, context), 3.0)
    return scheduler(profile(*scorers), producer)


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_the_chosen_endpoint_is_believed_to_hold_the_prompt() -> None:
    choosing, candidates = by_default(), pool(*[Page(waiting=0, kv_usage=0.1)] * 3)
    first = choosing.schedule(ask(BLOCK * 4), candidates)
    request = ask(BLOCK * 4 + "and a question")
    second = choosing.schedule(request, candidates)
    assert first.matched_tokens == 0
    assert second.first == first.first
    assert second.matched_tokens == 4 * 64
    assert second.prompt_tokens == request.tokens


def test_neither_another_model_nor_another_salt_shares_a_prompt() -> None:
    choosing, candidates = by_default(), pool(Page(waiting=0, kv_usage=0.1))
    choosing.schedule(ask(BLOCK), candidates)
    assert choosing.schedule(ask(BLOCK, model="adapter"), candidates).matched_tokens == 0
    assert choosing.schedule(ask(BLOCK, salt="mine"), candidates).matched_tokens == 0
    assert choosing.schedule(ask(BLOCK), candidates).matched_tokens == 64


def test_the_target_model_counts_not_the_one_that_was_asked_for() -> None:
    choosing, candidates = by_default(), pool(Page(waiting=0, kv_usage=0.1))
    rewritten = ask(BLOCK, model="alias")
    rewritten.target_model = "base"
    choosing.schedule(rewritten, candidates)
    assert choosing.schedule(ask(BLOCK, model="base"), candidates).matched_tokens == 64


def test_only_the_destination_holds_the_prompt_not_the_fallbacks() -> None:
    producer, context = with_prefix()
    choosing = scheduler(profile((made(prefix_cache, None, context), 1.0), endpoints=3), producer)
    candidates = pool(*[Page()] * 3)
    chosen = choosing.schedule(ask(BLOCK), candidates)
    again = choosing.schedule(ask(BLOCK), candidates)
    assert len(again.endpoints) == 3
    assert again.raw[0].sum() == 1.0
    assert again.first == chosen.first


def test_a_forgotten_slot_holds_nothing() -> None:
    choosing = by_default()
    table = EndpointTable(on_forget=choosing.forget)
    pool(Page(waiting=0, kv_usage=0.1), table=table)
    choosing.schedule(ask(BLOCK), table.candidates(NOW))
    table.drop("default/pod0-rank-0")
    again = pool(Page(waiting=0, kv_usage=0.1), table=table)  # the same slot, another endpoint
    assert again.slots.tolist() == [0]
    assert choosing.schedule(ask(BLOCK), again).matched_tokens == 0


def test_a_profile_that_asks_for_no_prompt_reads_none() -> None:
    request = ask(BLOCK)
    decision = scheduler(profile((made(queue), 1.0))).schedule(request, pool(Page(waiting=0)))
    assert (decision.prompt_tokens, decision.matched_tokens) == (0.0, 0.0)
    assert request._prompt is None
    assert request._tokens is None


def test_a_prompt_is_kept_no_longer_than_its_decision() -> None:
    choosing, candidates = by_default(), pool(Page(waiting=0, kv_usage=0.1))
    request = ask(BLOCK)
    before = sys.getrefcount(request)
    decision = choosing.schedule(request, candidates)
    assert decision.prompt_tokens > 0
    assert sys.getrefcount(request) == before


# -- capacity, in tokens of the engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "params", "blocks"),
    [
        # 20 blocks of 16 tokens are 320 tokens: 5 of our 64. The reference would believe in 20 of 64 tokens.
        (Page(kv_blocks=20, block_size=16), ApproximateParams(), 5),
        (Page(kv_blocks=6, block_size=128), ApproximateParams(), 6),  # our blocks are then 128 tokens, too
        (Page(kv_blocks=1, block_size=16), ApproximateParams(), 1),  # never less than one
        (Page(kv_blocks=20), ApproximateParams(lru_capacity_per_server=12), 3),  # 12 * 16 / 64
        (
            Page(kv_blocks=9, block_size=16),
            ApproximateParams(auto_tune=False, lru_capacity_per_server=7, block_size_tokens=64),
            7,
        ),
    ],
)
def test_an_endpoint_holds_as_much_as_its_engine_has_room_for(
    page: Page, params: ApproximateParams, blocks: int
) -> None:
    choosing, candidates = by_default(params), pool(page)
    prompt = BLOCK * 64
    choosing.schedule(ask(prompt), candidates)
    tokens = 128 if page.block_size == 128 else 64
    assert choosing.schedule(ask(prompt), candidates).matched_tokens == blocks * tokens


def test_the_default_capacity_is_half_a_million_tokens() -> None:
    choosing, candidates = (
        by_default(ApproximateParams(max_prefix_tokens_to_match=0, max_prefix_blocks_to_match=0)),
        pool(None),
    )
    prompt = "ab c" * 600_000
    choosing.schedule(ask(prompt), candidates)
    assert choosing.schedule(ask(prompt), candidates).matched_tokens == 499_968  # 7812 blocks of 64


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        (ApproximateParams(), 131_072),
        (ApproximateParams(max_prefix_tokens_to_match=1000), 960),  # 15 whole blocks
        (ApproximateParams(max_prefix_tokens_to_match=0, max_prefix_blocks_to_match=3), 192),
    ],
)
def test_no_more_of_a_prompt_is_looked_at_than_the_limits_say(params: ApproximateParams, tokens: int) -> None:
    choosing, candidates = by_default(params), pool(None)
    for expected in (0, tokens):
        assert choosing.schedule(ask("ab c" * 140_000), candidates).matched_tokens == expected


def test_the_block_size_is_settled_by_the_first_engine_that_tells_it() -> None:
    choosing, table = by_default(), EndpointTable()
    candidates = pool(Page(kv_blocks=1000, block_size=128), table=table)
    prompt = "ab c" * 192  # one and a half blocks of 128 tokens
    choosing.schedule(ask(prompt), candidates)
    table.page_told(0, table.generation(0), Page(kv_blocks=1000, block_size=32), NOW)
    assert choosing.schedule(ask(prompt), table.candidates(NOW)).matched_tokens == 128


# -- hooks -------------------------------------------------------------------------------------------------------------


class Remembers:
    """Remember where requests went; fail when told to."""

    def __init__(self, params: Params, context: Context) -> None:
        self.went: list[tuple[str, list[int]]] = []
        self.forgot: list[int] = []

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return np.ones(len(candidates))

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        self.went.append((request.model, slots.tolist()))
        if request.model == "poison":
            raise RuntimeError("no")

    def forget(self, slot: int) -> None:
        self.forgot.append(slot)


remembers = scorer("remembers", params=NoParams)(Remembers)


def test_a_stateful_plugin_is_told_the_destination_and_the_fallbacks_once() -> None:
    plugin = made(remembers)
    choosing = scheduler(profile((plugin, 1.0), endpoints=2))
    decision = choosing.schedule(ask(), pool(*[Page()] * 3))
    state = getattr(plugin.chosen, "__self__", None)
    assert isinstance(state, Remembers)
    assert state.went == [("base", decision.order[:2].tolist())]
    choosing.forget(7)
    assert state.forgot == [7]


def test_a_hook_that_fails_is_named_and_the_request_goes_on() -> None:
    decision = scheduler(profile((made(remembers), 1.0))).schedule(ask(model="poison"), pool(Page()))
    assert decision.endpoints == ("192.168.1.1:8000",)
    assert [(each.plugin, each.reason) for each in decision.failures] == [("remembers", "RuntimeError: no")]


class Follows(Remembers):
    """Remember how requests go on, too."""

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.told: list[tuple[str, bool, float]] = []

    def followed(self, request: Request, over: bool, now: float) -> None:
        self.told.append((request.model, over, now))


def test_a_scorer_that_follows_requests_is_in_the_lineup_once_whatever_the_number_of_its_profiles() -> None:
    plugin, other = made(scorer("follows", params=NoParams)(Follows)), made(remembers)
    state = getattr(plugin.chosen, "__self__", None)
    assert isinstance(state, Follows)
    picker = profile((plugin, 1.0)).picker
    profiles = [Profile(name, (), ((plugin, 1.0), (other, 1.0)), picker) for name in ("decode", "prefill")]
    lineup = Lineup(profiles)
    ((name, followed),) = lineup.followed
    followed(ask(), False, 1.0)
    assert (name, state.told) == ("follows", [("base", False, 1.0)])


# -- what is rendered --------------------------------------------------------------------------------------------------


def a_decision_of_four() -> tuple[EndpointTable, Scheduler, Candidates]:
    """Slot 0 fresh, slot 1 without a page, slot 2 left out by a guard, slot 3 by a filter."""
    table = EndpointTable()
    everybody = pool(Page(waiting=2), None, Page(waiting=1), Page(waiting=0), table=table)
    table.page_told(0, table.generation(0), Page(waiting=2), NOW - 0.5)
    left = Filter("decode-filter", None, None, None, None, (), lambda request, candidates: candidates.slots != 3)

    def broken(request: Request, candidates: Candidates) -> Scores:
        raise RuntimeError("no")

    scorers = (made(queue), 2.0), (Scorer("broken", None, None, None, None, (), broken), 1.0)
    return table, scheduler(profile(*scorers, filters=[left])), everybody.keep(np.array([True, True, False, True]))


def test_a_decision_renders_as_its_record() -> None:
    _, choosing, candidates = a_decision_of_four()
    decision = choosing.schedule(ask(), candidates, [Exclusion("ejected", np.array([2]))])
    decision.cost_us = 12.5
    rendered = decision.render()
    assert rendered == {
        "profile": "default",
        "endpoints": ["192.168.1.1:8000"],
        "candidates": [
            {
                "address": "192.168.1.1:8000",
                "name": "default/pod0-rank-0",
                "page_age": 0.5,
                "unknown": False,
                "total": 2.0,
            },
            {"address": "192.168.1.2:8000", "name": "default/pod1-rank-0", "unknown": True, "total": 1.0},
            {"address": "192.168.1.3:8000", "name": "default/pod2-rank-0", "page_age": 0.0, "excluded_by": "ejected"},
            {
                "address": "192.168.1.4:8000",
                "name": "default/pod3-rank-0",
                "page_age": 0.0,
                "excluded_by": "decode-filter",
            },
        ],
        "scorers": [
            {"name": "queue-scorer", "weight": 2.0, "scores": [1.0, 0.5]},
            {"name": "broken", "weight": 1.0, "failed": "RuntimeError: no"},
        ],
        "matched_tokens": 0.0,
        "prompt_tokens": 0.0,
        "ties": 1,
        "cost_us": 12.5,
    }
    message = ParseDict(json.loads(json.dumps(rendered)), decision_pb2.Decision())
    assert message.candidates[0].HasField("page_age")
    assert not message.candidates[1].HasField("page_age")
    assert decision.scores() == (("192.168.1.1:8000", 2.0), ("192.168.1.2:8000", 1.0))


def test_a_decision_stays_what_it_was_when_the_pool_changes() -> None:
    table, choosing, candidates = a_decision_of_four()
    decision = choosing.schedule(ask(), candidates, [Exclusion("ejected", np.array([2]))])
    before = decision.render()
    table.replace([Endpoint("other", "10.9.9.9:1")], NOW + 1)
    table.page_told(0, table.generation(0), Page(waiting=50), NOW + 1)
    assert decision.render() == before
    assert choosing.schedule(ask(), table.candidates(NOW + 1)).endpoints == ("10.9.9.9:1",)


def test_a_decision_that_nobody_can_look_at_keeps_what_its_request_needs_and_no_more() -> None:
    _, choosing, candidates = a_decision_of_four()
    decision = choosing.schedule(ask(), candidates, [Exclusion("ejected", np.array([2]))])
    decision.let_go()
    assert decision.first == 0
    rendered = decision.render()
    assert rendered["endpoints"] == ["192.168.1.1:8000"]
    assert rendered["candidates"] == rendered["scorers"] == []
    assert decision.scores() == ()
    arrays = (decision.slots, decision.raw, decision.unknown, decision.totals, decision.page_ages)
    assert sum(array.nbytes for array in arrays) == 0


def test_ties_are_counted() -> None:
    candidates = pool(*(Page(waiting=value) for value in (1, 0, 0, 1)))
    assert scheduler(profile((made(queue), 1.0))).schedule(ask(), candidates).ties == 2


def test_the_same_seed_decides_the_same() -> None:
    def run() -> list[int]:
        choosing = Scheduler(Lineup([Profile("default", [], [], profile().picker)]), Random(42))
        return [choosing.schedule(ask(), candidates).first for _ in range(50)]

    candidates = pool(*[Page()] * 8)
    assert run() == run()
