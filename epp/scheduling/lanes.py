"""What was sent to each endpoint and has no first token yet, as far as anyone can tell.

In: requests as they are sent, begin and end; pages. Out: the work that waits before a new request, by slot; and what
each engine did between two pages, which teaches `speeds.py`.
Rules here:
- Engines compute prompts in the order in which they came, so those without a first token are the latest ones. How many
  these are the page tells: requests that have ended, run and wait, less first tokens given.
- Where answers are seen, a request leaves its lane at its first token; where they are not, by pages alone.
- Engines count no end of a request whose client left, so that sum drifts. It is kept within what waits and what is
  there at all, and what it was off by is remembered: it heals whenever an engine is idle.
- Prompts that a page tells of and that were not sent from here (other pickers, other clients) weigh what ours do on
  average. An engine that counts no first tokens still tells how many wait.
- Half-computed prompts are on no counter: speeds are learned over pieces of time at whose end no prompt waits, or over
  such that are so long that it hardly matters.
- Where an engine counts no steps and answers are seen, the time to the first token of whoever was first in the lane
  teaches instead.
Source: vLLM 0.32, `vllm/v1/metrics`: prompts count at their first token, chunks without a token are in no step; the
order is that of the v1 scheduler.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Final

import msgspec
import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import EndpointTable, Floats, Slots, Totals
from epp.scheduling.speeds import Speeds

SHORTEST: Final = 0.5
"""Seconds of work that speeds are learned from, at least: ten pages."""
LONG: Final = 5.0
MANY: Final = 10.0
"""Likewise where prompts wait all the time: seconds, or first tokens. What was computed of the next prompt is then a
few hundredths of it; begun cold, an engine that is always busy must be known soon."""
USUAL: Final = 0.01
"""Part of the usual prompt that each one replaces."""
ANSWER: Final = 256.0
"""Tokens of an answer, before any has ended."""
ANSWERS: Final = 1_000.0
"""Answers from which on the older half counts half."""
MOST: Final = 100_000
"""Requests in flight that are remembered: whoever never says that they are over cannot fill the memory."""
CHUNK: Final = 8_192.0
"""Prompt tokens a step: vLLM's default on large GPUs, which no page tells."""
COUNT, TOKENS, PAIRS, LENGTH, OTHERS, FLIGHT = range(6)
"""Rows of `Lanes._sums`: prompts that wait, their tokens to compute, the pairs of these, their tokens in all; prompts
of others that wait; tokens of all prompts in flight."""


class Prompt(msgspec.Struct, frozen=True):
    """What a prompt is to the engine that computes it."""

    tokens: float
    """To be computed: what is not in the cache."""
    pairs: float
    """Query-key pairs of these."""
    length: float
    """Tokens, cached ones too."""


class Sent(msgspec.Struct, frozen=True):
    slot: int
    at: float
    prompt: Prompt
    answers_at: int
    """Slot where its answer is made: another one in disaggregated serving."""


class Work:
    """A piece of time in which an engine was busy, up to its latest page."""

    __slots__ = ("began", "began_at", "context", "latest", "pairs", "tokens")

    def __init__(self, began: Totals, now: float) -> None:
        self.began = self.latest = began
        self.began_at = now
        self.tokens = self.pairs = 0.0
        """Of prompts that got their first token, as was believed of them."""
        self.context = 0.0
        """Tokens of context that steps read."""


class Lane:
    """One endpoint's prompts that wait, in the order in which they were sent."""

    __slots__ = ("drift", "prompts", "work")

    def __init__(self) -> None:
        self.prompts: dict[Request, Sent] = {}
        self.drift = 0.0
        """Prompts that wait beyond what its page comes to."""
        self.work: Work | None = None


class Backlog(msgspec.Struct, frozen=True, eq=False):
    """What waits before a new request. Each of shape (N,)."""

    prompts: Floats
    tokens: Floats
    """To be computed."""
    pairs: Floats
    context: Floats
    """Tokens of the requests that are being answered, their prompts alone."""
    since: Floats
    """When the first of the prompts was begun, or later."""


