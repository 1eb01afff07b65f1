"""What a configuration says, checked: the objects that `load` returns and `build` takes.

Also the plugin types that the reference knows and that need no plugin of ours: their parameters are checked as
strictly as any, and those that change nothing are told to the operator.
Source: llm-d router, EndpointPickerConfig v1alpha1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from epp.config.document import Place
from epp.config.units import parse_duration
from epp.scheduling.plugin import Instance, NoParams, Params, Plugin

API_VERSION: Final = "llm-d.ai/v1alpha1"
LEGACY_API_VERSION: Final = "inference.networking.x-k8s.io/v1alpha1"
KIND: Final = "EndpointPickerConfig"


Headroom = Annotated[float, Meta(ge=0)]


class FileDiscovery(Params, frozen=True):
    """`file-discovery`: endpoints from a file instead of Kubernetes."""

    path: str
    """The endpoints file."""
    watch_file: bool = False
    """Read the file again whenever it changes."""


class MetricsSource(Params, frozen=True):
    """`metrics-data-source`: how pages are fetched. We scrape http://<endpoint>/metrics, whatever is written here."""

    scheme: str = "http"
    path: str = "/metrics"
    port: int = 0
    insecure_skip_verify: bool = True
    ca_cert_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    interval: str = ""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(_changed(self, given), "it is not supported yet")


class CoreMetrics(Params, frozen=True):
    """`core-metrics-extractor`: which engine's metric names a page has. We recognise the page."""

    engine_label_key: str = "llm-d.ai/engine-type"
    default_engine: str = "vllm"
    engine_configs: tuple[dict[str, Any], ...] = ()

    def idle(self, given: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(_changed(self, given), "it is not supported yet")


class UtilizationDetector(Params, frozen=True):
    """`utilization-detector`: full by what the servers' pages say."""

    queue_depth_threshold: Annotated[int, Meta(gt=0)] = 5
    """Waiting requests at which an endpoint is full."""
    kv_cache_util_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.8
    """Share of the KV cache in use at which it is."""
    metrics_staleness_threshold: str = "200ms"
    """Age of a page from which on an endpoint counts as full."""
    headroom: Headroom = 0.0
    """Only for the detector as a filter."""

    def __post_init__(self) -> None:
        if not parse_duration(self.metrics_staleness_threshold):
            raise ValueError("metricsStalenessThreshold must be longer than 0: every endpoint would count as full")

    def idle(self, given: Collection[str]) -> dict[str, str]:
        return _no_filter(self, given)


class ConcurrencyDetector(Params, frozen=True):
    """`concurrency-detector`: full by what was sent and has not ended."""

    max_concurrency: Annotated[int, Meta(gt=0)] = 100
    """Requests in flight at which an endpoint is full."""
    max_token_concurrency: Annotated[int, Meta(gt=0)] = 1_000_000
    """Prompt tokens in flight at which it is."""
    concurrency_mode: Literal["requests", "tokens", "hybrid"] = "requests"
    """Which of the two counts; hybrid: whichever is fuller."""
    headroom: Headroom = 0.0
    """Only for the detector as a filter."""
    in_flight_load_producer_name: str = ""
    """Who counts. We count what we send, whatever is written here."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        idle = _no_filter(self, given)
        if "inFlightLoadProducerName" in _changed(self, given):
            idle["inFlightLoadProducerName"] = "the picker counts what it sends"
        return idle


DetectorParams = UtilizationDetector | ConcurrencyDetector


class Parser(NoParams, frozen=True):
    """Which bodies are understood. Ours are chosen by path, all of them, always."""


OTHER_TYPES: Final[Mapping[str, type[Params]]] = {
    "file-discovery": FileDiscovery,
    "single-profile-handler": NoParams,
    "metrics-data-source": MetricsSource,
    "core-metrics-extractor": CoreMetrics,
    "utilization-detector": UtilizationDetector,
    "concurrency-detector": ConcurrencyDetector,
    "openai-parser": Parser,
    "anthropic-parser": Parser,
    "vllmhttp-parser": Parser,
    "sglanghttp-parser": Parser,
    "passthrough-parser": Parser,
}
"""Plugin types that are known beside the catalogue's."""

FEATURE_GATES: Final = frozenset(
    ("flowControl", "haPopulateNonLeaderDatastore", "dataLayer", "prepareDataPlugins", "enableLegacyMetrics")
)
"""The reference's, of today and of the years before."""


class Declared(msgspec.Struct, frozen=True):
    """One entry of `plugins`, or one that stands for a default."""

    name: str
    type: str
    params: Params
    plugin: Plugin[Instance] | None = None
    """From the catalogue; None: one of `OTHER_TYPES`."""
    place: Place = Place()


class Reference(msgspec.Struct, frozen=True):
    """One entry of a profile."""

    name: str
    """Of a declared plugin."""
    weight: float = 1.0
    """Counts for scorers only."""


class ProfileConfig(msgspec.Struct, frozen=True):
    name: str
    plugins: tuple[Reference, ...]
    """Filters, scorers and exactly one picker, in the order of the file."""


class Config(msgspec.Struct, frozen=True):
    plugins: Mapping[str, Declared]
    """By name; of those that decide, the ones that the profile uses."""
    profiles: tuple[ProfileConfig, ...]
    """Exactly one, until there is a handler that chooses between several."""
    discovery: FileDiscovery | None = None
    """None: endpoints come from Kubernetes."""
    detector: DetectorParams = UtilizationDetector()
    """What says whether the pool is saturated."""
    warnings: tuple[str, ...] = ()
    """For the operator, at start: what was accepted and has no effect."""


def _no_filter(params: DetectorParams, given: Collection[str]) -> dict[str, str]:
    return {"headroom": "a detector is no filter here yet"} if "headroom" in _changed(params, given) else {}


def _changed(params: Params, given: Collection[str]) -> list[str]:
    """Those of the given parameters that differ from their default: a default that is spelled out asks for nothing."""
    return [
        field.encode_name
        for field in msgspec.structs.fields(params)
        if field.encode_name in given and getattr(params, field.name) != field.default
    ]
