"""What is fetched from endpoints beside requests, and what is read from it: the data layer's sources and extractors.

In: parameters, as written. Out: which of the plugins count, and the attributes of endpoints that they provide.
Rules here:
- One page of an endpoint says how busy its engine is: of several metrics sources the first that `dataLayer.sources`
  refers to counts, else the first that is declared, whatever it is called. (The reference knows its own default by its
  name, and scrapes twice where it is renamed.)
- GPU metrics are fetched only where `dataLayer.sources` says so.
- Attributes are bounded in number, and none has a name that the endpoint table has a meaning for.
Source: llm-d router, data layer plugins of EndpointPickerConfig v1alpha1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from epp.endpoints.table import COUNTS, FACTS, GAUGES
from epp.scheduling.plugin import ADAPTERS, PREFIX_MATCH, Params
from epp.units import Duration, Written

BUILT_IN_ENGINES: Final = ("vllm", "sglang", "trtllm-serve", "triton-tensorrt-llm", "triton")
"""Engines whose metric names are known without being told."""
MOST_ATTRIBUTES: Final = 32
"""Attributes that engineConfigs may name in all: each is a column, and a search in every page."""
GPU_USE: Final = "GPUUtilization"
"""The attribute that dcgm-extractor provides: a share, 0..1."""
TAKEN: Final = (*GAUGES, *FACTS, *COUNTS, ADAPTERS, PREFIX_MATCH, GPU_USE)

TYPES: Final = ("metrics-data-source", "core-metrics-extractor", "dcgm-data-source", "dcgm-extractor")
UNREFERRED: Final = "dataLayer.sources names no dcgm-data-source with a dcgm-extractor"
"""Of GPU metrics."""

Port = Annotated[int, Meta(ge=0, le=65535)]
Labels = tuple[tuple[str, str], ...]
P = TypeVar("P", bound=Params)

_FAMILY: Final = re.compile(r"\s*([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{([^{}]*)\}\s*)?")
_PAIR: Final = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*(?:"([^"]*)"|([^,"\s]*))\s*(?:,|$)')


def parse_metric(text: str) -> tuple[str, Labels]:
    """A metric as `family` or `family{label=value,...}`, values with quotes or without: its name, and labels.

    Raises:
        ValueError: it is none.
    """
    match = _FAMILY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a metric: write family, or family{{label=value,label=value}}")
    pairs, at, inside = [], 0, (match[2] or "").rstrip()
    while at < len(inside):
        pair = _PAIR.match(inside, at)
        if pair is None:
            raise ValueError(f"{inside[at:].strip()!r} is not label=value, as {match[1]}{{label=value}} has it")
        pairs.append((pair[1], pair[2] if pair[2] is not None else pair[3]))
        at = pair.end()
    return match[1], tuple(pairs)


Metric = Annotated[
    str,
    Written(parse_metric),
    Meta(extra_json_schema={"pattern": r"^\s*([a-zA-Z_:][a-zA-Z0-9_:]*\s*(\{[^{}]*\}\s*)?)?$"}),
]
"""A family, and labels that its series must have."""


# -- sources -----------------------------------------------------------------------------------------------------------


class PageSource(Params, frozen=True):
    """How pages are fetched."""

    scheme: Literal["http", "https"] = "http"
    """http or https."""
    path: Annotated[str, Meta(pattern="^[!-~]*$")] = "/metrics"
    """Path of the page."""
    port: Port = 0
    """0: the endpoint's own."""
    insecure_skip_verify: bool = True
    """Take any certificate."""
    ca_cert_path: str = ""
    """PEM file of the authorities that certificates must be of; empty: those that the system trusts."""
    client_cert_path: str = ""
    """PEM file of our own certificate."""
    client_key_path: str = ""
    """PEM file of its key."""
    interval: Duration = ""
    """Pause between two pages; empty: that of --refresh-metrics-interval."""

    def __post_init__(self) -> None:
        if bool(self.client_cert_path) != bool(self.client_key_path):
            raise ValueError("clientCertPath and clientKeyPath need each other: give both, or neither")

    def idle(self, given: Collection[str]) -> dict[str, str]:
        if self.scheme == "http":
            return dict.fromkeys((name for name in _tls(self) if name in given), "scheme is http: write scheme: https")
        if self.insecure_skip_verify and self.ca_cert_path:
            return {"caCertPath": "any certificate is taken: write insecureSkipVerify: false"}
        return {}


def _tls(params: PageSource) -> Iterator[str]:
    """Parameters that ask for something that only https has."""
    if not params.insecure_skip_verify:
        yield "insecureSkipVerify"
    for name, path in (
        ("caCertPath", params.ca_cert_path),
        ("clientCertPath", params.client_cert_path),
        ("clientKeyPath", params.client_key_path),
    ):
        if path:
            yield name


class MetricsSource(PageSource, frozen=True):
    pass


class ModelsSource(PageSource, frozen=True):
    path: Annotated[str, Meta(pattern="^[!-~]*$")] = "/v1/models"
    """Path of the list."""


class DcgmSource(PageSource, frozen=True):
    port: Port = 9400
    """Port of the exporter."""
    use_node_address: bool = False
    """Ask the node's address instead of the pod's, where discovery tells it: Kubernetes does, a file does not."""
    interval: Duration = ""
    """Pause between two pages; empty: a second, for the exporter itself looks no more often by default."""


class ObjectSource(Params, frozen=True):
    group: str = ""
    """API group; empty: the core one."""
    version: str = "v1"
    """API version."""
    kind: str = ""
    """Kind of the objects that are watched."""


# -- engines -----------------------------------------------------------------------------------------------------------


