"""Which pages a configuration has fetched, where they are, and what the GPUs' page says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from epp.config.load import load
from epp.config.pages import GPU_USE, DcgmSource, MetricsSource, PageSource
from epp.endpoints.table import Endpoint
from epp.errors import ConfigError
from epp.signals.sources import Fetched, GpuPages, MetricsPages, Way, fetched, gpu_use, way
from tests.authority import Authority

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
GPUS = """plugins:
- type: metrics-data-source
  parameters: {port: 8001, path: stats, interval: 2s}
- type: dcgm-data-source
  parameters: {interval: 10s, useNodeAddress: true}
- type: dcgm-extractor
- type: core-metrics-extractor
  parameters:
    engineConfigs: [{name: e, customMetrics: [{attributeKey: Heat, metricSpec: e:heat}]}]
dataLayer:
  sources:
  - {pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}
  - {pluginRef: dcgm-data-source, extractors: [{pluginRef: dcgm-extractor}]}
"""


def read(text: str, default: MetricsSource | None = None, interval: float = 0.05, freshness: float = 2.0) -> Fetched:
    pages = load(HEAD + text, experimental=True).pages
    return fetched(pages, default or MetricsSource(), interval, freshness)


def test_without_a_word_only_metrics_pages_are_fetched() -> None:
    found = read("")
    (source,) = found.sources
    assert isinstance(source, MetricsPages)
    assert (source.way.path, source.way.port, source.way.interval, source.way.tls) == ("/metrics", 0, 0.05, None)
    assert (found.freshness, found.attributes) == (2.0, {})


def test_what_the_flags_say_counts_where_the_configuration_says_nothing() -> None:
    (source,) = read("", MetricsSource(path="/old", port=81)).sources
    assert (source.way.path, source.way.port) == ("/old", 81)
    (source,) = read("plugins: [{type: metrics-data-source}]", MetricsSource(path="/old", port=81)).sources
    assert (source.way.path, source.way.port) == ("/metrics", 0)


def test_a_configuration_says_where_pages_are_and_how_often() -> None:
    found = read(GPUS)
    metrics, gpus = found.sources
    assert (metrics.way.path, metrics.way.port, metrics.way.interval) == ("/stats", 8001, 2.0)
    assert isinstance(gpus, GpuPages)
    assert (gpus.way.port, gpus.way.interval, gpus.on_node) == (9400, 10.0, True)


def test_what_is_fetched_seldom_may_be_older() -> None:
    found = read(GPUS)
    assert found.freshness == 5.0  # 2.5 x 2 s
    assert found.attributes == {"Heat": 5.0, GPU_USE: 25.0}
    assert read("", interval=0.5, freshness=2.0).freshness == 2.0


def test_gpu_pages_are_asked_for_once_a_second() -> None:
    assert way(DcgmSource(), GpuPages().way.interval).interval == 1.0
    assert way(MetricsSource(interval="0s"), 0.05).interval == 0.001


@pytest.mark.parametrize(
    ("source", "endpoint", "address"),
    [
        (MetricsPages(), Endpoint("a", "10.0.0.1:8000"), "10.0.0.1:8000"),
        (MetricsPages(Way(port=9000)), Endpoint("a", "10.0.0.1:8000"), "10.0.0.1:9000"),
        (MetricsPages(Way(port=9000)), Endpoint("a", "[fd00::1]:8000"), "[fd00::1]:9000"),
        (MetricsPages(Way(port=9000)), Endpoint("a", "10.0.0.1:8000", {}, "10.0.0.1:81"), "10.0.0.1:81"),
        (GpuPages(), Endpoint("a", "10.0.0.1:8000", {}, "10.0.0.1:81", "n", "10.9.0.1"), "10.0.0.1:9400"),
        (GpuPages(on_node=True), Endpoint("a", "10.0.0.1:8000", {}, "", "n", "10.9.0.1"), "10.9.0.1:9400"),
        (GpuPages(on_node=True), Endpoint("a", "10.0.0.1:8000", {}, "", "n", "[fd00::9]"), "[fd00::9]:9400"),
        (GpuPages(on_node=True), Endpoint("a", "10.0.0.1:8000"), "10.0.0.1:9400"),
        (GpuPages(Way(port=0), on_node=True), Endpoint("a", "10.0.0.1:8000", {}, "", "n", "10.9.0.1"), "10.9.0.1:8000"),
    ],
)
def test_where_a_page_is(source: MetricsPages | GpuPages, endpoint: Endpoint, address: str) -> None:
    assert source.address(endpoint) == address


NODE = b"""# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a",container="vllm",namespace="prod",pod="a-0"} 35
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-b",container="vllm",namespace="prod",pod="a-0"} 62
DCGM_FI_DEV_GPU_UTIL{gpu="2",UUID="GPU-c",container="vllm",namespace="test",pod="a-0"} 99
DCGM_FI_DEV_GPU_UTIL{gpu="3",UUID="GPU-d",container="",namespace="",pod=""} 1
DCGM_FI_DEV_GPU_UTIL_OTHER{gpu="0",namespace="prod",pod="a-0"} 100
"""


@pytest.mark.parametrize(
    ("page", "name", "use"),
    [
        (NODE, "prod/a-0-rank-0", 0.62),
        (NODE, "prod/a-0-rank-11", 0.62),
        (NODE, "test/a-0-rank-0", 0.99),
        (NODE, "prod/b-0-rank-0", math.nan),
        (NODE, "prod/a-0", 0.62),
        (NODE, "default/a", math.nan),
        (NODE, "/", math.nan),
        (b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 7\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} 3\n', "prod/b-0-rank-0", 0.07),
        (b"DCGM_FI_DEV_GPU_UTIL 100\n", "by-hand", 1.0),
        (b"DCGM_FI_DEV_GPU_UTIL 0\n", "by-hand", 0.0),
        (b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 7\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} NaN\n', "prod/b-0-rank-0", math.nan),
        (b"DCGM_FI_DEV_GPU_UTIL 101\n", "by-hand", math.nan),
        (b"", "by-hand", math.nan),
    ],
)
def test_the_busiest_gpu_of_the_pod_counts(page: bytes, name: str, use: float) -> None:
    assert gpu_use(page, name) == pytest.approx(use, nan_ok=True)


# -- files of TLS ------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_refused_at_start(tmp_path: Path) -> None:
    authority = Authority()
    good, bad = authority.issue().write(tmp_path / "good"), tmp_path / "bad.pem"
    bad.write_text("nothing")
    wrong = [
        PageSource(scheme="https", insecure_skip_verify=False, ca_cert_path=str(tmp_path / "missing")),
        PageSource(scheme="https", insecure_skip_verify=False, ca_cert_path=str(bad)),
        PageSource(scheme="https", client_cert_path=str(bad), client_key_path=str(good / "tls.key")),
        PageSource(scheme="https", client_cert_path=str(good / "tls.crt"), client_key_path=str(bad)),
        PageSource(
            scheme="https",
            client_cert_path=str(good / "tls.crt"),
            client_key_path=str(authority.issue().write(tmp_path / "other") / "tls.key"),
        ),
    ]
    for params in wrong:
        with pytest.raises(ConfigError) as caught:
            way(params, 0.05)
        assert str(tmp_path) in str(caught.value)


def test_files_that_nothing_asks_for_are_not_read() -> None:
    assert way(PageSource(ca_cert_path="/missing"), 0.05).tls is None
    assert way(PageSource(scheme="https", ca_cert_path="/missing"), 0.05).tls is not None  # any certificate is taken
