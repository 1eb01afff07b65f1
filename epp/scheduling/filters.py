"""Filters by load, by attribute, by prefix, and by length of prompt.

In: a request and candidates. Out: a mask; or Saturated (429), where everybody is left out for being busy.
Rules here:
- A value that is too old to go by counts against an endpoint as long as others are known: unknown is not idle. Where
  nothing recent is known of anybody, nobody is left out for it: a scrape that fails must not stop the traffic. A fresh
  page that lacks a value is not held against its server, which may never tell it.
- Who is left out for load comes back by itself, so nobody left is 429 with Retry-After; who is left out for what it
  is does not, so nobody left is 503.
Source: llm-d router, scheduling filters; the rule for the unknown is ours (there a missing value counts as 0).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Annotated, Final, Literal

import numpy as np
from msgspec import Meta, field, structs

from epp.dialects.request import Request
from epp.endpoints.table import FACTS, Bools, Candidates, Endpoint, Floats, all_true
from epp.errors import ConfigError, Saturated
from epp.scheduling.labels import PerEndpoint
from epp.scheduling.plugin import (
    ADAPTERS,
    DEFAULT_PRODUCER,
    PREFIX_MATCH,
    Context,
    Params,
    Ref,
    Scores,
    experimental,
    filter_,
    scorer,
)

Share = Annotated[float, Meta(ge=0, le=1)]
LoadProducer = Annotated[str, Ref("producer", "inflight-load-producer")]

METRICS: Final = {
    "active-requests": "inflight",
    "running-requests": "running",
    "waiting-queue": "waiting",
    "kv-cache-utilization": "kv_usage",
}
"""Column of each metric that a condition of utilization-filter may name."""


class Condition(Params, frozen=True):
    """One cap of utilization-filter."""

    metric: Literal["active-requests", "running-requests", "waiting-queue", "kv-cache-utilization"]
    """active-requests: in flight, by our own count; the others as the endpoint's page has them."""
    max_value: Annotated[float, Meta(ge=0)]
    """The most that an endpoint may have and be kept; of kv-cache-utilization a share, up to 1."""

    def __post_init__(self) -> None:
        if self.metric == "kv-cache-utilization" and self.max_value > 1:
            raise ValueError(f"maxValue of kv-cache-utilization is a share: at most 1, not {self.max_value:g}")


class UtilizationParams(Params, frozen=True):
    conditions: Annotated[tuple[Condition, ...], Meta(min_length=1)]
    """Caps; an endpoint over any of them is left out."""
    fallback_on_empty: bool = False
    """Keep everybody where nobody is under all caps; else the request is refused with 429."""
    in_flight_load_producer_name: LoadProducer = ""
    """Kept for the reference's configurations: the table itself counts requests in flight."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        if "inFlightLoadProducerName" not in given:
            return {}
        return {"inFlightLoadProducerName": "the endpoint table itself counts requests in flight"}


@experimental
@filter_("utilization-filter", params=UtilizationParams)
def utilization(request: Request, candidates: Candidates, params: UtilizationParams) -> Bools:
    """Leave out endpoints that are over a cap.

    An endpoint whose page is too old counts as over the caps of what pages tell, as long as others have a recent one.
    Where everybody is left out the request is refused with 429, or, with fallbackOnEmpty, everybody stays.
    """
    kept = np.ones(len(candidates), np.bool_)
    for each in params.conditions:
        kept &= at_most(candidates, METRICS[each.metric], each.max_value)
    if kept.any():
        return kept
    if params.fallback_on_empty:
        return ~kept
    caps = ", ".join(f"{each.metric} {each.max_value:g}" for each in params.conditions)
    raise Saturated(f"every endpoint that may serve this request is over a cap ({caps}): try again later")


def at_most(candidates: Candidates, column: str, most: float) -> Bools:
    """Where a value is no higher, or no fresh page tells it; and where it is too old, if all are. Shape (N,)."""
    values, known = candidates.column(column)
    kept: Bools = values <= most  # NaN: false
    if all_true(known):
        return kept
    fresh = candidates.fresh()
    return kept | (~known & (fresh if fresh.any() else True))


Operator = Literal["LessThan", "LessThanOrEqual", "GreaterThan", "GreaterThanOrEqual", "Equal", "NotEqual"]
OPERATORS: Final[dict[str, Callable[[Floats, float], Bools]]] = {
    "LessThan": operator.lt,
    "LessThanOrEqual": operator.le,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqual": operator.ge,
    "Equal": operator.eq,
    "NotEqual": operator.ne,
}


class Threshold(Params, frozen=True):
    operator: Operator
    """How an endpoint's value must stand to `value` for it to be kept."""
    value: float
    """What each endpoint's value is compared with."""


class FilterAlgorithm(Params, frozen=True):
    type: Literal["threshold"]
    """How values are judged."""
    threshold: Threshold
    """For type threshold."""


