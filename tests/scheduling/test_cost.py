"""The cost of a request, worked out by hand with the constants that are taken of engines of which nothing is known:
a step 10 ms, a token of a prompt 50 us, an answer's 5 us, one of context 0.06 us, a pair 1.5 ns.

Until something is learned, caches save half of all prompt tokens, so a prompt costs others EVICTION / 2 = 2 times its
own time; an answer has 256 tokens; a step takes 8,192 tokens of prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.config.build import build
from epp.config.load import load
from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page
from epp.picker import Picker, PickerOptions
from epp.scheduling.cost import ALIKE, Cost, cost
from epp.scheduling.plugin import Context, Scorer
from epp.scheduling.producers import approximate_prefix
from epp.ticket import Outcome
from tests.scheduling.builders import NOW, made, pool, with_prefix
from tests.watching import Watch

CONFIG = Path(__file__).parents[2] / "config" / "picker" / "cost.yaml"
IDLE = Page(running=0.0, waiting=0.0, kv_usage=0.0)
OWN = 1_000 * 50e-6 + 1_000 * 1_001 / 2 * 1.5e-9
"""Seconds of a prompt of 1,000 tokens, of which nothing is cached: 0.05075075."""


WORK = 1.300015
"""Of one with 20,000 tokens and 200,010,000 pairs: 1 + 0.300015."""
LATER = [(1 + 4 * 495 / 1_190) * OWN + (0.5 + tokens / 8_192) * 10e-3 for tokens in (21_000, 1_000)]
"""What it costs behind that one, but for the wait, and where nothing waits. That prompt was cached nowhere, so what
caches save is now 495 of 1,190 tokens; nothing runs, so no step is longer."""


def asked(tokens: int = 1_000, first: int = 0, model: str = "base", max_tokens: int = 16) -> Request:
    """A prompt of token ids, so that its length is exact; another `first` is another prompt from its first token on."""
    body = {"model": model, "prompt": [first, *range(1, tokens)], "max_tokens": max_tokens}
    return read(((":path", b"/v1/completions"),), json.dumps(body).encode())


def scorer() -> Scorer:
    return made(cost, None, with_prefix()[1])


def ratios(plugin: Scorer, request: Request, candidates: Candidates) -> list[float]:
    """Cost of each in units of the least, as long as it is more than 2 % above."""
    return [(1 + ALIKE) / score for score in plugin.score(request, candidates).tolist()]


def approx(costs: list[float]) -> object:
    """What `ratios` gives for these costs."""
    return pytest.approx([max(each / min(costs), 1 + ALIKE) for each in costs])


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_what_waits_and_what_is_answered_there_costs_time() -> None:
    """First: nothing is there. Its own prompt and what it costs others, 3 x 0.05075075; half of the step under way
    and 1,000 / 8,192 of one, 0.62207 steps of 10 ms: 0.15847295.

    Second: four run and one waits, whose prompt is taken for one of 1,000 tokens and 500,000 pairs: 0.05075. A step
    takes 10 ms + 4 x 5 us = 10.02 ms, and 0.5 + 2,000 / 8,192 = 0.74414 of them run. An answer takes 256 x 20 us longer
    than at an idle one, of which 0.01 count. 0.05075 + 0.15225225 + 0.00745629 + 0.0000512 = 0.21050974.
    """
    first = 3 * OWN + (0.5 + 1_000 / 8_192) * 10e-3
    second = 0.05075 + 3 * OWN + (0.5 + 2_000 / 8_192) * 10.02e-3 + 0.01 * 256 * 20e-6
    assert [first, second] == pytest.approx([0.15847295, 0.21050974])
    candidates = pool(IDLE, Page(running=4.0, waiting=1.0, kv_usage=0.0))
    assert ratios(scorer(), asked(), candidates) == approx([first, second])


def test_context_of_what_is_answered_makes_steps_longer() -> None:
    """The first got our prompt of 20,000 tokens and answers it: 0.06 us x 20,000 = 1.2 ms a step more, and 5 us."""
    plugin, candidates = scorer(), pool(IDLE, IDLE)
    before = asked(20_000, first=9)
    plugin.score(before, candidates)
    assert plugin.chosen is not None
    assert plugin.followed is not None
    plugin.chosen(before, candidates, candidates.slots[:1])
    plugin.followed(before, False, NOW)
    table = candidates.table
    table.page_told(0, table.generation(0), Page(running=1.0, waiting=0.0, kv_usage=0.0), NOW)
    # That prompt was cached nowhere, so what caches save is now 495 of 1,190 tokens.
    own = (1 + 4 * 495 / 1_190) * OWN
    steps = 0.5 + 1_000 / 8_192
    longer = 5e-6 + 0.06e-6 * 20_000
    assert ratios(plugin, asked(), table.candidates(NOW)) == approx(
        [own + steps * (10e-3 + longer) + 0.01 * 256 * longer, own + steps * 10e-3]
    )


@pytest.mark.parametrize(
    ("after", "left"), [(0.3, WORK - 0.3), (1.45, 0.1 * WORK), (1.9, 1.9 - WORK - 0.2), (60.0, 0.1 * WORK)]
)
def test_the_work_before_a_request_is_less_by_the_time_that_it_runs_until_it_is_late(after: float, left: float) -> None:
    """Our first prompt waits at slot 0. A tenth of it stays for another 0.2 s; after that it takes as long as it is
    late, as long as a page that is fresh has it: after a minute none is."""
    plugin = scorer()
    assert plugin.followed is not None
    told = getattr(plugin.followed, "__self__", None)
    assert isinstance(told, Cost)
    for slot in (0, 1):  # a step of 10 ms with 1,000 tokens of 50 us: the constants stay what they are
        told._speeds.learn(slot, (1.0, 1_000.0, 0.0, 0.0, 0.0), 0.06)
    assert behind(plugin, after) == approx([left + LATER[0], LATER[1]])


@pytest.mark.parametrize("after", [0.0, 0.3, 1.45, 60.0])
def test_where_nobody_knows_how_fast_work_goes_all_of_it_is_left_until_a_page_says_otherwise(after: float) -> None:
    assert behind(scorer(), after) == approx([WORK + LATER[0], LATER[1]])


def behind(plugin: Scorer, after: float) -> list[float]:
    """What a prompt of 1,000 tokens costs so many seconds after one of 20,000 went to the first of two."""
    candidates, before = pool(IDLE, IDLE), asked(20_000, first=9)
    plugin.score(before, candidates)
    assert plugin.chosen is not None
    plugin.chosen(before, candidates, candidates.slots[:1])
    return ratios(plugin, asked(), candidates.table.candidates(NOW + after))


def test_a_prompt_that_is_held_costs_its_last_token_and_no_queue_that_is_shorter_is_worth_more() -> None:
    """1,024 tokens are 16 blocks of 64, all held: the last token is computed all the same, with 1,024 pairs."""
    producer = made(approximate_prefix)
    plugin = made(cost, None, Context({producer.name: producer}))
    candidates = pool(IDLE, IDLE)
    held = asked(1_024)
    assert producer.chosen is not None
    producer.match(held, candidates)
    producer.chosen(held, candidates, candidates.slots[1:])
    least = 3 * (50e-6 + 1_024 * 1.5e-9) + (0.5 + 1 / 8_192) * 10e-3
    most = 3 * (1_024 * 50e-6 + 1_024 * 1_025 / 2 * 1.5e-9) + (0.5 + 1_024 / 8_192) * 10e-3
    assert ratios(plugin, asked(1_024), candidates) == approx([most, least])


def test_a_full_cache_costs_the_time_until_answers_make_room() -> None:
    """Half of 100 blocks of 16 tokens is free: 800 tokens, and 200 are lacking; as much is in use, so a fourth of an
    answer's 2.56 s passes."""
    full = Page(running=0.0, waiting=0.0, kv_usage=0.5, kv_blocks=100.0, block_size=16.0)
    least = 3 * OWN + (0.5 + 1_000 / 8_192) * 10e-3
    assert ratios(scorer(), asked(), pool(IDLE, full)) == approx([least, least + 2.56 / 4])