class Lanes:
    """Every endpoint's."""

    def __init__(self, speeds: Speeds) -> None:
        self._usual_tokens, self._usual_pairs = 1_000.0, 500_000.0
        """What prompts are on average."""
        self._speeds = speeds
        self._lanes: dict[int, Lane] = {}
        self._sent: dict[Request, Sent] = {}
        self._sums: Floats = np.zeros((6, 0))
        self._since: Floats = np.zeros(0)
        self._read_at: Floats = np.zeros(0)
        """When the latest page of each slot was asked for."""
        self._generated, self._ended = ANSWER, 1.0

    @property
    def answer(self) -> float:
        """Tokens of an answer, on average."""
        return self._generated / self._ended

    def send(self, request: Request, slot: int, prompt: Prompt, now: float) -> None:
        """A request goes to a slot. A second slot for the same request only makes its answer."""
        before = self._sent.get(request)
        if before is not None:
            self._sums[FLIGHT, before.answers_at] -= before.prompt.length
            self._sums[FLIGHT, slot] += before.prompt.length
            self._sent[request] = msgspec.structs.replace(before, answers_at=slot)
            return
        lane = self._lanes.setdefault(slot, Lane())
        if not lane.prompts:
            self._since[slot] = now
        lane.prompts[request] = self._sent[request] = Sent(slot, now, prompt, slot)
        self._add(slot, prompt, 1.0)
        self._sums[FLIGHT, slot] += prompt.length
        if len(self._sent) > MOST:
            self.follow(next(iter(self._sent)), True, now)  # nobody has said so
        self._usual_tokens += USUAL * (prompt.tokens - self._usual_tokens)
        self._usual_pairs += USUAL * (prompt.pairs - self._usual_pairs)

    def follow(self, request: Request, over: bool, now: float) -> None:
        """A request has its first token, or is over. One that was not sent from here is nobody's."""
        sent = self._sent.get(request)
        if sent is None:
            return
        lane = self._lanes.get(sent.slot)
        if lane is not None and request in lane.prompts:
            if not over:
                self._time(lane, request, sent, now)
            self._leave(lane, request, now)
        if over:
            del self._sent[request]
            self._sums[FLIGHT, sent.answers_at] -= sent.prompt.length

    def read(self, table: EndpointTable, slots: Slots) -> None:
        """Take in what pages of these slots have said since the last time."""
        if table.width > len(self._since):
            self._grow(table.width)
        asked_at = table.pages_at(slots)
        new = asked_at > self._read_at[slots]
        if not np.count_nonzero(new):
            return
        told = slots[new]
        running, waiting = table.told("running", told).tolist(), table.told("waiting", told).tolist()
        for slot, at, runs, waits in zip(told.tolist(), asked_at[new].tolist(), running, waiting, strict=True):
            self._take(slot, at, table.totals(slot), runs, waits)

    def before(self, slots: Slots) -> Backlog:
        """What waits before a new request at these slots. Call `read` first."""
        count, tokens, pairs, length, others, flight = self._sums.take(slots, axis=1)  # a third of what an index takes
        if np.count_nonzero(others):
            count += others
            tokens += others * self._usual_tokens
            pairs += others * self._usual_pairs
        return Backlog(count, tokens, pairs, np.maximum(0.0, flight - length), self._since[slots])

    def forget(self, slot: int) -> None:
        """The slot will mean another endpoint: nothing runs there any more."""
        for request in [request for request, sent in self._sent.items() if sent.answers_at == slot]:
            self.follow(request, True, self._since.item(slot))
        self._lanes.pop(slot, None)
        if slot < len(self._since):
            self._sums[:, slot], self._read_at[slot] = 0.0, -math.inf

    # -- inside --------------------------------------------------------------------------------------------------

    def _grow(self, width: int) -> None:
        more = width - len(self._since)
        self._sums = np.concatenate((self._sums, np.zeros((6, more))), axis=1)
        self._since = np.append(self._since, np.zeros(more))
        self._read_at = np.append(self._read_at, np.full(more, -math.inf))

    def _add(self, slot: int, prompt: Prompt, sign: float) -> None:
        sums = self._sums
        sums[COUNT, slot] += sign
        sums[TOKENS, slot] += sign * prompt.tokens
        sums[PAIRS, slot] += sign * prompt.pairs
        sums[LENGTH, slot] += sign * prompt.length

    def _leave(self, lane: Lane, request: Request, now: float) -> None:
        """A prompt has its first token, or nobody waits for it any more."""
        first = next(iter(lane.prompts)) is request
        sent = lane.prompts.pop(request)
        if lane.prompts:
            self._add(sent.slot, sent.prompt, -1.0)
        else:
            self._sums[: LENGTH + 1, sent.slot] = 0.0  # nothing that rounding would have left
        if first:
            self._since[sent.slot] = now
        if lane.work is not None:
            lane.work.tokens += sent.prompt.tokens
            lane.work.pairs += sent.prompt.pairs

    def _time(self, lane: Lane, request: Request, sent: Sent, now: float) -> None:
        """Learn from a first token that was seen."""
        seconds = now - max(sent.at, self._since.item(sent.slot))
        counts = lane.work is not None and not math.isnan(lane.work.latest.steps)
        if counts or seconds <= 0 or next(iter(lane.prompts)) is not request:
            return
        steps = 1.0 + sent.prompt.tokens / CHUNK
        context = self._context(sent.slot) * steps
        self._speeds.learn(sent.slot, (steps, sent.prompt.tokens, 0.0, context, sent.prompt.pairs), seconds)

    def _context(self, slot: int) -> float:
        """Tokens that a step reads there: of the requests that are being answered, their prompts alone."""
        return max(0.0, self._sums.item(FLIGHT, slot) - self._sums.item(LENGTH, slot))

    def _take(self, slot: int, at: float, totals: Totals, running: float, waiting: float) -> None:
        """A page was read: what it counts, and what runs and waits. NaN: it does not tell."""
        lane = self._lanes.get(slot) or self._lanes.setdefault(slot, Lane())
        before, self._read_at[slot] = self._read_at.item(slot), at
        unbegun = _without_first_token(lane, totals, running, waiting)
        known = 0
        if lane.prompts:
            known = sum([sent.at <= at for sent in lane.prompts.values()])
            began = at if math.isinf(before) else (before + at) / 2  # nobody knows when, between two pages
            for request in list(islice(lane.prompts, known - int(min(unbegun, known)))):
                self._leave(lane, request, began)
        else:
            self._since[slot] = at
        self._sums[OTHERS, slot] = max(0.0, unbegun - known) if unbegun < math.inf else 0.0
        work = lane.work
        if work is None or running + waiting == 0 or not totals.steps >= work.latest.steps:
            lane.work = Work(totals, at)
            return
        work.context += self._context(slot) * (totals.steps - work.latest.steps)
        came, work.latest = totals.first_tokens > work.latest.first_tokens, totals
        took, prompts = at - work.began_at, totals.first_tokens - work.began.first_tokens
        if took >= SHORTEST and (not unbegun or (came and (took >= LONG or prompts >= MANY))):
            self._learn(slot, work, took)
            lane.work = Work(totals, at)

    def _learn(self, slot: int, work: Work, seconds: float) -> None:
        began, latest = work.began, work.latest
        generated = latest.generated - began.generated
        computed = latest.processed - began.processed - generated
        ended = latest.prompts - began.prompts
        if not (generated >= 0 and computed >= 0 and ended >= 0):
            return  # it does not tell, or has started anew
        scale = 0.5 if self._ended > ANSWERS else 1.0
        self._generated, self._ended = scale * self._generated + generated, scale * self._ended + ended
        if computed > 2 * work.tokens + 1_000:
            return  # most of it was sent by others: nobody knows the pairs
        pairs = work.pairs * computed / work.tokens if work.tokens else 0.0
        self._speeds.learn(slot, (latest.steps - began.steps, computed, generated, work.context, pairs), seconds)


def _without_first_token(lane: Lane, totals: Totals, running: float, waiting: float) -> float:
    """How many prompts at an engine have no first token; inf: it tells nothing of them."""
    counted = totals.prompts + (waiting + running) - totals.first_tokens
    if math.isnan(counted):
        return math.inf if math.isnan(waiting) else waiting
    found = min(max(counted + lane.drift, waiting), waiting + running)
    lane.drift = found - counted
    return found
