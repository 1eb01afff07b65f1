"""What every plugin of the catalogue keeps to."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page
from epp.errors import ConfigError
from epp.scheduling.cases import Case
from epp.scheduling.catalogue import BUILT_IN, catalogue, installed
from epp.scheduling.check import Subject, check, trial
from epp.scheduling.peers import Hook
from epp.scheduling.plugin import (
    SIGNALS,
    Admitter,
    Decider,
    Filter,
    Instance,
    Params,
    Picker,
    Plugin,
    Scorer,
    Scores,
    scorer,
)
from epp.scheduling.scorers import LoadParams, queue
from tests.scheduling.builders import NOW, ask, with_prefix

SCORERS = [plugin for plugin in BUILT_IN if plugin.kind is Scorer]
PICKERS = [plugin for plugin in BUILT_IN if plugin.kind is Picker]
NEEDED: dict[str, dict[str, Any]] = {
    "endpoint-attribute-scorer": {"attribute": "kv_usage", "algorithm": {"type": "linear_lower_is_better"}},
    "header-label-affinity-scorer": {"headerName": "x-zone", "labelKey": "zone"},
    "by-label": {"label": "zone", "validValues": ["a"]},
    "utilization-filter": {"conditions": [{"metric": "waiting-queue", "maxValue": 5}]},
    "endpoint-attribute-filter": {
        "attribute": "kv_usage",
        "algorithm": {"type": "threshold", "threshold": {"operator": "LessThan", "value": 0.5}},
    },
    "disaggregatedset-rollout-screener": {
        "scope": {"labelSelector": "zone=a"},
        "revisionGating": {"requireRoles": {"values": ["decode"]}},
    },
    "session-id-producer": {"headerName": "x-session-id"},
    "request-attribute-reporter": {"attributes": [{"key": {"name": "cost"}, "expression": "usage.total_tokens"}]},
}
"""Parameters of those plugins that have no defaults for all of them."""

amounts = st.none() | st.floats(0, 1e6)
pages = st.none() | st.builds(
    Page,
    waiting=amounts,
    running=amounts,
    kv_usage=st.none() | st.floats(0, 1),
    kv_blocks=amounts,
    block_size=st.none() | st.sampled_from([1.0, 16.0, 64.0]),
    max_lora=st.none() | st.integers(0, 4).map(float),
    running_adapters=st.lists(st.sampled_from("abc"), max_size=3, unique=True).map(tuple),
    waiting_adapters=st.lists(st.sampled_from("abc"), max_size=3, unique=True).map(tuple),
)


def told(pages: list[Page | None], ages: list[float], inflight: list[int]) -> Candidates:
    table = EndpointTable(freshness=2.0)
    for i, page in enumerate(pages):
        slot = table.put(Endpoint(f"p{i}", f"10.0.0.{i}:1"), 0.0)
        if page is not None:
            table.page_told(slot, table.generation(slot), page, NOW - ages[i])
        for _ in range(inflight[i]):
            table.admit(slot)
    return table.candidates(NOW)


@pytest.mark.parametrize("plugin", SCORERS, ids=lambda plugin: plugin.name)
@given(
    facts=st.lists(st.tuples(pages, st.floats(0, 4), st.integers(0, 5)), min_size=1, max_size=9),
    model=st.sampled_from(["a", "base"]),
    seed=st.integers(0, 99),
)
def test_every_scorer_keeps_the_contract(
    plugin: Plugin[Instance], facts: list[tuple[Page | None, float, int]], model: str, seed: int
) -> None:
    """Shape (N,), within 0..1, nothing changed, and the same under any order of the candidates."""
    candidates = told([page for page, _, _ in facts], [age for _, age, _ in facts], [count for _, _, count in facts])
    producer, context = with_prefix()
    assert producer.chosen is not None
    request = ask("p" * 1024, model=model)
    producer.chosen(request, candidates, candidates.slots[:1])
    instance = plugin.make(plugin.name, msgspec.convert(NEEDED.get(plugin.name, {}), plugin.params), context)
    assert isinstance(instance, Scorer)
    columns = {name: candidates.column(name)[0].copy() for name in SIGNALS - {"adapters", "prefix-match"}}

    scores = instance.score(request, candidates)
    assert scores.shape == (len(facts),)
    assert ((scores >= 0) & (scores <= 1)).all()
    for name, column in columns.items():
        assert np.array_equal(candidates.column(name)[0], column, equal_nan=True)
    order = np.random.default_rng(seed).permutation(len(facts))
    shuffled = Candidates(candidates.table, candidates.slots[order], NOW)
    assert np.array_equal(instance.score(request, shuffled), scores[order])


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda plugin: plugin.name)
def test_every_plugin_keeps_the_contract_in_every_corner(plugin: Plugin[Instance]) -> None:
    assert check(plugin, msgspec.convert(NEEDED.get(plugin.name, {}), plugin.params)) == []


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda plugin: plugin.name)
@settings(max_examples=20)
@given(
    facts=st.lists(st.tuples(pages, st.floats(0, 4), st.integers(0, 5)), min_size=1, max_size=9),
    model=st.sampled_from(["a", "base"]),
)
def test_every_plugin_keeps_the_contract_in_any_pool(
    plugin: Plugin[Instance], facts: list[tuple[Page | None, float, int]], model: str
) -> None:
    candidates = told([page for page, _, _ in facts], [age for _, age, _ in facts], [count for _, _, count in facts])
    params = msgspec.convert(NEEDED.get(plugin.name, {}), plugin.params)
    for role in plugin.roles:
        assert list(trial(Subject(role, params), Case("any", candidates, lambda: ask("p" * 1024, model=model)))) == []


@pytest.mark.parametrize("plugin", PICKERS, ids=lambda plugin: plugin.name)
@given(
    totals=st.lists(st.floats(0, 10) | st.integers(0, 2).map(float), min_size=1, max_size=9),
    endpoints=st.integers(1, 11),
    seed=st.integers(0, 99),
)
def test_every_picker_returns_as_many_as_it_is_asked_for_and_changes_no_total(
    plugin: Plugin[Instance], totals: list[float], endpoints: int, seed: int
) -> None:
    instance = plugin.make(plugin.name, plugin.params(max_num_of_endpoints=endpoints), with_prefix()[1])
    assert isinstance(instance, Picker)
    values = np.array(totals)
    order = instance.order(ask(), told([None] * len(totals), [], [0] * len(totals)), values, Random(seed))
    assert len(order) == min(endpoints, len(totals))
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(len(totals)))
    assert values.tolist() == totals


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda plugin: plugin.name)
def test_every_plugin_is_described(plugin: Plugin[Instance]) -> None:
    """A docstring, needs that exist, and a docstring under each parameter (read from the source)."""
    assert plugin.doc.strip()
    assert plugin.kind in (Filter, Scorer, Picker, Decider, Admitter, Hook) or plugin.needs == ()
    assert set(plugin.needs) <= SIGNALS
    bases = [base for base in plugin.params.__mro__ if issubclass(base, Params)]
    source = "".join(map(inspect.getsource, bases))
    for field in msgspec.structs.fields(plugin.params):
        definition = next(line for line in source.splitlines() if line.strip().startswith(f"{field.name}:"))
        following = source[source.index(definition) + len(definition) :].lstrip()
        assert following.startswith('"""'), f"{plugin.name}: {field.name} has no docstring"