@pytest.mark.parametrize("lacks", ["kv_usage", "kv_blocks", "block_size"])
def test_of_a_cache_whose_size_or_use_is_not_known_nothing_is_thought(lacks: str) -> None:
    page = Page(running=0.0, waiting=0.0, kv_usage=1.0, kv_blocks=100.0, block_size=16.0)
    page = msgspec.structs.replace(page, **{lacks: None})
    scores = scorer().score(asked(), pool(page, IDLE))
    assert scores.tolist() == [1.0, 1.0]


def test_an_adapter_costs_its_load_and_where_no_place_is_free_an_answer() -> None:
    """It runs in the first; in the second a place is free: 0.05 s; in the third another one must end: 2.56 s more."""

    def lora(*running: str) -> Page:
        return Page(running=0.0, waiting=0.0, kv_usage=0.0, max_lora=1.0, running_adapters=running, waiting_adapters=())

    candidates = pool(lora("mine"), lora(), lora("other"))
    request = asked(model="mine")
    request.target_model = "mine"
    base = 3 * OWN + (0.5 + 1_000 / 8_192) * 10e-3
    assert ratios(scorer(), request, candidates) == approx([base, base + 0.05, base + 0.05 + 2.56])
    request = asked()
    request.target_model = "base"
    assert scorer().score(request, candidates).tolist() == [1.0, 1.0, 1.0]


