"""Configurations read: defaults, every kind of mistake with its place, and what is accepted without effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from epp.config.document import ConfigErrors
from epp.config.load import load, load_file
from epp.config.parameters import FileDiscovery
from epp.config.schema import Config
from epp.errors import ConfigError
from epp.scheduling.plugin import PickerParams
from epp.scheduling.producers import ApproximateParams

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
SAMPLES = Path(__file__).parents[2] / "config" / "picker"

DEFAULT = [
    ("queue-scorer", 2.0),
    ("kv-cache-utilization-scorer", 2.0),
    ("prefix-cache-scorer", 3.0),
    ("max-score-picker", 1.0),
]
ADDED = ("approx-prefix-cache-producer", "utilization-detector")
"""What the default's plugins, and the section flowControl, refer to."""


def entries(config: Config) -> list[tuple[str, float]]:
    (profile,) = config.profiles
    return [(reference.name, reference.weight) for reference in profile.plugins]


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(text, "epp.yaml")
    return str(caught.value).splitlines()


# -- defaults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", HEAD, HEAD + "plugins:\n"])
def test_nothing_said_is_the_default(text: str) -> None:
    config = load(text)
    assert entries(config) == DEFAULT
    assert sorted(config.plugins) == sorted([*(name for name, _ in DEFAULT), *ADDED])
    assert config.discovery is None
    assert config.warnings == ()


def test_the_sample_of_the_default_is_the_default() -> None:
    config, default = load_file(SAMPLES / "default.yaml"), load("")
    assert config.profiles == default.profiles
    assert {name: each.params for name, each in config.plugins.items()} == {
        name: each.params for name, each in default.plugins.items()
    }
    assert config.warnings == ()


def test_the_sample_without_kubernetes() -> None:
    config = load_file(SAMPLES / "file-discovery.yaml")
    assert config.discovery == FileDiscovery(path="/etc/epp/endpoints.yaml", watch_file=True)
    assert entries(config) == [*DEFAULT[:3], ("lora-affinity-scorer", 1.0), DEFAULT[3]]
    assert config.plugins["max-score-picker"].params == PickerParams(max_num_of_endpoints=2)
    assert config.warnings == ()


def test_without_profiles_everything_declared_is_one_in_the_order_of_the_file() -> None:
    config = load(
        HEAD + "plugins: [{type: random-picker}, {type: queue-scorer, name: q}, {type: active-request-scorer}]"
    )
    assert entries(config) == [("q", 1.0), ("active-request-scorer", 1.0), ("random-picker", 1.0)]
    assert config.profiles[0].name == "default"


def test_discovery_alone_still_routes_by_the_default_scorers() -> None:
    text = (
        "plugins: [{type: file-discovery, parameters: {path: /e}}]\ndataLayer: {discovery: {pluginRef: file-discovery}}"
    )
    config = load(HEAD + text)
    assert entries(config) == DEFAULT
    assert config.discovery == FileDiscovery(path="/e", watch_file=False)


def test_a_profile_without_a_picker_takes_the_one_declared_else_the_highest_score() -> None:
    profile = "\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer}]}]"
    one = load(HEAD + "plugins: [{type: queue-scorer}, {type: weighted-random-picker}]" + profile)
    none = load(HEAD + "plugins: [{type: queue-scorer}]" + profile)
    two = load(
        HEAD + "plugins: [{type: queue-scorer}, {type: random-picker}, {type: weighted-random-picker}]" + profile
    )
    assert entries(one) == [("queue-scorer", 1.0), ("weighted-random-picker", 1.0)]
    assert entries(none) == [("queue-scorer", 1.0), ("max-score-picker", 1.0)]
    assert entries(two) == entries(none)
    assert two.warnings == (
        "plugins[1]: random-picker has no effect: no profile uses it",
        "plugins[2]: weighted-random-picker has no effect: no profile uses it",
    )


def test_parameters_have_the_references_names() -> None:
    text = """
plugins:
- type: approx-prefix-cache-producer
  parameters: {autoTune: false, blockSizeTokens: 64, lruCapacityPerServer: 1000, maxPrefixTokensToMatch: 4096}
- type: prefix-cache-scorer
  parameters: {matchLengthWeight: 1e-1, matchLengthScaleTokens: 4096}
"""
    config = load(HEAD + text)
    assert config.plugins["approx-prefix-cache-producer"].params == ApproximateParams(
        auto_tune=False, block_size_tokens=64, lru_capacity_per_server=1000, max_prefix_tokens_to_match=4096
    )
    assert config.warnings == ()


