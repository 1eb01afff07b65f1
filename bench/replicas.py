"""What several active pickers without election cost: each sees only its own requests in flight, and its own prefixes.

`python -m bench.replicas [--pickers 1,2,4] [--seeds 1,2,3] [--json FILE]`. One workload over one fleet, beside round
robin. The gateway shares requests out to k pickers in turn; every picker scrapes every model server by itself.

All of it runs in virtual time: real pickers (configuration, reading, hashing, scorers, table) over the simulator's
engines, which are those of `epp demo`. Rejected: the demo's processes in real time. k pickers, Envoy, model servers and
load on two cores measure the cores first, and runs of one seed differ by more than what one picker more costs; here a
seed gives the same figures on any machine, and fleets of GPUs fit.

- demo: the demo's workload and four engines at its rate; and at one and a half times that, where queues grow.
- nothing shared: every prompt is new, at twice the demo's rate for such: what is left is in-flight work unseen.
- published: the shared-prefix workload of llm-d at 73 % of the fleet's cache, over eight servers with the constants of
  a 32B model on two H100 (150 groups x 5 prompts, 6,000 + 1,200 tokens, 500 out), at 40 and at 60 requests a second.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Final

import cyclopts
import msgspec

from bench import report
from epp import dialects
from epp.config.build import build
from epp.config.load import load
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.load.results import percentile
from epp.picker import Picker, PickerOptions
from epp.sim import text
from epp.sim.profile import EngineProfile, load_profile
from epp.sim.vllm import Engine, EngineRequest, Step
from epp.sim.workload import DEMO, NO_SHARING, Arrival, Prompts, Workload
from epp.ticket import Outcome, Ticket
from tests.watching import Watch

CONFIG: Final = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: lora-affinity-scorer
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: lora-affinity-scorer, weight: 1}
"""
"""The default weights, and the demo's for adapters."""
HEADERS: Final = ((":method", b"POST"), (":path", b"/v1/chat/completions"), ("content-type", b"application/json"))
ANSWERED: Final = ((":status", b"200"),)
INTERVAL: Final = 0.05
"""Seconds between two pages of one server for one picker, `--refresh-metrics-interval`."""
LONG_AGO: Final = -1000.0
"""When the servers joined: nobody starts slowly."""
SAMPLE: Final = 0.1
"""Seconds between two looks at how the requests are spread."""
WARM: Final = 20.0
"""Seconds of arrivals that are not measured, for caches and indexes are empty at first."""
SLOWLY: Final = 3.0
"""How much longer these take: at full rate a fleet without caches falls behind, and the rest would be catching up."""


class Case(msgspec.Struct, frozen=True):
    """A workload at a rate over a fleet."""

    name: str
    workload: Workload
    rate: float
    profile: str
    servers: int


PUBLISHED: Final = Workload(
    "published",
    model="qwen3-32b",
    rate=60.0,
    tenants=(
        Prompts("search", 1.0, groups=150, questions=5, shared_tokens=6000, question_tokens=1200, output_tokens=500),
    ),
)
CASES: Final = {
    case.name: case
    for case in (
        Case("demo", DEMO, DEMO.rate, "demo", 4),
        Case("demo x 1.5", DEMO, 1.5 * DEMO.rate, "demo", 4),
        Case("nothing shared", NO_SHARING, 2 * NO_SHARING.rate, "demo", 4),
        Case("published 40/s", PUBLISHED, 40.0, "qwen3-32b-h100-tp2", 8),
        Case("published 60/s", PUBLISHED, PUBLISHED.rate, "qwen3-32b-h100-tp2", 8),
    )
}


class Figures(msgspec.Struct, frozen=True):
    """One run."""

    case: str
    pickers: int
    """0: round robin."""
    seed: int
    requests: int
    ttft_p50: float
    """Seconds."""
    ttft_p90: float
    cached_share: float
    """Prompt tokens that were in the server's cache, of all."""
    imbalance: float
    """Requests on the fullest server, of the mean of all; averaged over time. 1: spread evenly."""