def test_the_other_stage_s_endpoint_needs_no_transfer() -> None:
    """26 ms and 4.25 us a token."""
    base, request = 3 * OWN + (0.5 + 1_000 / 8_192) * 10e-3, asked()
    request.peer = 1
    assert ratios(scorer(), request, pool(IDLE, IDLE)) == approx([base + 0.026 + 4.25e-3, base])


# -- what is not known -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, Page(), IDLE])
def test_one_candidate_is_the_best(page: Page | None) -> None:
    assert scorer().score(asked(), pool(page)).tolist() == [1.0]


def test_a_request_without_tokens_costs_the_step_under_way() -> None:
    """5 ms, and for each that is answered 2.5 us of it and 12.8 us of the answer: with 100 of them 6.53 ms."""
    request = read(((":method", b"GET"), (":path", b"/v1/models")), b"")
    assert request.tokens == 0
    candidates = pool(IDLE, Page(running=100.0, waiting=0.0, kv_usage=0.0))
    plugin = scorer()
    assert ratios(plugin, request, candidates) == approx([5e-3, 5.25e-3 + 0.01 * 256 * 0.5e-3])
    assert plugin.chosen is not None
    assert plugin.followed is not None
    plugin.chosen(request, candidates, candidates.slots[:1])
    plugin.followed(request, True, NOW)


def test_one_whose_page_lacks_a_gauge_is_no_better_than_the_known_ones_are_on_average() -> None:
    busy, busier = Page(running=4.0, waiting=9.0, kv_usage=0.0), Page(running=4.0, waiting=20.0, kv_usage=0.0)
    scores = scorer().score(asked(), pool(busy, busier, Page(waiting=0.0, running=0.0)))
    assert scores[2] == pytest.approx((scores[0] + scores[1]) / 2)


def test_where_pages_are_too_old_our_own_count_says_who_is_answered() -> None:
    """The pages, of long ago, say nothing of what runs there, one of them until now."""
    candidates = pool(IDLE, IDLE, inflight=(600, 100)).table.candidates(NOW + 60)
    base = 3 * OWN
    steps = 0.5 + 1_000 / 8_192
    costs = [base + steps * (10e-3 + each * 5e-6) + 0.01 * 256 * each * 5e-6 for each in (600, 100)]
    assert ratios(scorer(), asked(), candidates) == approx(costs)


PAGES = st.none() | st.builds(
    Page,
    waiting=st.none() | st.floats(0, 1e3),
    running=st.none() | st.floats(0, 1e3),
    kv_usage=st.none() | st.floats(0, 1.05),
    kv_blocks=st.none() | st.floats(1, 1e6),
    block_size=st.none() | st.sampled_from([16.0, 64.0]),
    max_lora=st.none() | st.floats(0, 9),
    running_adapters=st.none() | st.just(("base",)) | st.just(()),
    prompts=st.none() | st.floats(0, 1e6),
    first_tokens=st.none() | st.floats(0, 1e6),
    steps=st.none() | st.floats(0, 1e6),
    processed=st.none() | st.floats(0, 1e9),
    generated=st.none() | st.floats(0, 1e9),
)


@settings(max_examples=150, deadline=None)
@given(
    told=st.lists(st.lists(PAGES, min_size=3, max_size=3), min_size=1, max_size=6),
    tokens=st.integers(1, 3_000),
    peer=st.none() | st.integers(0, 2),
)
def test_whatever_pages_say_scores_are_above_zero_and_the_best_is_one_where_all_is_known(
    told: list[list[Page | None]], tokens: int, peer: int | None
) -> None:
    plugin, candidates = scorer(), pool(None, None, None)
    table = candidates.table
    assert plugin.chosen is not None
    for number, pages in enumerate(told):
        now = NOW + number
        for slot, page in enumerate(pages):
            if page is not None:
                table.page_told(slot, table.generation(slot), page, now)
        request, there = asked(tokens, first=number), table.candidates(now)
        request.target_model, request.peer = "base", peer
        scores = plugin.score(request, there)
        assert ((scores > 0) & (scores <= 1)).all()
        known = [there.column(name)[1].all() for name in ("waiting", "running", "kv_usage")]
        if all(known):
            assert scores.max() == 1.0
        plugin.chosen(request, there, there.slots[[int(np.argmax(scores))]])


