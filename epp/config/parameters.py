"""Parameters of the plugin types in `known.py`: what each may be asked, in the reference's names and ranges.

Source: llm-d router, plugin catalogue of EndpointPickerConfig v1alpha1.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from epp.config.estimates import Estimate
from epp.scheduling.plugin import DEFAULT_PRODUCER, Params, Ref
from epp.units import Duration

Share = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
NanosOrText = Annotated[int | str, Meta(description="nanoseconds, or a Go duration")]
PrefixProducer = Annotated[str, Ref("producer", DEFAULT_PRODUCER)]
LoadProducer = Annotated[str, Ref("producer", "inflight-load-producer")]
LatencyProducer = Annotated[str, Ref("producer", "predicted-latency-producer")]


# -- data layer --------------------------------------------------------------------------------------------------------


class FileDiscovery(Params, frozen=True):
    path: str
    """The endpoints file."""
    watch_file: bool = False
    """Read the file again whenever it changes."""


class OpenAIParser(Params, frozen=True):
    propagate_priority: bool = False
    """Write the objective's priority into the body."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        return {"propagatePriority": "the body's own priority stays"} if self.propagate_priority else {}


# -- flow control ------------------------------------------------------------------------------------------------------


class ProgramAware(Params, frozen=True):
    strategy: Literal["las"] = "las"
    """las: least attained service."""
    las_weight_service: Amount = 0.8
    """Weight of the service that a program has had."""
    las_weight_head_wait: Amount = 0.2
    """Weight of how long its first request waits."""
    las_half_life_seconds: Amount = 60.0
    """After which service counts half."""
    las_decay_factor: Share = 0.99997
    """What service is multiplied by at each turn, where lasHalfLifeSeconds is 0."""
    eviction_ttl_seconds: Amount = 3600.0
    """After which a program that asks nothing is forgotten."""
    eviction_sweep_seconds: Positive = 300.0
    """How often that is looked at."""


class UsageLimit(Params, frozen=True):
    threshold: Positive = 1.0
    """Saturation at which every band stops."""


class Holdback(Params, frozen=True):
    min_ceiling: Annotated[float, Meta(ge=0, lt=1)]
    """Saturation at which the lowest band stops."""
    max_ceiling: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """That at which the highest does."""
    shape: Literal["linear"] = "linear"
    """How ceilings run between the two."""
    domain: Literal["rank", "value"] = "rank"
    """Between bands by their rank, or by their priority."""

    def __post_init__(self) -> None:
        if self.min_ceiling >= self.max_ceiling:
            raise ValueError(f"minCeiling must be below maxCeiling, {self.max_ceiling:g}")


# -- producers ---------------------------------------------------------------------------------------------------------


class Render(Params, frozen=True):
    url: str = "http://localhost:8000"
    """Address of vLLM's render service."""
    timeout: Duration = "5s"
    """For a text."""
    mm_timeout: Duration = "30s"
    """For a prompt with images."""


class TokenProducerParams(Params, frozen=True):
    model_name: str = ""
    """Model whose tokenizer is asked; a backend other than estimate needs it."""
    backend: Literal["", "estimate", "vllm", "uds"] = ""
    """Which of the sections below counts; empty: the one that there is."""
    estimate: Estimate | None = None
    """Tokens from the length of the text. The default."""
    vllm: Render | None = None
    """Tokens from vLLM."""
    uds_tokenizer_config: dict[str, Any] | None = None
    """Tokens from a side-car; deprecated."""

    def __post_init__(self) -> None:
        real = [each for each in (self.vllm, self.uds_tokenizer_config) if each is not None]
        if len(real) + (self.estimate is not None) > 1:
            raise ValueError("estimate, vllm and udsTokenizerConfig exclude one another: keep one")
        if real and not self.model_name:
            raise ValueError("modelName is required with vllm or udsTokenizerConfig")

    def idle(self, given: Collection[str]) -> dict[str, str]:
        names = [name for name in given if name in ("vllm", "udsTokenizerConfig", "modelName")]
        idle = dict.fromkeys(names, "there is no tokenizer yet: prompts are measured by their length")
        if self.estimate not in (None, Estimate()):
            idle["estimate"] = "an image, audio or video counts 225 tokens, whatever is inside it"
        return idle