class Request(msgspec.Struct):
    """One request on its way."""

    number: int
    came_at: float
    server: int
    picker: Picker | None
    ticket: Ticket | None
    ttft: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class World:
    """Engines, pickers and virtual time."""

    def __init__(self, case: Case, pickers: int, seed: int) -> None:
        profile: EngineProfile = load_profile(case.profile)
        self.requests: dict[str, Request] = {}
        self.spread: list[float] = []
        self.watches = [Watch() for _ in range(pickers)]
        self._case = case
        self._profile = profile
        self._engines = [Engine(profile) for _ in range(case.servers)]
        self._is_stepping = [False] * case.servers
        self._addresses = [f"10.0.0.{number + 1}:8000" for number in range(case.servers)]
        self._rng = random.Random(seed)
        self._seed = seed
        self.pickers = [self._picker(random.Random(f"{seed}/{at}"), watch) for at, watch in enumerate(self.watches)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._pushed = 0
        self._measured_from = 0.0
        self._ends_at = 0.0

    def run(self, seconds: float) -> World:
        """Send what comes within so many seconds, after what comes before that slowly; wait for every answer."""
        self._measured_from = WARM * SLOWLY
        self._ends_at = self._measured_from + seconds
        for arrival in self._case.workload.arrivals(self._seed, WARM + seconds, self._case.rate):
            at = arrival.at * SLOWLY if arrival.at < WARM else arrival.at - WARM + self._measured_from
            self._at(at, partial(self._send, arrival))
        for picker in self.pickers:
            for server in range(len(self._engines)):
                self._scrape(picker, server, 0.0)
        self._at(self._measured_from, self._look)
        while self._events:
            now, _, happens = heapq.heappop(self._events)
            happens(now)
        return self

    def figures(self) -> Figures:
        """Of the requests that came when caches were warm."""
        seen = [request for request in self.requests.values() if request.came_at >= self._measured_from]
        ttfts = [request.ttft for request in seen]
        p50, p90 = percentile(ttfts, 0.5), percentile(ttfts, 0.9)
        assert p50 is not None
        assert p90 is not None
        cached = sum(request.cached_tokens for request in seen) / sum(request.prompt_tokens for request in seen)
        spread = fmean(self.spread)
        return Figures(self._case.name, len(self.pickers), self._seed, len(seen), p50, p90, cached, spread)

    # -- what happens ---------------------------------------------------------------------------------------------

    def _at(self, at: float, happens: Callable[[float], None]) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (at, self._pushed, happens))

    def _picker(self, rng: random.Random, watch: Watch) -> Picker:
        table = EndpointTable()
        for number, address in enumerate(self._addresses):
            table.put(Endpoint(f"default/server-{number}", address), LONG_AGO)
        scheduler = build(load(CONFIG), rng)
        return Picker(table, scheduler, Ejection(table, EjectionParams()), watch, lambda: 0.0, PickerOptions())

    def _scrape(self, picker: Picker, server: int, now: float) -> None:
        """One page, and the next after the interval."""
        table, stats = picker.table, self._engines[server].stats()
        slot = table.slot_at(self._addresses[server])
        assert slot is not None
        page = Page(
            waiting=stats.waiting,
            running=stats.running,
            kv_usage=stats.kv_usage,
            kv_blocks=self._profile.kv_blocks,
            block_size=self._profile.block_size,
            max_lora=self._profile.max_lora,
            running_adapters=stats.running_adapters,
            waiting_adapters=stats.waiting_adapters,
        )
        table.page_asked(slot)
        table.page_told(slot, table.generation(slot), page, now)
        if now < self._ends_at:
            self._at(now + INTERVAL * self._rng.uniform(0.9, 1.1), partial(self._scrape, picker, server))

    def _send(self, arrival: Arrival, now: float) -> None:
        number = len(self.requests)
        request = Request(number, now, number % len(self._engines), None, None)
        if self.pickers:
            picker = request.picker = self.pickers[number % len(self.pickers)]
            request.ticket, _ = picker.decide(dialects.read(HEADERS, _body(arrival)), None, now, now)
            request.server = self._addresses.index(request.ticket.endpoint.address)
        asked = self._engine_request(str(number), arrival)
        request.prompt_tokens = asked.prompt_tokens
        self.requests[asked.id] = request
        self._engines[request.server].submit(asked)
        if not self._is_stepping[request.server]:
            self._begin_step(request.server, now)

    def _engine_request(self, name: str, arrival: Arrival) -> EngineRequest:
        prompt = text.chat_prompt(arrival.messages)
        whole = text.with_answer(prompt, arrival.max_tokens - 1)
        adapter = "" if arrival.model == self._case.workload.model else arrival.model
        keys = text.block_keys(whole, self._profile.block_size, adapter)
        return EngineRequest(name, text.count_tokens(prompt), arrival.max_tokens, keys, adapter)

    def _begin_step(self, server: int, now: float) -> None:
        step = self._engines[server].step()
        self._is_stepping[server] = step is not None
        if step is not None:
            self._at(now + step.duration, partial(self._end_step, server, step))

    def _end_step(self, server: int, step: Step, now: float) -> None:
        for name, cached in step.admitted:
            self.requests[name].cached_tokens = cached
        for name in step.first:
            request = self.requests[name]
            request.ttft = now - request.came_at
            if request.picker is not None and request.ticket is not None:
                served = self._addresses[server]
                request.picker.response_started(request.ticket, ANSWERED, served, now, bodies_seen=False)
        for name in step.finished:
            request = self.requests[name]
            if request.picker is not None and request.ticket is not None:
                request.picker.finish(request.ticket, Outcome.COMPLETE, now)
                request.ticket = None
        self._begin_step(server, now)

    def _look(self, now: float) -> None:
        """How are the requests spread?"""
        counts = [len(engine) for engine in self._engines]
        if any(counts):
            self.spread.append(max(counts) / fmean(counts))
        if now < self._ends_at:
            self._at(now + SAMPLE, self._look)


