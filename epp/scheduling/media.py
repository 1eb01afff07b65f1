"""Images, audio and video: who has encoded them already.

In: digests of a request's media and candidates. Out: scores. Once the decision is made, its endpoint holds them.
Rules here:
- What an endpoint holds is what was sent there last: as many items as its cache has room for, by the assumed size of
  one; the least recently used give way. Engines tell nothing of it, so it is a belief.
- Memory is bounded by MOST_ITEMS, whatever the number of endpoints: with many, each is remembered for less.
- Only what a plugin asks for is read: a request's media are looked for when the first one scores.
- In a profile of disaggregated serving it is that profile's endpoint that holds them.
Rejected: one memory for several scorers (a profile's endpoint encodes for that profile; pools have one such scorer).
Source: llm-d router, mm-embeddings-cache-producer (size of the cache) and -scorer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Final

import numpy as np
from msgspec import Meta, field

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Floats, Slots
from epp.errors import ConfigError
from epp.scheduling.plugin import Context, Params, Ref, Scores, scorer

PRODUCER: Final = "mm-embeddings-cache-producer"
MB_PER_ITEM: Final = 2
"""Of an engine's cache, for one image: the reference's assumption."""
MOST_ITEMS: Final = 250_000
"""Remembered by one plugin, of all endpoints together: 60 MB where no two endpoints hold the same one."""


class MediaCache(Params, frozen=True):
    cache_size_in_mb_per_server: Annotated[int, Meta(ge=1)] = field(default=4096, name="cacheSizeInMBPerServer")
    """Of an endpoint's cache of encoded images, in MiB; an image is taken for 2 of them."""

    @property
    def items(self) -> int:
        return max(1, self.cache_size_in_mb_per_server // MB_PER_ITEM)


class Holders:
    """Which items each slot holds."""

    def __init__(self, items: int) -> None:
        """
        Args:
            items: most that one slot holds.
        """
        self._items = items
        self._listed: Slots | None = None
        self._room = items
        self._by_slot: dict[int, OrderedDict[bytes, None]] = {}
        """The latest last."""
        self._by_item: dict[bytes, tuple[int, ...]] = {}  # a set takes four times as much, and mostly there is one slot

    def __len__(self) -> int:
        return sum(map(len, self._by_slot.values()))

    def count(self, items: Sequence[bytes], candidates: Candidates) -> Floats:
        """How many of the items each candidate holds, shape (N,)."""
        counts = np.zeros(candidates.table.width)
        for item in items:
            if holders := self._by_item.get(item):
                counts[list(holders)] += 1.0
        return counts.take(candidates.slots)

    def add(self, items: Sequence[bytes], slot: int, table: EndpointTable) -> None:
        if self._listed is not table.listed:
            self._make_room(table)
        held = self._by_slot.setdefault(slot, OrderedDict())
        for item in items:
            if item not in held:
                self._by_item[item] = (*self._by_item.get(item, ()), slot)
            held[item] = None
            held.move_to_end(item)
        self._trim(slot)

    def forget(self, slot: int) -> None:
        for item in self._by_slot.pop(slot, ()):
            self._drop(item, slot)

    def _make_room(self, table: EndpointTable) -> None:
        self._listed = table.listed
        self._room = max(1, min(self._items, MOST_ITEMS // max(1, len(table.listed))))
        for slot in self._by_slot:
            self._trim(slot)

    def _trim(self, slot: int) -> None:
        held = self._by_slot[slot]
        while len(held) > self._room:
            item, _ = held.popitem(last=False)
            self._drop(item, slot)

    def _drop(self, item: bytes, slot: int) -> None:
        holders = tuple(each for each in self._by_item.pop(item) if each != slot)
        if holders:
            self._by_item[item] = holders


class MediaParams(Params, frozen=True):
    producer_name: Annotated[str, Ref("producer", PRODUCER)] = ""
    """The mm-embeddings-cache-producer that says how large endpoints' caches are; empty: the usual one, declared or
    not."""


class MediaAffinity:
    """Prefer endpoints that are believed to have encoded the request's images, audio and video already.

    Score: share of its items that the endpoint holds, each counted once, whatever its size; 0 everywhere for a request
    without any. Looked for in the messages of chats, of Anthropic's API and of Responses, by URL or by content, and in
    the hashes of vLLM's own bodies.
    """

    def __init__(self, params: MediaParams, context: Context) -> None:
        cache = context.settings.get(params.producer_name or PRODUCER, MediaCache())
        if not isinstance(cache, MediaCache):
            raise ConfigError(f"{params.producer_name} is no {PRODUCER}: name one in producerName")
        self._holders = Holders(cache.items)

    def __call__(self, request: Request, candidates: Candidates, params: MediaParams) -> Scores:
        if not request.media:
            return np.zeros(len(candidates))
        return self._holders.count(request.media, candidates) / len(request.media)

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        if request.media:
            self._holders.add(request.media, slots.item(0), candidates.table)

    def forget(self, slot: int) -> None:
        self._holders.forget(slot)


media = scorer("mm-embeddings-cache-scorer", params=MediaParams)(MediaAffinity)
