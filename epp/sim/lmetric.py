"""LMetric's product as a reference: prompt tokens to compute, those that wait and one's own, times requests there.

In: a request and candidates. Out: scores. It knows what `cost-scorer` knows: the same lanes, the same prefix index, the
same pages. So what differs in a table is the formula alone.
Source: LMetric, arXiv 2603.15202: score = new prefill tokens x batch size, the least is taken.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from epp.config.load import load
from epp.config.schema import Config
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Floats
from epp.scheduling.catalogue import catalogue
from epp.scheduling.cost import Cost, CostParams
from epp.scheduling.plugin import PREFIX_MATCH, scorer


class Product(Cost):
    """Prefer the endpoint with the least product of prompt tokens to compute and requests there."""

    def _costs(self, request: Request, candidates: Candidates, tokens: Floats, pairs: Floats) -> Floats:
        running, _ = candidates.column("running")
        waiting, _ = candidates.column("waiting")
        backlog = self._lanes.before(candidates.slots)
        product: Floats = (backlog.tokens + tokens) * (np.nan_to_num(running + waiting) + 1.0)
        return product


TYPE: Final = "lmetric-scorer"
CONFIG: Final = f"""
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - type: {TYPE}
  - type: approx-prefix-cache-producer
  - type: max-score-picker
schedulingProfiles:
  - name: default
    plugins:
      - pluginRef: {TYPE}
      - pluginRef: max-score-picker
"""


def lmetric() -> Config:
    """The picker's configuration with this scorer alone."""
    needs = ("waiting", "running", PREFIX_MATCH)
    return load(CONFIG, plugins=catalogue((scorer(TYPE, params=CostParams, needs=needs)(Product),)))
