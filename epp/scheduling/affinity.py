"""Affinity to a place: to what a request's header names, and to where another stage of it runs.

In: a request and candidates. Out: a mask or scores.
Rules here:
- Labels are looked at when the pool changes, once per endpoint (`topology.py` does so, too).
- It is a preference: where it finds nothing, nobody is left out and nobody is preferred.
- What an endpoint does not tell of itself brings it no closer to anybody, and equals nothing.
Source: llm-d router, header-label-affinity-scorer, topology-affinity-filter and -scorer.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Floats, Slots
from epp.errors import ConfigError
from epp.headers import text
from epp.scheduling.plugin import Context, Params, Ref, Scores, experimental, filter_, scorer
from epp.scheduling.topology import HOST, RACK, REGION, ZONE, Closest, Topology

Word = Annotated[str, Meta(min_length=1)]
EXTRACTOR: Final = "topology-extractor"


class HeaderLabelParams(Params, frozen=True):
    header_name: Word
    """Request header that has the wanted value."""
    label_key: Word
    """Label that is compared with it."""


class HeaderLabel:
    """Prefer endpoints with the label's value that the request's header asks for.

    Score: 1 where they are equal, else 0; 0 for everybody where the request has no such header, or an empty one.
    """

    def __init__(self, params: HeaderLabelParams, context: Context) -> None:
        self._header = params.header_name.lower()
        self._key = params.label_key
        self._listed: Slots | None = None
        self._codes: dict[str, int] = {}
        self._by_slot: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def __call__(self, request: Request, candidates: Candidates, params: HeaderLabelParams) -> Scores:
        if self._listed is not candidates.table.listed:
            self._look(candidates)
        code = self._codes.get(text(request.headers, self._header))
        if code is None:
            return np.zeros(len(candidates))
        equal: Bools = self._by_slot.take(candidates.slots) == code
        return equal.astype(np.float64)

    def _look(self, candidates: Candidates) -> None:
        table, codes = candidates.table, dict[str, int]()
        self._by_slot = np.full(table.width, -1)
        for slot in table.listed.tolist():
            if value := table.endpoint(slot).labels.get(self._key):
                self._by_slot[slot] = codes.setdefault(value, len(codes))
        self._codes, self._listed = codes, table.listed


Levels = npt.NDArray[np.int8]


class Near:
    """How close candidates are to the endpoint of the stage before, by a topology-extractor's labels.

    It is worked out once for each endpoint of a stage before and each pool: 180 us for 1,000 candidates, which then
    cost 4 us and a kilobyte.
    """

    def __init__(self, extractor: str, context: Context) -> None:
        """Raises ConfigError: the plugin of that name is no topology-extractor."""
        topology = context.settings.get(extractor or EXTRACTOR, Topology())  # labels are there without one
        if not isinstance(topology, Topology):
            raise ConfigError(f"{extractor} is no {EXTRACTOR}: name one in topologyProducerName")
        self._closest = Closest(topology)
        self._listed: Slots | None = None
        self._by_peer: dict[int, Levels] = {}

    def __call__(self, request: Request, candidates: Candidates) -> Levels | None:
        """As of `Closest`; None: no stage came before."""
        if request.peer is None:
            return None
        table = candidates.table
        if self._listed is not table.listed:
            self._by_peer, self._listed = {}, table.listed
        levels = self._by_peer.get(request.peer)
        if levels is None:
            levels = self._by_peer[request.peer] = np.zeros(table.width, np.int8)
            levels[table.listed] = self._closest(table.candidates(candidates.now), table.endpoint(request.peer))
        return levels.take(candidates.slots)


LEVELS: Final = {"host": HOST, "rack": RACK, "zone": ZONE, "region": REGION}

Extractor = Annotated[str, Ref("extractor", EXTRACTOR)]


class TopologyScorerParams(Params, frozen=True):
    topology_producer_name: Extractor = ""
    """The topology-extractor that says which labels count; empty: the usual one, declared or not."""


SCORES: Final[Floats] = np.array([0.0, 0.02, 0.05, 0.2, 1.0])
"""By closeness: nothing shared, region, zone, rack, host."""


class TopologyScorer:
    """Prefer endpoints close to the one that another stage of the request runs on: its KV cache goes that way.

    Score: 1 on the same host, 0.2 in the same rack, 0.05 in the same zone, 0.02 in the same region, else 0. An endpoint
    without a label for its host is on the node that it runs on. The first stage has nobody to be close to: all 0.
    """

    def __init__(self, params: TopologyScorerParams, context: Context) -> None:
        self._near = Near(params.topology_producer_name, context)

    def __call__(self, request: Request, candidates: Candidates, params: TopologyScorerParams) -> Scores:
        closeness = self._near(request, candidates)
        return np.zeros(len(candidates)) if closeness is None else SCORES.take(closeness)


class TopologyFilterParams(Params, frozen=True):
    min_affinity: Literal["host", "rack", "zone", "region"] = "host"
    """What an endpoint must share with the one before to be kept; with rack, one on the same host is kept, too."""
    topology_producer_name: Extractor = ""
    """The topology-extractor that says which labels count; empty: the usual one, declared or not."""


class TopologyFilter:
    """Keep endpoints that are as close as minAffinity to the one that another stage of the request runs on.

    Everybody is kept where nobody is that close, where no stage came before, and where it is not known where its
    endpoint stands.
    """

    def __init__(self, params: TopologyFilterParams, context: Context) -> None:
        self._near = Near(params.topology_producer_name, context)
        self._level = LEVELS[params.min_affinity]

    def __call__(self, request: Request, candidates: Candidates, params: TopologyFilterParams) -> Bools:
        closeness = self._near(request, candidates)
        if closeness is None:
            return np.ones(len(candidates), np.bool_)
        kept: Bools = closeness >= self._level
        return kept if kept.any() else ~kept


header_label = experimental(scorer("header-label-affinity-scorer", params=HeaderLabelParams)(HeaderLabel))
topology_scorer = experimental(scorer("topology-affinity-scorer", params=TopologyScorerParams)(TopologyScorer))
topology_filter = experimental(filter_("topology-affinity-filter", params=TopologyFilterParams)(TopologyFilter))
