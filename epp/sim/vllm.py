"""One vLLM v1 engine: continuous batching, paged KV cache with prefix cache, LoRA slots, preemption.

In: requests (lengths and block keys, no text), aborts, steps. Out: what each step lasts and whose tokens it brings.
Rules here:
- A step has a token budget. Running requests first: one token for each that decodes, then the rest of an unfinished
  prefill; then waiting ones, first come first served, while budget, places and blocks allow and nobody was preempted.
- Only full blocks are found again, and at least one token of a prompt is computed.
- Out of blocks: the request admitted last loses its place, goes to the head of the queue and is computed anew.
- A request whose adapter does not fit into the batch waits; those behind it do not.
- The driver calls `step` when the last step's duration has passed, or, when it returned None, after the next submit.
  What a step finishes is retired by the next call, so `stats` in between show it running, as an engine's page does.
- No time, no chance: the order of calls alone decides.
- Nothing is done per token: contexts are summed as they grow, growth and ends of decodes are kept by step number.
Left out: encoder inputs, speculative decoding, priorities (first come first served only); of KV connectors all but the
prompt that comes whole.
Source: vLLM v1 scheduler (`vllm/v1/core/sched`) as modelled by BLIS; defaults in the profiles.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Final

import msgspec

from epp.errors import BadRequest
from epp.sim.blocks import BlockPool, Held
from epp.sim.profile import EngineProfile


class EngineRequest(msgspec.Struct, frozen=True):
    """What an engine must know of a request."""

    id: str
    """Unique among the requests that the engine has at a time."""
    prompt_tokens: int
    output_tokens: int
    """Length of the answer; at least 1."""
    keys: tuple[int, ...] = ()
    """Chained keys (not negative) of the full blocks of prompt and answer, root first; adapter and cache salt are in
    them. May stop early: later blocks cannot be found again, but take their room like any other."""
    adapter: str = ""
    """LoRA adapter; empty: the base model."""
    sent: bool = False
    """Its prompt was computed by another engine and comes with its keys and values: only its last token is computed
    here, unless it is preempted."""


class Step(msgspec.Struct, frozen=True):
    """What one step does. Tokens come at its end."""

    duration: float
    """Seconds."""
    admitted: tuple[tuple[str, int], ...]
    """Requests that left the queue for the first time, and how many of their prompt tokens were in the cache."""
    tokens: tuple[str, ...]
    """Requests that get one token each."""
    first: tuple[str, ...]
    """Those of `tokens` that get their first."""
    finished: tuple[str, ...]
    """Those of `tokens` that get their last."""


class Stats(msgspec.Struct, frozen=True):
    """What the metrics page of an engine says."""

    waiting: int
    running: int
    kv_usage: float
    """Share of blocks in use, 0..1. Blocks that only hold something for later are free."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache, ever."""
    prefix_hits: int
    """Prompt tokens found there, ever."""
    preemptions: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    prompts: int = 0
    """Requests that got their last token, ever."""
    prompt_tokens: int = 0
    """Of their prompts."""
    first_tokens: int = 0
    """Requests that got their first token, ever."""
    steps: int = 0
    """Steps that are over and brought a token, ever: vLLM counts no others."""
    processed: int = 0
    """Tokens that were computed, ever: each one of an answer, and at a prompt's first token what of it was not cached.
    What is computed anew after a preemption is not among them."""
    generated: int = 0
    """Tokens of answers, ever."""


class Load(msgspec.Struct, frozen=True):
    """What an engine does besides what waits; no page says so much."""

    decodes: int
    context: int
    """Tokens of context of all that decode."""
    prefilling: str
    """The request whose prompt is computed in part; empty: there is none."""
    prefilled: int
    """Tokens of that prompt that are computed or were cached."""


class _Sequence:
    """A request in the queue or in the batch, since it last entered the queue."""

    __slots__ = ("alive", "cached", "computed", "done", "held", "last", "length", "preempted", "request", "since")

    def __init__(self, request: EngineRequest, done: int = 0, preempted: bool = False) -> None:
        self.request = request
        self.done = done
        """Tokens of the answer that it had when it entered the queue."""
        self.preempted = preempted
        """It was in the batch before."""
        self.length = request.prompt_tokens + done
        """Tokens to prefill."""
        self.cached = 0
        """Those of them that the cache held."""
        self.computed = 0
        """Those of them whose keys and values are in blocks."""
        self.held: Held
        """Its blocks, from when it enters the batch."""
        self.since = 0
        """Step that finished the prefill."""
        self.last = 0
        """Step that brings the last token."""
        self.alive = True


