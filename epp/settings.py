"""What the flags and the environment of `epp serve` ask for, read and checked.

In: `ServeFlags`, environment variables. Out: values with units; whatever cannot be is a ConfigError naming the flag.
Rules here: nothing is opened and nothing starts; but for the configuration file, which is read once.
"""

from __future__ import annotations

import os
import platform
import random
import re
import secrets
from collections.abc import Iterable

import msgspec

from epp.config.load import load, load_file
from epp.config.pages import MetricsSource
from epp.config.schema import Config
from epp.discovery.kube.election import Candidate, lease_name
from epp.discovery.kube.objects import Pool
from epp.discovery.kube.view import POOLS, NamedPool, SelectedPods
from epp.endpoints.selector import parse_selector
from epp.errors import ConfigError
from epp.extproc.exchange import Limits
from epp.extproc.http2.faults import ConnectionLimits
from epp.flags import ServeFlags
from epp.scheduling.catalogue import catalogue, installed
from epp.telemetry import tls
from epp.units import parse_duration, parse_quantity


class Settings(msgspec.Struct, frozen=True):
    """The flags, read: quantities as bytes, durations as seconds."""

    pool: str
    namespace: str
    limits: Limits
    http2: ConnectionLimits
    max_receive_bytes: int
    max_send_bytes: int
    scrape_interval: float
    freshness: float
    drain_timeout: float
    seed: int


def read_settings(flags: ServeFlags) -> Settings:
    """Check the flags that are not plain numbers. Raises ConfigError naming the flag."""

    def quantity(name: str, value: str) -> int:
        try:
            return parse_quantity(value)
        except ValueError as error:
            raise ConfigError(f"--{name}: {error}") from None

    def duration(name: str, value: str) -> float:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise ConfigError(f"--{name}: {error}") from None

    receive, send = flags.grpc_max_recv_msg_size, flags.grpc_max_send_msg_size
    max_body = quantity("max-body", flags.max_body)
    # A buffered body comes in one message, and a 413 for it is worth more than a gRPC status.
    max_receive = quantity("grpc-max-recv-msg-size", receive) if receive else 2 * max_body + (1 << 20)
    return Settings(
        pool=flags.pool_name or "default",
        namespace=read_namespace(flags),
        limits=Limits(max_body=max_body),
        http2=read_http2_limits(flags.http2_limit, max_receive),
        max_receive_bytes=max_receive,
        max_send_bytes=quantity("grpc-max-send-msg-size", send) if send else -1,
        scrape_interval=max(0.001, duration("refresh-metrics-interval", flags.refresh_metrics_interval)),
        freshness=duration("metrics-staleness-threshold", flags.metrics_staleness_threshold),
        drain_timeout=duration("drain-timeout", flags.drain_timeout),
        seed=random.SystemRandom().getrandbits(64) if flags.seed is None else flags.seed,
    )


def read_http2_limits(texts: Iterable[str], max_message_bytes: int) -> ConnectionLimits:
    """Every `--http2-limit NAME=VALUE`. Raises ConfigError."""
    kinds = {field.name.replace("_", "-"): field.type for field in msgspec.structs.fields(ConnectionLimits)}
    chosen: dict[str, int | float] = {
        "max_message_bytes": max_message_bytes,
        "max_queued_bytes": max(ConnectionLimits().max_queued_bytes, 2 * max_message_bytes),
    }
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise ConfigError(f"--http2-limit {text!r}: NAME=VALUE is expected, with a name of {', '.join(kinds)}")
        try:
            chosen[name.replace("-", "_")] = parse_quantity(value) if kinds[name] is int else parse_duration(value)
        except ValueError as error:
            raise ConfigError(f"--http2-limit {name}: {error}") from None
    return msgspec.convert(chosen, ConnectionLimits)


def read_port_files(flags: ServeFlags) -> tls.CredentialFiles | None:
    """Where the certificate of the ext_proc port lies; None: it is plaintext. Raises ConfigError."""
    if flags.enable_cert_reload and not flags.cert_path:
        raise ConfigError("--enable-cert-reload needs --cert-path; a certificate made at start never changes")
    if flags.client_ca_file and not flags.secure_serving:
        raise ConfigError("--client-ca-file needs TLS; remove it, or --secure-serving=false")
    return tls.CredentialFiles(flags.cert_path, flags.client_ca_file) if flags.secure_serving else None


