"""Affinity to a header's label and to where another stage runs: hand-worked tables, and decisions that they change."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from epp.config.build import build
from epp.config.load import load
from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page
from epp.errors import ConfigError
from epp.scheduling import handlers
from epp.scheduling.affinity import header_label, topology_filter, topology_scorer
from epp.scheduling.deciders import always
from epp.scheduling.labels import decode_role, prefill_role
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import Context, NoParams, Params, PickerParams, Plugin, Scorer
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import queue
from epp.scheduling.topology import Topology
from tests.scheduling.builders import NOW, made, pool, profile, winners

ZONES = {"headerName": "X-Zone", "labelKey": "zone"}


def asking(*headers: tuple[str, bytes]) -> Request:
    return read(((":path", b"/v1/completions"), *headers), json.dumps({"model": "m", "prompt": "hello"}).encode())


def given(plugin: Plugin[Any], parameters: dict[str, Any]) -> Params:
    params: Params = msgspec.convert(parameters, plugin.params)
    return params


def after(slot: int | None) -> Request:
    """A request of which another stage goes to this slot."""
    request = asking()
    request.peer = slot
    return request


# -- header-label-affinity-scorer --------------------------------------------------------------------------------------


@pytest.fixture
def by_zone() -> Scorer:
    return made(header_label, given(header_label, ZONES))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("x-zone", b"a")], [1.0, 0.0, 1.0, 0.0, 0.0]),
        ([("x-zone", b" b ")], [0.0, 1.0, 0.0, 0.0, 0.0]),
        ([("x-zone", b"c")], [0.0] * 5),  # nobody has it
        ([("x-zone", b"")], [0.0] * 5),  # not even the one whose label is empty
        ([], [0.0] * 5),
        ([("x-zone", b"b"), ("x-zone", b"a")], [0.0, 1.0, 0.0, 0.0, 0.0]),  # the first of several
    ],
)
def test_who_has_the_label_that_the_header_asks_for(
    by_zone: Scorer, headers: list[tuple[str, bytes]], expected: list[float]
) -> None:
    zones = [{"zone": "a"}, {"zone": "b"}, {"zone": "a", "rack": "b"}, {"zone": ""}, {}]
    candidates = pool(*[None] * 5, labels=zones)
    assert by_zone.score(asking(*headers), candidates).tolist() == expected
    left = candidates.keep(np.array([False, False, True, True, True]))
    assert by_zone.score(asking(*headers), left).tolist() == expected[2:]


def test_one_candidate_with_or_without_the_label(by_zone: Scorer) -> None:
    candidates = pool(None, labels=[{"zone": "a"}])
    assert by_zone.score(asking(("x-zone", b"a")), candidates).tolist() == [1.0]
    assert by_zone.score(asking(("x-zone", b"b")), candidates).tolist() == [0.0]


def test_labels_are_followed_as_they_change(by_zone: Scorer) -> None:
    table, request = EndpointTable(), asking(("x-zone", b"a"))
    pool(None, None, labels=[{"zone": "a"}, {"zone": "b"}], table=table)
    assert by_zone.score(request, table.candidates(NOW)).tolist() == [1.0, 0.0]
    pool(None, None, None, labels=[{"zone": "b"}, {"zone": "a"}, {"zone": "a"}], table=table)
    assert by_zone.score(request, table.candidates(NOW)).tolist() == [0.0, 1.0, 1.0]


def test_the_header_decides(by_zone: Scorer) -> None:
    candidates = pool(Page(), Page(), labels=[{"zone": "a"}, {"zone": "b"}])
    assert winners(profile((by_zone, 1.0)), candidates, asking(("x-zone", b"b")), 20) == [0, 20]


@pytest.mark.parametrize(
    "parameters", [{}, {"headerName": "x"}, {"labelKey": "x"}, {"headerName": "", "labelKey": "x"}]
)
def test_header_and_label_must_both_be_named(parameters: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError):
        given(header_label, parameters)


# -- topology-affinity-scorer and -filter ------------------------------------------------------------------------------

KEYS = {
    "region": "topology.kubernetes.io/region",
    "zone": "topology.kubernetes.io/zone",
    "rack": "topology.kubernetes.io/rack",
    "host": "kubernetes.io/hostname",
}


def at(place: str, node: str = "") -> tuple[dict[str, str], str]:
    """Labels and node of an endpoint at region/zone/rack/host, each a letter; `-`: no label."""
    names = zip(("region", "zone", "rack", "host"), place, strict=True)
    return {KEYS[level]: name for level, name in names if name != "-"}, node


def standing(*places: tuple[dict[str, str], str]) -> Candidates:
    table = EndpointTable()
    for i, (labels, node) in enumerate(places):
        table.put(Endpoint(f"p{i}", f"10.0.0.{i + 1}:80", labels, node=node), 0.0)
    return table.candidates(NOW)


PLACES = (at("rzkh"), at("rzkh"), at("rzki"), at("rzlj"), at("rylk"), at("qxmn"), at("----"))


def test_the_closer_the_higher() -> None:
    got = made(topology_scorer).score(after(0), standing(*PLACES))
    assert got.tolist() == [1.0, 1.0, 0.2, 0.05, 0.02, 0.0, 0.0]


def test_the_first_stage_is_close_to_nobody_and_so_is_who_tells_nothing() -> None:
    candidates = standing(*PLACES)
    for request in (after(None), after(6)):
        assert made(topology_scorer).score(request, candidates).tolist() == [0.0] * 7
        assert made(topology_filter).keep(request, candidates).tolist() == [True] * 7


@pytest.mark.parametrize(
    ("level", "kept"),
    [("", [0, 1]), ("host", [0, 1]), ("rack", [0, 1, 2]), ("zone", [0, 1, 2, 3]), ("region", [0, 1, 2, 3, 4])],
)
def test_who_is_close_enough_is_kept(level: str, kept: list[int]) -> None:
    candidates, parameters = standing(*PLACES), {"minAffinity": level} if level else {}
    mask = made(topology_filter, given(topology_filter, parameters)).keep(after(0), candidates)
    assert candidates.slots[mask].tolist() == kept


def test_everybody_is_kept_where_nobody_is_close_enough() -> None:
    candidates = standing(*PLACES).keep(np.array([False, False, False, True, True, True, True]))
    rack = made(topology_filter, given(topology_filter, {"minAffinity": "rack"}))
    assert rack.keep(after(0), candidates).tolist() == [True] * 4
    assert rack.keep(after(0), candidates.keep(np.array([True, False, False, False]))).tolist() == [True]


def test_without_a_label_the_node_is_the_host() -> None:
    candidates = standing(at("----", "n1"), at("----", "n2"), at("----", "n1"))
    assert made(topology_scorer).score(after(0), candidates).tolist() == [1.0, 0.0, 1.0]


def test_an_extractor_says_which_labels_count() -> None:
    candidates = standing(({"cage": "1"}, ""), ({"cage": "1"}, ""), ({"cage": "2"}, ""))
    settings = {"topology-extractor": Topology(rack="cage"), "other": Topology(zone="cage")}
    for name, score in (("", 0.2), ("other", 0.05)):
        params = given(topology_scorer, {"topologyProducerName": name})
        scorer = made(topology_scorer, params, Context(settings=settings))
        assert scorer.score(after(0), candidates).tolist() == [score, score, 0.0]


def test_places_are_followed_as_they_change() -> None:
    candidates, scorer = standing(at("rzkh"), at("rzki"), at("----")), made(topology_scorer)
    assert scorer.score(after(0), candidates).tolist() == [1.0, 0.2, 0.0]
    assert scorer.score(after(1), candidates).tolist() == [0.2, 1.0, 0.0]
    candidates.table.put(Endpoint("p2", "10.0.0.3:80", at("rzlj")[0]), 0.0)
    candidates.table.put(Endpoint("p3", "10.0.0.4:80", at("rzkh")[0]), 0.0)
    assert scorer.score(after(0), candidates.table.candidates(NOW)).tolist() == [1.0, 0.2, 0.05, 1.0]


@pytest.mark.parametrize("plugin", [topology_scorer, topology_filter])
def test_a_plugin_that_says_nothing_of_places_is_refused(plugin: Plugin[Any]) -> None:
    params = given(plugin, {"topologyProducerName": "pages"})
    with pytest.raises(ConfigError, match="pages is no topology-extractor"):
        made(plugin, params, Context(settings={"pages": NoParams()}))


def test_the_extractor_of_a_configuration_is_read() -> None:
    config = load(CONFIG, experimental=True)
    candidates = standing(({"cage": "1"}, ""), ({"cage": "2"}, ""), ({"cage": "1"}, ""))
    decision = build(config, Random(0)).schedule(after(0), candidates)
    assert decision.raw.tolist() == [[0.2, 0.2]]
    assert [(each.name, each.slots.tolist()) for each in decision.exclusions] == [("topology-affinity-filter", [1])]


CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: topology-extractor, name: cages, parameters: {rack: cage}}
- {type: topology-affinity-filter, parameters: {minAffinity: rack, topologyProducerName: cages}}
- {type: topology-affinity-scorer, parameters: {topologyProducerName: cages}}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: topology-affinity-filter}, {pluginRef: topology-affinity-scorer}]}
"""


