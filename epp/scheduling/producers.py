"""Producers: what is worked out about a request once, for whichever plugin asks.

In: a request and candidates. Out: a `PrefixMatch`. Once the decision is made, the chosen endpoint holds the prompt.
Rules here:
- A prompt is hashed at most once per decision and producer, however many plugins ask.
- Capacity is counted in tokens of the engine's own cache, whatever our blocks are. What a block is worth in tokens
  follows what was learned of the model (`prefix/ratio.py`); how large it is in bytes does not.
- What an endpoint computes pushes out what is old, whether a prompt can match it or not: the end of a prompt behind
  its whole blocks, what is beyond the part that is looked at, its other prompts, and what answers say they took.
  Of a prompt that was held whole, nothing counts. Where an answer does not say what came from the engine's cache, and
  it comes back in the next turn, it counts twice: what is old is then given up too early rather than too late.
- Several producers may stand side by side, each with its own index, as for a cache on GPUs and a larger one behind it.
The precise index, which engines' KV events fill, will be another producer. It needs `match`, with hashes that are the
engines' own and so a tokenizer before it, and depths from what was stored and removed; `chosen` only to bridge the time
until the events come; `forget`; `blocks`; and an edge that calls it with (slot, event) as scraping calls the table. No
plugin that reads a PrefixMatch will notice.
Source: llm-d approx-prefix-cache-producer (parameters, limits, the floor of 64 tokens a block).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Final

from msgspec import Meta

from epp.dialects.body import BYTES_PER_TOKEN
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Slots
from epp.prefix.approximate import ApproximateIndex
from epp.prefix.hashing import HASH_BYTES, block_hashes, prompt_to_hash, root_seed
from epp.scheduling.plugin import DEFAULT_PRODUCER, Context, Params, PrefixMatch, producer
from epp.units import Quantity, parse_quantity

SMALLEST_BLOCK: Final = 64
"""Tokens. Smaller blocks cost memory and time for hardly any better match."""
ENGINE_BLOCK: Final = 16
ENGINE_BLOCKS: Final = 31_250
"""500,000 tokens: what an H100 holds of an 8B model, where the engine does not tell."""
SMALLEST_INDEX: Final = 1 << 20


class ApproximateParams(Params, frozen=True):
    auto_tune: bool = True
    """Take block size and capacity from the engines' own metrics where they tell them."""
    block_size_tokens: Annotated[int, Meta(ge=0)] = ENGINE_BLOCK
    """Tokens a block, at least 64; the engines' own value comes first with autoTune. 0: 16."""
    lru_capacity_per_server: Annotated[int, Meta(ge=0)] = ENGINE_BLOCKS
    """Blocks of blockSizeTokens that an endpoint holds, where its metrics do not tell. 0: 31250."""
    max_prefix_tokens_to_match: Annotated[int, Meta(ge=0)] = 131_072
    """Tokens of a prompt that are looked at. 0: maxPrefixBlocksToMatch counts."""
    max_prefix_blocks_to_match: Annotated[int, Meta(ge=0)] = 2048
    """Blocks of a prompt that are looked at when maxPrefixTokensToMatch is 0. 0: all."""
    max_index_size: Quantity = "256Mi"
    """Bytes that the index takes at most, at least 1Mi; beyond it the endpoint that holds most forgets what is oldest.
    An entry takes 9 bytes where prompts are long, 65 where each is one block: the default is four million or more."""

    def __post_init__(self) -> None:
        if parse_quantity(str(self.max_index_size)) < SMALLEST_INDEX:
            raise ValueError("maxIndexSize must be at least 1Mi")
        if not self.auto_tune and not self.block_size_tokens:
            raise ValueError("blockSizeTokens must be at least 1 without autoTune")

    def idle(self, given: Collection[str]) -> dict[str, str]:
        idle: dict[str, str] = {}
        if "blockSizeTokens" in given and self.block_size_tokens < SMALLEST_BLOCK:
            idle["blockSizeTokens"] = f"blocks have at least {SMALLEST_BLOCK} tokens; it only counts the capacity"
        if "maxPrefixBlocksToMatch" in given and self.max_prefix_tokens_to_match:
            idle["maxPrefixBlocksToMatch"] = "maxPrefixTokensToMatch comes first unless it is 0"
        return idle


class Holder:
    """What is kept of one slot beside its blocks."""

    __slots__ = ("owed", "worth")

    def __init__(self, worth: float) -> None:
        self.worth = worth
        """Real tokens for each estimated one in what it holds, on average."""
        self.owed = 0.0
        """Tokens computed, not yet a whole block; below 0: counted too many."""


