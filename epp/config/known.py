"""Plugin types that the reference knows and that are no plugins of ours, and why they do nothing here.

Their parameters are checked as strictly as any, so that a configuration moves between the two pickers without
surprises; those that change nothing are told to the operator. A type that the catalogue has counts as the catalogue
says.
Source: llm-d router, plugin catalogue of EndpointPickerConfig v1alpha1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from epp.config.pages import (
    CoreMetrics,
    DcgmSource,
    MetricsSource,
    ModelsSource,
    ObjectSource,
    PageSource,
)
from epp.config.parameters import (
    Burst,
    FileDiscovery,
    Holdback,
    InflightLoad,
    LatencyAdmitter,
    LatencyScorer,
    OpenAIParser,
    Precise,
    PredictedLatency,
    ProgramAware,
    SessionPin,
    SloTier,
    TokenProducerParams,
    UsageLimit,
)
from epp.scheduling.media import MediaCache
from epp.scheduling.plugin import NoParams, Params
from epp.scheduling.topology import Topology

NO_PREDICTOR: Final = "there is no latency predictor yet"
WITHOUT_PREDICTIONS: Final = (
    ("kv-cache-utilization-scorer", 1 / 3),
    ("queue-scorer", 1 / 3),
    ("prefix-cache-scorer", 1 / 3),
)
"""What the reference's latency-scorer scores by while it has no predictions, by its default weights."""
NO_QUEUES: Final = "there are no queues yet"
NO_EVICTION: Final = "requests in flight are never evicted"
ONE_CLUSTER: Final = "other clusters' pools are not watched"
NO_EVENTS: Final = "KV-cache events are not read yet"
BY_HANDLER: Final = "it is deprecated, since the profile handler itself sets the headers"
PODS_ARE_TOLD: Final = "discovery tells the endpoint table itself"


class Known(msgspec.Struct, frozen=True):
    """One type."""

    roles: tuple[str, ...]
    """What it may be referred to as, in the words of `Ref.kind`."""
    doc: str
    params: type[Params] = NoParams
    why: str = ""
    """Why it has no effect; empty: it has, or whoever refers to it says so."""
    experimental: bool = False
    instead: str = ""
    """What to write instead of it; not empty: it is deprecated."""
    reads: tuple[str, ...] = ()
    """Of an extractor: the data sources that it understands, by type."""
    stands_in: tuple[tuple[str, float], ...] = ()
    """Of a scorer: types of ours that score in its place, with their shares of its weight."""


PARSER_WHY: Final = "every dialect is always understood, by its path"
PAGE: Final = ("metrics-data-source",)
READ_BY_ENGINE: Final = """Read queues, caches, adapters and attributes from them.

A page is read as of the engine that the endpoint's label names. Without a label, or where it names none that is known,
as of the first of these whose metrics are on it: the default engine, those configured, the built-in ones.
"""
NOTICES: Final = ("endpoint-notification-source",)


def _policy(kind: str, doc: str, params: type[Params] = NoParams, *, experimental: bool = False) -> Known:
    return Known((f"{kind} policy",), doc, params, NO_QUEUES, experimental)


def _parser(api: str, params: type[Params] = NoParams) -> Known:
    return Known(("parser",), f"Understand {api}.", params, PARSER_WHY)


def _elsewhere(role: str, doc: str, params: type[Params] = NoParams, reads: tuple[str, ...] = ()) -> Known:
    return Known((role,), doc, params, ONE_CLUSTER, experimental=True, reads=reads)


FURTHER: Final[Mapping[str, tuple[str, ...]]] = {
    "utilization-detector": ("detector",),
    "concurrency-detector": ("detector",),
    "session-id-producer": ("producer",),
    "mm-embeddings-cache-producer": ("producer", "extractor"),
    "disaggregatedset-rollout-screener": ("extractor",),
    "p2p-source-producer": ("producer",),
}
"""What types of ours may be referred to as, beside their own kinds."""

