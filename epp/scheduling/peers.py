"""Who may lend its KV cache to the endpoint that computes a prompt.

In: a request, everybody who might have served it, and who will. Out: a header for the side-car, or none.
Rules here:
- Asked before anybody learns of the decision: the endpoint does not hold this prompt yet.
- The choice falls on one of those who hold nearly the most, so that a prompt that many hold does not make one server
  everybody's source.
Source: llm-d router, p2p-source-producer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Annotated, Final

import numpy as np
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Floats, Slots
from epp.headers import Headers
from epp.scheduling.decision import Failure, Plan
from epp.scheduling.plugin import DEFAULT_PRODUCER, PREFIX_MATCH, Context, Instance, Params, Plugin, PrefixMatch, Ref

SOURCE: Final = "x-kv-cache-source-host-port"


class Hook(Instance, frozen=True):
    """Says something to whoever serves a request, once it is known who does."""

    headers: Callable[[Request, Candidates, Plan], Headers]
    """Of all candidates, before any profile; returns headers to set on the request."""


def hooked(
    hooks: Sequence[Hook], request: Request, candidates: Candidates, plan: Plan
) -> tuple[Headers, tuple[Failure, ...]]:
    """Headers of all of them, and which of them failed."""
    found: Headers = ()
    failures: list[Failure] = []
    for each in hooks:
        try:
            found += each.headers(request, candidates, plan)
        except Exception as error:
            failures.append(Failure.of(each.name, error))
    return found, tuple(failures)


class PeerSource(Params, frozen=True):
    min_cached_token_delta: Annotated[int, Meta(ge=1)] = 1
    """Tokens that a peer must hold more than the endpoint that computes the prompt."""
    prefill_profile_name: str = "prefill"
    """Profile whose endpoint computes the prompt, where it runs; else the destination does."""
    prefix_match_info_producer_name: Annotated[str, Ref("producer", DEFAULT_PRODUCER)] = ""
    """Who says which tokens are cached."""


class PeerSources:
    """Name a peer in the header x-kv-cache-source-host-port from which the prompt's cached blocks can be fetched.

    Chosen among those who hold the most of the prompt, or one block less, with a chance in proportion to 1 / (1 +
    waiting requests); a queue that is not known counts as the others' mean. Only where it holds at least
    minCachedTokenDelta tokens more than the endpoint that computes the prompt. Which tier of memory blocks are in is
    not known: all of them count.
    """

    def __init__(self, params: PeerSource, context: Context) -> None:
        self._params = params
        self._producer = context.producer(params.prefix_match_info_producer_name)
        self._rng = context.rng

    def headers(self, request: Request, candidates: Candidates, plan: Plan) -> Headers:
        match = self._producer.match(request, candidates)
        source = _drawn(match, candidates, self._rng)
        if source is None:
            return ()
        (at,) = np.flatnonzero(candidates.slots == self._computes(plan))
        more = int(match.blocks[source] - match.blocks[at]) * match.block_tokens
        if more < self._params.min_cached_token_delta:
            return ()
        return ((SOURCE, candidates.table.endpoint(int(candidates.slots[source])).address.encode()),)

    def _computes(self, plan: Plan) -> int:
        prefill = plan.prefill
        if prefill is not None and prefill.decision.profile == self._params.prefill_profile_name:
            return prefill.decision.first
        return plan.primary.decision.first


def _drawn(match: PrefixMatch, candidates: Candidates, rng: Random) -> int | None:
    """Position of one of those who hold nearly the most; None: nobody holds anything."""
    most = int(match.blocks.max())
    if not most:
        return None
    near: Slots = np.flatnonzero(match.blocks >= max(1, most - 1))
    sums = np.cumsum(chances(candidates.column("waiting")[0][near]))
    return int(near[np.searchsorted(sums, rng.random() * sums[-1], side="right").clip(max=len(near) - 1)])


def chances(waiting: Floats) -> Floats:
    """1 / (1 + waiting), shape (N,); the mean queue's where it is NaN, not known."""
    known = ~np.isnan(waiting)
    mean = waiting[known].mean() if known.any() else 0.0
    weights: Floats = 1.0 / (1.0 + np.where(known, waiting, mean))
    return weights


def _make(name: str, params: Params, context: Context) -> Hook:
    assert isinstance(params, PeerSource)
    headers = PeerSources(params, context).headers
    return Hook(name=name, chosen=None, forget=None, answered=None, pins=None, needs=(PREFIX_MATCH,), headers=headers)


peer_source = Plugin(
    "p2p-source-producer",
    Hook,
    PeerSource,
    (PREFIX_MATCH, "waiting"),
    PeerSources.__doc__ or "",
    _make,
    experimental=True,
)
