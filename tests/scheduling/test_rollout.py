"""All stages of a request run on one revision."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Endpoint, EndpointTable
from epp.errors import NoEndpoint
from epp.headers import Headers
from epp.scheduling import handlers
from epp.scheduling.deciders import always
from epp.scheduling.labels import decode_role, prefill_role
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import at_random
from epp.scheduling.plugin import Answer, Context, NoParams, Params, PickerParams, Screener, screener
from epp.scheduling.profile import Profile
from epp.scheduling.rollout import rollout
from epp.scheduling.scheduler import Scheduler
from tests.scheduling.builders import NOW, ask, made, profile

REVISION, ROLE = "disaggregatedset.x-k8s.io/revision", "disaggregatedset.x-k8s.io/role"
BY_HEADER = {"name": "revision", "headerName": "X-Revision", "labelKey": REVISION, "mode": "strict"}
BY_SLICE = {"name": "slice", "headerName": "x-slice", "labelKey": "slice", "mode": "strict"}


def table_of(*pods: tuple[str, str], ranks: int = 1, **labels: str) -> EndpointTable:
    """Pod i has this revision and role, and so many ranks."""
    table = EndpointTable()
    for i, (revision, role) in enumerate(pods):
        for rank in range(ranks):
            told = {REVISION: revision, ROLE: role, "llm-d.ai/role": role, "app": "a", **labels}
            table.put(Endpoint(f"default/pod{i}-rank-{rank}", f"10.0.0.{i + 1}:{8000 + rank}", told), 0.0)
    return table


def screening(
    mode: str = "sum", *selectors: dict[str, str], draw: float | None = None, scope: str = "app=a"
) -> Screener:
    class Draws(Random):
        def random(self) -> float:
            return super().random() if draw is None else draw

    gating: dict[str, Any] = {"mode": mode}
    if mode != "disabled":
        gating["requireRoles"] = {"values": ["prefill", "decode"]}
    given = {"scope": {"labelSelector": scope}, "revisionGating": gating, "headerSelectors": selectors}
    params: Params = msgspec.convert(given, rollout.params)
    return made(rollout, params, Context(rng=Draws(0)))


def asking(*headers: tuple[str, bytes]) -> Request:
    return read(((":path", b"/v1/completions"), *headers), b'{"model":"m","prompt":"p"}')


def kept(plugin: Screener, candidates: Candidates, *headers: tuple[str, bytes]) -> list[int]:
    slots: list[int] = candidates.slots[plugin.screen(asking(*headers), candidates)].tolist()
    return slots


P, D = "prefill", "decode"
TWO = [("a", P), ("a", P), *[("a", D)] * 9, ("b", P), ("b", D)]
"""The reference's example: revision a has 2 prefill and 9 decode pods, b has 1 and 1."""
A, B = list(range(11)), [11, 12]


@pytest.mark.parametrize(
    ("mode", "draw", "slots"),
    [
        ("sum", 0.846, A),  # 11 of 13
        ("sum", 0.847, B),
        ("max-role", 0.899, A),  # 9 of 10, by decode
        ("max-role", 0.9, B),
    ],
)
def test_a_revision_is_drawn_in_proportion_to_its_ready_pods(mode: str, draw: float, slots: list[int]) -> None:
    assert kept(screening(mode, draw=draw), table_of(*TWO).candidates(NOW)) == slots


def test_ranks_of_one_pod_are_one_pod() -> None:
    table = table_of(("a", P), ("a", D), ("b", P), ("b", D))
    table.put(Endpoint("default/pod0-rank-1", "10.0.0.1:8001", table.endpoint(0).labels), 0.0)
    assert kept(screening(draw=0.499), table.candidates(NOW)) == [0, 1, 4]
    assert kept(screening(draw=0.5), table.candidates(NOW)) == [2, 3]


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_a_revision_that_lacks_a_role_gets_nothing(draw: float) -> None:
    table = table_of(("a", P), ("a", D), ("b", D), ("b", D), ("b", "other"))
    assert kept(screening(draw=draw), table.candidates(NOW)) == [0, 1]
    table.put(Endpoint("default/pod9-rank-0", "10.0.0.9:1", {REVISION: "b", ROLE: P, "app": "b"}), 0.0)
    assert kept(screening(draw=draw), table.candidates(NOW)) == [0, 1]  # of another set
    plugin = screening(draw=0.999)
    assert kept(plugin, table.candidates(NOW)) == [0, 1]
    table.put(Endpoint("default/pod8-rank-0", "10.0.0.8:1", {REVISION: "b", ROLE: P, "app": "a"}), 0.0)
    assert kept(plugin, table.candidates(NOW)) == [2, 3, 4, 5, 6]


def test_a_revision_of_which_guards_left_no_endpoint_for_a_role_is_not_drawn() -> None:
    candidates = table_of(("a", P), ("a", D), ("b", P), ("b", D)).candidates(NOW)
    without = candidates.keep(np.array([False, True, True, True]))
    assert kept(screening(draw=0.0), without) == [2, 3]


