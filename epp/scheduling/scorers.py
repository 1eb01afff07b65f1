"""Scorers: functions of the candidates' columns, one score in 0..1 each, higher is better.

Rules here:
- The formulas and parameters are the reference's; `unknown` is ours: a value that was never told, or is too old,
  scores neutral, neither sought nor avoided, and never better than the known ones do on average.
- Every function works on whole columns: nothing loops over endpoints.
Source: llm-d router, scheduling scorers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final

import numpy as np
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Floats, all_true
from epp.scheduling.adapters import AdapterNames
from epp.scheduling.plugin import ADAPTERS, DEFAULT_PRODUCER, PREFIX_MATCH, Context, Params, Ref, Scores, scorer

ONE: Final = np.array(1.0)
"""As an array, since taking a column from a Python float costs 0.2 us more."""

Share = Annotated[float, Meta(ge=0, le=1)]


class LoadParams(Params, frozen=True):
    unknown: Share = 0.5
    """Score of an endpoint whose value is not known or too old, but at most the mean of the known ones' scores; 0.5:
    neither sought nor avoided."""


@scorer("queue-scorer", params=LoadParams, needs=("waiting",))
def queue(request: Request, candidates: Candidates, params: LoadParams) -> Scores:
    """Prefer the shortest waiting queue.

    Score: (longest - waiting) / (longest - shortest) among the known; all 1 when equal.
    """
    return lowest_first(*candidates.column("waiting"), params.unknown)


@scorer("running-requests-size-scorer", params=LoadParams, needs=("running",))
def running(request: Request, candidates: Candidates, params: LoadParams) -> Scores:
    """Prefer the fewest running requests, as the engines count them.

    Score: (most - running) / (most - fewest) among the known; all 1 when equal.
    """
    return lowest_first(*candidates.column("running"), params.unknown)


@scorer("kv-cache-utilization-scorer", params=LoadParams, needs=("kv_usage",))
def kv_cache(request: Request, candidates: Candidates, params: LoadParams) -> Scores:
    """Prefer free KV cache.

    Score: 1 - share of the cache in use.
    """
    usage, known = candidates.column("kv_usage")
    return with_unknown(ONE - usage, known, params.unknown)


class ActiveRequestParams(Params, frozen=True):
    idle_threshold: Annotated[int, Meta(ge=0)] = 0
    """Requests in flight up to which an endpoint counts as idle and scores 1."""
    max_busy_score: Share = 1.0
    """Score that a busy endpoint approaches; below 1 leaves a gap to the idle ones."""
    request_timeout: str = ""
    """Kept for old configurations: requests are counted out exactly, none times out."""
    in_flight_load_producer_name: Annotated[str, Ref("producer", "inflight-load-producer")] = ""
    """Kept for the reference's configurations: the table itself counts requests in flight."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        whys = {
            "requestTimeout": "requests in flight are counted out exactly",
            "inFlightLoadProducerName": "the endpoint table itself counts requests in flight",
        }
        return {name: why for name, why in whys.items() if name in given}


@scorer("active-request-scorer", params=ActiveRequestParams, needs=("inflight",))
def active_request(request: Request, candidates: Candidates, params: ActiveRequestParams) -> Scores:
    """Prefer the fewest requests in flight, as we count them ourselves.

    Score: 1 up to idleThreshold, else (most - count) / most * maxBusyScore.
    """
    counts, _ = candidates.column("inflight")
    most = max(float(counts.max()), 1.0)  # nobody busy: every score is 1
    return np.where(counts <= params.idle_threshold, 1.0, (most - counts) / most * params.max_busy_score)


