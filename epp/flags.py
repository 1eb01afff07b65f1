"""The flags of `epp serve`: the reference picker's, with its names and defaults, and a few of our own.

A flag that is accepted for compatibility and does nothing yet is in `WITHOUT_EFFECT`, with what to know about it;
one that is given and stands there is warned about at start. A flag of the reference's that was removed is in
`REMOVED`, with what to write instead.
Source: llm-d router, `pkg/epp/server/options.go`; Go's flag package for single dashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class ServeFlags:
    """Everything that `epp serve` can be told on its command line."""

    pool_name: str = ""
    """Name of the InferencePool to serve; with file discovery it is only a label."""
    pool_namespace: str = ""
    """Namespace of the pool; empty: the environment's NAMESPACE, then "default"."""
    pool_group: str = "inference.networking.k8s.io"
    """API group of the InferencePool; the older one is inference.networking.x-k8s.io."""
    endpoint_selector: str = ""
    """Serve the pods that this label selector selects, without a pool."""
    endpoint_target_ports: tuple[str, ...] = ()
    """Their ports, 1 to 8."""
    config_file: str = ""
    """EndpointPickerConfig to read; empty: the default configuration."""
    config_text: str = ""
    """EndpointPickerConfig as text, instead of a file."""
    allow_experimental_plugins: bool = False
    """The configuration may name plugins that may still change."""
    grpc_port: int = 9002
    """Port of the ext_proc service."""
    grpc_health_port: int = 9003
    """Port of the gRPC health service, plaintext."""
    metrics_port: int = 9090
    """Port of /metrics and /debug."""
    health_checking: bool = False
    """Serve the health service on the ext_proc port too."""
    transport: Literal["wire", "grpcio"] = "wire"
    """What carries the ext_proc and health services: our own HTTP/2, or grpcio."""
    http2_limit: tuple[str, ...] = ()
    """NAME=VALUE, as often as needed: a limit of the wire transport, such as max-streams=2000."""
    secure_serving: bool = True
    """TLS on the ext_proc port."""
    cert_path: str = ""
    """Folder with tls.crt and tls.key; empty: a self-signed certificate made at start."""
    enable_cert_reload: bool = False
    """Take a certificate of --cert-path, and the client CA, anew when they change."""
    client_ca_file: str = ""
    """PEM file: only clients with a certificate of its authorities may use the ext_proc port. Ours."""
    metrics_cert_dir: str = ""
    """Folder with tls.crt and tls.key: TLS on the metrics port; empty: plaintext."""
    metrics_endpoint_auth: bool | None = None
    """The metrics port asks the API server who a token is and what he may read; by default, unless endpoints are in a
    file."""
    metrics_client_ca_file: str = ""
    """PEM file: only clients with a certificate of its authorities may read the metrics port."""
    max_body: str = "32Mi"
    """Largest request body, a quantity; a larger one is refused with 413."""
    grpc_max_recv_msg_size: str = ""
    """Largest ext_proc message received, a quantity; it limits messages, not bodies."""
    grpc_max_send_msg_size: str = ""
    """Largest ext_proc message sent, a quantity."""
    refresh_metrics_interval: str = "50ms"
    """Pause between two scrapes of one model server."""
    metrics_staleness_threshold: str = "2s"
    """Age at which what a model server said counts as unknown, for scoring too."""
    model_server_metrics_scheme: Literal["http", "https"] | None = None
    """How model servers' metrics pages are fetched, by default http; a metrics-data-source in the configuration counts
    before these four."""
    model_server_metrics_path: str | None = None
    """Path of the page; by default /metrics."""
    model_server_metrics_port: int | None = None
    """Port of the page; 0, the default: the endpoint's own."""
    model_server_metrics_https_insecure_skip_verify: bool | None = None
    """With https, take any certificate; by default true."""
    disable_endpoint_subset_filter: bool = False
    """Ignore the gateway's subset hint."""
    emit_endpoint_scores: bool = False
    """Tell the proxy each endpoint's score as dynamic metadata."""
    enable_grpc_stream_metrics: bool = False
    """Series about ext_proc streams."""
    ha_enable_leader_election: bool = False
    """Of several replicas one is ready, by a Lease in the pool's namespace; the others stand by."""
    drain_timeout: str = "30s"
    """After SIGTERM, how long exchanges under way may take to finish."""
    tls_min_version: str = ""
    """VersionTLS12 (the default) or VersionTLS13; wire only."""
    tls_cipher_suites: tuple[str, ...] = ()
    """Cipher suites for TLS 1.2, by their IANA names; wire only."""
    seed: int | None = None
    """Seed of everything random; not given: from the system."""
    zap_encoder: str = "json"
    """Form of the log: json or console."""
    v: Annotated[int, Parameter(name=("-v", "--v"))] = 2
    """Verbosity of the log: 0 warnings, 1 to 3 information, 4 and more debugging."""

    # Accepted so that existing manifests start; WITHOUT_EFFECT says what is to be known.
    refresh_prometheus_metrics_interval: str | None = None
    enable_pprof: bool | None = None
    tracing: bool | None = None
    zap_devel: bool | None = None
    zap_log_level: str | None = None
    zap_stacktrace_level: str | None = None
    zap_time_encoding: str | None = None

    def without_effect(self, *, kubernetes: bool = True, pages: bool = False) -> Iterator[str]:
        """A warning for each flag that was given and does nothing. `--flag=false` asks for nothing: no warning.

        Args:
            kubernetes: endpoints come from an API server.
            pages: the configuration says how metrics pages are fetched.
        """
        unheard = WITHOUT_EFFECT | (ONLY_GRPCIO if self.transport == "wire" else ONLY_WIRE)
        unheard |= {} if kubernetes else ONLY_KUBERNETES
        unheard |= dict.fromkeys(PAGES, "the configuration has a metrics-data-source, which counts") if pages else {}
        for name, why in unheard.items():
            if getattr(self, name) not in (None, False, "", ()):
                yield f"--{name.replace('_', '-')} has no effect: {why}"


