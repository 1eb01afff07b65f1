"""Slow start: a new endpoint has nothing in flight and an empty queue, so every scorer would send it everything.

In: candidates. Out: a mask of those that may be chosen now.
Rules here:
- New is who joined, came back, or was let in again after an ejection, less than `window` seconds ago.
- A new endpoint is left out while one request more would lift it over its ramp: its age's share of what the
  candidates that are not new have in flight on average, at least one request.
- Where every candidate is new, nobody is left out: at start-up, or when the whole pool was replaced.
Rejected: a weight that grows (Envoy's slow_start_config scales weights): our scores are no shares of traffic, the
best one wins, and a small weight either loses every decision or none.
"""

from __future__ import annotations

import numpy as np

from epp.endpoints.table import Bools, Candidates, EndpointTable


def anyone_new(table: EndpointTable, window: float, now: float) -> bool:
    """Whether any endpoint is new, which is rare: a look at this saves `slow_start` and what is done with its mask."""
    return window > 0 and now - table.last_join < window


def slow_start(candidates: Candidates, window: float) -> Bools:
    """Which candidates may be chosen, shape (N,). Never none, unless there are no candidates.

    Args:
        window: seconds in which a new endpoint's share grows to its full size; 0: at once.
    """
    table, now = candidates.table, candidates.now
    everybody: Bools = np.ones(len(candidates), np.bool_)
    if not anyone_new(table, window, now):
        return everybody
    age = now - table.joined(candidates.slots)
    warm = age >= window
    count = np.count_nonzero(warm)
    if count in (0, len(warm)):
        return everybody
    inflight, _ = candidates.column("inflight")
    mean = np.dot(inflight, warm) / count  # a third of what inflight[warm].mean() costs
    mask: Bools = warm | (inflight + 1.0 <= np.maximum(1.0, age * (mean / window)))
    return mask