class AttributeParams(Params, frozen=True):
    attribute: Annotated[str, Meta(min_length=1)]
    """Name of what is compared: a column of the endpoint table, such as waiting, kv_usage or inflight."""
    algorithm: FilterAlgorithm
    """What is kept."""
    producer: str = ""
    """Kept for the reference's configurations: every attribute is known by its name alone."""
    on_missing: Literal["Pass", "Fail"] = "Pass"
    """Pass: keep endpoints of which the value is not known. Fail: leave them out."""
    fallback_on_empty: bool = False
    """Keep everybody where nobody is left."""

    def __post_init__(self) -> None:
        combined(self.attribute)

    def idle(self, given: Collection[str]) -> dict[str, str]:
        return {"producer": "every attribute is known by its name alone"} if self.producer else {}


def combined(attribute: str) -> None:
    """Raises ValueError for a name of an attribute and its producer in one."""
    name, slash, producer = attribute.partition("/")
    if slash:
        raise ValueError(f"attribute {attribute} holds two names: write attribute: {name} and producer: {producer}")


def check_attribute(attribute: str, context: Context) -> None:
    """Raises ConfigError for an attribute that nobody provides."""
    there = sorted(set(context.signals) - {ADAPTERS, PREFIX_MATCH})
    if attribute not in there:
        raise ConfigError(f"no attribute is named {attribute!r} (there are: {', '.join(there)})")


class EndpointAttribute:
    """Keep endpoints by one number that is known of each.

    Where nobody is left, and fallbackOnEmpty is false, the request is refused: with 503 if the attribute is a property
    of the server, with 429 if it changes with load.
    """

    def __init__(self, params: AttributeParams, context: Context) -> None:
        check_attribute(params.attribute, context)
        self.needs = (params.attribute,)
        self._holds = OPERATORS[params.algorithm.threshold.operator]

    def __call__(self, request: Request, candidates: Candidates, params: AttributeParams) -> Bools:
        values, known = candidates.column(params.attribute)
        kept = self._holds(values, params.algorithm.threshold.value)
        kept = kept | ~known if params.on_missing == "Pass" else kept & known
        if kept.any():
            return kept
        if params.fallback_on_empty:
            return ~kept
        if params.attribute in FACTS:
            return kept
        threshold = params.algorithm.threshold
        raise Saturated(
            f"of no endpoint that may serve this request is {params.attribute} {threshold.operator} "
            f"{threshold.value:g}: try again later"
        )


class AffinityParams(Params, frozen=True):
    affinity_threshold: Share = 0.8
    """Share of the prompt that an endpoint must hold for the request to stick to it."""
    exploration_probability: Share = 0.0
    """Probability that a request sticks to nobody, so that its prefix comes to be held elsewhere too."""
    max_ttft_penalty_ms: Annotated[float, Meta(ge=0)] = field(default=18_000.0, name="maxTTFTPenaltyMs")
    """Milliseconds by which the first token may come later where the prompt is held; 0: however much."""
    ttft_source: Literal["prefillThroughput", "latencyPredictor"] = "prefillThroughput"
    """Where times to the first token come from. There is no predictor yet: both are worked out by throughput."""
    peak_prefill_throughput: Annotated[float, Meta(gt=0)] = 15_928.0
    """Prompt tokens a second that one endpoint computes. Measure it: the default, 15928, is that of a 32B model on two
    H100s, and with another model or GPU requests stick too long, or not long enough."""
    prefix_match_info_producer_name: Annotated[str, Ref("producer", DEFAULT_PRODUCER)] = ""
    """The producer that says what each endpoint holds; empty: approx-prefix-cache-producer, declared or not."""
    in_flight_load_producer_name: LoadProducer = ""
    """Kept for the reference's configurations: the table itself counts tokens in flight."""
    latency_prediction_info_producer_name: Annotated[str, Ref("producer", "predicted-latency-producer")] = ""
    """Kept for the reference's configurations: there is no predictor yet."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        whys = {
            "inFlightLoadProducerName": "the endpoint table itself counts tokens in flight",
            "latencyPredictionInfoProducerName": "there is no latency predictor yet",
        }
        idle = {name: why for name, why in whys.items() if name in given}
        if self.ttft_source == "latencyPredictor":
            idle["ttftSource"] = "there is no latency predictor yet; peakPrefillThroughput counts"
        return idle


class PrefixAffinity:
    """Keep the endpoints that hold nearly all of the prompt, unless they are so busy that it would come later there.

    Sticky is who holds at least affinityThreshold of the prompt's blocks. All are kept where nobody is sticky, with
    probability explorationProbability, and where the least busy sticky endpoint would take maxTTFTPenaltyMs longer to
    the first token than the least busy other one. Estimate: prompt tokens in flight / peakPrefillThroughput.
    """

    def __init__(self, params: AffinityParams, context: Context) -> None:
        self._match = context.producer(params.prefix_match_info_producer_name).match
        self._rng = context.rng
        self._most_tokens = params.max_ttft_penalty_ms / 1000.0 * params.peak_prefill_throughput
        """In flight beyond others' before a request leaves who holds its prompt."""

    def __call__(self, request: Request, candidates: Candidates, params: AffinityParams) -> Bools:
        everybody = np.ones(len(candidates), np.bool_)
        match = self._match(request, candidates)
        if not match.total:
            return everybody
        sticky: Bools = match.blocks >= params.affinity_threshold * match.total
        if sticky.all() or not sticky.any():
            return everybody
        if params.exploration_probability and self._rng.random() < params.exploration_probability:
            return everybody
        if not self._most_tokens:
            return sticky
        tokens, _ = candidates.column("inflight_tokens")
        behind = float(tokens[sticky].min() - tokens[~sticky].min())
        return everybody if behind > self._most_tokens else sticky