KNOWN: Final[Mapping[str, Known]] = {
    "single-profile-handler": Known(("handler",), "Run the one profile that there is."),
    "disagg-headers-handler": Known(("hook",), "Set the headers of disaggregated serving.", why=BY_HANDLER),
    "prefill-header-handler": Known(("hook",), "Set the header of the prefill endpoint.", why=BY_HANDLER),
    "dp-rank-header-handler": Known(
        ("hook",), "Name the chosen rank in a header.", why="each rank is an endpoint of its own here"
    ),
    "file-discovery": Known(("discovery",), "Endpoints from a file instead of Kubernetes.", FileDiscovery),
    "metrics-data-source": Known(("data source",), "Fetch the servers' metrics pages.", MetricsSource),
    "core-metrics-extractor": Known(("extractor",), READ_BY_ENGINE, CoreMetrics, reads=PAGE),
    "models-data-source": Known(
        ("data source",), "Fetch the servers' lists of models.", ModelsSource, "no plugin reads the lists"
    ),
    "models-data-extractor": Known(
        ("extractor",), "Read them.", why="no plugin reads the lists", reads=("models-data-source",)
    ),
    "dcgm-data-source": Known(("data source",), "Fetch the GPUs' metrics.", DcgmSource, experimental=True),
    "dcgm-extractor": Known(
        ("extractor",),
        "Read how busy the busiest GPU of a pod is: the attribute GPUUtilization, 0..1.",
        experimental=True,
        reads=("dcgm-data-source",),
    ),
    "topology-extractor": Known(
        ("extractor",),
        "Read where an endpoint stands.",
        Topology,
        experimental=True,
        reads=NOTICES,
    ),
    "k8s-notification-source": Known(("data source",), "Watch Kubernetes objects.", ObjectSource, PODS_ARE_TOLD),
    "endpoint-notification-source": Known(
        ("data source",), "Tell when endpoints come and go.", NoParams, PODS_ARE_TOLD
    ),
    "openai-parser": _parser("OpenAI's API", OpenAIParser),
    "anthropic-parser": _parser("Anthropic's API"),
    "vllmhttp-parser": _parser("vLLM's own paths"),
    "vllmgrpc-parser": _parser("vLLM's gRPC"),
    "sglanghttp-parser": _parser("SGLang's own paths"),
    "vertexai-parser": _parser("Vertex AI's gRPC"),
    "passthrough-parser": _parser("nothing of the body"),
    "global-strict-fairness-policy": _policy("fairness", "The best request of all flows first."),
    "round-robin-fairness-policy": _policy("fairness", "Each flow in turn."),
    "program-aware-fairness": _policy("fairness", "Programs that had the least service first.", ProgramAware),
    "fcfs-ordering-policy": _policy("ordering", "In the order of arrival."),
    "edf-ordering-policy": _policy("ordering", "The earliest deadline first."),
    "slo-deadline-ordering-policy": _policy("ordering", "By arrival and objective."),
    "static-usage-limit-policy": _policy("usage limit", "One ceiling for every band.", UsageLimit),
    "priority-holdback-policy": _policy("usage limit", "Lower bands have lower ceilings.", Holdback, experimental=True),
    "soft-reflective-ceiling-policy": _policy(
        "usage limit", "Lower bands have ceilings that fall with saturation.", experimental=True
    ),
    "sheddable-eviction-filter": Known(
        ("eviction filter",), "Requests below priority 0 may be evicted.", why=NO_EVICTION, experimental=True
    ),
    "priority-then-time-eviction-order-policy": Known(
        ("eviction order",), "The lowest priority first, the newest of it.", why=NO_EVICTION, experimental=True
    ),
    "token-producer": Known(("producer",), "Count the tokens of prompts.", TokenProducerParams),
    "tokenizer": Known(("producer",), "Count the tokens of prompts.", TokenProducerParams, instead="token-producer"),
    "mm-embeddings-cache-producer": Known(
        ("producer", "extractor"),
        "Say how large endpoints' caches of encoded images are.",
        MediaCache,
        reads=NOTICES,
    ),
    "inflight-load-producer": Known(("producer",), "Count what was sent and has not ended.", InflightLoad),
    "precise-prefix-cache-producer": Known(
        ("producer", "extractor"), "Read from the engines what they hold.", Precise, NO_EVENTS, reads=NOTICES
    ),
    "precise-prefix-cache-scorer": Known(
        ("scorer", "extractor"),
        "Prefer who holds the prompt, by what the engines say.",
        Precise,
        NO_EVENTS,
        instead="precise-prefix-cache-producer and prefix-cache-scorer",
        reads=NOTICES,
        stands_in=(("prefix-cache-scorer", 1.0),),
    ),
    "burst-prefix-cache-producer": Known(
        ("producer",), "Send bursts of one prompt to one place.", Burst, "requests are not held back", experimental=True
    ),
    "predicted-latency-producer": Known(
        ("producer",), "Predict how long a request will take.", PredictedLatency, NO_PREDICTOR
    ),
    "latency-slo-admitter": Known(
        ("admitter",),
        "Refuse what no endpoint can serve in time.",
        LatencyAdmitter,
        f"{NO_PREDICTOR}, so it admits everybody",
    ),
    "latency-scorer": Known(
        ("scorer",), "Prefer who will be in time.", LatencyScorer, NO_PREDICTOR, stands_in=WITHOUT_PREDICTIONS
    ),
    "predicted-latency-scorer": Known(
        ("scorer",),
        "Prefer who will be in time.",
        LatencyScorer,
        NO_PREDICTOR,
        instead="latency-scorer",
        stands_in=WITHOUT_PREDICTIONS,
    ),
    "slo-headroom-tier-filter": Known(("filter",), "Keep who will be in time.", SloTier, NO_PREDICTOR),
    "multicluster-session-affinity-filter": _elsewhere("filter", "Keep a session's pool.", SessionPin),
    "multicluster-queue-scorer": _elsewhere("scorer", "Prefer the pool with the shortest queues."),
    "multicluster-kv-cache-utilization-scorer": _elsewhere("scorer", "Prefer the pool with the most free cache."),
    "multicluster-prefix-cache-scorer": _elsewhere("scorer", "Prefer the pool that holds the prompt."),
    "multicluster-metrics-data-source": _elsewhere("data source", "Fetch other pickers' pages.", PageSource),
    "multicluster-metrics-extractor": _elsewhere(
        "extractor", "Read them.", reads=("multicluster-metrics-data-source",)
    ),
    "multicluster-file-discovery": _elsewhere("discovery", "Other pools, from a file.", FileDiscovery),
}
