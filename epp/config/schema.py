"""What a configuration says, checked: its sections, and the objects that `load` returns and `build` takes.

Rules here: the sections are structs like plugins' parameters, read the same way; what they refer to is marked by `Ref`.
Source: llm-d router, EndpointPickerConfig v1alpha1.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from epp.config.document import Place
from epp.config.pages import Pages, pages
from epp.config.parameters import FileDiscovery
from epp.scheduling.detectors import ConcurrencyDetector, UtilizationDetector
from epp.scheduling.plugin import Instance, Params, Plugin, Ref
from epp.units import Duration, Quantity

API_VERSION: Final = "llm-d.ai/v1alpha1"
LEGACY_API_VERSION: Final = "inference.networking.x-k8s.io/v1alpha1"
KIND: Final = "EndpointPickerConfig"

DEFAULT_DETECTOR: Final = "utilization-detector"
DEFAULT_FAIRNESS: Final = "global-strict-fairness-policy"
DEFAULT_ORDERING: Final = "fcfs-ordering-policy"
DEFAULT_USAGE_LIMIT: Final = "static-usage-limit-policy"

FEATURE_GATES: Final[Mapping[str, bool]] = {
    "flowControl": False,
    "haPopulateNonLeaderDatastore": True,
    "dataLayer": True,
    "prepareDataPlugins": True,
    "enableLegacyMetrics": True,
}
"""The reference's, of today and of the years before, with what they are when nobody says."""

DetectorParams = UtilizationDetector | ConcurrencyDetector
Weight = Annotated[float, Meta(ge=0, le=sys.float_info.max)]


# -- sections ----------------------------------------------------------------------------------------------------------


class ProfileEntry(Params, frozen=True):
    """One plugin of a profile."""

    plugin_ref: Annotated[str, Ref("plugin")]
    """Name of the plugin."""
    weight: Weight = 1.0
    """Of a scorer: what its scores are multiplied by."""


class ProfileSection(Params, frozen=True):
    """Filters in order, scorers with weights, and one picker."""

    name: str
    """Name of the profile, for handlers and metrics."""
    plugins: tuple[ProfileEntry, ...] = ()
    """Without a picker among them: the one declared, or max-score-picker."""


class PriorityBandTemplate(Params, frozen=True):
    """Queues of one priority."""

    max_bytes: Quantity = 0
    """Bytes of all bodies that wait; 0: 1G."""
    max_requests: Quantity = 0
    """Requests that wait; 0: 5000."""
    fairness_policy_ref: Annotated[str, Ref("fairness policy", DEFAULT_FAIRNESS)] = DEFAULT_FAIRNESS
    """Whose turn it is."""
    ordering_policy_ref: Annotated[str, Ref("ordering policy", DEFAULT_ORDERING)] = DEFAULT_ORDERING
    """Which request of a flow is next."""


class PriorityBand(PriorityBandTemplate, frozen=True, kw_only=True):
    """Queues of one priority."""

    priority: int
    """Of the requests; below 0: sheddable."""


class DetectorSection(Params, frozen=True):
    """What says whether the pool is saturated."""

    plugin_ref: Annotated[str, Ref("detector", DEFAULT_DETECTOR)] = DEFAULT_DETECTOR
    """Name of the plugin."""


class FlowControl(Params, frozen=True):
    """May a request run now?"""

    max_bytes: Quantity = 0
    """Bytes of all bodies under way; 0: no limit."""
    max_requests: Quantity = 0
    """Requests under way; 0: no limit."""
    default_request_ttl: Duration = msgspec.field(default="60s", name="defaultRequestTTL")
    """How long a request may wait; 0s: for ever."""
    no_endpoint_request_ttl: Duration = msgspec.field(default="", name="noEndpointRequestTTL")
    """How long it may wait while there is no endpoint; empty: as defaultRequestTTL."""
    default_priority_band: PriorityBandTemplate = PriorityBandTemplate()
    """Of priorities without a band of their own."""
    default_negative_priority_band: PriorityBandTemplate = PriorityBandTemplate()
    """Of those below 0."""
    priority_bands: tuple[PriorityBand, ...] = ()
    """Bands of their own."""
    usage_limit_policy_plugin_ref: Annotated[str, Ref("usage limit policy", DEFAULT_USAGE_LIMIT)] = DEFAULT_USAGE_LIMIT
    """At which saturation each band stops."""
    saturation_detector: DetectorSection = DetectorSection()
    """What says whether the pool is saturated."""
    enable_eviction: bool = False
    """End requests in flight for more important ones."""