class LoraAffinity:
    """Prefer endpoints that have the request's LoRA adapter in their batch, then those with a free slot for it.

    Score: adapter running 1; else fewer adapters running and waiting than fit 0.8; else adapter waiting 0.6; else 0.
    A page that is too old scores `unknown`; so does an endpoint that never told how many fit, unless the adapter is
    there.
    A request for the base model scores 1 everywhere: resident adapters mean nothing to it. A target model counts as
    an adapter once any page of the pool has named it; its name is remembered, because pages name adapters only while
    requests use them, and an idle adapter should still go where a slot is free. What no page has named yet may be
    either: it is left to the other scorers.
    """

    def __init__(self, params: LoadParams, context: Context) -> None:
        self._adapters = AdapterNames()

    def __call__(self, request: Request, candidates: Candidates, params: LoadParams) -> Scores:
        if not self._adapters.has(request.target_model, candidates):
            return np.ones(len(candidates))
        state = candidates.adapter(request.target_model)
        most, told = candidates.column("max_lora")
        cold = np.where(told, 0.0, params.unknown)
        scores = np.where(state == 1, 0.6, cold)
        scores = np.where(candidates.adapters_held() < most, 0.8, scores)  # NaN: false
        return np.where(candidates.fresh(), np.where(state == 2, 1.0, scores), params.unknown)


lora_affinity = scorer("lora-affinity-scorer", params=LoadParams, needs=(ADAPTERS, "max_lora"))(LoraAffinity)


class PrefixParams(Params, frozen=True):
    match_length_weight: Share = 0.0
    """Weight of the matched length beside the matched share: long matches save more than short ones."""
    match_length_scale_tokens: int = 8192
    """Matched tokens from which the length scores 1."""
    prefix_match_info_producer_name: Annotated[str, Ref("producer", DEFAULT_PRODUCER)] = ""
    """The producer that says what each endpoint holds; empty: approx-prefix-cache-producer, declared or not."""

    def __post_init__(self) -> None:
        if self.match_length_weight and self.match_length_scale_tokens < 1:
            raise ValueError("matchLengthScaleTokens must be at least 1 when matchLengthWeight is above 0")

    def idle(self, given: Collection[str]) -> dict[str, str]:
        if "matchLengthScaleTokens" in given and not self.match_length_weight:
            return {"matchLengthScaleTokens": "matchLengthWeight is 0"}
        return {}


class PrefixCache:
    """Prefer endpoints that are believed to hold the beginning of the prompt.

    Score: w * min(1, matched tokens / matchLengthScaleTokens)^2 + (1 - w) * matched blocks / blocks of the prompt,
    w = matchLengthWeight. A prompt shorter than one block scores 0 everywhere.
    """

    def __init__(self, params: PrefixParams, context: Context) -> None:
        self._match = context.producer(params.prefix_match_info_producer_name).match

    def __call__(self, request: Request, candidates: Candidates, params: PrefixParams) -> Scores:
        match = self._match(request, candidates)
        if not match.total:
            return np.zeros(len(candidates))
        share: Scores = match.blocks / match.total
        weight = params.match_length_weight
        if not weight:
            return share
        length = np.minimum(1.0, match.blocks * match.block_tokens / params.match_length_scale_tokens)
        return weight * length**2 + (1 - weight) * share


prefix_cache = scorer("prefix-cache-scorer", params=PrefixParams, needs=(PREFIX_MATCH,))(PrefixCache)


def lowest_first(values: Floats, known: Bools, unknown: float) -> Scores:
    """Score 1 for the lowest value, 0 for the highest, and by distance between; all 1 when equal.

    Args:
        values: shape (N,), NaN where unknown.
        unknown: the score where the value is unknown, but at most the mean of the known ones' scores.
    """
    highest, lowest = values.item(values.argmax()), values.item(values.argmin())
    if highest > lowest:
        return (highest - values) / (highest - lowest)
    if highest == lowest:
        return np.ones(len(values))
    highest, lowest = np.fmax.reduce(values), np.fmin.reduce(values)  # argmax found NaN; these skip it
    scores = (highest - values) / (highest - lowest) if highest > lowest else np.ones(len(values))
    return with_unknown(scores, known, unknown)


def with_unknown(scores: Scores, known: Bools, unknown: float) -> Scores:
    """Scores of the known, and for the rest `unknown`, but at most the mean of the known."""
    if all_true(known):
        return scores
    if known.any():
        unknown = min(unknown, float(np.sort(scores[known]).mean()))  # sorted: the same whatever the candidates' order
    return np.where(known, scores, unknown)