@pytest.mark.parametrize("how", ["filter", "scorer"])
def test_the_prefill_endpoint_is_chosen_next_to_the_decode_endpoint(how: str) -> None:
    table = EndpointTable()
    for i, (role, node) in enumerate([("decode", "n1"), ("decode", "n2"), ("prefill", "n1"), ("prefill", "n2")]):
        slot = table.put(Endpoint(f"p{i}", f"10.0.0.{i + 1}:80", {"llm-d.ai/role": role}, node=node), 0.0)
        table.page_told(slot, table.generation(slot), Page(waiting=[5, 0, 0, 1][i]), NOW)
    picker, by_queue = made(max_score, PickerParams()), (made(queue), 1.0)
    near = {
        "filter": ([made(prefill_role), made(topology_filter)], [by_queue]),
        "scorer": ([made(prefill_role)], [by_queue, (made(topology_scorer), 2.0)]),
        "neither": ([made(prefill_role)], [by_queue]),
    }
    for way, prefill in ((how, 3), ("neither", 2)):
        context = Context(deciders={"always": made(always)}, profiles=("decode", "prefill"))
        params = given(handlers.disaggregated, {"deciders": {"prefill": "always"}})
        choosing = Scheduler(
            Lineup(
                [Profile("decode", [made(decode_role)], [by_queue], picker), Profile("prefill", *near[way], picker)],
                handler=made(handlers.disaggregated, params, context),
            ),
            Random(0),
        )
        decision = choosing.schedule(asking(), table.candidates(NOW))
        assert decision.prefill is not None
        assert (decision.first, decision.prefill.first) == (1, prefill)


@examples(
    places=st.lists(st.text("ab-", min_size=4, max_size=4), min_size=1, max_size=9),
    peer=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_scores_stay_in_range_follow_their_candidates_and_agree_with_the_filter(
    places: list[str], peer: int, seed: int
) -> None:
    candidates, request = standing(*map(at, places)), after(peer % len(places))
    scorer, host = made(topology_scorer), made(topology_filter)
    scores = scorer.score(request, candidates)
    assert set(scores.tolist()) <= {0.0, 0.02, 0.05, 0.2, 1.0}
    order = np.random.default_rng(seed).permutation(len(places))
    shuffled = Candidates(candidates.table, candidates.slots[order], NOW)
    assert np.array_equal(scorer.score(request, shuffled), scores[order])
    same_host = scores == 1.0
    assert np.array_equal(host.keep(request, candidates), same_host if same_host.any() else ~same_host)
