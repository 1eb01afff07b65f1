"""One estimate in seconds instead of weights: what a request costs at each endpoint.

In: a request, candidates, what each of them holds of the prompt. Out: scores, 1 at the least cost.
The cost of an endpoint, in seconds:
- prompts that were sent there before and have no first token yet: `lanes.py`; more, where they are late;
- its own prompt, of what the cache does not hold, with the term that grows with the square of the length;
- the steps of all that, each of which also decodes what is being answered there, and half of the step under way;
- where the KV cache is full: until answers have ended that make room;
- an adapter that must be brought to the GPU, and for which a place must become free; in disaggregated serving, sending
  the KV cache to the endpoint of the other stage;
- what it costs the others: `EVICTION` times its own prompt, by the share of prompts that caches save, for what is
  computed pushes out as much; `PACE` times how much longer its own answer takes than at an idle endpoint, else all that
  begin alike would go to one.
Constants of the engines are learned (`speeds.py`), and so are the share that caches save and how long answers are.
Rejected: a product of new tokens and batch size (LMetric, arXiv 2603.15202): nothing in it says that what is computed
elsewhere is lost there, and prefixes are lost under load; a threshold where affinity ends, which somebody must set;
one's own prompt once more whatever caches save, for others wait for it: no better anywhere, and slower servers idle.
Source: vLLM RFC 20962 (time to first token as queue, transfer and uncached blocks); the form of the step's time as in
`speeds.py`; figures in docs/routing.md.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Final

import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import GAUGES, Bools, Candidates, Floats, Slots, all_true
from epp.scheduling.adapters import AdapterNames
from epp.scheduling.lanes import CHUNK, Backlog, Lanes, Prompt
from epp.scheduling.plugin import ADAPTERS, DEFAULT_PRODUCER, PREFIX_MATCH, Context, Params, Ref, Scores, scorer
from epp.scheduling.profile import capped
from epp.scheduling.speeds import Speeds

EVICTION: Final = 4.0
PACE: Final = 0.01
"""With 0.02 two of eight seeds of 73-capacity lost their prefixes at 40 requests a second, with this none."""
ALIKE: Final = 0.02
"""Costs within this part of the least are the same: what is learned of two equal engines differs by more."""
PROGRESS: Final = 0.9
"""Part of the work before a request that may be over without a page that says so."""
GRACE: Final = 0.2
"""Seconds that work may last longer than it should before an endpoint counts as late: four pages."""
ADAPTER_LOAD: Final = 0.05
"""Seconds to bring an adapter to the GPU: estimate, 0.3 GB from host memory."""
TRANSFER: Final = 0.026
TRANSFER_TOKEN: Final = 4.25e-6
"""Seconds to send a prompt's KV cache, and for each of its tokens (llm-d: pulled peer to peer, H200)."""
MEMORY: Final = 0.01
"""Part that each request replaces of what is known of the share that caches save."""
STAGES: Final = 3
"""Profiles that one request runs at most: encode, prefill, decode."""


class CostParams(Params, frozen=True):
    prefix_match_info_producer_name: Annotated[str, Ref("producer", DEFAULT_PRODUCER)] = ""
    """The producer that says what each endpoint holds; empty: approx-prefix-cache-producer, declared or not."""


class Cost:
    """Prefer the endpoint where a request costs the fewest seconds: its own until the first token, and those of others.

    Score: least cost / cost; 1 within 2 % of the least. Nothing is to be tuned: what is not told is learned of the
    engines' pages, and of answers where they are seen. Use it as the only scorer of a profile, for it counts queues, KV
    caches, prefixes and adapters itself.
    """

    def __init__(self, params: CostParams, context: Context) -> None:
        self._match = context.producer(params.prefix_match_info_producer_name).match
        self._adapters = AdapterNames()
        self._speeds = Speeds()
        self._lanes = Lanes(self._speeds)
        self._saved, self._asked_for = 500.0, 1_000.0
        """Tokens of a prompt that were held, and tokens of a prompt, on average."""
        self._latest: deque[tuple[Candidates, Floats, Floats]] = deque(maxlen=STAGES)
        """Tokens to compute and their pairs, for `chosen`."""

    def __call__(self, request: Request, candidates: Candidates, params: CostParams) -> Scores:
        self._lanes.read(candidates.table, candidates.slots)
        match, length = self._match(request, candidates), float(request.tokens)
        held = np.minimum(match.blocks * float(match.block_tokens), max(0.0, length - 1.0))
        tokens = length - held
        pairs = tokens * (0.5 * (held + (length + 1.0)))
        self._latest.append((candidates, tokens, pairs))
        costs = self._costs(request, candidates, tokens, pairs)
        least = costs.item(costs.argmin())  # a third of the time that `min` takes
        scores: Scores = np.minimum(1.0, least * (1.0 + ALIKE) / costs)
        return _less_where_unknown(scores, candidates)

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        found = [each for each in self._latest if each[0] is candidates]
        if not found:
            return
        _, tokens, pairs = found[0]
        slot, length = slots.item(0), float(request.tokens)
        at = (candidates.slots == slot).argmax()
        prompt = Prompt(tokens.item(at), pairs.item(at), length)
        self._lanes.send(request, slot, prompt, candidates.now)
        self._saved += MEMORY * (length - prompt.tokens - self._saved)
        self._asked_for += MEMORY * (length - self._asked_for)

    def followed(self, request: Request, over: bool, now: float) -> None:
        self._lanes.follow(request, over, now)

    def forget(self, slot: int) -> None:
        self._lanes.forget(slot)
        self._speeds.forget(slot)

    # -- inside --------------------------------------------------------------------------------------------------

    def _costs(self, request: Request, candidates: Candidates, tokens: Floats, pairs: Floats) -> Floats:
        """Seconds, over 0."""
        slots, lanes = candidates.slots, self._lanes
        a_step, a_token, an_answer, a_context, a_pair = self._speeds.of(slots, candidates.table.width)
        backlog = lanes.before(slots)
        longer = an_answer * _answered(candidates, backlog.prompts) + a_context * backlog.context
        step = a_step + longer
        own = a_token * tokens + a_pair * pairs
        needed = backlog.tokens + tokens
        others = EVICTION * self._saved / max(1.0, self._asked_for)
        work = a_token * backlog.tokens + a_pair * backlog.pairs
        costs = _left(candidates, backlog, work, self._speeds.learned(slots))
        costs += (1.0 + others) * own + (0.5 + needed / CHUNK) * step + (PACE * lanes.answer) * longer
        until = _until_room(candidates, needed)
        if until is not None:
            costs += until * (lanes.answer * step)
        if self._adapters.has(request.target_model, candidates):
            costs += _until_adapter(request.target_model, candidates, lanes.answer * step)
        if request.peer is not None:
            costs += np.where(slots == request.peer, 0.0, TRANSFER + TRANSFER_TOKEN * tokens)
        return costs


