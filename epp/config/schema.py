"""What a configuration says, checked: the objects that `load` returns and `build` takes.

Also the plugin types that the reference knows and that need no plugin of ours: their parameters are checked as
strictly as any, and those that change nothing are told to the operator.
Source: llm-d router, EndpointPickerConfig v1alpha1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec

from epp.config.document import Place
from epp.scheduling.plugin import Instance, NoParams, Params, Plugin

API_VERSION: Final = "llm-d.ai/v1alpha1"
LEGACY_API_VERSION: Final = "inference.networking.x-k8s.io/v1alpha1"
KIND: Final = "EndpointPickerConfig"


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


class Parser(NoParams, frozen=True):
    """Which bodies are understood. Ours are chosen by path, all of them, always."""


OTHER_TYPES: Final[Mapping[str, type[Params]]] = {
    "file-discovery": FileDiscovery,
    "single-profile-handler": NoParams,
    "metrics-data-source": MetricsSource,
    "core-metrics-extractor": CoreMetrics,
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
    warnings: tuple[str, ...] = ()
    """For the operator, at start: what was accepted and has no effect."""


def _changed(params: Params, given: Collection[str]) -> list[str]:
    """Those of the given parameters that differ from their default: a default that is spelled out asks for nothing."""
    return [
        field.encode_name
        for field in msgspec.structs.fields(params)
        if field.encode_name in given and getattr(params, field.name) != field.default
    ]
