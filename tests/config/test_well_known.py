"""The reference's well-known configurations, and what they choose here."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from epp.config.build import build
from epp.config.load import load_file
from epp.config.schema import Config
from epp.endpoints.table import Page
from tests.scheduling.builders import ask, pool

FOLDER = Path(__file__).parents[2] / "config" / "picker" / "well-known"
NAMES = (
    "flow-control",
    "optimized-baseline",
    "payload-agnostic",
    "pd-disaggregation",
    "predicted-latency-slo",
    "tiered-prefix-cache-cpu",
    "wide-ep-lws",
    "wide-ep-lws-experimental-dp-aware",
)


def known(name: str) -> Config:
    return load_file(FOLDER / f"{name}.yaml", experimental=True)


def test_all_eight_are_there() -> None:
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_decides(name: str) -> None:
    roles = [{}, {"llm-d.ai/role": "prefill"}, {}]
    candidates = pool(Page(waiting=0, kv_usage=0.5), Page(waiting=3, kv_usage=0.1), None, labels=roles)
    decision = build(known(name), Random(0)).schedule(ask("ab c" * 64), candidates)
    assert decision.endpoints
    assert decision.failures == ()


@pytest.mark.parametrize("name", ["pd-disaggregation", "wide-ep-lws"])
def test_every_prompt_is_handed_over(name: str) -> None:
    candidates = pool(None, None, labels=[{"llm-d.ai/role": "decode"}, {"llm-d.ai/role": "prefill"}])
    decision = build(known(name), Random(0)).schedule(ask(), candidates)
    assert decision.endpoints == ("192.168.1.1:8000",)
    assert decision.set_headers == (("x-prefiller-host-port", b"192.168.1.2:8000"),)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "payload-agnostic"])
def test_no_experimental_plugin_is_needed(name: str) -> None:
    load_file(FOLDER / f"{name}.yaml")


def test_two_prefix_scorers_read_two_producers() -> None:
    config = known("tiered-prefix-cache-cpu")
    producers = [each.name for each in config.plugins.values() if each.type == "approx-prefix-cache-producer"]
    assert sorted(producers) == ["approx-prefix-cache-producer", "cpu-prefix-cache-producer"]
    assert config.warnings == ()


@pytest.mark.parametrize("name", ["pd-disaggregation", "wide-ep-lws", "wide-ep-lws-experimental-dp-aware"])
def test_disaggregation_has_its_handler_and_two_profiles(name: str) -> None:
    config = known(name)
    assert config.handler == "disagg-profile-handler"
    assert [profile.name for profile in config.profiles] == ["prefill", "decode"]
    (told,) = config.warnings
    assert told.endswith("it is deprecated, since the profile handler itself sets the headers")


def test_without_predictions_three_scorers_share_the_weight() -> None:
    (profile,) = known("predicted-latency-slo").profiles
    assert [(each.name, each.weight) for each in profile.plugins] == [
        ("strict-affinity-filter", 1.0),
        ("loose-affinity-filter", 1.0),
        ("weighted-random-picker", 1.0),
        ("kv-cache-utilization-scorer", 1 / 3),
        ("queue-scorer", 1 / 3),
        ("prefix-cache-scorer", 1 / 3),
    ]


def test_what_has_no_effect_is_told() -> None:
    assert known("predicted-latency-slo").warnings == (
        "schedulingProfiles[0].plugins[0]: predicted-latency-producer has no effect in a profile:"
        " it is no filter, scorer or picker",
        "plugins[8]: kv-cache-utilization-scorer and queue-scorer and prefix-cache-scorer"
        " score in place of latency-scorer",
        "plugins[5]: predicted-latency-producer has no effect: there is no latency predictor yet",
        "plugins[8]: latency-scorer has no effect: there is no latency predictor yet",
        "plugins[10]: slo-headroom-tier-filter has no effect: there is no latency predictor yet",
        "plugins[11]: latency-slo-admitter has no effect: there is no latency predictor yet, so it admits everybody",
    )
    assert known("flow-control").warnings == (
        "featureGates[0]: the feature gate flowControl has no effect yet",
        "flowControl.maxBytes has no effect yet",
        "flowControl.maxRequests has no effect yet",
        "flowControl.priorityBands has no effect yet",
        "plugins[3]: round-robin-fairness-policy has no effect: there are no queues yet",
        "plugins[4]: fcfs-ordering-policy has no effect: there are no queues yet",
    )