# -- many of them ------------------------------------------------------------------------------------------------------


def picker_of(size: int, page: Page | None, config: str | None = None) -> Picker:
    table = EndpointTable(on_forget=lambda slot: picker.forget(slot))
    for number in range(size):
        slot = table.put(Endpoint(f"default/pod-{number}", f"10.0.0.{number + 1}:8000"), 0.0)
        if page is not None:
            table.page_told(slot, table.generation(slot), page, NOW)
    text = CONFIG.read_text() if config is None else config
    scheduler = build(load(text), Random(1))
    picker = Picker(table, scheduler, Ejection(table, EjectionParams()), Watch(), lambda: 0.0, PickerOptions())
    return picker


@pytest.mark.parametrize("page", [None, IDLE, Page(running=3.0, waiting=0.0, kv_usage=0.2)])
@pytest.mark.parametrize("tokens", [1_000, 8_000])
@pytest.mark.parametrize("apart", [0.0, 0.5e-3])
def test_a_burst_of_equal_requests_within_one_interval_is_spread_evenly(
    page: Page | None, tokens: int, apart: float
) -> None:
    """100 within no time, or within one interval of 50 ms, in which no page comes."""
    picker = picker_of(8, page)
    went = Counter(
        picker.decide(asked(tokens, first=number + 1), None, NOW, NOW + apart * number)[0].endpoint.address
        for number in range(100)
    )
    assert len(went) == 8
    assert max(went.values()) - min(went.values()) <= 1


def test_when_all_of_a_burst_is_over_the_endpoints_are_alike_again() -> None:
    picker = picker_of(4, IDLE)
    tickets = [picker.decide(asked(1_000, first=number + 1), None, NOW, NOW)[0] for number in range(10)]
    for ticket in tickets:
        picker.finish(ticket, Outcome.COMPLETE, NOW + 1)
    ticket, _ = picker.decide(asked(1_000, first=99), None, NOW + 1, NOW + 1)
    assert [score for _, score in ticket.decision.scores()] == [1.0] * 4


STAGES = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: decode-filter}
- {type: prefill-filter}
- {type: cost-scorer}
- {type: max-score-picker}
- {type: always-disagg-pd-decider}
- {type: disagg-profile-handler, parameters: HANDLER}
schedulingProfiles:
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: cost-scorer}, {pluginRef: max-score-picker}]
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: cost-scorer}, {pluginRef: max-score-picker}]
"""


@pytest.mark.parametrize(
    "handler",
    ["{deciders: {prefill: always-disagg-pd-decider}}", "{stageOrder: prefill-first}"],
    ids=["decode-first", "prefill-first"],
)
def test_of_two_stages_the_prompt_waits_at_prefill_alone(handler: str) -> None:
    """Two endpoints of each role: the second request goes to the prefill endpoint that has nothing to compute, while of
    the decode endpoints none is worse for it."""
    watch = Watch()
    table = EndpointTable(freshness=1e9)
    for number, role in enumerate(["prefill", "prefill", "decode", "decode"]):
        slot = table.put(Endpoint(f"default/pod-{number}", f"10.0.0.{number}:8000", {"llm-d.ai/role": role}), 0.0)
        table.page_told(slot, table.generation(slot), IDLE, NOW)
    scheduler = build(load(STAGES.replace("HANDLER", handler)), Random(1))
    picker = Picker(table, scheduler, Ejection(table, EjectionParams()), watch, lambda: 0.0, PickerOptions())
    prefills = []
    for number in range(2):
        ticket, _ = picker.decide(asked(20_000, first=number + 1), None, NOW, NOW)
        assert ticket.decision.failures == ()
        assert [score for _, score in ticket.decision.scores()] == [1.0, 1.0]
        assert ticket.decision.prefill is not None
        prefills.append(ticket.decision.prefill)
    assert sorted(each.first for each in prefills) == [0, 1]
    assert sorted(score for _, score in prefills[1].scores())[0] < 0.9
    for ticket in watch.tickets:
        picker.response_started(ticket, ((":status", b"200"),), None, NOW + 1, bodies_seen=True)
        picker.response_data(ticket, b"data: ", NOW + 1)
    ticket, _ = picker.decide(asked(20_000, first=3), None, NOW + 1, NOW + 1)
    assert ticket.decision.prefill is not None
    assert [score for _, score in ticket.decision.prefill.scores()] == [1.0, 1.0]
    for each in watch.tickets:
        picker.finish(each, Outcome.COMPLETE, NOW + 2)
    watch.check()
