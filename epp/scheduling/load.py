"""Scorers that spread requests: by queues, by tokens, by whose cache was filled longest ago, by any number.

In: a request and candidates. Out: scores.
Rules here:
- Unknown is neutral, and never better than the known ones are on average (as in `scorers.py`).
- A rank counts candidates alone: endpoints of other roles, and such as are gone, take no place in it.
- Endpoints of which nothing tells one from another score the same: it is the picker's to spread them.
Source: llm-d router, load-aware-scorer, token-load-scorer, no-hit-lru-scorer, endpoint-attribute-scorer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Slots
from epp.scheduling.filters import check_attribute, combined
from epp.scheduling.plugin import DEFAULT_PRODUCER, PREFIX_MATCH, Context, Params, Ref, Scores, experimental, scorer
from epp.scheduling.scorers import lowest_first, with_unknown

Share = Annotated[float, Meta(ge=0, le=1)]


class LoadAwareParams(Params, frozen=True):
    threshold: Annotated[int, Meta(ge=1)] = 128
    """Waiting requests from which on an endpoint scores 0."""
    unknown: Annotated[float, Meta(ge=0, le=0.5)] = 0.25
    """Score of an endpoint whose queue is not known, but at most the mean of the known ones' scores; 0.25: halfway
    between no queue and a full one."""


@scorer("load-aware-scorer", params=LoadAwareParams, needs=("waiting",))
def load_aware(request: Request, candidates: Candidates, params: LoadAwareParams) -> Scores:
    """Prefer short waiting queues, by their length alone, whatever the others' are.

    Score: 0.5 * (1 - waiting / threshold), 0 from the threshold on.
    """
    waiting, known = candidates.column("waiting")
    return with_unknown(0.5 - 0.5 * np.minimum(waiting / params.threshold, 1.0), known, params.unknown)


class TokenLoadParams(Params, frozen=True):
    queue_threshold_tokens: Annotated[int, Meta(ge=1)] = 4_194_304
    """Tokens from which on an endpoint scores 0: 128 requests of 32,768."""
    in_flight_load_producer_name: Annotated[str, Ref("producer", "inflight-load-producer")] = ""
    """Kept for the reference's configurations: the table itself counts tokens in flight."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        if "inFlightLoadProducerName" not in given:
            return {}
        return {"inFlightLoadProducerName": "the endpoint table itself counts tokens in flight"}


class TokenLoad:
    """Prefer endpoints with the fewest prompt tokens to compute, those of this request included.

    Score: 1 - (tokens in flight + prompt tokens that the endpoint does not hold) / queueThresholdTokens, and 0 from
    the threshold on. Bodies that are not read count by their size. What is held counts where a prefix producer is used.
    """

    def __init__(self, params: TokenLoadParams, context: Context) -> None:
        self._producers = tuple(context.producers.values())

    def __call__(self, request: Request, candidates: Candidates, params: TokenLoadParams) -> Scores:
        inflight, _ = candidates.column("inflight_tokens")
        held = np.zeros(len(candidates))
        for each in self._producers:
            match = each.match(request, candidates)
            held = np.maximum(held, match.blocks * match.block_tokens)
        load = inflight + np.maximum(0.0, request.tokens - held)
        return 1.0 - np.minimum(load / params.queue_threshold_tokens, 1.0)


