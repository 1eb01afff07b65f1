"""Who may lend its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest

from epp.config.build import build
from epp.config.load import load
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Page
from epp.scheduling.decision import Decision, Plan
from epp.scheduling.lineup import Lineup
from epp.scheduling.peers import SOURCE, Hook, PeerSource, chances, peer_source
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import Context, PrefixMatch, Producer
from epp.scheduling.profile import Profile
from epp.scheduling.quarantine import IN_A_ROW
from epp.scheduling.scheduler import Scheduler
from tests.scheduling.builders import ask, made, pool, profile
from tests.scheduling.test_profile import keeps

DRAWS = 2000
QUIET = Page(waiting=0, kv_usage=0.1)


def holds(*blocks: int) -> Producer:
    """A producer that believes so of slots, in blocks of 64 tokens."""

    def match(request: Request, candidates: Candidates) -> PrefixMatch:
        return PrefixMatch(np.array(blocks, np.int64)[candidates.slots], 100, 64)

    return made_producer(match)


def made_producer(match: Callable[[Request, Candidates], PrefixMatch]) -> Producer:
    return Producer(
        name="held", chosen=None, forget=None, answered=None, pins=None, needs=(), match=match, blocks=lambda: 0
    )


def hook(producer: Producer, delta: int = 1) -> Hook:
    params = PeerSource(min_cached_token_delta=delta, prefix_match_info_producer_name="held")
    return made(peer_source, params, Context({"held": producer}, rng=Random(5)))


def sources(blocks: tuple[int, ...], pages: tuple[Page | None, ...], computes: int, delta: int = 1) -> dict[str, int]:
    """How often each address was named, where this slot computes the prompt; "" where none was."""
    each = hook(holds(*blocks), delta)
    candidates = pool(*pages)
    only = profile(filters=[keeps(*(slot == computes for slot in range(len(pages))))])
    plan = Plan(only.decide(ask(), candidates, (), tuple(candidates.endpoints()), Random(0)))
    counts: dict[str, int] = {}
    for _ in range(DRAWS):
        headers = dict(each.headers(ask(), candidates, plan))
        said = headers.get(SOURCE, b"").decode()
        counts[said] = counts.get(said, 0) + 1
    return counts


A, B, C = (f"192.168.1.{i}:8000" for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("blocks", "delta", "named"),
    [
        ((0, 5, 0), 1, {B}),
        ((0, 0, 0), 1, {""}),  # nobody holds anything
        ((5, 5, 0), 1, {""}),  # the one that computes holds as much
        ((5, 6, 0), 1, {B, ""}),  # within a block it may be drawn itself
        ((4, 6, 0), 128, {B}),  # two blocks of 64
        ((4, 6, 0), 129, {""}),
        ((0, 1, 0), 1, {B}),  # one block less than one is none: who holds nothing is not drawn
        ((0, 6, 5), 1, {B, C}),
        ((0, 6, 4), 1, {B}),
    ],
)
def test_a_peer_is_named_that_holds_more_than_the_one_that_computes(
    blocks: tuple[int, ...], delta: int, named: set[str]
) -> None:
    assert set(sources(blocks, (QUIET, QUIET, QUIET), 0, delta)) == named


def test_nobody_is_named_where_there_is_one() -> None:
    assert set(sources((5,), (QUIET,), 0)) == {""}


@pytest.mark.parametrize(
    ("waiting", "weights"),
    [
        ([0.0, 3.0], [1.0, 0.25]),
        ([1.0, 3.0, np.nan], [0.5, 0.25, 1 / 3]),  # unknown: the mean of 1 and 3
        ([np.nan, np.nan], [1.0, 1.0]),
    ],
)
def test_short_queues_are_preferred_and_the_unknown_is_in_between(waiting: list[float], weights: list[float]) -> None:
    assert chances(np.array(waiting)).tolist() == weights


def test_equals_share_by_their_queues() -> None:
    counts = sources((0, 5, 5), (QUIET, Page(waiting=0), Page(waiting=3)), 0)
    assert abs(counts[B] - DRAWS * 0.8) < 4 * (DRAWS * 0.8 * 0.2) ** 0.5  # 1 to 1/4
    assert counts[B] + counts[C] == DRAWS


def decided(scheduler: Scheduler, candidates: Candidates, prompt: str = "ab c" * 256) -> Decision:
    return scheduler.schedule(ask(prompt), candidates)


CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: p2p-source-producer
- type: queue-scorer
"""


def test_a_server_that_gets_a_prompt_is_told_who_has_it() -> None:
    """Declared beside the scorers: the first server has the prompt, and is busy when it comes again."""
    scheduler = build(load(CONFIG, experimental=True), Random(0))
    candidates = pool(QUIET, Page(waiting=1))
    table = candidates.table
    assert (decided(scheduler, candidates).first, decided(scheduler, candidates).set_headers) == (0, ())
    table.page_told(0, table.generation(0), Page(waiting=9), candidates.now)
    again = decided(scheduler, table.candidates(candidates.now))
    assert (again.first, again.set_headers) == (1, ((SOURCE, A.encode()),))
    third = decided(scheduler, table.candidates(candidates.now))
    assert (third.first, third.set_headers) == (1, ())  # now it has it, too


STAGES = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: p2p-source-producer
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- type: always-disagg-pd-decider
- type: prefill-filter
- type: decode-filter
- type: queue-scorer
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: queue-scorer}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: queue-scorer}]}
"""


def test_with_stages_it_is_the_prefill_endpoint_that_is_told() -> None:
    scheduler = build(load(STAGES, experimental=True), Random(0))
    roles = [{"llm-d.ai/role": role} for role in ("decode", "prefill", "prefill")]
    candidates = pool(QUIET, QUIET, Page(waiting=1), labels=roles)
    table = candidates.table
    first = decided(scheduler, candidates)
    assert first.prefill is not None
    assert (first.prefill.first, SOURCE in dict(first.set_headers)) == (1, False)
    table.page_told(1, table.generation(1), Page(waiting=9), candidates.now)
    again = decided(scheduler, table.candidates(candidates.now))
    assert again.prefill is not None
    assert again.prefill.first == 2
    # Both the decode endpoint and the first prefill endpoint hold it; the new one computes.
    assert dict(again.set_headers)[SOURCE].decode() in (A, B)
    assert dict(again.set_headers)["x-prefiller-host-port"].decode() == C


def test_one_that_fails_is_named_left_out_and_no_request_is_lost() -> None:
    asked: list[int] = []

    def fails(request: Request, candidates: Candidates) -> PrefixMatch:
        asked.append(1)
        raise RuntimeError("no")

    each = hook(made_producer(fails))
    scheduler = Scheduler(Lineup([Profile("default", [], [], made(max_score))], others=[each]), Random(0))
    kinds = [[failure.kind for failure in decided(scheduler, pool(QUIET)).failures] for _ in range(IN_A_ROW + 2)]
    assert kinds == [["error"]] * IN_A_ROW + [["left-out"]] * 2
    assert len(asked) == IN_A_ROW
