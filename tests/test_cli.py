"""The command line: the reference's spellings, exit codes, and flags that do nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from epp.discovery.kube.objects import Kind
from epp.discovery.kube.view import NamedPool, SelectedPods
from epp.errors import ConfigError
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.tls import cipher_suites, least_version
from epp.flags import REMOVED, WITHOUT_EFFECT, ServeFlags, normalised
from epp.settings import read_config, read_metrics_files, read_port_files, read_scope, read_settings
from epp.telemetry.tls import CredentialFiles

ROOT = Path(__file__).parents[1]


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epp", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (["serve", "-grpc-port=9002"], ["serve", "--grpc-port=9002"]),
        (["serve", "-grpc-port", "9002"], ["serve", "--grpc-port", "9002"]),
        (["serve", "-v=4", "-v", "4", "--v=4"], ["serve", "-v=4", "-v", "4", "--v=4"]),
        (["serve", "-secure-serving=false"], ["serve", "--secure-serving=false"]),
        (["demo", "--seconds", "-1"], ["demo", "--seconds", "-1"]),
        (["serve", "-poolName", "myPool"], ["serve", "--pool-name", "myPool"]),
        (["serve", "--refreshMetricsInterval=5S"], ["serve", "--refresh-metrics-interval=5S"]),
    ],
)
def test_gos_single_dashes_and_the_spelling_of_v0_are_ours(given: list[str], ours: list[str]) -> None:
    assert normalised(given) == ours


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_a_removed_flag_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match="engine-type"):
        normalised(["serve", f"--{name}=x"])


@pytest.mark.parametrize(("flags", "told"), [((), "file-discovery"), (("--pool-name", "my-pool"), "KUBECONFIG")])
def test_without_a_source_of_endpoints_it_ends_with_2_and_a_clear_word(flags: tuple[str, ...], told: str) -> None:
    ended = run("serve", *flags, "-v=4", "--secure-serving=false", environment={"HOME": "/nowhere", "KUBECONFIG": ""})
    assert ended.returncode == 2
    assert told in ended.stderr
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


def file_discovery(folder: Path) -> Path:
    """A configuration over no endpoint."""
    listing, config = folder / "endpoints.yaml", folder / "picker.yaml"
    listing.write_text("endpoints: []")
    config.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
        f"plugins: [{{type: file-discovery, parameters: {{path: {listing}}}}}]\n"
        "dataLayer: {discovery: {pluginRef: file-discovery}}\n"
    )
    return config


@pytest.mark.parametrize("flag", ["--grpc-port", "--grpc-health-port", "--metrics-port"])
def test_a_taken_port_is_named(flag: str, tmp_path: Path) -> None:
    config = file_discovery(tmp_path)
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
    config = read_config(ServeFlags(config_file=str(ROOT / "config" / "picker" / "file-discovery.yaml")))
    source = config.discovery
    assert source is not None
    assert source.path == "/etc/epp/endpoints.yaml"
    assert config.warnings == ()
    with pytest.raises(ConfigError, match="no source of endpoints"):
        read_scope(ServeFlags())
    assert read_config(ServeFlags(config_file=str(ROOT / "config" / "picker" / "default.yaml"))).discovery is None


def test_what_to_serve_of_a_cluster_is_read_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESPACE", "models")
    assert read_scope(ServeFlags(pool_name="p")) == NamedPool("models", "p", (Kind.POOL,))
    older = ServeFlags(pool_name="p", pool_namespace="x", pool_group="inference.networking.x-k8s.io")
    assert read_scope(older) == NamedPool("x", "p", (Kind.LEGACY_POOL,))
    monkeypatch.setenv("POD_NAME", "my-epp-7c5ddbdf54-2wtxk")
    scope = read_scope(ServeFlags(endpoint_selector="app in (a,b)", endpoint_target_ports=("8000,8001", "8000")))
    assert isinstance(scope, SelectedPods)
    assert (scope.name, scope.pool.ports) == ("my-epp", (8000, 8001))
    assert scope.pool.selector.matches({"app": "b"})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (ServeFlags(pool_name="p", endpoint_selector="a=b"), "not both"),
        (ServeFlags(pool_name="p", pool_group="inference.example.com"), "inference.networking.k8s.io or"),
        (ServeFlags(endpoint_selector="a=b"), "1 to 8 port numbers"),
        (ServeFlags(endpoint_selector="a=b", endpoint_target_ports=("0",)), "1 to 8 port numbers"),
        (ServeFlags(endpoint_selector="a=b", endpoint_target_ports=("8000",)), "POD_NAME"),
    ],
)
def test_what_cannot_be_served_of_a_cluster_is_said(
    flags: ServeFlags, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POD_NAME", raising=False)
    with pytest.raises(ConfigError, match=words):
        read_scope(flags)


def test_help_lists_the_commands() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    commands = ("serve", "demo", "model-server", "validate", "config", "plugins", "schema")
    assert all(name in ended.stdout for name in commands)


HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"


def test_files_are_validated_with_every_mistake_and_an_exit_code(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(HEAD + "plugins: [{type: queue-scorer}, {type: openai-parser}]\n")
    bad.write_text(HEAD + "plugins:\n- type: queue-scorrer\nflowcontrol: {}\n")
    ended = run("validate", str(good), str(bad))
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.splitlines() == [
        f"{good}: warning: plugins[1]: openai-parser has no effect: every dialect is always understood, by its path",
        f"{bad}:4:9: plugins[0].type: plugin type queue-scorrer is not known (did you mean queue-scorer?)",
        f"{bad}:5:1: flowcontrol: unknown field (did you mean flowControl?); expected fields (apiVersion, data,"
        " dataLayer, featureGates, flowControl, kind, parser, plugins, requestHandler, saturationDetector,"
        " schedulingProfiles)",
        f"{good}: ok",
    ]
    assert run("validate", str(good)).returncode == 0


def test_problems_come_as_json_and_as_githubs_commands(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(HEAD + "plugins:\n- type: queue-scorrer\n")
    ended = run("validate", "--format", "json", str(bad))
    assert ended.returncode == 1
    (problem,) = json.loads(ended.stdout)
    assert (problem["line"], problem["column"], problem["path"]) == (4, 9, "plugins[0].type")
    ended = run("validate", "--format=github", str(bad))
    assert ended.returncode == 1
    assert ended.stdout.startswith(f"::error file={bad},line=4,col=9,title=plugins[0].type::plugin type queue-scorrer")


def test_an_experimental_plugin_is_validated_with_the_flag_of_serve(tmp_path: Path) -> None:
    file = tmp_path / "picker.yaml"
    file.write_text(HEAD + "plugins: [{type: dcgm-data-source}]\n")
    assert run("validate", str(file)).returncode == 1
    assert run("validate", "--allow-experimental-plugins", str(file)).returncode == 0
    with pytest.raises(ConfigError, match="needs --allow-experimental-plugins"):
        read_config(ServeFlags(config_file=str(file)))
    assert read_config(ServeFlags(config_file=str(file), allow_experimental_plugins=True)).plugins


def test_the_effective_configuration_is_printed_and_is_one(tmp_path: Path) -> None:
    file = ROOT / "config" / "picker" / "default.yaml"
    ended = run("config", str(file))
    assert ended.returncode == 0, ended.stderr
    said = next(n for n, line in enumerate(file.read_text().splitlines(), 1) if "maxNumOfEndpoints: 1" in line)
    assert f"    maxNumOfEndpoints: 1  # line {said}\n" in ended.stdout
    again = tmp_path / "effective.yaml"
    again.write_text(ended.stdout)
    ended = run("validate", str(again))
    assert (ended.returncode, ended.stdout) == (0, f"{again}: ok\n")
    ended = run("config", str(tmp_path / "gone.yaml"))
    assert ended.returncode == 2
    assert "No such file" in ended.stderr


def test_plugins_are_listed_and_printed() -> None:
    listed = run("plugins").stdout.splitlines()
    assert any(line.startswith("queue-scorer ") for line in listed)
    assert "Prefer the shortest waiting queue." in run("plugins", "queue-scorer").stdout
    ended = run("plugins", "queue-scorrer")
    assert ended.returncode == 2
    assert "did you mean queue-scorer?" in ended.stderr
    assert run("plugins", "--markdown").stdout.startswith("# Plugins\n")


def test_the_schema_is_printed_as_json() -> None:
    assert json.loads(run("schema").stdout)["title"] == "EndpointPickerConfig"


def test_what_is_asked_of_no_file_ends_with_2() -> None:
    ended = run("validate")
    assert ended.returncode == 2
    assert "name a configuration file" in ended.stderr


def test_where_certificates_lie_is_read_from_flags() -> None:
    assert read_port_files(ServeFlags()) == CredentialFiles("")
    assert read_port_files(ServeFlags(secure_serving=False)) is None
    given = ServeFlags(cert_path="a", enable_cert_reload=True, client_ca_file="b")
    assert read_port_files(given) == CredentialFiles("a", "b")
    assert read_metrics_files(ServeFlags()) is None
    read = read_metrics_files(ServeFlags(metrics_cert_dir="a", metrics_client_ca_file="b"))
    assert read == CredentialFiles("a", "b", "--metrics-cert-dir", "--metrics-client-ca-file")
    assert read_metrics_files(ServeFlags(metrics_cert_dir="a")) is not None
    with pytest.raises(ConfigError, match="--enable-cert-reload needs --cert-path"):
        read_port_files(ServeFlags(enable_cert_reload=True))
    with pytest.raises(ConfigError, match="--client-ca-file needs TLS"):
        read_port_files(ServeFlags(client_ca_file="b", secure_serving=False))
    with pytest.raises(ConfigError, match="--metrics-client-ca-file needs --metrics-cert-dir"):
        read_metrics_files(ServeFlags(metrics_client_ca_file="b"))


@pytest.mark.parametrize("flag", ["--cert-path", "--metrics-cert-dir"])
def test_a_folder_without_a_certificate_ends_with_2_and_names_file_and_flag(flag: str, tmp_path: Path) -> None:
    config = file_discovery(tmp_path)
    ended = run(
        "serve",
        f"--config-file={config}",
        f"{flag}={tmp_path}",
        "--grpc-port=0",
        "--grpc-health-port=0",
        "--metrics-port=0",
    )
    assert ended.returncode == 2, ended.stderr
    assert f"{tmp_path}/tls.key: cannot be read" in ended.stderr
    assert f"{flag} names a folder with tls.crt and tls.key" in ended.stderr
    assert "Traceback" not in ended.stderr