def read_metrics_files(flags: ServeFlags) -> tls.CredentialFiles | None:
    """Likewise of the metrics port."""
    folder, client_ca = flags.metrics_cert_dir, flags.metrics_client_ca_file
    if client_ca and not folder:
        raise ConfigError("--metrics-client-ca-file needs --metrics-cert-dir, a folder with tls.crt and tls.key")
    return tls.CredentialFiles(folder, client_ca, "--metrics-cert-dir", "--metrics-client-ca-file") if folder else None


def read_config(flags: ServeFlags) -> Config:
    """The EndpointPickerConfig. Raises ConfigError."""
    if flags.config_file and flags.config_text:
        raise ConfigError("--config-file and --config-text are both given; keep one")
    plugins, experimental = catalogue(installed()), flags.allow_experimental_plugins
    if flags.config_file:
        return load_file(flags.config_file, plugins, experimental=experimental)
    return load(flags.config_text, "--config-text", plugins, experimental=experimental)


def read_metrics_source(flags: ServeFlags) -> MetricsSource:
    """How metrics pages are fetched where the configuration does not say. Raises ConfigError."""
    port, path = flags.model_server_metrics_port or 0, flags.model_server_metrics_path or "/metrics"
    if not 0 <= port <= 65535:
        raise ConfigError(f"--model-server-metrics-port {port}: 0 to 65535 is expected; 0 is the endpoint's own")
    if not re.fullmatch("[!-~]+", path):
        raise ConfigError(f"--model-server-metrics-path {path!r}: a path is expected, as /metrics")
    return MetricsSource(
        scheme=flags.model_server_metrics_scheme or "http",
        path=path,
        port=port,
        insecure_skip_verify=flags.model_server_metrics_https_insecure_skip_verify is not False,
    )


def read_namespace(flags: ServeFlags) -> str:
    return flags.pool_namespace or os.environ.get("NAMESPACE", "") or "default"


def read_scope(flags: ServeFlags) -> NamedPool | SelectedPods:
    """What to serve of a Kubernetes cluster. Raises ConfigError."""
    namespace = read_namespace(flags)
    if bool(flags.pool_name) == bool(flags.endpoint_selector):
        raise ConfigError(
            "no source of endpoints: give --pool-name or --endpoint-selector, not both, to find them in Kubernetes, "
            "or configure dataLayer.discovery.pluginRef with a plugin of type file-discovery"
        )
    if flags.pool_name:
        kinds = {kind.group: (kind,) for kind in POOLS}
        if flags.pool_group not in kinds:
            raise ConfigError(f"--pool-group {flags.pool_group!r}: {' or '.join(kinds)} is expected")
        return NamedPool(namespace, flags.pool_name, kinds[flags.pool_group])
    ports = tuple(dict.fromkeys(port.strip() for text in flags.endpoint_target_ports for port in text.split(",")))
    if not 1 <= len(ports) <= 8 or not all(port.isdigit() and 1 <= int(port) <= 65535 for port in ports):
        raise ConfigError("--endpoint-target-ports: 1 to 8 port numbers are expected with --endpoint-selector")
    # The reference's pool is then the Deployment, by the name that its pods have in common.
    deployment = re.fullmatch(r"(.+)-[a-z0-9]+-[a-z0-9]+", os.environ.get("POD_NAME", ""))
    if deployment is None:
        raise ConfigError("--endpoint-selector needs the environment's POD_NAME, as a Deployment's pod has it")
    pool = Pool(parse_selector(flags.endpoint_selector), tuple(map(int, ports)))
    return SelectedPods(namespace, deployment[1], pool)


def read_candidate(flags: ServeFlags, scope: NamedPool | SelectedPods) -> Candidate | None:
    """What we stand for election as; None: every replica serves."""
    if not flags.ha_enable_leader_election:
        return None
    who = os.environ.get("POD_NAME") or platform.node()
    return Candidate(scope.namespace, lease_name(scope.namespace, scope.name), f"{who}_{secrets.token_hex(8)}")