class InflightLoad(Params, frozen=True):
    add_estimated_output_tokens: bool = False
    """Count the tokens that an answer is expected to have, too, from the decision to its end."""
    output_ratio: Amount = 1.5
    """Tokens of an answer for each of its prompt."""
    max_estimated_output_tokens: Count = 0
    """At most so many; 0: no limit."""
    prefix_match_info_producer_name: PrefixProducer = ""
    """Who says which tokens are cached."""
    sync_cross_replica_state: bool = True
    """Share the counts between replicas."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        idle: dict[str, str] = {}
        given = changed(self, given)
        for name in ("outputRatio", "maxEstimatedOutputTokens"):
            if name in given and not self.add_estimated_output_tokens:
                idle[name] = "addEstimatedOutputTokens is false"
        if "syncCrossReplicaState" in given:
            idle["syncCrossReplicaState"] = "replicas do not share their counts"
        return idle


class TokenProcessor(Params, frozen=True):
    block_size_tokens: Count = 16
    """Tokens a block."""
    block_size: Count = 16
    """Deprecated: blockSizeTokens."""
    hash_seed: str = ""
    """PYTHONHASHSEED of the engines."""
    hash_algorithm: Literal["cbor-fnv", "xxh64"] = "cbor-fnv"
    """How blocks are hashed."""


class Indexer(Params, frozen=True):
    token_processor_config: TokenProcessor = TokenProcessor()
    """As beside indexerConfig."""
    kv_block_index_config: dict[str, Any] = msgspec.field(default_factory=dict)
    """Where the index is kept."""
    kv_cache_backend_configs: tuple[dict[str, Any], ...] = ()
    """What a hit in each tier of memory is worth."""


class PodDiscovery(Params, frozen=True):
    pod_label_selector: str = "llm-d.ai/inference-serving=true"
    """Which pods publish events."""
    pod_namespace: str = ""
    """Where they are."""
    socket_port: Port = 5557
    """Where rank 0 publishes."""
    replay_socket_port: Port = 0
    """Where it repeats; 0: nowhere."""


class Events(Params, frozen=True):
    zmq_endpoint: str = ""
    """Where engines publish to."""
    topic_filter: str = "kv@"
    """Which topics are read."""
    concurrency: AtLeastOne = 4
    """Workers."""
    engine_type: str = "vllm"
    """Whose layout events have."""
    discover_pods: bool = True
    """Subscribe to each pod."""
    pod_discovery_config: PodDiscovery = PodDiscovery()
    """Which pods."""


class Precise(Params, frozen=True):
    token_processor_config: TokenProcessor = TokenProcessor()
    """How prompts become blocks."""
    indexer_config: Indexer = Indexer()
    """How blocks are remembered."""
    kv_events_config: Events = Events()
    """Where events come from."""
    speculative_indexing: bool = False
    """Believe that a prompt is held as soon as it is sent."""
    speculative_ttl: Annotated[Duration, Meta(description="How long that is believed.")] = msgspec.field(
        default="2s", name="speculativeTTL"
    )
    """How long that is believed."""


class Burst(Params, frozen=True):
    window_duration_ms: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """How long requests are collected."""
    max_per_replica: int = -1
    """Of a group, to one endpoint; -1: all."""
    block_size_tokens: AtLeastOne = 64
    """Tokens a block."""
    max_prefix_tokens_to_match: Count = 0
    """Tokens of a prompt that are looked at; 0: all."""
    min_colocate_blocks: Count = 0
    """Blocks that two groups must share to be sent to one endpoint; 0: groups are spread."""
    max_batch_size: int = 1000
    """Requests that are collected; -1: no limit."""
    balance_by: Literal["requests", "tokens"] = "requests"
    """What is spread evenly."""

    def __post_init__(self) -> None:
        for name, value in (("maxPerReplica", self.max_per_replica), ("maxBatchSize", self.max_batch_size)):
            if value != -1 and value < 1:
                raise ValueError(f"{name} must be -1 or at least 1, not {value}")
        if 0 < self.max_prefix_tokens_to_match < self.block_size_tokens:
            raise ValueError(f"maxPrefixTokensToMatch must be 0 or at least a block, {self.block_size_tokens}")


class PredictedLatency(Params, frozen=True):
    slo_buffer_factor: Positive = 1.0
    """Share of an objective that is planned with."""
    context_ttl: NanosOrText = msgspec.field(default="5m", name="contextTTL")
    """How long a request is remembered."""
    streaming_mode: bool = False
    """Learn from the first token rather than from whole answers."""
    endpoint_role_label: str = ""
    """Label that tells endpoints of different stages apart."""
    predict_in_produce: bool = True
    """Predict before filters run."""
    prefix_match_info_producer_name: PrefixProducer = ""
    """Who says which tokens are cached."""
    in_flight_load_producer_name: LoadProducer = ""
    """Who counts."""
    use_encoder_cache_features: bool = False
    """Predict from cached images, too."""
    sampling_mean: Amount = 1000.0
    """Ignored by the reference, too."""
    max_decode_token_samples_for_prediction: Count = 0
    """Ignored by the reference, too."""


class LatencyAdmitter(Params, frozen=True):
    latency_prediction_info_producer_name: LatencyProducer = ""
    """Who predicts."""


# -- scheduling by predictions, and across clusters --------------------------------------------------------------------


class LatencyScorer(Params, frozen=True):
    ttft_weight: Amount = 0.8
    """Weight of the time to the first token."""
    tpot_weight: Amount = 0.2
    """Weight of the time for each further one."""
    headroom_selection_strategy: Literal["least", "most"] = "least"
    """Prefer the least room below the objective, or the most."""
    composite_kv_weight: Amount = msgspec.field(default=1.0, name="compositeKVWeight")
    """Without predictions: of free KV cache."""
    composite_queue_weight: Amount = 1.0
    """Without predictions: of short queues."""
    composite_prefix_weight: Amount = 1.0
    """Without predictions: of cached prefixes."""
    prefix_match_info_producer_name: PrefixProducer = ""
    """Who says which tokens are cached."""
    latency_prediction_info_producer_name: LatencyProducer = ""
    """Who predicts."""


class SloTier(Params, frozen=True):
    epsilon_explore_neg: Share = 0.01
    """How often an endpoint that misses the objective is tried."""
    latency_prediction_info_producer_name: LatencyProducer = ""
    """Who predicts."""


class SessionPin(Params, frozen=True):
    header: str = "x-session-token"
    """Header with the session."""


def changed(params: Params, given: Collection[str]) -> list[str]:
    """Those of the given parameters that differ from their default: a default that is spelled out asks for nothing."""
    return [
        field.encode_name
        for field in msgspec.structs.fields(params)
        if field.encode_name in given and getattr(params, field.name) != field.default
    ]
