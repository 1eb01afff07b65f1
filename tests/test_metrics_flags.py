"""The older picker's flags for metrics pages."""

from __future__ import annotations

import pytest

from epp.config.pages import MetricsSource
from epp.errors import ConfigError
from epp.flags import REMOVED, ServeFlags
from epp.settings import read_metrics_source


def test_by_default_pages_are_where_they_always_were() -> None:
    assert read_metrics_source(ServeFlags()) == MetricsSource()


def test_flags_say_where_pages_are() -> None:
    flags = ServeFlags(
        model_server_metrics_scheme="https",
        model_server_metrics_path="/stats",
        model_server_metrics_port=9000,
        model_server_metrics_https_insecure_skip_verify=False,
    )
    assert read_metrics_source(flags) == MetricsSource(
        scheme="https", path="/stats", port=9000, insecure_skip_verify=False
    )
    assert list(flags.without_effect()) == []


def test_flags_that_the_configuration_overrides_are_told() -> None:
    flags = ServeFlags(model_server_metrics_port=9000, model_server_metrics_path="/stats")
    assert list(flags.without_effect(pages=True)) == [
        f"--model-server-metrics-{what} has no effect: the configuration has a metrics-data-source, which counts"
        for what in ("path", "port")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ServeFlags(model_server_metrics_port=65536), "--model-server-metrics-port 65536: 0 to 65535 is expected"),
        (ServeFlags(model_server_metrics_port=-1), "--model-server-metrics-port -1: 0 to 65535 is expected"),
        (ServeFlags(model_server_metrics_path="/a b"), "--model-server-metrics-path '/a b': a path is expected"),
        (ServeFlags(model_server_metrics_path="/a\r\nb: c"), "a path is expected, as /metrics"),
    ],
)
def test_what_cannot_be_is_refused(flags: ServeFlags, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_metrics_source(flags)
    assert message in str(caught.value)


def test_a_flag_that_named_a_metric_says_where_to_name_it_now() -> None:
    assert "engineConfigs of a core-metrics-extractor" in REMOVED["total-queued-requests-metric"]
