"""How full is the pool? One number: 0 when nothing runs, 1 when there is room for nothing more.

In: candidates. Out: a `Saturation`, worked out for the few requests that depend on it and never otherwise.
Rules here:
- An endpoint whose pages are missing or too old counts as full, and the result says how many do. A scorer may take
  unknown for average; to let more work in on a guess is what an overloaded pool needs least.
- A fresh page that lacks one gauge is judged by the other: Triton tells no KV usage and would be full for ever.
- The queue is the page's own, without what was sent since: what was sent may run at once, and a refusal must not
  rest on the guess that it does not.
- Every endpoint weighs the same, so one hot endpoint does not make a pool full. What uneven load costs is the
  scheduler's business.
Rejected: keeping the result until a column changes (at 1,000 endpoints a page comes every 50 us, so it would never be
found; at 8 it saves 5 us of a request that is likely to be refused).
Source: llm-d router, utilization-detector and concurrency-detector.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Final

import msgspec
import numpy as np

from epp.endpoints.table import Candidates


class Saturation(msgspec.Struct, frozen=True):
    """How full some endpoints are."""

    value: float
    """0: idle; 1 or more: full."""
    endpoints: int
    """Those that were looked at."""
    unknown: int = 0
    """Those among them that counted as full because nothing recent is known of them."""


_NONE_THERE: Final = Saturation(1.0, 0)
"""Where there is no endpoint there is no room."""


class Utilization(msgspec.Struct, frozen=True):
    """By what the servers say: the mean of each one's queue or KV cache, whichever is fuller."""

    queue_depth: float = 5.0
    """Waiting requests at which an endpoint is full, above 0."""
    kv_usage: float = 0.8
    """Share of the KV cache at which an endpoint is full, above 0."""
    staleness: float = 0.2
    """Seconds after which a page counts no more."""
    weighs: ClassVar[bool] = False
    """Whether it needs the length of every prompt, whatever the plugins ask for."""

    def saturation(self, candidates: Candidates) -> Saturation:
        """Mean over endpoints of max(queue / queue_depth, kv / kv_usage); 1 for an endpoint that is unknown."""
        table, slots, count = candidates.table, candidates.slots, len(candidates)
        if not count:
            return _NONE_THERE
        load = np.fmax(table.told("waiting", slots) / self.queue_depth, table.told("kv_usage", slots) / self.kv_usage)
        known = table.page_ages(candidates.now)[slots] <= self.staleness
        known &= load == load  # NaN where neither was told
        unknown = count - int(np.count_nonzero(known))
        if unknown:
            load[~known] = 1.0
        return Saturation(float(np.add.reduce(load)) / count, count, unknown)


class Counted(Enum):
    """What is counted of the work in flight."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    HYBRID = "hybrid"
    """Both: each endpoint is as full as the fuller of its two."""


class Concurrency(msgspec.Struct, frozen=True):
    """By what this picker sent and has not seen the end of; always known, and blind to what others sent."""

    counted: Counted = Counted.REQUESTS
    requests: float = 100.0
    """In flight on one endpoint when it is full, above 0."""
    tokens: float = 1_000_000.0
    """Prompt tokens in flight on one endpoint when it is full, above 0: those that are not cached, until the first
    token of the answer."""

    def saturation(self, candidates: Candidates) -> Saturation:
        """In flight / capacity, both summed over endpoints; hybrid: the mean of each endpoint's fuller count."""
        count = len(candidates)
        if not count:
            return _NONE_THERE
        if self.counted is Counted.REQUESTS:
            load = candidates.column("inflight")[0] / self.requests
        elif self.counted is Counted.TOKENS:
            load = candidates.column("inflight_tokens")[0] / self.tokens
        else:
            requests, tokens = candidates.column("inflight")[0], candidates.column("inflight_tokens")[0]
            load = np.maximum(requests / self.requests, tokens / self.tokens)
        return Saturation(float(np.add.reduce(load)) / count, count)

    @property
    def weighs(self) -> bool:
        """Whether it needs the length of every prompt, whatever the plugins ask for."""
        return self.counted is not Counted.REQUESTS


Detector = Utilization | Concurrency
