"""Virtual time: arrivals, engines and a routing policy on one heap.

In: a fleet of engines, who asks what and when, a policy. Out: one `Asked` a request, with all that became of it.
Rules here:
- Events are ordered by time, then by kind (steps end before pages are told, pages before requests come), then by the
  order in which they were put there. So a run is the same to the last digit for the same seed.
- A policy sees what its kind sees in production: pages that it asks for, and requests that it sends. Who looks at
  `engines` instead is a reference that nobody can build.
- Servers may fail, come back, start and stop (`fleet.py`). What runs on one that fails is lost, and what is sent there
  before discovery has noticed; nobody tries again elsewhere, as a gateway with a retry policy would.
- A stage sends at its own rate for so many seconds. Where stages wait, the next one begins when every answer has come.
- Times of the network, the proxy and the tokenizer are not modelled: see `figures.FLOOR`.
Rejected: SimPy (a generator a request and a step; 15,000 requests on 8 engines are 300,000 steps). Text instead of
keys for the engines' caches is what costs most, so prompts that come again are made once (`_prepared`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from random import Random
from statistics import fmean
from typing import Final, Protocol

import msgspec

from epp.errors import NoEndpoint, Refusal
from epp.sim import text
from epp.sim.fleet import STEADY, Changes, Fleet
from epp.sim.profile import EngineProfile
from epp.sim.vllm import Engine, EngineRequest, Step
from epp.sim.workload import Arrival

SAMPLE: Final = 0.1
"""Seconds between two looks at how the requests are spread."""
PREPARED: Final = 1_024
"""Prompts that are kept as bodies and keys, at most: all 750 of the published workloads'."""
TRANSFER: Final = 0.026
TRANSFER_TOKEN: Final = 4.25e-6
"""Seconds to send a prompt's keys and values from one server to another, and for each of its tokens: a line through
what was published of pulls peer to peer on H200 (llm-d, gpt-oss-120b: 35 ms for 2,048 tokens, 235 ms for 49,152)."""
PAUSE: Final = 1.0
"""Seconds between two stages that wait for each other, as in inference-perf."""
RESET: Final = "reset"
"""`Asked.refusal` of what a server had when it failed."""
CONNECT: Final = "connect"
"""`Asked.refusal` of what was sent to a server that had failed. Both are the load client's names."""


class Order(IntEnum):
    """What comes first at the same moment."""

    STEP = 0
    SERVER = 1
    PAGE = 2
    ARRIVAL = 3
    LOOK = 4


class Stage(msgspec.Struct, frozen=True):
    """So many requests a second for so many seconds."""

    rate: float
    seconds: float
    warm_up: bool = False
    """Fills caches; nothing of it is measured."""


