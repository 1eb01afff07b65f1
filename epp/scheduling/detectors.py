"""The saturation detectors as filters: who is full is left out.

In: candidates. Out: a mask; or Saturated (429), where everybody is full and the filter has no fallback.
Rules here: full means what it means to the detector that refuses requests (`flow/saturation.py`), with thresholds
raised by `headroom`, but for the queue: a filter counts what was sent since the page was asked for, so that a burst
sees itself; a refusal does not rest on that guess.
Source: llm-d router, utilization-detector and concurrency-detector.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates
from epp.errors import Saturated
from epp.scheduling.plugin import Context, Params, Ref, filter_
from epp.units import Duration, parse_duration

Headroom = Annotated[float, Meta(ge=0)]


class UtilizationDetector(Params, frozen=True):
    queue_depth_threshold: Annotated[int, Meta(gt=0)] = 5
    """Waiting requests at which an endpoint is full."""
    kv_cache_util_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.8
    """Share of the KV cache in use at which it is."""
    metrics_staleness_threshold: Duration = "200ms"
    """Age of a page from which on an endpoint counts as full."""
    headroom: Headroom = 0.0
    """As a filter: by how much the thresholds are raised; 0.2: by a fifth."""

    def __post_init__(self) -> None:
        if not parse_duration(self.metrics_staleness_threshold):
            raise ValueError("metricsStalenessThreshold must be longer than 0: every endpoint would count as full")


class UtilizationFilter:
    """Leave out who is full by what its page says; where everybody is, nobody.

    Full: waiting / queueDepthThreshold or cache in use / kvCacheUtilThreshold is at least 1 + headroom, or the page is
    older than metricsStalenessThreshold. A fresh page that lacks one of the two is judged by the other.
    """

    def __init__(self, params: UtilizationDetector, context: Context) -> None:
        self._staleness = parse_duration(params.metrics_staleness_threshold)

    def __call__(self, request: Request, candidates: Candidates, params: UtilizationDetector) -> Bools:
        waiting, kv_usage = candidates.column("waiting")[0], candidates.column("kv_usage")[0]
        load = np.fmax(waiting / params.queue_depth_threshold, kv_usage / params.kv_cache_util_threshold)
        kept: Bools = load < 1.0 + params.headroom  # NaN, where neither is known: false
        kept &= candidates.table.page_ages(candidates.now)[candidates.slots] <= self._staleness
        return kept if kept.any() else ~kept


class ConcurrencyDetector(Params, frozen=True):
    max_concurrency: Annotated[int, Meta(gt=0)] = 100
    """Requests in flight at which an endpoint is full."""
    max_token_concurrency: Annotated[int, Meta(gt=0)] = 1_000_000
    """Prompt tokens in flight at which it is."""
    concurrency_mode: Literal["requests", "tokens", "hybrid"] = "requests"
    """Which of the two counts; hybrid: whichever is fuller."""
    headroom: Headroom = 0.0
    """As a filter: by how much the limits are raised; 0.2: by a fifth."""
    in_flight_load_producer_name: Annotated[str, Ref("producer", "inflight-load-producer")] = ""
    """Who counts. We count what we send, whatever is written here."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        if not self.in_flight_load_producer_name:
            return {}
        return {"inFlightLoadProducerName": "the picker counts what it sends"}


class ConcurrencyFilter:
    """Leave out who is full by what we sent there and has not ended; where everybody is, refuse the request with 429.

    Full: requests in flight / maxConcurrency, prompt tokens in flight / maxTokenConcurrency, or, with hybrid, one of
    the two, is at least 1 + headroom.
    """

    def __init__(self, params: ConcurrencyDetector, context: Context) -> None:
        requests = ("inflight", params.max_concurrency * (1.0 + params.headroom))
        tokens = ("inflight_tokens", params.max_token_concurrency * (1.0 + params.headroom))
        self._limits = {"requests": (requests,), "tokens": (tokens,), "hybrid": (requests, tokens)}[
            params.concurrency_mode
        ]

    def __call__(self, request: Request, candidates: Candidates, params: ConcurrencyDetector) -> Bools:
        kept = np.ones(len(candidates), np.bool_)
        for column, limit in self._limits:
            kept &= candidates.column(column)[0] < limit
        if not kept.any():
            limits = ", ".join(f"{column} {limit:g}" for column, limit in self._limits)
            raise Saturated(f"every endpoint that may serve this request is full ({limits}): try again later")
        return kept


utilization = filter_("utilization-detector", params=UtilizationDetector, needs=("waiting", "kv_usage"))(
    UtilizationFilter
)
concurrency = filter_("concurrency-detector", params=ConcurrencyDetector, needs=("inflight", "inflight_tokens"))(
    ConcurrencyFilter
)