def test_a_producer_may_have_another_name() -> None:
    text = """
plugins:
- {type: approx-prefix-cache-producer, name: mine}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: mine}}
"""
    assert sorted(load(HEAD + text).plugins) == ["max-score-picker", "mine", "prefix-cache-scorer", ADDED[1]]


def test_json_is_read_too() -> None:
    text = '{"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": [{"type": "queue-scorer"}]}'
    assert entries(load(text)) == [("queue-scorer", 1.0), ("max-score-picker", 1.0)]


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]", "1:1: expected fields (apiVersion, data, dataLayer, featureGates, flowControl, kind, parser, plugins,"),
        ("kind: EndpointPickerConfig", "1:1: apiVersion is missing: write apiVersion: llm-d.ai/v1alpha1"),
        ("apiVersion: llm-d.ai/v1alpha1", "1:1: kind is missing: write kind: EndpointPickerConfig"),
        ("apiVersion: v1\nkind: EndpointPickerConfig", "1:13: apiVersion: apiVersion v1 is not known: write llm-d.ai/"),
        ("apiVersion: [v1]\nkind: EndpointPickerConfig", "1:13: apiVersion: expected `str`, got `array`"),
        (HEAD + "plugin: []", "3:1: plugin: unknown field (did you mean plugins?); expected fields (apiVersion,"),
        (HEAD + "plugins: []\nplugins: []", "4:1: plugins: this field is given twice"),
        (HEAD + "plugins: {}", "3:10: plugins: expected a list, not fields"),
        (HEAD + "plugins: [queue-scorer]", "3:11: plugins[0]: expected fields (name, parameters, type), not the value"),
        (HEAD + "plugins: [{name: x}]", "3:11: plugins[0]: a plugin needs a type"),
        (HEAD + "plugins: [{type: ''}]", "3:18: plugins[0].type: expected a word, not an empty one"),
        (
            HEAD + "plugins:\n- type: que-scorer",
            "4:9: plugins[0].type: plugin type que-scorer is not known (did you mean queue-scorer?)",
        ),
        (
            HEAD + "plugins:\n- type: queue-scorer\n- type: queue-scorer",
            "5:3: plugins[1]: two plugins are named queue-scorer: give one another name",
        ),
        (
            HEAD + "plugins:\n- type: max-score-picker\n  parameters:\n    maxNumOfEndpoint: 2",
            "6:5: plugins[0].parameters.maxNumOfEndpoint: unknown field (did you mean maxNumOfEndpoints?)",
        ),
        (
            HEAD + "plugins:\n- type: max-score-picker\n  parameters:\n    maxNumOfEndpoints: 0",
            "6:24: plugins[0].parameters.maxNumOfEndpoints: expected `int` >= 1",
        ),
        (
            HEAD + "plugins:\n- type: prefix-cache-scorer\n  parameters: {matchLengthWeight: '1'}",
            "5:35: plugins[0].parameters.matchLengthWeight: expected `float`, got `str`",
        ),
        (
            HEAD
            + "plugins:\n- type: prefix-cache-scorer\n  parameters: {matchLengthWeight: 1, matchLengthScaleTokens: 0}",
            "5:15: plugins[0].parameters: matchLengthScaleTokens must be at least 1 when matchLengthWeight is above 0",
        ),
        (
            HEAD + "plugins: [{type: file-discovery}]",
            "3:11: plugins[0]: the parameter path is required",
        ),
        (
            HEAD + "plugins: [{type: queue-scorer, parameters: 7}]",
            "3:44: plugins[0].parameters: expected fields (unknown), not the value '7'",
        ),
        (
            HEAD + "featureGates: [flowControll]",
            "3:16: featureGates[0]: feature gate flowControll is not known (did you",
        ),
        (
            HEAD + "featureGates: [flowControl=maybe]",
            "3:16: featureGates[0]: expected flowControl=true or flowControl=",
        ),
        (HEAD + "schedulingProfiles: [{plugins: []}]", "3:22: schedulingProfiles[0]: a profile needs a name"),
        (
            HEAD + "schedulingProfiles: [{name: a}, {name: b}]",
            "3:33: schedulingProfiles[1]: a, b need a plugin that chooses among them: declare one of disagg-",
        ),
        (
            HEAD + "schedulingProfiles: [{name: a, plugins: [{pluginRef: gone}]}]",
            "3:54: schedulingProfiles[0].plugins[0].pluginRef: no plugin is named gone: declare it",
        ),
        (
            HEAD + "schedulingProfiles: [{name: a, plugins: [{weight: 2}]}]",
            "3:42: schedulingProfiles[0].plugins[0]: pluginRef is missing: name a plugin",
        ),
        (
            HEAD + "plugins: [{type: random-picker}, {type: max-score-picker}]",
            "3:34: plugins[1]: random-picker picks already: keep one picker, or write schedulingProfiles",
        ),
        (
            HEAD + "dataLayer: {discovery: {pluginRef: queue-scorer}}\nplugins: [{type: queue-scorer}]",
            "3:36: dataLayer.discovery.pluginRef: queue-scorer is a scorer, and a discovery is needed: refer to",
        ),
        (
            HEAD + "dataLayer: {sources: [{pluginRef: metrics-data-source}]}",
            "3:35: dataLayer.sources[0].pluginRef: no plugin is named metrics-data-source: declare it",
        ),
        (
            HEAD + "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: gone}}]",
            "3:81: plugins[0].parameters.prefixMatchInfoProducerName: no plugin is named gone: declare it",
        ),
        (
            HEAD + "plugins: [{type: queue-scorer, name: max-score-picker}]",
            "3:11: plugins[0]: max-score-picker is the name of a plugin that is added by default",
        ),
        ("a: \0", " not YAML: special characters are not allowed"),
        ("a: [1", "1:6: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 2", "2:1: not YAML: but found another document"),
        (
            HEAD + "plugins: [{type: max-score-picker, parameters: {maxNumOfEndpoints: !!python/name:os.system }}]",
            "3:68:",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place_and_what_to_do(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"epp.yaml:{expected}")


def test_weights_are_numbers_not_below_zero() -> None:
    plugins = "plugins: [{type: queue-scorer}]\n"
    profile = HEAD + plugins + "schedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: %s}]}]"
    place = "epp.yaml:4:76: schedulingProfiles[0].plugins[0].weight: "
    assert problems(profile % "-1") == [place + "expected `float` >= 0.0"]
    assert problems(profile % "heavy") == [place + "expected `float`, got `str`"]
    assert problems(profile % ".nan") == [place + "expected `float` >= 0.0"]
    assert problems(profile % ".inf") == [place + "expected `float` <= 1.7976931348623157e+308"]
    assert entries(load(profile % "1e2"))[0] == ("queue-scorer", 100.0)
    assert entries(load(profile % "0"))[0] == ("queue-scorer", 0.0)


def test_one_profile_has_one_picker_and_no_plugin_twice() -> None:
    text = """
plugins: [{type: random-picker}, {type: max-score-picker}, {type: queue-scorer}]
schedulingProfiles:
- name: p
  plugins:
  - {pluginRef: random-picker}
  - {pluginRef: queue-scorer}
  - {pluginRef: max-score-picker}
  - {pluginRef: queue-scorer}
"""
    assert problems(HEAD + text) == [
        "epp.yaml:10:5: schedulingProfiles[0].plugins[2]: a profile has one picker: keep max-score-picker or"
        " random-picker",
        "epp.yaml:11:5: schedulingProfiles[0].plugins[3]: queue-scorer is listed twice: one entry with the sum of the"
        " weights says the same",
    ]


def test_every_mistake_of_a_file_is_told_in_order_and_none_that_follows_from_another() -> None:
    text = """
plugins:
- type: queue-scorer
  parameters: {nosuch: 2, nonsense: 1}
- type: prefix-scorer
- type: max-score-picker
  parameters: {maxNumOfEndpoints: -1}
schedulingProfiles:
- name: p
  plugins:
  - pluginRef: queue-scorer
    wait: 2
  - pluginRef: prefix-scorer
  - pluginRef: max-score-picker
"""
    assert [problem.split(": ")[0] + ": " + problem.split(": ")[1] for problem in problems(HEAD + text)] == [
        "epp.yaml:6:16: plugins[0].parameters.nosuch",
        "epp.yaml:6:27: plugins[0].parameters.nonsense",
        "epp.yaml:7:9: plugins[1].type",
        "epp.yaml:9:35: plugins[2].parameters.maxNumOfEndpoints",
        "epp.yaml:14:5: schedulingProfiles[0].plugins[0].wait",
    ]


def test_a_file_that_cannot_be_read_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: .*No such file"):
        load_file(tmp_path / "gone.yaml")
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode())
    assert entries(load_file(tmp_path / "windows.yaml")) == DEFAULT
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read: .*utf-8"):
        load_file(tmp_path / "latin.yaml")


# -- accepted without effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            "apiVersion: inference.networking.x-k8s.io/v1alpha1\nkind: EndpointPickerConfig",
            "apiVersion inference.networking.x-k8s.io/v1alpha1 is deprecated: write llm-d.ai/v1alpha1",
        ),
        (HEAD + "featureGates: [flowControl]", "featureGates[0]: the feature gate flowControl has no effect yet"),
        (HEAD + "featureGates: [dataLayer=true]", "featureGates[0]: the feature gate dataLayer has no effect yet"),
        (HEAD + "flowControl: {maxBytes: 1Gi}", "flowControl.maxBytes has no effect yet"),
        (HEAD + "dataLayer: {injectDefaults: false}", "dataLayer.injectDefaults has no effect: metrics pages are"),
        (HEAD + "dataLayer: {crossReplicaSyncInterval: 1s}", "dataLayer.crossReplicaSyncInterval has no effect yet"),
        (
            HEAD + "plugins: [{type: metrics-data-source, parameters: {path: /metrics, caCertPath: /ca.pem}}]",
            "plugins[0]: metrics-data-source: caCertPath has no effect: scheme is http: write scheme: https",
        ),
        (
            HEAD + "plugins: [{type: openai-parser}]",
            "plugins[0]: openai-parser has no effect: every dialect is always understood, by its path",
        ),
        (
            HEAD + "plugins: [{type: file-discovery, parameters: {path: /e}}]",
            "plugins[0]: file-discovery has no effect: dataLayer.discovery does not refer to it",
        ),
        (
            HEAD + "plugins: [{type: approx-prefix-cache-producer}, {type: queue-scorer}]",
            "plugins[0]: approx-prefix-cache-producer has no effect: no profile uses it",
        ),
        (
            HEAD + "plugins: [{type: approx-prefix-cache-producer, parameters: {maxPrefixBlocksToMatch: 256}},"
            " {type: prefix-cache-scorer}]",
            "plugins[0]: approx-prefix-cache-producer: maxPrefixBlocksToMatch has no effect: maxPrefixTokensToMatch",
        ),
        (
            HEAD + "plugins: [{type: active-request-scorer, parameters: {requestTimeout: 2m}}]",
            "plugins[0]: active-request-scorer: requestTimeout has no effect: requests in flight are counted out",
        ),
        (
            HEAD + "plugins: [{type: prefix-cache-scorer, parameters: {matchLengthScaleTokens: 9}}]",
            "plugins[0]: prefix-cache-scorer: matchLengthScaleTokens has no effect: matchLengthWeight is 0",
        ),
    ],
)
def test_what_has_no_effect_is_told(text: str, warning: str) -> None:
    (told,) = load(text).warnings
    assert told.startswith(warning)


def test_what_a_profile_cannot_use_is_told() -> None:
    text = """
plugins: [{type: single-profile-handler}, {type: queue-scorer}, {type: random-picker}]
schedulingProfiles:
- name: p
  plugins: [{pluginRef: single-profile-handler}, {pluginRef: queue-scorer}, {pluginRef: random-picker, weight: 3}]
"""
    config = load(HEAD + text)
    assert entries(config) == [("queue-scorer", 1.0), ("random-picker", 1.0)]
    assert config.warnings == (
        "schedulingProfiles[0].plugins[0]: single-profile-handler has no effect in a profile:"
        " it is no filter, scorer or picker",
        "schedulingProfiles[0].plugins[2].weight has no effect: random-picker is no scorer",
    )


def test_metrics_sources_as_the_reference_injects_them_are_what_happens_anyway() -> None:
    text = """
plugins: [{type: metrics-data-source, parameters: {scheme: http}}, {type: core-metrics-extractor}]
dataLayer: {sources: [{pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}]}
"""
    assert load(HEAD + text).warnings == ()