class CustomMetric(Params, frozen=True):
    """A number of each endpoint's page that endpoint-attribute-filter and -scorer may use."""

    attribute_key: Annotated[str, Meta(min_length=1, pattern="^[^/]*$")]
    """What they call it."""
    metric_spec: Annotated[Metric, Meta(min_length=1)]
    """Where it stands on the page; of several series the mean."""


class EngineConfig(Params, frozen=True):
    """Metric names of one kind of model server. What is empty the server does not tell."""

    name: Annotated[str, Meta(min_length=1)]
    """As the engine label has it. That of a built-in engine replaces it as a whole."""
    queued_requests_spec: Metric = ""
    """Requests that wait; of several series the sum."""
    running_requests_spec: Metric = ""
    """Requests that run; of several series the sum."""
    kv_usage_spec: Metric = msgspec.field(default="", name="kvUsageSpec")
    """Share of the KV cache that is in use, 0..1; of several series the mean."""
    lora_spec: Metric = ""
    """A metric with the labels running_lora_adapters, waiting_lora_adapters and max_lora; the newest series counts."""
    cache_info_spec: Metric = ""
    """A metric whose labels say how large the KV cache is."""
    cache_block_size_label_name: str = "block_size"
    """Its label with the tokens of a block."""
    cache_num_blocks_label_name: str = "num_gpu_blocks"
    """Its label with the number of blocks; of several series the sum."""
    cache_block_size_spec: Metric = ""
    """Tokens of a block, as a metric; it counts before cacheInfoSpec."""
    cache_num_blocks_spec: Metric = ""
    """Number of blocks, as a metric; it counts before cacheInfoSpec."""
    custom_metrics: tuple[CustomMetric, ...] = ()
    """Further numbers, as attributes of endpoints."""


class CoreMetrics(Params, frozen=True):
    """How metrics pages are read."""

    engine_label_key: str = "llm-d.ai/engine-type"
    """Label that names an endpoint's engine; inference.networking.k8s.io/engine-type is read where it is missing."""
    default_engine: str = "vllm"
    """Engine that an endpoint without the label is tried as first."""
    engine_configs: tuple[EngineConfig, ...] = ()
    """Metric names of further engines."""

    def __post_init__(self) -> None:
        names = [each.name for each in self.engine_configs]
        if len(set(names)) < len(names):
            raise ValueError("engineConfigs: two have one name")
        if self.default_engine not in (*names, *BUILT_IN_ENGINES):
            known = ", ".join(dict.fromkeys((*names, *BUILT_IN_ENGINES)))
            raise ValueError(f"defaultEngine {self.default_engine!r} is not known: write one of {known}")
        taken = [each for each in self.attributes if each in TAKEN]
        if taken:
            raise ValueError(f"attributeKey {taken[0]} is taken: give the metric another (not one of {_listed(TAKEN)})")
        if len(self.attributes) > MOST_ATTRIBUTES:
            raise ValueError(f"customMetrics name {len(self.attributes)} attributes: {MOST_ATTRIBUTES} at most")
        for each in self.engine_configs:
            keys = [custom.attribute_key for custom in each.custom_metrics]
            if len(set(keys)) < len(keys):
                raise ValueError(f"customMetrics of {each.name}: two have one attributeKey")

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes of all engines, each once."""
        return tuple(
            dict.fromkeys(each.attribute_key for config in self.engine_configs for each in config.custom_metrics)
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)


# -- which of them count -----------------------------------------------------------------------------------------------


class Pages(msgspec.Struct, frozen=True):
    """What is fetched from every endpoint."""

    metrics: MetricsSource | None = None
    """How its metrics page is; None: the configuration does not say."""
    core: CoreMetrics = CoreMetrics()
    gpu: DcgmSource | None = None
    """How its GPUs' page is; None: nobody asks for it."""
    counts: frozenset[str] = frozenset()
    """Names of the plugins that are meant by these."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """What endpoints have beside the table's own columns."""
        return (*self.core.attributes, *((GPU_USE,) if self.gpu is not None else ()))

    def why_idle(self, name: str, type_: str) -> str:
        """Why a source or an extractor does nothing; empty: it does, or is none of these."""
        if name in self.counts or type_ not in TYPES:
            return ""
        if type_.startswith("dcgm"):
            return "" if self.gpu is not None and type_ == "dcgm-extractor" else UNREFERRED
        return f"every endpoint has one metrics page, and another {type_} counts for it"


def pages(plugins: Mapping[str, Params], sources: Mapping[str, tuple[str, ...]]) -> Pages:
    """Which of the plugins count.

    Args:
        plugins: parameters of what is declared, by name.
        sources: `dataLayer.sources`: the extractors' names by the source's.
    """
    fetched = first(MetricsSource, sources, plugins) or first(MetricsSource, plugins, plugins)
    core = first(CoreMetrics, sources.get(fetched, ()), plugins) or first(CoreMetrics, plugins, plugins)
    gpu = next((name for name in sources if isinstance(plugins.get(name), DcgmSource) and sources[name]), "")
    metrics_params, core_params, gpu_params = (plugins.get(name) for name in (fetched, core, gpu))
    return Pages(
        metrics_params if isinstance(metrics_params, MetricsSource) else None,
        core_params if isinstance(core_params, CoreMetrics) else CoreMetrics(),
        gpu_params if isinstance(gpu_params, DcgmSource) else None,
        frozenset((fetched, core, gpu)) - {""},
    )


def first(kind: type[P], names: Collection[str], plugins: Mapping[str, Params]) -> str:
    """The first of the names whose plugin has parameters of a kind; empty: none has."""
    return next((name for name in names if isinstance(plugins.get(name), kind)), "")