class NoHitParams(Params, frozen=True):
    lru_size: Annotated[int, Meta(ge=0)] = 1024
    """Endpoints remembered; beyond them whoever was used longest ago counts as never used. 0: 1024."""
    prefix_match_info_producer_name: Annotated[str, Ref("producer", DEFAULT_PRODUCER)] = ""
    """The producer that says what each endpoint holds; empty: approx-prefix-cache-producer, declared or not."""
    prefix_plugin_type: str = ""
    """Kept for old configurations: it never had an effect."""
    prefix_plugin_name: str = ""
    """Kept for old configurations: it never had an effect."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        unread = ("prefixPluginType", "prefixPluginName")
        return {name: "prefixMatchInfoProducerName names the producer" for name in unread if name in given}


STAGES: Final = 3
"""Profiles that one request runs at most: encode, prefill, decode."""


class NoHitLru:
    """Send prompts that nobody holds to whoever was given such a prompt longest ago, so that caches fill evenly.

    Score: 0.5 everywhere where a candidate holds the beginning of the prompt. Else, among N candidates of which U never
    had such a prompt: 1 for those; for the others, least recent first, 1 - (U + i) / (N - 1), i = 0, 1, ...; 1 for a
    single candidate. In a profile of disaggregated serving it is that profile's endpoint that counts as used.

    Other than in the reference, the never used ones tie (there they are ranked by their place in the list, which
    outweighs their load), and endpoints that are no candidates take no place in the ranking.
    """

    def __init__(self, params: NoHitParams, context: Context) -> None:
        self._match = context.producer(params.prefix_match_info_producer_name).match
        self._size = params.lru_size or NoHitParams().lru_size
        self._used: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """By slot: a number that grows with each use; 0: never."""
        self._uses = 0
        self._cold: deque[Candidates] = deque(maxlen=STAGES)

    def __call__(self, request: Request, candidates: Candidates, params: NoHitParams) -> Scores:
        if self._match(request, candidates).blocks.any():
            return np.full(len(candidates), 0.5)
        self._cold.append(candidates)
        used = self._used_by(candidates)
        rank = np.searchsorted(np.sort(used), used)  # the never used, all 0, share the first place
        return 1.0 - rank / max(1, len(used) - 1)

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        if not any(each is candidates for each in self._cold):
            return
        self._used_by(candidates)
        self._uses += 1
        self._used[slots.item(0)] = self._uses
        if np.count_nonzero(self._used) > self._size:
            self._used[self._used == self._used[self._used > 0].min()] = 0

    def forget(self, slot: int) -> None:
        if slot < len(self._used):
            self._used[slot] = 0

    def _used_by(self, candidates: Candidates) -> npt.NDArray[np.int64]:
        if len(self._used) < candidates.table.width:
            self._used = np.append(self._used, np.zeros(candidates.table.width - len(self._used), np.int64))
        return self._used.take(candidates.slots)


class FixedRange(Params, frozen=True):
    min: float
    """Value that is the best or the worst, and whatever is below it."""
    max: float
    """Value that is the other of the two, and whatever is above it."""

    def __post_init__(self) -> None:
        if not self.min < self.max:
            raise ValueError(f"min must be below max: {self.min:g} is not below {self.max:g}")


class AdaptiveRange(Params, frozen=True):
    """From the lowest to the highest value among the candidates."""


class Normalization(Params, frozen=True):
    fixed_range: FixedRange | None = None
    """From `min` to `max`."""
    adaptive_range: AdaptiveRange | None = None
    """From the lowest to the highest of the candidates; so it is, too, where neither is given."""

    def __post_init__(self) -> None:
        if self.fixed_range and self.adaptive_range:
            raise ValueError("fixedRange and adaptiveRange exclude one another: keep one")


class ScorerAlgorithm(Params, frozen=True):
    type: Literal["linear_lower_is_better", "linear_higher_is_better"]
    """Which end of the range scores 1."""
    normalization: Normalization = Normalization()
    """What range values are seen in."""


class AttributeScorerParams(Params, frozen=True):
    algorithm: ScorerAlgorithm
    """How a value becomes a score."""
    attribute: str = ""
    """Name of what is compared: a column of the endpoint table, such as waiting, kv_usage or inflight."""
    attribute_key: str = ""
    """The older name of attribute, which may have its producer behind a slash."""
    producer: str = ""
    """Kept for the reference's configurations: every attribute is known by its name alone."""
    unknown: Share = 0.5
    """Score of an endpoint whose value is not known or too old, but at most the mean of the known ones' scores."""

    instead: ClassVar[Mapping[str, str]] = {"attributeKey": "attribute"}

    def __post_init__(self) -> None:
        if bool(self.attribute) == bool(self.attribute_key):
            raise ValueError("attribute is needed: the name of what is compared")
        combined(self.attribute)

    def idle(self, given: Collection[str]) -> dict[str, str]:
        return {"producer": "every attribute is known by its name alone"} if self.producer else {}


class AttributeScorer:
    """Prefer endpoints by one number that is known of each.

    Score: (value - lowest) / (highest - lowest), or 1 minus that where lower is better; all 1 when equal. With
    fixedRange lowest and highest are its min and max, and values beyond are taken for the nearer one. A value that is
    not known scores `unknown` (in the reference 0, so that a page that fails would keep its server from all requests).
    """

    def __init__(self, params: AttributeScorerParams, context: Context) -> None:
        self._attribute = params.attribute or params.attribute_key.partition("/")[0]
        check_attribute(self._attribute, context)
        self.needs = (self._attribute,)
        self._lower = params.algorithm.type == "linear_lower_is_better"
        self._range = params.algorithm.normalization.fixed_range

    def __call__(self, request: Request, candidates: Candidates, params: AttributeScorerParams) -> Scores:
        values, known = candidates.column(self._attribute)
        if self._range is None:
            return lowest_first(values if self._lower else -values, known, params.unknown)
        share = np.clip((values - self._range.min) / (self._range.max - self._range.min), 0.0, 1.0)
        return with_unknown(1.0 - share if self._lower else share, known, params.unknown)


token_load = scorer("token-load-scorer", params=TokenLoadParams, needs=("inflight_tokens",))(TokenLoad)
no_hit_lru = scorer("no-hit-lru-scorer", params=NoHitParams, needs=(PREFIX_MATCH,))(NoHitLru)
endpoint_attribute = experimental(scorer("endpoint-attribute-scorer", params=AttributeScorerParams)(AttributeScorer))