class ExtractorEntry(Params, frozen=True):
    """Reads what a source fetches."""

    plugin_ref: Annotated[str, Ref("extractor")]
    """Name of the plugin."""


class SourceEntry(Params, frozen=True):
    """Fetches what is known of endpoints."""

    plugin_ref: Annotated[str, Ref("data source")]
    """Name of the plugin."""
    extractors: tuple[ExtractorEntry, ...] = ()
    """Who reads it."""


class DiscoverySection(Params, frozen=True):
    """Where endpoints come from."""

    plugin_ref: Annotated[str, Ref("discovery")]
    """Name of the plugin."""


class PeerSection(Params, frozen=True):
    """Where other replicas are found."""

    plugin_ref: Annotated[str, Ref("peer discovery")]
    """Name of the plugin."""


class DataLayer(Params, frozen=True):
    """What is known of endpoints, and from whom."""

    inject_defaults: bool = True
    """Read metrics pages without being told."""
    sources: tuple[SourceEntry, ...] = ()
    """What is fetched beside."""
    discovery: DiscoverySection | None = None
    """Not given: endpoints come from Kubernetes."""
    peer_discovery: PeerSection | None = None
    """Not given: replicas do not know each other."""
    cross_replica_syncer_plugin_ref: Annotated[str, Ref("replica syncer")] = ""
    """What replicas share their counts by."""
    cross_replica_sync_interval: Duration = "200ms"
    """How often."""

    @property
    def fetched(self) -> dict[str, tuple[str, ...]]:
        """Names of each source's extractors, by the source's."""
        return {each.plugin_ref: tuple(reader.plugin_ref for reader in each.extractors) for each in self.sources}


class ParserEntry(Params, frozen=True):
    """Understands bodies."""

    plugin_ref: Annotated[str, Ref("parser")]
    """Name, or type, of the plugin."""


class RequestHandler(Params, frozen=True):
    """How requests are read."""

    parsers: Annotated[tuple[ParserEntry, ...], Meta(min_length=1)] | None = None
    """Which bodies are understood."""


# -- the whole ---------------------------------------------------------------------------------------------------------


class Declared(msgspec.Struct, frozen=True):
    """One entry of `plugins`, or one that stands for a default."""

    name: str
    type: str
    params: Params
    plugin: Plugin[Instance] | None = None
    """From the catalogue; None: one of `KNOWN`."""
    place: Place = Place()
    """Where it is written; without a line: it is added."""
    places: Mapping[str, Place] = {}
    """Where its parameters are, by path, as `profiles.decode`; others have their defaults."""
    added_for: str = ""
    """Why it is there although the file does not declare it."""


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
    """By name, those that others refer to before them; of the catalogue's, only those that are used."""
    profiles: tuple[ProfileConfig, ...]
    handler: str = ""
    """Name of the plugin that chooses among the profiles; empty: there is one, which decides alone."""
    gates: Mapping[str, bool] = {}
    """Feature gates that are set."""
    flow: FlowControl = FlowControl()
    data: DataLayer = DataLayer()
    request_handler: RequestHandler = RequestHandler()
    discovery: FileDiscovery | None = None
    """None: endpoints come from Kubernetes."""
    detector: DetectorParams = UtilizationDetector()
    """What says whether the pool is saturated."""
    warnings: tuple[str, ...] = ()
    """For the operator, at start: what was accepted and has no effect."""
    places: Mapping[str, Place] = {}
    """Where everything else is written, by its path in the effective configuration, as
    `schedulingProfiles.default.queue-scorer.weight`."""

    @property
    def pages(self) -> Pages:
        """What is fetched from every endpoint."""
        params = {name: declared.params for name, declared in self.plugins.items()}
        return pages(params, self.data.fetched)
