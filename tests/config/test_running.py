"""What a changed configuration keeps, and what it begins anew."""

from __future__ import annotations

from random import Random

import pytest

from epp.config.document import ConfigErrors
from epp.config.load import load
from epp.config.running import Running
from epp.endpoints.table import EndpointTable
from epp.flow.saturation import Concurrency, Counted, Detector, Utilization
from tests.config.test_load import HEAD
from tests.scheduling.builders import ask, pool

PROMPT = "ab c" * 64 * 4
"""256 tokens: four blocks."""
PREFIX = "plugins: [{type: prefix-cache-scorer}, {type: approx-prefix-cache-producer, parameters: %s}]\n"


def test_what_a_producer_has_learned_stays_while_its_parameters_stay() -> None:
    running = Running(load(HEAD + PREFIX % "{lruCapacityPerServer: 999}"), Random(0))
    candidates = pool(None, None)
    went = running.scheduler.schedule(ask(PROMPT), candidates).first
    running.take(load(HEAD + PREFIX % "{lruCapacityPerServer: 999}" + "featureGates: [dataLayer]"))
    assert running.scheduler.prefix_blocks() == 4
    decision = running.scheduler.schedule(ask(PROMPT), pool(None, None, table=candidates.table))
    assert (decision.first, decision.matched_tokens) == (went, 256)


def test_it_begins_anew_with_other_parameters() -> None:
    running = Running(load(HEAD + PREFIX % "{lruCapacityPerServer: 999}"), Random(0))
    running.scheduler.schedule(ask(PROMPT), pool(None, None))
    running.take(load(HEAD + PREFIX % "{lruCapacityPerServer: 998}"))
    assert running.scheduler.prefix_blocks() == 0


def test_a_slot_that_means_another_endpoint_is_forgotten_by_the_plugins_of_today() -> None:
    running = Running(load(HEAD + PREFIX % "{}"), Random(0))
    table = EndpointTable(on_forget=lambda slot: running.scheduler.forget(slot))
    running.scheduler.schedule(ask(PROMPT), pool(None, table=table))
    running.take(load(HEAD + PREFIX % "{}" + "featureGates: [dataLayer]"))
    table.drop(table.endpoint(0).name)
    assert running.scheduler.prefix_blocks() == 0


def test_counts_of_what_runs_are_the_tables_and_stay() -> None:
    running = Running(load(""), Random(0))
    candidates = pool(None, None, inflight=[3, 0])
    running.take(load(HEAD + "plugins: [{type: active-request-scorer}]"))
    assert running.scheduler.schedule(ask(), candidates).first == 1
    assert candidates.column("inflight")[0].tolist() == [3.0, 0.0]


def full_by(running: Running) -> Detector:
    return running.detector


def test_the_detector_changes_with_the_configuration() -> None:
    running = Running(load(""), Random(0))
    assert full_by(running) == Utilization()
    section = "flowControl: {saturationDetector: {pluginRef: concurrency-detector}}\n"
    running.take(load(HEAD + section + "plugins: [{type: concurrency-detector}]"))
    assert full_by(running) == Concurrency(Counted.REQUESTS, 100, 1_000_000)


def test_one_that_cannot_be_used_changes_nothing() -> None:
    attribute = "core-metrics-extractor, parameters: {engineConfigs: [{name: e, customMetrics: [%s]}]}"
    running = Running(load(""), Random(0))
    before = (running.scheduler, running.detector)
    metric = attribute % "{attributeKey: gpu, metricSpec: gpu_use}"
    reads = "{type: endpoint-attribute-filter, parameters: {attribute: gpu, algorithm: %s}}"
    threshold = "{type: threshold, threshold: {operator: LessThan, value: 1}}"
    config = load(HEAD + f"plugins: [{{type: {metric}}}, {reads % threshold}]", experimental=True)
    with pytest.raises(ConfigErrors, match="gpu"):  # its page is read only from the next start on
        running.take(config)
    assert (running.scheduler, running.detector) == before


def test_a_plugin_that_was_made_with_anothers_parameters_begins_anew_with_them() -> None:
    plugins = "plugins: [{type: topology-affinity-scorer}, {type: topology-extractor, parameters: {zone: %s}}]"
    config = [load(HEAD + plugins % zone, experimental=True) for zone in ("a", "a", "b")]
    running = Running(config[0], Random(0))
    (first,) = running.scheduler.lineup.profiles["default"].scorers
    running.take(config[1])
    (same,) = running.scheduler.lineup.profiles["default"].scorers
    running.take(config[2])
    (other,) = running.scheduler.lineup.profiles["default"].scorers
    assert first is same is not other


def test_a_producer_that_is_new_is_found_by_those_who_ask_for_any() -> None:
    """token-load-scorer takes the uncached part of a prompt where somebody says how much is cached."""
    running = Running(load(HEAD + "plugins: [{type: token-load-scorer}]"), Random(0))
    (first,) = running.scheduler.lineup.profiles["default"].scorers
    running.take(load(HEAD + "plugins: [{type: token-load-scorer}, {type: prefix-cache-scorer}]"))
    other, _ = running.scheduler.lineup.profiles["default"].scorers
    assert first is not other
