"""Who is turned away before anything is chosen.

In: a request and candidates, of which guards have left out theirs. Out: nothing, or Saturated (429, Retry-After).
Rules here:
- Only a request below priority 0 is ever turned away.
- An admitter's refusal reaches the client as what it is: 429 with `rejected-saturated`, never 500.
- An endpoint whose page is missing or too old counts as full, as it does to the detector (`flow/saturation.py`): to let
  more work in on a guess is what an overloaded pool needs least.
Source: llm-d router, request control (admitters).
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Candidates
from epp.errors import Saturated
from epp.scheduling.plugin import Context, Params, admitter

Positive = Annotated[float, Meta(gt=0)]


class ProbabilisticParams(Params, frozen=True):
    queue_depth_threshold: Positive = 5.0
    """Waiting requests at which an endpoint is full."""
    kv_cache_util_threshold: Positive = 0.8
    """Share of the KV cache in use at which it is."""
    power: Positive = 5.0
    """How late, and then how steeply, refusals set in as the pool fills."""
    k: Positive = 300.0
    """How soon all are refused: at a saturation of (1/k)^(1/power), 0.32 by default."""


class Probabilistic:
    """Refuse requests below priority 0 the more often the fuller the pool is.

    Chance: saturation^power * k, at most 1, where saturation is the mean over endpoints of waiting /
    queueDepthThreshold or cache in use / kvCacheUtilThreshold, whichever is more; 1 for an endpoint without a fresh
    page. The detector of flowControl.saturationDetector refuses such requests on its own at a saturation of 1, before.
    """

    def __init__(self, params: ProbabilisticParams, context: Context) -> None:
        self._rng = context.rng

    def __call__(self, request: Request, candidates: Candidates, params: ProbabilisticParams) -> None:
        if request.priority >= 0:
            return
        saturation = _saturation(candidates, params)
        if self._rng.random() < chance(saturation, params):
            raise Saturated(
                f"the model servers are filling up, and this request's priority is {request.priority}: try again "
                f"later, or use an objective with a priority of 0 or more; saturation is {saturation:.2f}"
            )


def chance(saturation: float, params: ProbabilisticParams) -> float:
    """Of being refused, 0..1. By logarithms, since no float holds some powers."""
    if saturation <= 0.0:
        return 0.0
    return math.exp(min(0.0, math.log(params.k) + params.power * math.log(saturation)))


def _saturation(candidates: Candidates, params: ProbabilisticParams) -> float:
    table, slots = candidates.table, candidates.slots
    waiting, kv_usage = table.told("waiting", slots), table.told("kv_usage", slots)
    load = np.fmax(waiting / params.queue_depth_threshold, kv_usage / params.kv_cache_util_threshold)
    load[~candidates.fresh() | np.isnan(load)] = 1.0
    return float(load.mean())


probabilistic = admitter("probabilistic-admitter", params=ProbabilisticParams, needs=("waiting", "kv_usage"))(
    Probabilistic
)
