"""What is fetched and read of endpoints: the grammar of metrics, ranges, and which of several plugins counts."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.config.build import build
from epp.config.document import ConfigErrors
from epp.config.load import load
from epp.config.pages import GPU_USE, MOST_ATTRIBUTES, CoreMetrics, DcgmSource, MetricsSource, Pages, parse_metric
from epp.config.schema import Config
from epp.endpoints.table import Endpoint, EndpointTable
from tests.scheduling.builders import ask

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"


def read(text: str) -> Config:
    return load(HEAD + text, "epp.yaml", experimental=True)


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        read(text)
    return str(caught.value).splitlines()


# -- the grammar of metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "family", "labels"),
    [
        ("vllm:num_requests_waiting", "vllm:num_requests_waiting", ()),
        (" up ", "up", ()),
        ("up{}", "up", ()),
        ("up { }", "up", ()),
        ("m{request_type=waiting}", "m", (("request_type", "waiting"),)),
        ('m{ a = "x, y" , b=2,}', "m", (("a", "x, y"), ("b", "2"))),
        ('m{a="",b=}', "m", (("a", ""), ("b", ""))),
        ("m{a=b=c}", "m", (("a", "b=c"),)),
        ("m{a=vllm:x/y-z}", "m", (("a", "vllm:x/y-z"),)),
    ],
)
def test_a_metric_is_a_family_and_labels(text: str, family: str, labels: tuple[tuple[str, str], ...]) -> None:
    assert parse_metric(text) == (family, labels)


@pytest.mark.parametrize(
    "text", ["", "{a=b}", "1m", "a b", "m{a=b", "m{a}", "m{a=b c=d}", "m{=b}", "m{a=b}{c=d}", "m{a='x y'}", "m{a=b} 7"]
)
def test_anything_else_is_no_metric(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not (a metric|label=value)"):
        parse_metric(text)


NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(str.isascii)
VALUES = st.text(st.characters(codec="utf-8", exclude_characters='"{}'), max_size=8)


@given(family=NAMES, labels=st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_whatever_is_quoted_is_read_back(family: str, labels: list[tuple[str, str]]) -> None:
    inside = ",".join(f'{name}="{value}"' for name, value in labels)
    assert parse_metric(f"{family}{{{inside}}}") == (family, tuple(labels))


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "plugins:\n- type: core-metrics-extractor\n  parameters:\n    engineConfigs:\n    - name: mine\n"
            "      kvUsageSpec: my metric",
            "epp.yaml:8:20: plugins[0].parameters.engineConfigs[0].kvUsageSpec: 'my metric' is not a metric: write",
        ),
        (
            "plugins: [{type: core-metrics-extractor, parameters: {defaultEngine: vlm}}]",
            "epp.yaml:3:54: plugins[0].parameters: defaultEngine 'vlm' is not known: write one of vllm, sglang,",
        ),
        (
            "plugins: [{type: core-metrics-extractor, parameters: {engineConfigs: [{name: e}, {name: e}]}}]",
            "epp.yaml:3:54: plugins[0].parameters: engineConfigs: two have one name",
        ),
        (
            "plugins: [{type: core-metrics-extractor, parameters: {engineConfigs: [{queuedRequestsSpec: q}]}}]",
            "epp.yaml:3:71: plugins[0].parameters.engineConfigs[0]: the parameter name is required",
        ),
        (
            "plugins: [{type: core-metrics-extractor, parameters: {engineConfigs: [{name: e, customMetrics: "
            "[{attributeKey: waiting, metricSpec: q}]}]}}]",
            "epp.yaml:3:54: plugins[0].parameters: attributeKey waiting is taken: give the metric another",
        ),
        (
            "plugins: [{type: core-metrics-extractor, parameters: {engineConfigs: [{name: e, customMetrics: "
            "[{attributeKey: a, metricSpec: q}, {attributeKey: a, metricSpec: r}]}]}}]",
            "epp.yaml:3:54: plugins[0].parameters: customMetrics of e: two have one attributeKey",
        ),
        (
            "plugins: [{type: core-metrics-extractor, parameters: {engineConfigs: [{name: e, customMetrics: "
            "[{attributeKey: a, metricSpec: ''}]}]}}]",
            "epp.yaml:3:127: plugins[0].parameters.engineConfigs[0].customMetrics[0].metricSpec: ",
        ),
        (
            "plugins: [{type: metrics-data-source, parameters: {clientCertPath: /c}}]",
            "epp.yaml:3:51: plugins[0].parameters: clientCertPath and clientKeyPath need each other: give both, or",
        ),
        (
            'plugins: [{type: metrics-data-source, parameters: {path: "/m\\r\\nx: y"}}]',
            "epp.yaml:3:58: plugins[0].parameters.path: expected `str` matching regex",
        ),
        (
            "plugins: [{type: metrics-data-source, parameters: {port: 70000}}]",
            "epp.yaml:3:58: plugins[0].parameters.port: expected `int` <= 65535",
        ),
        (
            "plugins: [{type: metrics-data-source, parameters: {interval: 5}}]",
            "epp.yaml:3:62: plugins[0].parameters.interval: expected `str`, got `int`",
        ),
    ],
)
def test_a_mistake_is_told_where_it_is(text: str, problem: str) -> None:
    (told,) = problems(text)
    assert told.startswith(problem)


def test_attributes_are_bounded_in_number() -> None:
    def text(count: int) -> str:
        custom = ", ".join(f"{{attributeKey: a{i}, metricSpec: m}}" for i in range(count))
        configs = f"[{{name: e, customMetrics: [{custom}]}}]"
        return f"plugins: [{{type: core-metrics-extractor, parameters: {{engineConfigs: {configs}}}}}]"

    assert len(read(text(MOST_ATTRIBUTES)).pages.attributes) == MOST_ATTRIBUTES
    (told,) = problems(text(MOST_ATTRIBUTES + 1))
    assert "customMetrics name 33 attributes: 32 at most" in told


# -- what has no effect ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "idle"),
    [
        ("{path: /metrics, interval: 100ms, port: 8001}", []),
        ("{scheme: http, insecureSkipVerify: true}", []),
        ("{insecureSkipVerify: false}", ["insecureSkipVerify has no effect: scheme is http: write scheme: https"]),
        ("{caCertPath: /ca}", ["caCertPath has no effect: scheme is http: write scheme: https"]),
        (
            "{scheme: https, caCertPath: /ca}",
            ["caCertPath has no effect: any certificate is taken: write insecureSkipVerify: false"],
        ),
        ("{scheme: https, insecureSkipVerify: false, caCertPath: /ca}", []),
        ("{scheme: https, clientCertPath: /c, clientKeyPath: /k}", []),
    ],
)
def test_what_has_no_effect_is_told(parameters: str, idle: list[str]) -> None:
    warnings = read(f"plugins: [{{type: metrics-data-source, parameters: {parameters}}}]").warnings
    assert warnings == tuple(f"plugins[0]: metrics-data-source: {each}" for each in idle)


# -- which plugins count -----------------------------------------------------------------------------------------------


def test_nothing_declared_is_nothing_said() -> None:
    assert read("").pages == Pages()


def test_what_is_declared_counts_even_where_no_source_refers_to_it() -> None:
    config = read(
        "plugins: [{type: metrics-data-source, name: pages, parameters: {port: 81}},"
        " {type: core-metrics-extractor, name: reading, parameters: {defaultEngine: sglang}}]"
    )
    assert config.pages.metrics == MetricsSource(port=81)
    assert config.pages.core == CoreMetrics(default_engine="sglang")
    assert config.warnings == ()


def test_of_several_the_one_that_is_referred_to_counts() -> None:
    config = read("""