def _body(arrival: Arrival) -> bytes:
    messages = [{"role": role, "content": content} for role, content in arrival.messages]
    return msgspec.json.encode({"model": arrival.model, "messages": messages, "max_tokens": arrival.max_tokens})


def row(runs: Sequence[Figures]) -> tuple[str, ...]:
    """Runs of one case and number of pickers, one a seed."""
    first = runs[0]
    who = f"{first.pickers} picker{'s' if first.pickers > 1 else ''}" if first.pickers else "round robin"
    p90s = [1000 * run.ttft_p90 for run in runs]
    return (
        first.case,
        who,
        f"{1000 * fmean(run.ttft_p50 for run in runs):.0f}",
        f"{fmean(p90s):.0f}",
        f"{min(p90s):.0f} to {max(p90s):.0f}",
        f"{fmean(run.cached_share for run in runs):.1%}",
        f"{fmean(run.imbalance for run in runs):.2f}",
    )


def main(
    *,
    cases: str = ",".join(CASES),
    pickers: str = "0,1,2,4",
    seeds: str = "1,2,3",
    seconds: float = 60.0,
    json: Path | None = None,
) -> None:
    """Measure what several active pickers cost.

    Parameters
    ----------
    cases
        Which workloads, separated by commas.
    pickers
        How many pickers, separated by commas; 0 is round robin.
    seeds
        Of arrivals and everything random, separated by commas: each is a run.
    seconds
        Virtual seconds of arrivals that are measured.
    json
        File for the raw figures.
    """
    columns = ("TTFT p50", "p90", "over the seeds", "cached", "fullest / mean")
    table = report.table("Several pickers, none of which knows of the others", "workload", "who", *columns, texts=2)
    figures: list[Figures] = []
    for case in (CASES[name] for name in cases.split(",")):
        for count in map(int, pickers.split(",")):
            runs = [World(case, count, int(seed)).run(seconds).figures() for seed in seeds.split(",")]
            table.add_row(*row(runs))
            figures += runs
    report.write(json, "replicas", figures)
    report.show(
        table,
        "TTFT: ms of virtual time, means of the seeds. cached: prompt tokens found in the server's cache.",
        "fullest / mean: requests on the fullest server by the mean of all, averaged over time.",
    )


if __name__ == "__main__":
    cyclopts.run(main)