class _Batch:
    """What one step computes, as it is put together."""

    __slots__ = ("admitted", "budget", "first", "loading", "pairs", "prefill")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that it may still take."""
        self.prefill = 0
        self.pairs = 0.0
        self.loading = 0.0
        self.admitted: list[tuple[str, int]] = []
        self.first: list[str] = []


_QUIET: Final = _Batch(0)
"""Of a step in which all only decode, as nearly all do; nothing is ever put into it."""


class Engine:
    """One model server's engine."""

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        self.blocks = BlockPool(profile.kv_blocks)
        self._number = 0
        """Steps so far, the current one included."""
        self._first = self._steps = self._computed = self._generated = 0
        """First tokens, steps with tokens, prompt tokens computed, tokens of answers: with this step's."""
        self._over = (0, 0, 0, 0)
        """The numbers of a page that grow by steps, without this step's."""
        self._all: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[str, _Sequence] = {}
        """In the order of admission."""
        self._decoding: dict[str, _Sequence] = {}
        """Those of `_running` whose prefill is done."""
        self._tokens: tuple[str, ...] | None = ()
        """Their names; None: somebody came or went since they were written down."""
        self._context = 0
        """Tokens of context of all that decode, summed as of step `_context_at`."""
        self._context_at = 0
        self._prefilling: _Sequence | None = None
        """The one request whose prefill did not fit into the last step's budget."""
        self._grow_at: defaultdict[int, list[_Sequence]] = defaultdict(list)
        """Step -> who needs one more block in it."""
        self._finish_at: defaultdict[int, list[_Sequence]] = defaultdict(list)
        """Step -> who gets its last token in it."""
        self._finishing: list[_Sequence] = []
        self._stuck = False
        """The head of the queue lacks blocks, and none has been freed since."""
        self._adapters: Counter[str] = Counter()
        """Adapters in the batch."""
        self._loaded: OrderedDict[str, None] = OrderedDict()
        """Adapters on the GPU, the one used longest ago first."""
        self._queries = self._hits = self._preemptions = self._prompts = self._prompt_tokens = 0

    def __repr__(self) -> str:
        return (
            f"<Engine [Profile: {self.profile.name} | Running: {len(self._running)} | Waiting: {len(self._waiting)}]>"
        )

    def __len__(self) -> int:
        """Requests that wait or run, those that finish in the current step included."""
        return len(self._all)

    # -- what the driver calls -----------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Put a request at the end of the queue.

        Raises:
            BadRequest: it can never be run: no tokens, or more than the KV cache holds.
        """
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise BadRequest("a prompt and an answer need at least one token each")
        total = request.prompt_tokens + request.output_tokens
        if total > self.profile.kv_tokens:
            raise BadRequest(
                f"This model's maximum context length is {self.profile.kv_tokens} tokens, but {total} were requested: "
                "shorten the prompt or lower max_tokens"
            )
        assert request.id not in self._all, f"request {request.id} is already here"
        sequence = self._all[request.id] = _Sequence(request)
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is. Nothing happens when it is not here."""
        sequence = self._all.get(request_id)
        if sequence is None or sequence in self._finishing:
            return
        del self._all[request_id]
        if request_id in self._running:
            self._leave_batch(sequence)
        else:
            self._waiting.remove(sequence)
            self._stuck = False  # another request may be at the head now

    def step(self) -> Step | None:
        """Begin the next step; None: nothing to do until the next submit."""
        self._over = self._first, self._steps, self._computed + self._generated, self._generated
        if self._finishing:
            self._retire()
        if not self._all:
            return None
        number = self._number = self._number + 1
        growing = self._grow_at.pop(number, None)
        nobody_preempted = growing is None or self._grow_decodes(growing)
        decodes = len(self._decoding)
        context = self._context = self._context + decodes  # each reads what it wrote in the last step, too
        self._context_at = number
        batch = _QUIET
        if self._prefilling is not None or (self._waiting and not self._stuck and nobody_preempted):
            batch = _Batch(self.profile.max_num_batched_tokens - decodes)
            if self._go_on_prefilling(batch) and nobody_preempted:
                self._admit(batch)
        if self._tokens is None:
            self._tokens = tuple(self._decoding)
        self._steps += bool(self._tokens)
        self._generated += len(self._tokens)
        ends = self._finish_at.pop(number, None)
        self._finishing = [] if ends is None else [sequence for sequence in ends if sequence.alive]
        return Step(
            self.profile.step_time(batch.prefill, decodes, context, batch.pairs) + batch.loading,
            tuple(batch.admitted),
            self._tokens,
            tuple(batch.first),
            () if ends is None else tuple([sequence.request.id for sequence in self._finishing]),
        )

    def stats(self) -> Stats:
        """The engine as it is during the current step."""
        waiting = {sequence.request.adapter for sequence in self._waiting} - {""} if self._waiting else ()
        first, steps, processed, generated = self._over
        return Stats(
            waiting=len(self._waiting),
            running=len(self._running),
            kv_usage=self.blocks.used / self.blocks.total,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            preemptions=self._preemptions,
            running_adapters=tuple(sorted(self._adapters)),
            waiting_adapters=tuple(sorted(waiting)),
            prompts=self._prompts,
            prompt_tokens=self._prompt_tokens,
            first_tokens=first,
            steps=steps,
            processed=processed,
            generated=generated,
        )

    def load(self) -> Load:
        """What runs now, for whoever knows everything."""
        unfinished = self._prefilling
        return Load(
            decodes=len(self._decoding),
            context=self._context,
            prefilling="" if unfinished is None else unfinished.request.id,
            prefilled=0 if unfinished is None else unfinished.computed,
        )

    def steps_until(self, blocks: int) -> int:
        """Steps until requests that decode now have given so many blocks back; 0: they never will, all together."""
        ends = sorted((each.last, len(each.held)) for each in self._decoding.values())
        for at, held in ends:
            blocks -= held
            if blocks <= 0:
                return at - self._number
        return 0

    # -- the parts of a step -------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Take out who got its last token: its blocks, the answer's included, can be found again."""
        for sequence in self._finishing:
            request = sequence.request
            full = (request.prompt_tokens + request.output_tokens - 1) // self.profile.block_size
            self.blocks.name(sequence.held, max(0, full - 1), full)
            self._prompts += 1
            self._prompt_tokens += request.prompt_tokens
            del self._all[request.id]
            self._leave_batch(sequence)
        self._finishing = []

    def _grow_decodes(self, sequences: list[_Sequence]) -> bool:
        """Give a block to everyone whose last one is full. False: somebody was preempted."""
        nobody_preempted, go_on = True, self.blocks.go_on
        again = self._number + self.profile.block_size
        grow_again = self._grow_at[again].append
        for sequence in sequences:
            if sequence.alive and not go_on(sequence.held):
                nobody_preempted = False
                self._make_room(sequence)
            if sequence.alive and again <= sequence.last:
                grow_again(sequence)
        return nobody_preempted

    def _make_room(self, sequence: _Sequence) -> None:
        """Preempt others until this one has another block, or is preempted itself."""
        while sequence.alive:
            self._preempt_last()
            if sequence.alive and self.blocks.grow(sequence.held, 1):
                return

    def _go_on_prefilling(self, batch: _Batch) -> bool:
        """Compute the next part of the unfinished prefill. False: it was preempted, being the last one admitted."""
        if self._prefilling is None or self._prefill(self._prefilling, batch):
            return True
        self._preempt_last()
        return False

    def _admit(self, batch: _Batch) -> None:
        """Let waiting requests in while budget, places and blocks last."""
        passed_over: list[_Sequence] = []
        waiting = self._waiting
        while waiting and batch.budget > 0 and len(self._running) < self.profile.max_num_seqs and not self._stuck:
            sequence = waiting[0]
            if not self._adapter_fits(sequence.request.adapter):
                passed_over.append(waiting.popleft())
            elif self._start(sequence, batch):
                waiting.popleft()
            else:
                self._stuck = True
        waiting.extendleft(reversed(passed_over))

    def _start(self, sequence: _Sequence, batch: _Batch) -> bool:
        """Find what the cache holds of a waiting request and compute the first part of the rest. False: no blocks."""
        request, size = sequence.request, self.profile.block_size
        keys = request.keys[: (sequence.length - 1) // size]
        found, free = self.blocks.match(keys)
        here = sequence.length - 1 if request.sent and not sequence.preempted else found * size
        tokens = min(sequence.length - here, batch.budget)
        if -(-(here + tokens) // size) - found > self.blocks.free - free:
            return False
        room = -(-(request.prompt_tokens + request.output_tokens) // size)
        sequence.held = self.blocks.use(request.keys, found, room)
        if here > found * size:
            self.blocks.grow(sequence.held, -(-here // size) - found)
            self.blocks.name(sequence.held, found, here // size)
        sequence.cached = sequence.computed = here
        if not sequence.preempted:
            batch.admitted.append((request.id, found * size))
            self._queries += request.prompt_tokens
            self._hits += found * size
        self._running[request.id] = sequence
        if request.adapter:
            self._adapters[request.adapter] += 1
            batch.loading += self._load(request.adapter)
        return self._prefill(sequence, batch)

    def _prefill(self, sequence: _Sequence, batch: _Batch) -> bool:
        """Compute as much of a prompt as the budget allows. False: no blocks for it."""
        size, held = self.profile.block_size, sequence.held
        tokens = min(sequence.length - sequence.computed, batch.budget)
        after = sequence.computed + tokens
        if not self.blocks.grow(held, -(-after // size) - len(held)):
            return False
        self.blocks.name(held, sequence.computed // size, after // size)
        batch.prefill += tokens
        batch.budget -= tokens
        batch.pairs += tokens * (sequence.computed + (tokens + 1) / 2)
        self._stuck = False  # new blocks may be what the head of the queue looks for
        sequence.computed = after
        if after < sequence.length:
            self._prefilling = sequence
        else:
            self._begin_decode(sequence, batch)
        return True

    def _begin_decode(self, sequence: _Sequence, batch: _Batch) -> None:
        if sequence is self._prefilling:
            self._prefilling = None
        sequence.since = self._number
        sequence.last = self._number + sequence.request.output_tokens - sequence.done - 1
        self._decoding[sequence.request.id] = sequence
        self._tokens = None
        self._context += sequence.length
        if not sequence.done:
            batch.first.append(sequence.request.id)
            self._first += 1
            self._computed += sequence.length - sequence.cached
        self._finish_at[sequence.last].append(sequence)
        full_at = self._number + 1 + -sequence.length % self.profile.block_size
        if full_at <= sequence.last:
            self._grow_at[full_at].append(sequence)

    # -- inside --------------------------------------------------------------------------------------------------

    def _preempt_last(self) -> None:
        """Who was admitted last gives its blocks back and waits at the head of the queue."""
        sequence = next(reversed(self._running.values()))
        request = sequence.request
        done = sequence.done
        if request.id in self._decoding:
            done += self._number - sequence.since  # what it got up to the last step
        self._leave_batch(sequence)
        again = self._all[request.id] = _Sequence(request, done, preempted=True)
        self._waiting.appendleft(again)
        self._preemptions += 1

    def _leave_batch(self, sequence: _Sequence) -> None:
        request = sequence.request
        sequence.alive = False
        del self._running[request.id]
        if self._decoding.pop(request.id, None) is not None:
            self._tokens = None
            self._context -= sequence.length + self._context_at - sequence.since
        if sequence is self._prefilling:
            self._prefilling = None
        self.blocks.release(sequence.held)
        self._stuck = False
        if request.adapter:
            self._adapters[request.adapter] -= 1
            if not self._adapters[request.adapter]:
                del self._adapters[request.adapter]

    def _adapter_fits(self, adapter: str) -> bool:
        return not adapter or adapter in self._adapters or len(self._adapters) < self.profile.max_lora

    def _load(self, adapter: str) -> float:
        """Bring an adapter to the GPU, in place of the one used longest ago. Returns the seconds that it takes."""
        known = adapter in self._loaded
        self._loaded[adapter] = None
        self._loaded.move_to_end(adapter)
        if known:
            return 0.0
        if len(self._loaded) > self.profile.max_lora:
            del self._loaded[next(name for name in self._loaded if name not in self._adapters)]
        return self.profile.lora_load_s
