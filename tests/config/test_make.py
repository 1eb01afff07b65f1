"""Plugins of every kind, made from a configuration; and those that a changed configuration keeps."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from epp.config.build import Plugins, assemble, build, make_plugins
from epp.config.document import ConfigErrors
from epp.config.load import load
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.errors import Saturated
from epp.scheduling.catalogue import catalogue
from epp.scheduling.plugin import Context, Instance, NoParams, Plugin, Scores, admitter, scorer
from epp.scheduling.scheduler import Scheduler
from tests.scheduling.builders import NOW, ask, pool

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
PD = """
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: pd}}}
- {type: prefix-based-pd-decider, name: pd, parameters: {nonCachedTokens: 64}}
- {type: decode-filter}
- {type: prefill-filter}
- {type: queue-scorer}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: queue-scorer}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: queue-scorer}]}
"""
LABELS = [{"llm-d.ai/role": "decode"}, {"llm-d.ai/role": "prefill"}]


def built(text: str, *added: Plugin[Instance], experimental: bool = False) -> Scheduler:
    config = load(HEAD + text, "epp.yaml", catalogue(added), experimental=experimental)
    return build(config, Random(0))


def test_a_handler_and_its_decider_are_made_whatever_their_order_in_the_file() -> None:
    scheduler = built(PD)
    candidates = pool(Page(waiting=0), Page(waiting=0), labels=LABELS)
    assert scheduler.schedule(ask("ab c" * 64), candidates).plan == "prefill-decode"
    assert scheduler.schedule(ask("ab c" * 64), candidates).plan == "decode-only"  # both hold it now
    assert scheduler.schedule(ask("short"), candidates).plan == "decode-only"


def test_older_names_of_parameters_still_work_and_the_newer_ones_are_told() -> None:
    config = load(HEAD + PD.replace("{deciders: {prefill: pd}}", "{deciderPluginName: pd}"), "epp.yaml")
    assert config.warnings == ("plugins[0].parameters.deciderPluginName is deprecated: write deciders.prefill",)
    candidates = pool(Page(waiting=0), Page(waiting=0), labels=LABELS)
    assert build(config, Random(0)).schedule(ask("ab c" * 64), candidates).plan == "prefill-decode"


def test_a_handler_that_cannot_be_made_is_reported_at_its_place() -> None:
    text = """
plugins:
- {type: queue-scorer}
- {type: data-parallel-profile-handler}
schedulingProfiles:
- {name: one, plugins: [{pluginRef: queue-scorer}]}
- {name: two, plugins: [{pluginRef: queue-scorer}]}
"""
    with pytest.raises(ConfigErrors) as caught:
        built(text)
    assert str(caught.value) == (
        "epp.yaml:6:3: plugins[1]: it runs one profile, not 2: keep the one that chooses the rank"
    )


def test_an_attribute_that_nobody_provides_is_reported_at_its_place() -> None:
    text = """
plugins:
- type: endpoint-attribute-filter
  parameters:
    attribute: gpu
    algorithm: {type: threshold, threshold: {operator: LessThan, value: 1}}
"""
    config = load(HEAD + text, "epp.yaml", experimental=True)
    with pytest.raises(ConfigErrors, match=r"^epp.yaml:5:3: plugins\[0\]: no attribute is named 'gpu'"):
        build(config, Random(0))


def test_a_type_of_two_roles_filters_and_scores() -> None:
    text = """
plugins:
- {type: context-length-aware, parameters: {enableFiltering: true}}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: context-length-aware, weight: 8}]}
"""
    ranges = [{"llm-d.ai/context-length-range": text} for text in ("0-2000", "2000-8000", "0-8000")]
    decision = built(text).schedule(ask(), pool(Page(), Page(), Page(), labels=ranges))
    assert [(each.name, each.slots.tolist()) for each in decision.exclusions] == [("context-length-aware", [1])]
    assert decision.scorers == (("context-length-aware", 8.0),)
    assert decision.first == 0


def test_admitters_and_processors_act_by_being_declared() -> None:
    @admitter("closed", params=NoParams)
    def closed(request: Request, candidates: Candidates, params: NoParams) -> None:
        """Refuse sessions that are named."""
        if request.session:
            raise Saturated(f"no room for {request.session}")

    scheduler = built("plugins: [{type: closed}, {type: session-id-producer, parameters: {headerName: x-s}}]", closed)
    request = ask()
    assert scheduler.schedule(request, pool(Page(waiting=0)))
    request.headers = (*request.headers, ("x-s", b"a"))
    with pytest.raises(Saturated, match="no room for a"):
        scheduler.schedule(request, pool(Page(waiting=0)))


# -- what a changed configuration keeps --------------------------------------------------------------------------------


class Learns:
    """Remember something."""

    def __init__(self, params: NoParams, context: Context) -> None:
        pass

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return np.ones(len(candidates))


learns = scorer("learns", params=NoParams)(Learns)
ADDED = ("max-score-picker", "utilization-detector")
"""By default."""
FIRST = [
    "{type: approx-prefix-cache-producer}",
    "{type: prefix-cache-scorer}",
    "{type: queue-scorer}",
    "{type: learns}",
]


def remade(texts: Sequence[str], before: Plugins | None = None) -> Plugins:
    config = load(HEAD + "plugins: [" + ", ".join(texts) + "]", "", catalogue([learns]))
    return make_plugins(config, Random(0), before=before)


def kept(texts: Sequence[str]) -> list[str]:
    """Names of the plugins that are what they were, in the order of the file."""
    before = remade(FIRST)
    after = remade(texts, before)
    return [name for name in after if after[name] is before.get(name) and name not in ADDED]


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (FIRST, ["approx-prefix-cache-producer", "prefix-cache-scorer", "queue-scorer", "learns"]),
        (
            [*FIRST[:2], "{type: queue-scorer, parameters: {unknown: 0.1}}", "{type: learns}"],
            ["approx-prefix-cache-producer", "prefix-cache-scorer", "learns"],
        ),
        (FIRST[:2], ["approx-prefix-cache-producer", "prefix-cache-scorer"]),
        (
            ["{type: approx-prefix-cache-producer, parameters: {lruCapacityPerServer: 9}}", *FIRST[1:]],
            [],  # another index; who was made with the old one would still read that
        ),
        (["{type: learns, name: other}"], []),
    ],
)
def test_a_plugin_that_is_described_as_before_is_kept(texts: list[str], names: list[str]) -> None:
    assert kept(texts) == names


def test_what_was_learned_still_counts_after_a_change() -> None:
    table = EndpointTable()
    pool(Page(waiting=0, kv_usage=0.1), Page(waiting=0, kv_usage=0.1), table=table)
    old, new = load(""), load(HEAD + "plugins: [{type: prefix-cache-scorer}]")
    before = make_plugins(old, Random(0))
    first = assemble(old, before, Random(0)).schedule(ask("ab c" * 64), table.candidates(NOW))
    changed = assemble(new, make_plugins(new, Random(0), before=before), Random(0))
    second = changed.schedule(ask("ab c" * 64), table.candidates(NOW))
    assert (first.matched_tokens, second.matched_tokens) == (0.0, 64.0)
    assert second.first == first.first
