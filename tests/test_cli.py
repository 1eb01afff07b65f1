"""The command line: the reference's spellings, exit codes, and flags that do nothing."""

from __future__ import annotations

import dataclasses
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from epp.errors import ConfigError
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.tls import cipher_suites, least_version
from epp.flags import REMOVED, WITHOUT_EFFECT, ServeFlags, normalised
from epp.server import read_config, read_settings

ROOT = Path(__file__).parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epp", *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (["serve", "-grpc-port=9002"], ["serve", "--grpc-port=9002"]),
        (["serve", "-grpc-port", "9002"], ["serve", "--grpc-port", "9002"]),
        (["serve", "-v=4", "-v", "4", "--v=4"], ["serve", "-v=4", "-v", "4", "--v=4"]),
        (["serve", "-secure-serving=false"], ["serve", "--secure-serving=false"]),
        (["demo", "--seconds", "-1"], ["demo", "--seconds", "-1"]),
    ],
)
def test_gos_single_dashes_are_ours(given: list[str], ours: list[str]) -> None:
    assert normalised(given) == ours


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_a_removed_flag_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match="engine-type"):
        normalised(["serve", f"--{name}=x"])


def test_a_pool_name_without_a_source_of_endpoints_ends_with_2_and_a_clear_word() -> None:
    ended = run("serve", "--pool-name", "my-pool", "-v=4", "--secure-serving=false")
    assert ended.returncode == 2
    assert "file-discovery" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("serve", "--grpc-prot=1"), "--grpc-prot"),
        (("serve", "--max-body=lots"), "--max-body: 'lots' is not a quantity"),
        (("serve", "--drain-timeout=soon"), "--drain-timeout: 'soon' is not a duration"),
        (("serve", "--config-file=/nowhere/at/all.yaml"), "/nowhere/at/all.yaml"),
        (("serve", "--config-file=a", "--config-text=b"), "keep one"),
        (("serve", "--lora-info-metric=x"), "was removed"),
        (("model-server", "--engine=nonsense"), "nonsense"),
        (("model-server", "--faults=explode=1"), "explode"),
        (("nonsense",), "nonsense"),
    ],
)
def test_what_is_asked_wrongly_ends_with_2_and_says_why(words: tuple[str, ...], told: str) -> None:
    ended = run(*words)
    assert ended.returncode == 2, ended.stderr
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_mistake_in_the_configuration_has_its_line(tmp_path: Path) -> None:
    config = tmp_path / "picker.yaml"
    config.write_text("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- type: queue-scorrer\n")
    ended = run("serve", f"--config-file={config}")
    assert ended.returncode == 2
    assert f"{config}:4:" in ended.stderr
    assert "did you mean queue-scorer?" in ended.stderr


@pytest.mark.parametrize("flag", ["--grpc-port", "--grpc-health-port", "--metrics-port"])
def test_a_taken_port_is_named(flag: str, tmp_path: Path) -> None:
    listing, config = tmp_path / "endpoints.yaml", tmp_path / "picker.yaml"
    listing.write_text("endpoints: []")
    config.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
        f"plugins: [{{type: file-discovery, parameters: {{path: {listing}}}}}]\n"
        "dataLayer: {discovery: {pluginRef: file-discovery}}\n"
    )
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        ports = dict.fromkeys(("--grpc-port", "--grpc-health-port", "--metrics-port"), 0)
        ports[flag] = taken.getsockname()[1]
        given = [f"{name}={port}" for name, port in ports.items()]
        ended = run("serve", f"--config-file={config}", "--secure-serving=false", *given)
    assert ended.returncode == 2, ended.stderr
    assert f"{flag} {ports[flag]} cannot be bound" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_flags_without_effect_warn_when_given_and_only_then() -> None:
    assert list(ServeFlags().without_effect()) == []
    assert list(ServeFlags(tracing=False, enable_pprof=False).without_effect()) == []
    (warning,) = ServeFlags(tracing=True).without_effect()
    assert warning.startswith("--tracing has no effect")
    assert {field.name for field in dataclasses.fields(ServeFlags)} >= set(WITHOUT_EFFECT)