plugins:
- {type: metrics-data-source, name: one}
- {type: metrics-data-source, name: two, parameters: {port: 81}}
- {type: core-metrics-extractor, name: three}
- {type: core-metrics-extractor, name: four, parameters: {defaultEngine: triton}}
dataLayer: {sources: [{pluginRef: two, extractors: [{pluginRef: four}]}]}
""")
    assert config.pages.metrics == MetricsSource(port=81)
    assert config.pages.core == CoreMetrics(default_engine="triton")
    why = "every endpoint has one metrics page, and another"
    assert config.warnings == (
        f"plugins[0]: one has no effect: {why} metrics-data-source counts for it",
        f"plugins[2]: three has no effect: {why} core-metrics-extractor counts for it",
    )


def test_gpu_metrics_are_read_only_where_a_source_says_so() -> None:
    plugins = "plugins: [{type: dcgm-data-source, parameters: {port: 9401}}, {type: dcgm-extractor, name: gpu}]\n"
    config = read(plugins)
    assert config.pages.gpu is None
    assert config.warnings == (
        "plugins[0]: dcgm-data-source has no effect: dataLayer.sources names no dcgm-data-source with a dcgm-extractor",
        "plugins[1]: gpu has no effect: dataLayer.sources names no dcgm-data-source with a dcgm-extractor",
    )
    alone = read(plugins + "dataLayer: {sources: [{pluginRef: dcgm-data-source}]}")
    assert alone.pages.gpu is None
    both = read(plugins + "dataLayer: {sources: [{pluginRef: dcgm-data-source, extractors: [{pluginRef: gpu}]}]}")
    assert both.pages.gpu == DcgmSource(port=9401)
    assert both.pages.attributes == (GPU_USE,)
    assert both.warnings == ()


# -- attributes decide -------------------------------------------------------------------------------------------------

COOL = """
plugins:
- type: core-metrics-extractor
  parameters: {engineConfigs: [{name: e, customMetrics: [{attributeKey: Heat, metricSpec: e:celsius}]}]}
- type: endpoint-attribute-filter
  parameters:
    attribute: Heat
    algorithm: {type: threshold, threshold: {operator: LessThan, value: 70}}
"""


def test_a_custom_metric_decides_through_a_filter() -> None:
    scheduler = build(read(COOL), Random(1))
    table = EndpointTable(attributes={"Heat": 2.0})
    table.replace([Endpoint(name, f"10.0.0.{i}:80") for i, name in enumerate("abc")], 0.0)
    for slot, heat in enumerate((70.0, 69.0, 90.0)):
        table.attributes_told(slot, table.generation(slot), [("Heat", heat)], 1.0)
    decision = scheduler.schedule(ask(), table.candidates(1.0))
    assert table.endpoint(decision.first).name == "b"


def test_an_attribute_that_nobody_reads_is_an_error() -> None:
    with pytest.raises(ConfigErrors, match=r"no attribute is named 'Cold' \(there are: Heat, "):
        build(read(COOL.replace("attribute: Heat", "attribute: Cold")), Random(1))
