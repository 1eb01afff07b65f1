"""From a configuration to a scheduler that decides."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from epp.config.build import build, detector
from epp.config.document import ConfigErrors
from epp.config.load import load, load_file
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Page
from epp.errors import ConfigError
from epp.flow.saturation import Concurrency, Counted, Utilization
from epp.scheduling.catalogue import catalogue
from epp.scheduling.plugin import SIGNALS, Context, NoParams, Scores, scorer
from tests.scheduling.builders import ask, pool

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
SAMPLES = Path(__file__).parents[2] / "config" / "picker"


def test_the_default_weighs_queue_two_cache_two_prefix_three() -> None:
    scheduler = build(load(""), Random(0))
    candidates = pool(Page(waiting=0, kv_usage=0.5), Page(waiting=4, kv_usage=0.0))
    decision = scheduler.schedule(ask("ab c" * 64), candidates)
    assert decision.scorers == (
        ("queue-scorer", 2.0),
        ("kv-cache-utilization-scorer", 2.0),
        ("prefix-cache-scorer", 3.0),
    )
    assert decision.totals.tolist() == [2 + 1, 0 + 2]
    assert decision.first == 0
    assert scheduler.schedule(ask("ab c" * 64), candidates).totals.tolist() == [3 + 3, 2]


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_sample_decides(sample: Path) -> None:
    roles = [{"llm-d.ai/role": role} for role in ("decode", "prefill")]
    pages = (Page(waiting=0, kv_usage=0.5), None)
    decision = build(load_file(sample), Random(0)).schedule(ask(), pool(*pages, labels=roles))
    assert decision.endpoints
    assert decision.failures == ()


def test_fallbacks_and_names_are_the_operators() -> None:
    text = """
plugins:
- {type: queue-scorer, name: shortest}
- {type: max-score-picker, name: best, parameters: {maxNumOfEndpoints: 2}}
"""
    decision = build(load(HEAD + text), Random(0)).schedule(ask(), pool(*(Page(waiting=i) for i in (2, 0, 1))))
    assert decision.scorers == (("shortest", 1.0),)
    assert decision.endpoints == ("192.168.1.2:8000", "192.168.1.3:8000")


def test_two_prefix_scorers_read_their_own_producers() -> None:
    text = """
plugins:
- {type: approx-prefix-cache-producer, name: gpu, parameters: {autoTune: false, lruCapacityPerServer: 4}}
- {type: approx-prefix-cache-producer, name: cpu, parameters: {autoTune: false, lruCapacityPerServer: 1000}}
- {type: prefix-cache-scorer, name: on-gpu, parameters: {prefixMatchInfoProducerName: gpu}}
- {type: prefix-cache-scorer, name: on-cpu, parameters: {prefixMatchInfoProducerName: cpu}}
"""
    scheduler = build(load(HEAD + text), Random(0))
    request, candidates = ask("ab c" * 64 * 4), pool(None)  # 4 blocks of 64 tokens; 4 * 16 tokens are one block
    scheduler.schedule(request, candidates)
    decision = scheduler.schedule(request, candidates)
    assert decision.raw.tolist() == [[0.25], [1.0]]
    assert decision.matched_tokens == 256  # the most that any of them believes


def test_a_config_that_asks_for_no_prefix_hashes_none() -> None:
    scheduler = build(load(HEAD + "plugins: [{type: queue-scorer}, {type: approx-prefix-cache-producer}]"), Random(0))
    assert scheduler.lineup.producers == ()


class Refuses:
    """Refuse to be made."""

    def __init__(self, params: NoParams, context: Context) -> None:
        raise ConfigError("not on a Monday")

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return np.ones(len(candidates))


@scorer("gpu-scorer", params=NoParams, needs=("waiting", "gpu_use"))
def gpu(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    """Prefer idle GPUs."""
    return np.ones(len(candidates))


def test_a_plugin_that_needs_what_nobody_provides_is_refused_with_its_place() -> None:
    refuses = scorer("refuses", params=NoParams)(Refuses)
    config = load(HEAD + "plugins:\n- type: gpu-scorer\n- type: refuses", "epp.yaml", catalogue([gpu, refuses]))
    with pytest.raises(ConfigErrors) as caught:
        build(config, Random(0))
    assert str(caught.value).splitlines() == [
        "epp.yaml:4:3: plugins[0]: gpu-scorer needs gpu_use, which nobody provides",
        "epp.yaml:5:3: plugins[1]: not on a Monday",
    ]
    good = load(HEAD + "plugins:\n- type: gpu-scorer", "epp.yaml", catalogue([gpu]))
    build(good, Random(0), SIGNALS | {"gpu_use"})


def test_the_detector_has_the_operators_thresholds_in_seconds_and_shares() -> None:
    assert detector(load("")) == Utilization(queue_depth=5, kv_usage=0.8, staleness=0.2)
    thresholds = "{queueDepthThreshold: 3, kvCacheUtilThreshold: 1, metricsStalenessThreshold: 1.5s}"
    config = load(HEAD + f"plugins: [{{type: utilization-detector, parameters: {thresholds}}}]")
    assert detector(config) == Utilization(queue_depth=3, kv_usage=1.0, staleness=1.5)
    counting = (
        "plugins: [{type: concurrency-detector}]\nflowControl: {saturationDetector: {pluginRef: concurrency-detector}}"
    )
    assert detector(load(HEAD + counting)) == Concurrency(Counted.REQUESTS, 100, 1_000_000)
    tokens = counting.replace(
        "-detector}]", "-detector, parameters: {concurrencyMode: tokens, maxTokenConcurrency: 7}}]"
    )
    assert detector(load(HEAD + tokens)) == Concurrency(Counted.TOKENS, 100, 7)