WITHOUT_EFFECT: Final = {
    "refresh_prometheus_metrics_interval": "pool gauges are computed when /metrics is read",
    "enable_pprof": "profile with py-spy, which attaches from outside",
    "tracing": "there are no traces yet",
    "zap_devel": "use --zap-encoder and -v",
    "zap_log_level": "use -v",
    "zap_stacktrace_level": "errors of our own always carry their trace",
    "zap_time_encoding": "times are ISO 8601",
}

ONLY_WIRE: Final = {
    "http2_limit": "grpcio has limits of its own",
    "tls_min_version": "grpcio takes its TLS versions from the library (1.2 and 1.3)",
    "tls_cipher_suites": "grpcio takes its cipher suites from the library; GRPC_SSL_CIPHER_SUITES sets them",
}
ONLY_KUBERNETES: Final = {
    "metrics_endpoint_auth": "endpoints are in a file, so there is no API server to ask; --metrics-client-ca-file lets "
    "in only who has a certificate",
    "ha_enable_leader_election": "endpoints are in a file, so there is no API server to keep a Lease in: each replica "
    "serves",
}
PAGES: Final = (
    "model_server_metrics_scheme",
    "model_server_metrics_path",
    "model_server_metrics_port",
    "model_server_metrics_https_insecure_skip_verify",
)
ONLY_GRPCIO: Final = {
    "grpc_max_send_msg_size": "no message sent is larger than a body, which --max-body limits",
}

REMOVED: Final = dict.fromkeys(
    (
        "total-queued-requests-metric",
        "total-running-requests-metric",
        "kv-cache-usage-percentage-metric",
        "lora-info-metric",
        "cache-info-metric",
    ),
    "label the model servers with llm-d.ai/engine-type instead; the engine is also recognised from its page. Metrics "
    "of other names belong in engineConfigs of a core-metrics-extractor",
)


def normalised(argv: Sequence[str]) -> list[str]:
    """Go's spellings made ours: `-grpc-port=9002` and v0's `--grpcPort=9002` are `--grpc-port=9002`; `-v=4` stays.

    Raises:
        ValueError: a flag that the reference removed, with what to do instead.
    """
    words = [re.sub(r"^-(?=[a-z][a-zA-Z-]+(=|$))", "--", word) for word in argv]
    words = [re.sub(r"^--[a-zA-Z-]+", _in_kebab_case, word) for word in words]
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name in REMOVED:
            raise ValueError(f"--{name} was removed from the picker: {REMOVED[name]}")
    return words


def _in_kebab_case(flag: re.Match[str]) -> str:
    return re.sub(r"[A-Z]", lambda letter: f"-{letter[0].lower()}", flag[0])