@pytest.mark.parametrize("pods", [[("a", P)], [("a", P), ("b", D)], [("a", D)]])
def test_no_complete_revision_is_a_503(pods: list[tuple[str, str]]) -> None:
    choosing = Scheduler(Lineup([profile()], screeners=[screening()]), Random(0))
    with pytest.raises(NoEndpoint, match=f"disaggregatedset-rollout-screener left out {len(pods)}"):
        choosing.schedule(ask(), table_of(*pods).candidates(NOW))


@pytest.mark.parametrize(("value", "slots"), [(b"b", B), (b"a", A), (b"c", []), (b"d", [])])
def test_a_strict_header_chooses_the_revision_if_it_is_complete(value: bytes, slots: list[int]) -> None:
    """Revision c has no prefill pod; there is no d."""
    candidates = table_of(*TWO, ("c", D)).candidates(NOW)
    assert kept(screening("sum", BY_HEADER, draw=0.0), candidates, ("x-revision", value)) == slots


def test_another_strict_header_keeps_what_has_its_label_and_the_revision_is_drawn_among_those() -> None:
    table = table_of(("a", P), ("a", D))
    for i, name in enumerate(("b", "b"), 5):
        labels = {REVISION: name, ROLE: (P, D)[i - 5], "app": "a", "slice": "s"}
        table.put(Endpoint(f"default/pod{i}-rank-0", f"10.0.0.{i + 1}:8000", labels), 0.0)
    plugin = screening("sum", BY_SLICE, draw=0.0)
    assert kept(plugin, table.candidates(NOW)) == [0, 1]
    assert kept(plugin, table.candidates(NOW), ("x-slice", b"s")) == [2, 3]
    assert kept(plugin, table.candidates(NOW), ("x-slice", b"t")) == []


def test_without_gating_only_headers_count_and_a_preference_screens_nobody() -> None:
    candidates = table_of(*TWO).candidates(NOW)
    plugin = screening("disabled", BY_HEADER, {**BY_SLICE, "mode": "prefer"})
    assert kept(plugin, candidates) == A + B
    assert kept(plugin, candidates, ("x-slice", b"none")) == A + B
    assert kept(plugin, candidates, ("x-revision", b"b")) == B


def test_the_response_tells_the_labels_of_the_endpoint_that_served() -> None:
    plugin, table = screening("sum", BY_HEADER, BY_SLICE), table_of(("a", P), ("a", D))
    decision = Scheduler(Lineup([profile()], screeners=[plugin]), Random(0)).schedule(ask(), table.candidates(NOW))
    assert plugin.answered is not None
    told: Headers = plugin.answered(ask(), Answer(table.endpoint(0), None, (), decision))
    assert told == (("x-revision", b"a"),)  # it has no slice


def test_both_stages_of_a_request_run_on_one_revision() -> None:
    candidates = table_of(*TWO).candidates(NOW)
    context = Context(deciders={"always": made(always)}, profiles=("decode", "prefill"))
    params: Params = msgspec.convert({"deciders": {"prefill": "always"}}, handlers.disaggregated.params)
    picker = made(at_random, PickerParams())
    profiles = [
        Profile("decode", [made(decode_role)], [], picker),
        Profile("prefill", [made(prefill_role)], [], picker),
    ]
    handler = made(handlers.disaggregated, params, context)
    choosing = Scheduler(Lineup(profiles, handler=handler, screeners=[screening()]), Random(0))
    seen: set[tuple[bool, bool]] = set()
    for _ in range(200):
        decision = choosing.schedule(ask(), candidates)
        assert decision.prefill is not None
        seen.add((decision.first in B, decision.prefill.first in B))
        assert decision.exclusions[0].name == "disaggregatedset-rollout-screener"
    assert seen == {(False, False), (True, True)}


def test_a_screener_that_fails_or_returns_no_mask_leaves_nobody_out_and_is_named() -> None:
    @screener("broken", params=NoParams)
    def broken(request: Request, candidates: Candidates, params: NoParams) -> Bools:
        """Return too little."""
        return np.zeros(1, np.bool_)

    choosing = Scheduler(Lineup([profile()], screeners=[made(broken), screening("disabled", BY_HEADER)]), Random(0))
    decision = choosing.schedule(asking(("x-revision", b"b")), table_of(*TWO).candidates(NOW))
    assert [each.plugin for each in decision.failures] == ["broken"]
    assert decision.first in B
    assert decision.slots.tolist() == B


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": {"labelSelector": "app in a"}}, "scope.labelSelector: expected a list in parentheses"),
        ({"revisionGating": {"mode": "sum"}}, "mode sum needs requireRoles.values"),
        ({"revisionGating": {"requireRoles": {"values": []}}}, "length >= 1"),
        ({"revisionGating": {"mode": "all"}}, "Invalid enum value 'all'"),
        ({"headerSelectors": [BY_HEADER, {**BY_SLICE, "headerName": "x-revision"}]}, "two have x-revision"),
        ({"headerSelectors": [BY_HEADER, {**BY_SLICE, "name": "revision"}]}, "two have revision"),
        ({"headerSelectors": [{**BY_HEADER, "mode": "maybe"}]}, "Invalid enum value 'maybe'"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"scope": {"labelSelector": "app=a"}, "revisionGating": {"mode": "disabled"}}
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert({**given, **changes}, rollout.params)