def test_built_in_plugins_are_those_of_the_reference_and_ours() -> None:
    assert list(catalogue()) == [
        "disaggregatedset-rollout-screener",
        "label-selector-filter",
        "by-label-selector",
        "by-label",
        "decode-filter",
        "prefill-filter",
        "encode-filter",
        "utilization-filter",
        "endpoint-attribute-filter",
        "prefix-cache-affinity-filter",
        "utilization-detector",
        "concurrency-detector",
        "session-affinity-filter",
        "response-affinity",
        "topology-affinity-filter",
        "queue-scorer",
        "running-requests-size-scorer",
        "kv-cache-utilization-scorer",
        "active-request-scorer",
        "load-aware-scorer",
        "token-load-scorer",
        "no-hit-lru-scorer",
        "endpoint-attribute-scorer",
        "cost-scorer",
        "lora-affinity-scorer",
        "prefix-cache-scorer",
        "mm-embeddings-cache-scorer",
        "session-affinity-scorer",
        "header-label-affinity-scorer",
        "topology-affinity-scorer",
        "context-length-aware",
        "max-score-picker",
        "random-picker",
        "weighted-random-picker",
        "softmax-picker",
        "power-of-two-picker",
        "approx-prefix-cache-producer",
        "disagg-profile-handler",
        "pd-profile-handler",
        "data-parallel-profile-handler",
        "header-profile-handler",
        "always-disagg-pd-decider",
        "prefix-based-pd-decider",
        "always-disagg-multimodal-decider",
        "probabilistic-admitter",
        "agent-identity",
        "session-id-producer",
        "p2p-source-producer",
        "request-attribute-reporter",
        "header-based-testing-filter",
        "destination-endpoint-served-verifier",
    ]


def test_a_plugin_of_a_package_is_added_and_a_second_one_of_a_type_is_refused() -> None:
    @scorer("my-scorer", params=LoadParams)
    def mine(request: Request, candidates: Candidates, params: LoadParams) -> Scores:
        """Prefer nobody."""
        return np.ones(len(candidates))

    assert list(catalogue([mine]))[-1] == "my-scorer"
    with pytest.raises(ConfigError, match="two plugins have the type queue-scorer"):
        catalogue([queue])


MODULE = """
from epp.scheduling.plugin import NoParams, scorer

@scorer("rack-scorer", params=NoParams)
def rack(request, candidates, params):
    'Prefer the same rack.'

number = 7
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package; its entry points are still to be written into the file returned."""
    (tmp_path / "rack_plugins.py").write_text(MODULE)
    metadata = tmp_path / "rack-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rack\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rack_plugins", raising=False)
    return metadata / "entry_points.txt"


def test_an_installed_package_adds_its_plugins(package: Path) -> None:
    package.write_text("[epp.plugins]\nrack-scorer = rack_plugins:rack\n")
    assert "rack-scorer" in catalogue(installed())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rack_plugins:number", r"plugin rack-scorer of rack is no plugin \(rack_plugins:number\)"),
        ("rack_plugins:gone", r"plugin rack-scorer of rack cannot be loaded \(rack_plugins:gone\)"),
        ("no_such_module:rack", "plugin rack-scorer of rack cannot be loaded .*No module named 'no_such_module'"),
    ],
)
def test_a_package_whose_plugin_cannot_be_used_is_named(package: Path, value: str, message: str) -> None:
    package.write_text(f"[epp.plugins]\nrack-scorer = {value}\n")
    with pytest.raises(ConfigError, match=message):
        installed()
