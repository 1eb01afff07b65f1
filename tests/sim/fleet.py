"""Several engines in virtual time under one routing policy: what a workload does to a fleet, without a network."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from epp.load.results import percentile
from epp.sim import text
from epp.sim.profile import EngineProfile
from epp.sim.vllm import Engine, EngineRequest, Step
from epp.sim.workload import Arrival, Workload

Policy = Callable[["Fleet", EngineRequest], int]


class Fleet:
    """Runs one workload to its end."""

    def __init__(self, profile: EngineProfile, servers: int, policy: Policy) -> None:
        self.engines = [Engine(profile) for _ in range(servers)]
        self.ttft: dict[str, float] = {}
        self._policy = policy
        self._base = ""
        self._stepping = [False] * servers
        self._sent: dict[str, float] = {}
        self._heap: list[tuple[float, int, Arrival | tuple[int, Step]]] = []
        self._pushed = 0
        self._prompt_tokens = self._cached_tokens = 0

    def run(self, workload: Workload, seed: int, duration: float) -> Fleet:
        self._base = workload.model
        for arrival in workload.arrivals(seed, duration):
            self._push(arrival.at, arrival)
        while self._heap:
            now, _, event = heapq.heappop(self._heap)
            if isinstance(event, Arrival):
                self._send(event, now)
            else:
                self._end_step(*event, now)
        return self

    def ttft_percentile(self, share: float) -> float:
        value = percentile(list(self.ttft.values()), share)
        assert value is not None
        return value

    @property
    def cached_share(self) -> float:
        return self._cached_tokens / self._prompt_tokens

    def _push(self, at: float, event: Arrival | tuple[int, Step]) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (at, self._pushed, event))

    def _send(self, arrival: Arrival, now: float) -> None:
        prompt = text.chat_prompt(arrival.messages)
        whole = text.with_answer(prompt, arrival.max_tokens - 1)
        name = str(len(self._sent))
        adapter = "" if arrival.model == self._base else arrival.model
        keys = text.block_keys(whole, self.engines[0].profile.block_size, adapter)
        request = EngineRequest(name, text.count_tokens(prompt), arrival.max_tokens, keys, adapter)
        server = self._policy(self, request)
        self._sent[name] = now
        self._prompt_tokens += request.prompt_tokens
        self.engines[server].submit(request)
        if not self._stepping[server]:
            self._begin_step(server, now)

    def _begin_step(self, server: int, now: float) -> None:
        step = self.engines[server].step()
        self._stepping[server] = step is not None
        if step is not None:
            self._cached_tokens += sum(cached for _, cached in step.admitted)
            self._push(now + step.duration, (server, step))

    def _end_step(self, server: int, step: Step, now: float) -> None:
        for name in step.first:
            self.ttft[name] = now - self._sent[name]
        self._begin_step(server, now)


def round_robin() -> Policy:
    turn = -1

    def pick(fleet: Fleet, request: EngineRequest) -> int:
        nonlocal turn
        turn += 1
        return turn % len(fleet.engines)

    return pick


def prefix_and_load(fleet: Fleet, request: EngineRequest) -> int:
    """The picker's default weights (queue 2, KV 2, prefix 3) on perfect knowledge; the first of the best."""
    stats = [engine.stats() for engine in fleet.engines]
    waiting = [stat.waiting for stat in stats]
    most, least = max(waiting), min(waiting)
    keys = request.keys[: request.prompt_tokens // fleet.engines[0].profile.block_size]

    def score(server: int) -> float:
        queue = (most - waiting[server]) / (most - least) if most > least else 1.0
        prefix = fleet.engines[server].blocks.match(keys)[0] / len(keys) if keys else 0.0
        return 2 * queue + 2 * (1 - stats[server].kv_usage) + 3 * prefix

    return max(range(len(stats)), key=score)