def _less_where_unknown(scores: Scores, candidates: Candidates) -> Scores:
    """An endpoint that lacks what others tell is at most what those that tell it all are on average; where nobody tells
    it all, nobody is better than the best that tells one thing."""
    masks = [candidates.column(name)[1] for name in GAUGES]
    if all(map(all_true, masks)):
        return scores
    told = [known for known in masks if known.any()]
    known = np.logical_and.reduce(told) if told else np.ones(len(scores), np.bool_)
    if all_true(known):
        return scores
    if known.any():
        return capped(scores, ~known)
    best: float = min(scores[each].max() for each in told)
    return np.minimum(scores, best)


def _left(candidates: Candidates, backlog: Backlog, work: Floats, learned: Bools) -> Floats:
    """Seconds until the prompts before a request are computed; below 0: they should be, and no page has said so yet.

    A tenth of the work is left in any case (`PROGRESS`), and all of it where nobody knows yet how fast it goes: else
    the slowest engine would look like the emptiest. Where the page shows that they wait longer than they should (no
    room, an engine that stands still), each takes as long as they are late: a wait of unknown length has lasted half
    of it, on average.
    """
    ahead = work - (candidates.now - backlog.since)
    late = (-GRACE - ahead) * backlog.prompts
    _, known = candidates.column("waiting")
    if not all_true(known):
        late = np.where(known, late, 0.0)
    least = (1.0 - PROGRESS) * work
    if not all_true(learned):
        least = np.where(learned, least, work)
    left: Floats = np.maximum(np.maximum(ahead, late), least)
    return left


def _answered(candidates: Candidates, waiting: Floats) -> Floats:
    """Requests that are being answered: those that are there, less those whose prompt waits."""
    there = candidates.column("running")[0] + candidates.column("waiting")[0]
    unknown = np.isnan(there)
    if np.count_nonzero(unknown):
        there = np.where(unknown, candidates.column("inflight")[0], there)
    answered: Floats = np.maximum(0.0, there - waiting)
    return answered


def _until_room(candidates: Candidates, needed: Floats) -> Floats | None:
    """Until so many tokens fit into the KV cache, in times of an answer: these end evenly, and each gives back its
    room. 0 where it is not known how full it is; None: they fit everywhere, as far as anyone knows."""
    usage, _ = candidates.column("kv_usage")
    room = candidates.column("kv_blocks")[0] * candidates.column("block_size")[0]
    lacking = needed - (1.0 - usage) * room
    lacks = lacking > 0.0  # not where something is unknown
    if not np.count_nonzero(lacks):
        return None
    return np.where(lacks, lacking / np.maximum(1.0, usage * room), 0.0)


def _until_adapter(name: str, candidates: Candidates, answer: Floats) -> Floats:
    """Seconds until the batch has this adapter: none where it runs; a load; where no place is free, an answer more."""
    most, told = candidates.column("max_lora")
    is_full = told & (candidates.adapters_held() >= most)
    return np.where(candidates.adapter(name) == 2, 0.0, ADAPTER_LOAD + np.where(is_full, answer, 0.0))


cost = scorer(
    "cost-scorer", params=CostParams, needs=("waiting", "running", "kv_usage", "max_lora", ADAPTERS, PREFIX_MATCH)
)(Cost)
