"""An engine in real time: one task steps it and sleeps what a step lasts; streams are told of their tokens.

Rules here: the engine's clock does not drift (each step is due a duration after the last one was due); a server that
got too little CPU catches up; a stream is told how many tokens it has, so what one step or several bring is one write.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from epp.sim.vllm import Engine, EngineRequest, Step

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
"""Seconds; the lower part of vLLM's."""


class Stream:
    """The tokens of one request as they come."""

    __slots__ = ("cached", "has", "request", "submitted_at", "waiter", "wanted")

    def __init__(self, request: EngineRequest, now: float) -> None:
        self.request = request
        self.submitted_at = now
        self.has = 0
        """Tokens so far."""
        self.cached = 0
        """Prompt tokens that were in the cache; known with the first token."""
        self.wanted = 0
        """Tokens that `waiter` waits for."""
        self.waiter: asyncio.Future[None] | None = None

    async def at_least(self, tokens: int) -> int:
        """Wait until there are so many tokens. Returns how many there are."""
        if self.has < tokens:
            self.wanted = tokens
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.has

    def add_token(self) -> None:
        self.has += 1
        if self.waiter is not None and self.has >= self.wanted and not self.waiter.done():
            self.waiter.set_result(None)


class Counters:
    """What the metrics page counts and the engine does not."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        """By finish reason."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ttft_sum = 0.0
        self.ttft_counts = [0] * (len(TTFT_BUCKETS) + 1)
        """By bucket, not added up; the last one is over all bounds."""

    def first_token(self, ttft: float) -> None:
        self.ttft_sum += ttft
        self.ttft_counts[next((at for at, bound in enumerate(TTFT_BUCKETS) if ttft <= bound), len(TTFT_BUCKETS))] += 1


class Driver:
    """Steps one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.counters = Counters()
        self._streams: dict[str, Stream] = {}
        self._work = asyncio.Event()

    def submit(self, request: EngineRequest) -> Stream:
        """Raises: BadRequest, the engine can never run it."""
        self.engine.submit(request)
        stream = self._streams[request.id] = Stream(request, asyncio.get_running_loop().time())
        self._work.set()
        return stream

    def leave(self, stream: Stream, reason: str) -> None:
        """The client has its answer, or is gone: a request that still runs is aborted."""
        del self._streams[stream.request.id]
        done = stream.has >= stream.request.output_tokens
        self.counters.finished[reason if done else "abort"] += 1
        self.engine.abort(stream.request.id)

    async def run(self) -> None:
        """Step until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            step = self.engine.step()
            if step is None:
                self._work.clear()
                await self._work.wait()
                due = loop.time()
                continue
            due += step.duration
            await asyncio.sleep(due - loop.time())
            self._deliver(step, loop.time())

    def _deliver(self, step: Step, now: float) -> None:
        streams = self._streams
        for request_id, cached in step.admitted:
            if stream := streams.get(request_id):
                stream.cached = cached
                self.counters.prompt_tokens += stream.request.prompt_tokens
        for request_id in step.first:
            if stream := streams.get(request_id):
                self.counters.first_token(now - stream.submitted_at)
        self.counters.generation_tokens += len(step.tokens)
        for request_id in step.tokens:
            if stream := streams.get(request_id):
                stream.add_token()