class Source(Protocol):
    """Who asks: a `Workload` or a `Trace`."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str:
        """The base model; every other one that is asked for is an adapter."""

    @property
    def rate(self) -> float: ...

    def arrivals(self, seed: int, duration: float = ..., rate: float | None = None) -> Iterator[Arrival]: ...


class Prepared(msgspec.Struct, frozen=True):
    """What a request is to a gateway and to an engine."""

    body: bytes
    prompt_tokens: int
    keys: tuple[int, ...]


class Asked(msgspec.Struct):
    """One request, and what became of it. Times are seconds of the world, 0 until they are known."""

    number: int
    stage: int
    arrival: Arrival
    prepared: Prepared
    came_at: float
    server: int = -1
    """-1: it was sent to none."""
    prefill: int = -1
    """Server that computes its prompt and sends keys and values to `server`; -1: `server` does it itself."""
    place: int = -1
    """Server that it is on now; -1: on none, or on its way between two."""
    first_at: float = 0.0
    """When the first token came."""
    ended_at: float = 0.0
    cached_tokens: int = 0
    """Prompt tokens that were in the engine's cache."""
    refusal: str = ""
    """Why it was refused, by the policy or by the engine, or how its server was lost (`RESET`, `CONNECT`); empty: it
    was answered, or will be."""
    held: object = None
    """What the policy remembers of it; nobody else's."""

    @property
    def prompt_tokens(self) -> int:
        return self.prepared.prompt_tokens

    @property
    def output_tokens(self) -> int:
        return self.arrival.max_tokens

    @property
    def ttft(self) -> float:
        return self.first_at - self.came_at

    @property
    def itl(self) -> float:
        """Mean seconds between two tokens; 0: there is one."""
        return (self.ended_at - self.first_at) / max(1, self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.ended_at - self.came_at


class Policy(Protocol):
    """Who decides where a request runs."""

    def begin(self, world: World) -> None:
        """The world is about to start: look at it, and put events of one's own on its heap."""

    def choose(self, asked: Asked, now: float) -> int:
        """The server, one that is listed. Raises Refusal."""

    def answered(self, asked: Asked, now: float) -> None:
        """The first token has come."""

    def ended(self, asked: Asked, now: float) -> None:
        """The last token has come; or the engine refused it (`asked.refusal`) and `answered` was never called; or its
        server failed, before the first token or after it."""


Watcher = Callable[[int, bool, float], None]
"""Is told of a server that it is listed from now on, or is no longer."""


class Reference:
    """The beginning of a policy that sees no answers and asks for no pages."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def begin(self, world: World) -> None:
        self.world = world

    def answered(self, asked: Asked, now: float) -> None:
        """See `Policy`."""

    def ended(self, asked: Asked, now: float) -> None:
        """See `Policy`."""

    def choose(self, asked: Asked, now: float) -> int:
        """See `Policy`."""
        raise NotImplementedError

    def listed(self) -> tuple[int, ...]:
        """Servers to choose from. Raises NoEndpoint."""
        if not self.world.fleet.listed:
            raise NoEndpoint("no server is listed")
        return self.world.fleet.listed


class World:
    """One run of one policy."""

    def __init__(
        self,
        profiles: Sequence[EngineProfile],
        policy: Policy,
        source: Source,
        seed: int,
        changes: Changes = STEADY,
    ) -> None:
        """
        Args:
            profiles: one a server that is there at the beginning; servers that are added take them in turn.
        """
        self.now = 0.0
        self.profiles = list(profiles)
        self.engines = [Engine(profile) for profile in profiles]
        self.prefill = changes.prefill
        """Servers 0 to here, this one not among them, compute prompts for the others."""
        self.worked = [0.0] * len(self.engines)
        """Seconds that each server computed."""
        self.fleet = Fleet(self, len(self.engines), changes)
        self.watchers: list[Watcher] = []
        self.asked: list[Asked] = []
        """In the order in which they came."""
        self.spread: list[tuple[int, float]] = []
        """Stage, and requests on the fullest server by the mean of all: each time that somebody looked."""
        self.spans: list[tuple[float, float]] = []
        """Begin of each stage, and when its last answer came."""
        self.over = False
        """Every request has its answer, and none will come: events that come again and again may end."""
        self.model = source.model
        self.stages: tuple[Stage, ...] = ()
        self._policy = policy
        self._source = source
        self._running: dict[str, Asked] = {}
        self._stepping = [False] * len(self.engines)
        self._kinds = len(self.engines)
        self._events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self._pushed = 0
        self._arrivals = source.arrivals(seed, rate=source.rate)
        self._next = next(self._arrivals, None)
        self._waits = True
        self._closed = False
        """Nothing more comes in this stage."""
        self._unit = 0.0
        """Where in the source's time this stage began."""
        self._cache: dict[tuple[str, tuple[tuple[str, str], ...], int], Prepared] = {}

    def __repr__(self) -> str:
        return f"<World [Now: {self.now:.3f} s | Asked: {len(self.asked)} | Running: {len(self._running)}]>"

    def run(self, stages: Sequence[Stage], *, waits: bool = True) -> World:
        """Send all stages and wait for every answer.

        Args:
            waits: a stage begins when the one before it has all its answers; else when its time is over.
        """
        self.stages, self._waits = tuple(stages), waits
        self._policy.begin(self)
        self.fleet.begin()
        self._begin_stage(0.0)
        self.at(0.0, self._look, Order.LOOK)
        events = self._events
        while events:
            self.now, _, _, happens = heapq.heappop(events)
            happens(self.now)
        assert not self._running, "a request has no answer, and nothing will happen any more"
        return self

    def at(self, at: float, happens: Callable[[float], None], order: Order) -> None:
        """Let something happen then; it is told the time."""
        self._pushed += 1
        heapq.heappush(self._events, (at, order, self._pushed, happens))

    @property
    def in_flight(self) -> int:
        """Requests that have no answer yet."""
        return len(self._running)

    def engine_request(self, asked: Asked) -> EngineRequest:
        """What an engine is told of a request."""
        model, prepared = asked.arrival.model, asked.prepared
        adapter = "" if model == self.model else model
        tokens = 1 if asked.place == asked.prefill else asked.output_tokens
        sent = asked.prefill >= 0 and asked.place == asked.server
        return EngineRequest(f"{asked.number}", prepared.prompt_tokens, tokens, prepared.keys, adapter, sent)

    # -- stages -----------------------------------------------------------------------------------------------------

    def _begin_stage(self, now: float) -> None:
        self.spans.append((now, now))
        self._closed = False
        self._schedule()

    def _schedule(self) -> None:
        """Put the next arrival of this stage on the heap, or the end of the stage. The source's time runs at its own
        rate: a stage is so long a piece of it, made faster or slower."""
        stage, began = self.stages[len(self.spans) - 1], self.spans[-1][0]
        faster = stage.rate / self._source.rate
        coming = self._next
        if coming is not None and coming.at - self._unit < stage.seconds * faster:
            self.at(began + (coming.at - self._unit) / faster, self._send, Order.ARRIVAL)
        else:
            self._unit += stage.seconds * faster
            self.at(began + stage.seconds, self._close, Order.ARRIVAL)

    def _close(self, now: float) -> None:
        self._closed = True
        if not self._waits or not self._running:
            self._go_on(now)

    def _go_on(self, now: float) -> None:
        """This stage is done with."""
        if len(self.spans) == len(self.stages) or self._next is None:
            self.over = not self._running
        elif self._waits:
            self._closed = False
            self.at(now + PAUSE, self._begin_stage, Order.ARRIVAL)
        else:
            self._begin_stage(now)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _send(self, now: float) -> None:
        arrival, self._next = self._next, next(self._arrivals, None)
        assert arrival is not None
        asked = Asked(len(self.asked), len(self.spans) - 1, arrival, self._prepared(arrival), now)
        self.asked.append(asked)
        self._schedule()
        try:
            asked.server = self._policy.choose(asked, now)
        except Refusal as refusal:
            self._refused(asked, refusal, now)
            return
        assert asked.server in self.fleet.listed, f"server {asked.server} is not listed"
        if self._submit(asked, asked.server if asked.prefill < 0 else asked.prefill, now):
            self._running[f"{asked.number}"] = asked
        else:
            self._policy.ended(asked, now)

    def _submit(self, asked: Asked, server: int, now: float) -> bool:
        """Put a request on a server. False: it is refused, and says why."""
        if server in self.fleet.dead:
            asked.refusal, asked.ended_at = CONNECT, now
            return False
        asked.place = server
        try:
            self.engines[server].submit(self.engine_request(asked))
        except Refusal as refusal:
            self._refused(asked, refusal, now)
            return False
        if not self._stepping[server]:
            self._begin_step(server, now)
        return True

    def _hand_on(self, asked: Asked, now: float) -> None:
        """Its prompt is computed; keys and values go to the server that answers."""
        asked.place = -1
        takes = TRANSFER + TRANSFER_TOKEN * asked.prompt_tokens
        self.at(now + takes, partial(self._arrive, asked), Order.ARRIVAL)

    def _arrive(self, asked: Asked, now: float) -> None:
        if not self._submit(asked, asked.server, now):
            self._end(self._running.pop(f"{asked.number}"), now)

    def _refused(self, asked: Asked, refusal: Refusal, now: float) -> None:
        asked.refusal, asked.ended_at = refusal.code, now

    def _prepared(self, arrival: Arrival) -> Prepared:
        key = arrival.model, arrival.messages, arrival.max_tokens
        got = self._cache.get(key)
        if got is None:
            if len(self._cache) == PREPARED:
                self._cache.clear()
            got = self._cache[key] = prepare(arrival, self.model, self.profiles[0].block_size)
        return got

    def _begin_step(self, server: int, now: float) -> None:
        engine = self.engines[server]
        step = engine.step()
        self._stepping[server] = step is not None
        if step is not None:
            self.worked[server] += step.duration
            self.at(now + step.duration, partial(self._end_step, server, engine, step), Order.STEP)

    def _end_step(self, server: int, engine: Engine, step: Step, now: float) -> None:
        if engine is not self.engines[server]:
            return  # the server failed in the middle of it
        running = self._running
        for name, cached in step.admitted:
            if running[name].prefill in (-1, server):
                running[name].cached_tokens = cached
        for name in step.first:
            asked = running[name]
            if asked.prefill != server:
                asked.first_at = now
                self._policy.answered(asked, now)
        for name in step.finished:
            if running[name].prefill == server:
                self._hand_on(running[name], now)
            else:
                self._end(running.pop(name), now)
        self._begin_step(server, now)

    def _end(self, asked: Asked, now: float) -> None:
        asked.ended_at = now
        self.spans[asked.stage] = self.spans[asked.stage][0], now
        self._policy.ended(asked, now)
        # 12,031 prompts of a trace kept to the end were 1.9 GB
        asked.arrival = msgspec.structs.replace(asked.arrival, messages=())
        asked.prepared = Prepared(b"", asked.prepared.prompt_tokens, ())
        if self._closed and not self._running:
            self._go_on(now)

    # -- servers, for the fleet -------------------------------------------------------------------------------------

    def later(self, at: float, happens: Callable[[float], None]) -> None:
        """See `fleet.Site`, as the next three."""
        self.at(at, happens, Order.SERVER)

    def add(self) -> None:
        profile = self.profiles[len(self.engines) % self._kinds]
        self.profiles.append(profile)
        self.engines.append(Engine(profile))
        self.worked.append(0.0)
        self._stepping.append(False)

    def kill(self, server: int, now: float) -> None:
        self.engines[server] = Engine(self.profiles[server])
        self._stepping[server] = False
        lost = [name for name, asked in self._running.items() if asked.place == server]
        for asked in [self._running.pop(name) for name in lost]:
            asked.refusal = RESET
            self._end(asked, now)

    def tell(self, server: int, listed: bool, now: float) -> None:
        for watcher in self.watchers:
            watcher(server, listed, now)

    # -- looking on -------------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """How are the requests spread? Asked while some come: the last answers of a stage are on few servers, whoever
        decides."""
        counts = [len(self.engines[server]) for server in self.fleet.listed]
        if any(counts) and not self._closed:
            self.spread.append((len(self.spans) - 1, max(counts) / fmean(counts)))
        if not self.over:
            self.at(now + SAMPLE, self._look, Order.LOOK)


def prepare(arrival: Arrival, base: str, block_size: int) -> Prepared:
    """Make a request of an arrival.

    Args:
        base: the model that is no adapter.
    """
    prompt = text.chat_prompt(arrival.messages)
    whole = text.with_answer(prompt, arrival.max_tokens - 1)
    keys = text.block_keys(whole, block_size, "" if arrival.model == base else arrival.model)
    messages = [{"role": role, "content": content} for role, content in arrival.messages]
    body = msgspec.json.encode({"model": arrival.model, "messages": messages, "max_tokens": arrival.max_tokens})
    return Prepared(body, text.count_tokens(prompt), keys)