NO_LIMIT: Final = 1e18
"""Tokens: more than any prompt has, and a number that arithmetic does not warn of."""


class ContextLengthParams(Params, frozen=True):
    label: Annotated[str, Meta(min_length=1)] = "llm-d.ai/context-length-range"
    """The label that says for which prompts an endpoint is meant: fewest and most tokens, as 0-2048."""
    enable_filtering: bool = False
    """Leave out endpoints that are meant for others, beside scoring."""


class ContextLength:
    """Prefer endpoints that are meant for prompts of this length; with enableFiltering leave the others out.

    Score, of n tokens and a label of low-high: 1 if low = high = n; else, if low <= n <= high, with width = high - low,
    0.3 + 0.7 * (0.7 / (1 + width / 10000) + 0.3 * (high - n) / width); else 0.3 / (1 + distance / 1000), where distance
    is how far n is outside. No label: 0.5. A label that is no range: 0. With enableFiltering endpoints without the
    label stay; where nobody is left the request is refused with 503.
    """

    def __init__(self, params: ContextLengthParams, context: Context) -> None:
        self._ranges = Ranges(params.label)

    def __call__(self, request: Request, candidates: Candidates, params: ContextLengthParams) -> Scores:
        tokens, low, high = request.tokens, self._ranges.low(candidates), self._ranges.high(candidates)
        width = np.where(high > low, high - low, 1.0)  # 1 where it is not looked at
        inside = 0.3 + 0.7 * (0.7 / (1 + width / 10_000) + 0.3 * (high - tokens) / width)
        outside = 0.3 / (1 + np.fmax(0.0, np.maximum(low - tokens, tokens - high)) / 1000)
        scores = np.where((low <= tokens) & (tokens <= high), np.where(low == high, 1.0, inside), outside)
        scores[high == NO_LIMIT] = 0.5
        scores[np.isnan(low)] = 0.0
        return scores


class ContextLengthFilter:
    """With enableFiltering leave out endpoints that are meant for prompts of other lengths."""

    def __init__(self, params: ContextLengthParams, context: Context) -> None:
        self._ranges = Ranges(params.label)

    def __call__(self, request: Request, candidates: Candidates, params: ContextLengthParams) -> Bools:
        if not params.enable_filtering:
            return np.ones(len(candidates), np.bool_)
        tokens = request.tokens
        return (self._ranges.low(candidates) <= tokens) & (tokens <= self._ranges.high(candidates))


class Ranges:
    """Fewest and most tokens that each candidate is meant for, as a label says, each of shape (N,)."""

    def __init__(self, label: str) -> None:
        self.low = PerEndpoint(lambda endpoint: token_range(endpoint, label)[0])
        self.high = PerEndpoint(lambda endpoint: token_range(endpoint, label)[1])


def token_range(endpoint: Endpoint, label: str) -> tuple[float, float]:
    """Fewest and most tokens, as the label says; 0 and NO_LIMIT: no label; NaN: it is no range."""
    text = endpoint.labels.get(label)
    if text is None:
        return 0.0, NO_LIMIT
    low, _, high = (part.strip() for part in text.partition("-"))
    if not (low.isascii() and low.isdigit() and high.isascii() and high.isdigit()):
        return np.nan, np.nan
    fewest, most = float(low), float(high)
    return (fewest, most) if fewest <= most < NO_LIMIT else (np.nan, np.nan)


endpoint_attribute = experimental(filter_("endpoint-attribute-filter", params=AttributeParams)(EndpointAttribute))
prefix_affinity = filter_(
    "prefix-cache-affinity-filter", params=AffinityParams, needs=(PREFIX_MATCH, "inflight_tokens")
)(PrefixAffinity)
context_length = structs.replace(
    scorer("context-length-aware", params=ContextLengthParams)(ContextLength),
    also=(filter_("context-length-aware", params=ContextLengthParams)(ContextLengthFilter),),
)