class ApproximatePrefix:
    """Believe that an endpoint holds the prompts that were sent to it, as far as its KV cache is large enough.

    Block size: what the first engine tells that tells it, never changed after that, since another size would make
    every hash a new one.
    """

    def __init__(self, params: ApproximateParams, context: Context) -> None:
        self.index = ApproximateIndex(parse_quantity(str(params.max_index_size)))
        self._params = params
        self._block_tokens = max(SMALLEST_BLOCK, params.block_size_tokens)
        self._settled = not params.auto_tune
        self._holders: dict[int, Holder] = {}
        self._hashed: tuple[Request, bytes] | None = None
        self._matched: tuple[Candidates, PrefixMatch] | None = None

    def match(self, request: Request, candidates: Candidates) -> PrefixMatch:
        hashes = self._hashes(request, candidates)
        if self._matched is None or self._matched[0] is not candidates:
            counts = self.index.match(hashes, candidates.slots)
            tokens = max(1, round(self._block_tokens * request.token_ratio))
            self._matched = candidates, PrefixMatch(counts, len(hashes) // HASH_BYTES, tokens)
        return self._matched[1]

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        hashes = self._hashes(request, candidates)
        rest = request.tokens - len(hashes) // HASH_BYTES * self._block_tokens * request.token_ratio
        for slot in slots.tolist():
            holder = self._holders.get(slot)
            if holder is None:
                holder = self._holders[slot] = Holder(request.token_ratio)
            capacity = self._capacity(candidates.table, slot, holder.worth)
            new = self.index.add(hashes, slot, capacity) if hashes else 0
            holder.worth += (request.token_ratio - holder.worth) * min(1.0, new / capacity)
            if rest > 0 and (new or not hashes):
                self.computed(candidates.table, slot, rest)
        self._hashed = self._matched = None  # the body must not outlive its request

    def computed(self, table: EndpointTable, slot: int, tokens: float) -> None:
        """An endpoint computed tokens that no prompt matches; below 0: fewer than was believed."""
        holder = self._holders.get(slot)
        if holder is None:
            return
        holder.owed += tokens
        blocks = int(holder.owed / (self._block_tokens * holder.worth))
        if blocks > 0:
            holder.owed -= blocks * self._block_tokens * holder.worth
            self.index.computed(slot, blocks, self._capacity(table, slot, holder.worth))

    def forget(self, slot: int) -> None:
        self.index.forget(slot)
        self._holders.pop(slot, None)

    def blocks(self) -> int:
        return len(self.index)

    def _hashes(self, request: Request, candidates: Candidates) -> bytes:
        if self._hashed is None or self._hashed[0] is not request:
            if not self._settled:
                self._settle(candidates)
            self._hashed = request, self._hash(request)
            self._matched = None
        return self._hashed[1]

    def _hash(self, request: Request) -> bytes:
        size, most = self._block_tokens * BYTES_PER_TOKEN, self._most()
        prompt = prompt_to_hash(request, most * size)
        if len(prompt) < size:
            return b""
        return block_hashes(prompt, root_seed(request.target_model, request.cache_salt), self._block_tokens, most)

    def _settle(self, candidates: Candidates) -> None:
        sizes, known = candidates.column("block_size")
        if known.any():
            self._block_tokens = max(SMALLEST_BLOCK, int(sizes[known][0]))
            self._settled = True

    def _most(self) -> int:
        """Blocks of a prompt that are looked at."""
        if self._params.max_prefix_tokens_to_match:
            return self._params.max_prefix_tokens_to_match // self._block_tokens
        return self._params.max_prefix_blocks_to_match or 2**63

    def _capacity(self, table: EndpointTable, slot: int, worth: float) -> int:
        """Our blocks that fit into the slot's cache, each of so many real tokens for each that it is estimated at."""
        tokens: float = (self._params.lru_capacity_per_server or ENGINE_BLOCKS) * (
            self._params.block_size_tokens or ENGINE_BLOCK
        )
        if self._params.auto_tune:
            told = table.fact("kv_blocks", slot) * table.fact("block_size", slot)
            tokens = tokens if math.isnan(told) else told
        return max(1, int(tokens // (self._block_tokens * worth)))


approximate_prefix = producer(DEFAULT_PRODUCER, params=ApproximateParams)(ApproximatePrefix)
