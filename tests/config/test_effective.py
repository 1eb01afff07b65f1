"""The effective configuration: everything spelled out, with where it comes from, and it loads to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from epp.config.effective import effective
from epp.config.load import load, load_file
from epp.config.schema import Config
from epp.dialects.request import Request
from epp.endpoints.table import Candidates
from epp.scheduling.catalogue import catalogue
from epp.scheduling.plugin import Params, Scores, scorer
from tests.config.test_load import HEAD

SAMPLES = sorted((Path(__file__).parents[2] / "config" / "picker").rglob("*.yaml"))


def said(config: Config) -> list[Any]:
    """A configuration without where it is written."""
    plugins = [(each.name, each.type, each.params, each.plugin) for each in config.plugins.values()]
    names = [name for name in Config.__struct_fields__ if name not in ("plugins", "places", "warnings")]
    return [plugins, *(getattr(config, name) for name in names)]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_what_a_file_comes_to_loads_to_the_same(sample: Path) -> None:
    config = load_file(sample, experimental=True)
    text = effective(config, "picker.yaml")
    again = load(text, experimental=True)
    assert said(again) == said(config)
    assert said(load(effective(again), experimental=True)) == said(config)


def test_old_sections_come_to_the_new_ones() -> None:
    text = "saturationDetector: {kvCacheUtilThreshold: 0.5}\nparser: {pluginRef: openai-parser}\n"
    config = load(HEAD + text)
    again = load(effective(config))
    assert said(again) == said(config)
    assert again.warnings == ("requestHandler.parsers has no effect: every dialect is always understood, by its path",)


class Where(Params, frozen=True):
    name: str = "usual"
    """A name."""
    sizes: tuple[int, ...] = ()
    """Sizes."""


class GivenParams(Params, frozen=True):
    share: float = 0.5
    """A share."""
    where: Where = Where()
    """A section."""
    more: tuple[Where, ...] = ()
    """Sections."""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    """Words."""
    maybe: Where | None = None
    """A section that may be missing."""


@scorer("my-scorer", params=GivenParams)
def mine(request: Request, candidates: Candidates, params: GivenParams) -> Scores:
    """Prefer nobody."""
    return np.ones(len(candidates))


def test_every_value_says_where_it_comes_from() -> None:
    text = """featureGates: [dataLayer=false]
plugins:
- type: my-scorer
  name: first
  parameters:
    share: 0.25
    where:
      sizes: [1,
        2]
    more:
    - {name: 'yes'}
    labels: {"true": 1: 2}
- type: single-profile-handler
schedulingProfiles:
- name: answers
  plugins:
  - pluginRef: first
flowControl:
  priorityBands:
  - priority: 3
""".replace("1: 2", "'1: 2'")
    assert effective(load(HEAD + text, plugins=catalogue([mine])), "picker.yaml") == EFFECTIVE


EFFECTIVE = """\
# What picker.yaml comes to. Comments: the line that says so, or why it counts unsaid.
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
featureGates:
- dataLayer=false  # line 3
plugins:
- name: first  # line 5
  type: my-scorer
  parameters:
    share: 0.25  # line 8
    where:
      name: usual  # default
      sizes:
      - 1  # line 10
      - 2  # line 11
    more:
    - name: 'yes'  # line 13
      sizes: []  # default
    labels:
      'true': '1: 2'  # line 14
- name: single-profile-handler  # line 15
  type: single-profile-handler
- name: max-score-picker  # added: a profile needs a picker
  type: max-score-picker
  parameters:
    maxNumOfEndpoints: 1  # default
- name: utilization-detector  # added: flowControl.saturationDetector refers to it
  type: utilization-detector
  parameters:
    queueDepthThreshold: 5  # default
    kvCacheUtilThreshold: 0.8  # default
    metricsStalenessThreshold: 200ms  # default
    headroom: 0.0  # default
schedulingProfiles:
- name: answers  # line 17
  plugins:
  - pluginRef: first  # line 19
    weight: 1.0  # default
  - pluginRef: max-score-picker  # added: a profile needs a picker
dataLayer:
  injectDefaults: true  # default
  sources: []  # default
  crossReplicaSyncerPluginRef: ''  # default
  crossReplicaSyncInterval: 200ms  # default
flowControl:
  maxBytes: 0  # default
  maxRequests: 0  # default
  defaultRequestTTL: 60s  # default
  noEndpointRequestTTL: ''  # default
  defaultPriorityBand:
    maxBytes: 0  # default
    maxRequests: 0  # default
    fairnessPolicyRef: global-strict-fairness-policy  # default
    orderingPolicyRef: fcfs-ordering-policy  # default
  defaultNegativePriorityBand:
    maxBytes: 0  # default
    maxRequests: 0  # default
    fairnessPolicyRef: global-strict-fairness-policy  # default
    orderingPolicyRef: fcfs-ordering-policy  # default
  priorityBands:
  - maxBytes: 0  # default
    maxRequests: 0  # default
    fairnessPolicyRef: global-strict-fairness-policy  # default
    orderingPolicyRef: fcfs-ordering-policy  # default
    priority: 3  # line 22
  usageLimitPolicyPluginRef: static-usage-limit-policy  # default
  saturationDetector:
    pluginRef: utilization-detector  # default
  enableEviction: false  # default
"""


def test_words_that_yaml_would_take_for_something_else_stay_words() -> None:
    text = "plugins: [{type: queue-scorer, name: 'yes'}, {type: random-picker, name: '1: # x'}]"
    config = load(HEAD + text)
    assert list(load(effective(config)).plugins)[:2] == ["yes", "1: # x"]


def test_the_same_file_always_gives_the_same_text() -> None:
    sample = SAMPLES[0].read_text()
    assert len({effective(load(sample, experimental=True)) for _ in range(3)}) == 1