def test_every_flag_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "serve.md").read_text()
    names = [field.name for field in dataclasses.fields(ServeFlags)] + list(REMOVED)
    assert [name for name in names if f"`--{name.replace('_', '-')}`" not in page and name != "v"] == []
    assert "`-v`" in page


def test_every_limit_of_a_connection_is_in_the_documentation_with_its_default() -> None:
    page = (ROOT / "docs" / "serve.md").read_text()
    told = dict(re.findall(r"^\| `([a-z-]+)` \| ([\w.]+)", page, re.M))
    derived = {"max_message_bytes": "2"}
    for field in msgspec.structs.fields(ConnectionLimits):
        seconds = f"{field.default:g}s" if field.type is float else str(field.default)
        assert told[field.name.replace("_", "-")] == derived.get(field.name, seconds)


def test_limits_of_a_connection_are_read_from_flags() -> None:
    given = ("max-streams=2k", "keepalive=1m", "stream-window=1Mi")
    limits = read_settings(ServeFlags(http2_limit=given, grpc_max_recv_msg_size="64Mi")).http2
    assert (limits.max_streams, limits.keepalive, limits.stream_window) == (2000, 60.0, 1 << 20)
    assert (limits.max_message_bytes, limits.max_queued_bytes) == (64 << 20, 128 << 20)
    for wrong, words in (
        ("streams=1", "a name of max-streams"),
        ("keepalive=1", "duration"),
        ("stream-window=1", "65535"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_settings(ServeFlags(http2_limit=(wrong,)))


def test_tls_versions_and_ciphers_are_read_by_their_go_names() -> None:
    assert least_version("") is ssl.TLSVersion.TLSv1_2
    assert least_version("VersionTLS13") is ssl.TLSVersion.TLSv1_3
    names = ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", "TLS_AES_128_GCM_SHA256")
    assert cipher_suites(names) == ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305")
    for refused in ("VersionTLS11", "TLSv1.2"):
        with pytest.raises(ConfigError, match="VersionTLS12 or VersionTLS13"):
            least_version(refused)
    with pytest.raises(ConfigError, match="HTTP/2 takes"):
        cipher_suites(("TLS_RSA_WITH_AES_128_CBC_SHA",))  # forbidden by RFC 9113, appendix A


def test_flags_of_the_other_transport_are_warned_about() -> None:
    (warning,) = ServeFlags(transport="grpcio", tls_min_version="VersionTLS13").without_effect()
    assert warning.startswith("--tls-min-version has no effect: grpcio")
    assert list(ServeFlags(tls_min_version="VersionTLS13").without_effect()) == []
    (warning,) = ServeFlags(grpc_max_send_msg_size="1Mi").without_effect()
    assert warning.startswith("--grpc-max-send-msg-size has no effect")


def test_settings_are_read_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESPACE", "models")
    settings = read_settings(ServeFlags(max_body="1Mi", drain_timeout="1m30s", refresh_metrics_interval="0s", seed=7))
    assert settings.namespace == "models"
    assert settings.limits.max_body == 1 << 20
    assert settings.drain_timeout == 90.0
    assert settings.scrape_interval > 0
    assert settings.seed == 7
    assert read_settings(ServeFlags(pool_namespace="other")).namespace == "other"


def test_the_configurations_for_operators_are_read() -> None:
    config, source = read_config(ServeFlags(config_file=str(ROOT / "config" / "picker" / "file-discovery.yaml")))
    assert source.path == "/etc/epp/endpoints.yaml"
    assert config.warnings == ()
    with pytest.raises(ConfigError, match="no source of endpoints"):
        read_config(ServeFlags(config_file=str(ROOT / "config" / "picker" / "default.yaml")))


def test_help_lists_the_commands() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    assert all(name in ended.stdout for name in ("serve", "demo", "model-server"))
