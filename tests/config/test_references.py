"""Who refers to whom: orders, circles, and what is read instead of what finds nothing."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.config.document import ConfigErrors
from epp.config.load import load
from epp.config.references import Mention, in_order, mentions
from epp.dialects.request import Request
from epp.endpoints.table import Candidates
from epp.scheduling.catalogue import catalogue
from epp.scheduling.plugin import (
    NoParams,
    Params,
    Ref,
    Scores,
    admitter,
    decider,
    deprecated,
    experimental,
    processor,
    scorer,
)
from epp.scheduling.producers import ApproximateParams
from epp.scheduling.scorers import PrefixParams
from tests.config.test_load import HEAD, entries


class PairParams(Params, frozen=True):
    other: Annotated[str, Ref("scorer")] = ""
    """Another scorer."""


class ManyParams(Params, frozen=True):
    first: PairParams = PairParams()
    """One."""
    more: tuple[PairParams, ...] = ()
    """Others."""


@scorer("pair-scorer", params=PairParams)
def pair(request: Request, candidates: Candidates, params: PairParams) -> Scores:
    """Prefer nobody."""
    return np.ones(len(candidates))


@experimental
@scorer("young-scorer", params=NoParams)
def young(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    """Prefer nobody."""
    return np.ones(len(candidates))


@deprecated("pair-scorer")
@scorer("old-scorer", params=NoParams)
def old(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    """Prefer nobody."""
    return np.ones(len(candidates))


@admitter("open-door", params=NoParams)
def door(request: Request, candidates: Candidates, params: NoParams) -> None:
    """Admit everybody."""


@processor("reads-nothing", params=NoParams)
def reader(request: Request, params: NoParams) -> None:
    """Read nothing."""


@decider("never", params=NoParams)
def never(request: Request, decode: object, params: NoParams) -> bool:
    """Decide against it."""
    return False


PLUGINS = catalogue([pair, young, old, door, reader, never])


def test_every_field_that_refers_to_something_is_found_at_any_depth() -> None:
    value = ManyParams(first=PairParams(other="a"), more=(PairParams(), PairParams(other="b")))
    to = Ref("scorer")
    assert list(mentions(value)) == [
        Mention("first.other", "a", to),
        Mention("more[0].other", "", to),
        Mention("more[1].other", "b", to),
    ]


@pytest.mark.parametrize(
    ("needs", "order"),
    [
        ({}, "abc"),
        ({"a": ["c"], "c": ["b"]}, "bca"),
        ({"a": ["b", "c"]}, "bca"),
        ({"c": ["a"]}, "abc"),
    ],
)
def test_what_is_needed_comes_first_else_the_order_stays(needs: dict[str, list[str]], order: str) -> None:
    assert in_order("abc", needs, lambda names: pytest.fail(str(names))) == list(order)


@given(st.permutations(range(6)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9))
def test_an_order_without_circles_is_found_whatever_the_names(names: list[int], pairs: set[tuple[int, int]]) -> None:
    needs = {str(n): [str(other) for one, other in sorted(pairs) if one == n and other < n] for n in names}
    order = in_order([str(n) for n in names], needs, lambda names: pytest.fail(str(names)))
    assert sorted(order) == sorted(needs)
    assert all(order.index(other) < order.index(name) for name, others in needs.items() for other in others)


def test_a_circle_is_an_error_where_it_is_closed() -> None:
    text = """
plugins:
- type: pair-scorer
  name: a
  parameters: {other: b}
- type: pair-scorer
  name: b
  parameters:
    other: c
- type: pair-scorer
  name: c
  parameters: {other: a}
- type: pair-scorer
  name: d
  parameters: {other: d}
"""
    with pytest.raises(ConfigErrors) as caught:
        load(HEAD + text, "epp.yaml", PLUGINS)
    assert str(caught.value).splitlines() == [
        "epp.yaml:7:23: plugins[0].parameters.other: a -> b -> c -> a: plugins that refer to each other in a circle",
        "epp.yaml:17:23: plugins[3].parameters.other: d -> d: plugins that refer to each other in a circle",
    ]


def test_what_is_referred_to_is_made_first_whatever_the_order_of_the_file() -> None:
    text = """
plugins:
- {type: pair-scorer, name: a, parameters: {other: b}}
- {type: prefix-cache-scorer}
- {type: pair-scorer, name: b}
"""
    assert list(load(HEAD + text, plugins=PLUGINS).plugins) == [
        "b",
        "a",
        "approx-prefix-cache-producer",
        "prefix-cache-scorer",
        "max-score-picker",
        "utilization-detector",
    ]


def test_what_works_on_whole_requests_works_because_it_is_declared() -> None:
    text = "plugins: [{type: open-door}, {type: reads-nothing}, {type: never}, {type: queue-scorer}]"
    config = load(HEAD + text, plugins=PLUGINS)
    assert [name for name in ("open-door", "reads-nothing", "never") if name in config.plugins] == [
        "open-door",
        "reads-nothing",
    ]
    assert config.warnings == ("plugins[2]: never has no effect: no plugin refers to it",)
    assert entries(config) == [("queue-scorer", 1.0), ("max-score-picker", 1.0)]


def test_a_scorer_whose_producer_finds_nothing_here_reads_the_default_one() -> None:
    text = """
plugins:
- {type: precise-prefix-cache-producer}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
"""
    config = load(HEAD + text)
    assert config.plugins["prefix-cache-scorer"].params == PrefixParams(
        prefix_match_info_producer_name="approx-prefix-cache-producer"
    )
    assert config.plugins["approx-prefix-cache-producer"].params == ApproximateParams()
    assert config.warnings == (
        "plugins[1].parameters.prefixMatchInfoProducerName has no effect: prefix-cache-scorer reads"
        " approx-prefix-cache-producer instead of precise-prefix-cache-producer",
        "plugins[0]: precise-prefix-cache-producer has no effect: KV-cache events are not read yet",
    )


def test_a_scorer_that_is_not_there_yet_is_stood_in_for_with_its_weight() -> None:
    text = """
plugins:
- {type: precise-prefix-cache-scorer, name: precise}
- {type: prefix-cache-scorer}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: precise, weight: 3}
  - {pluginRef: prefix-cache-scorer, weight: 2}
"""
    config = load(HEAD + text)
    assert entries(config) == [("prefix-cache-scorer", 5.0), ("max-score-picker", 1.0)]
    alone = load(HEAD + "plugins: [{type: precise-prefix-cache-scorer}]")
    assert entries(alone) == [("prefix-cache-scorer", 1.0), ("max-score-picker", 1.0)]


def test_experimental_plugins_need_the_flag_and_deprecated_ones_say_what_to_write() -> None:
    text = HEAD + "plugins:\n- type: young-scorer\n- type: old-scorer\n"
    with pytest.raises(ConfigErrors, match=r"4:9: plugins\[0\].type: young-scorer is experimental"):
        load(text, plugins=PLUGINS)
    config = load(text, plugins=PLUGINS, experimental=True)
    assert config.warnings == ("plugins[1].type: old-scorer is deprecated: write pair-scorer",)
