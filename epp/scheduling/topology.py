"""Where endpoints stand, for plugins that keep the stages of a request close together.

In: endpoints, and which labels name hosts, racks, zones and regions. Out: how close each candidate is to one of them.
Rules here:
- A host is known by its label, else by the node that discovery tells. (The reference falls back to the pod's
  `spec.hostname`, which names the pod: no two would ever share a host.)
- Names count only within what is around them: rack-1 of one zone is not rack-1 of another. What is not known of either
  endpoint is not held against them, and brings them no closer.
Source: llm-d router, topology extractor; Kubernetes' well-known labels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from epp.endpoints.table import Candidates, Endpoint, Slots
from epp.scheduling.plugin import Params

REGION, ZONE, RACK, HOST = range(1, 5)
"""How close two endpoints are: what is the smallest that they share; 0: nothing is known that they share."""
UNKNOWN: Final = -1

Closeness = npt.NDArray[np.int64]


class Topology(Params, frozen=True):
    """Labels that say where an endpoint stands."""

    hostname: str = "kubernetes.io/hostname"
    """Label with the host's name; without it that of the node, where discovery tells it."""
    rack: str = "topology.kubernetes.io/rack"
    """Label with the rack's."""
    zone: str = "topology.kubernetes.io/zone"
    """Label with the zone's."""
    region: str = "topology.kubernetes.io/region"
    """Label with the region's."""

    def place(self, endpoint: Endpoint) -> tuple[str, str, str, str]:
        """Region, zone, rack and host of an endpoint; empty: not known."""
        labels = endpoint.labels
        region, zone, rack, host = (labels.get(key, "") for key in (self.region, self.zone, self.rack, self.hostname))
        return region, zone, rack, host or endpoint.node


class Closest:
    """How close candidates are to one endpoint. Labels are looked at when the pool changes, once per endpoint."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._listed: Slots | None = None
        self._codes: list[dict[str, int]] = []  # of each level, number by name
        self._by_slot: Closeness = np.empty((0, 4), np.int64)

    def __call__(self, candidates: Candidates, other: Endpoint) -> Closeness:
        """REGION to HOST, or 0, shape (N,).

        Args:
            other: it need not be listed any more.
        """
        if self._listed is not candidates.table.listed:
            self._look(candidates)
        theirs = self._by_slot[candidates.slots]
        ours = [
            codes.get(name, len(codes)) if name else UNKNOWN
            for codes, name in zip(self._codes, self._topology.place(other), strict=True)
        ]
        both = (theirs != UNKNOWN) & (np.array(ours) != UNKNOWN)
        same, differs = both & (theirs == ours), both & (theirs != ours)
        around = ~np.logical_or.accumulate(differs, axis=1)
        closest: Closeness = np.max((same & around) * np.arange(REGION, HOST + 1), axis=1)
        return closest

    def _look(self, candidates: Candidates) -> None:
        table = candidates.table
        self._codes = [{}, {}, {}, {}]
        self._by_slot = np.full((table.width, 4), UNKNOWN, np.int64)
        for slot in table.listed.tolist():
            place = self._topology.place(table.endpoint(slot))
            self._by_slot[slot] = [
                codes.setdefault(name, len(codes)) if name else UNKNOWN
                for codes, name in zip(self._codes, place, strict=True)
            ]
        self._listed = table.listed
