"""Who decides in a world: the picker with a configuration, and references that need none.

In: requests of a world. Out: the server of each.
Rules here:
- The picker is built from a configuration as `server.py` builds it, reads the bytes of each request, and knows of an
  engine what its last page said. It sees responses as with SEND/NONE/SEND: that they begin, and that they end.
- References draw from a generator of their own.
- Whatever breaks in the picker ends the run: a simulation must not hide it.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Final

import msgspec

from epp import dialects
from epp.config.running import Running
from epp.config.schema import Config
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.errors import Refusal
from epp.headers import FAIRNESS_ID
from epp.picker import Picker, PickerOptions
from epp.scheduling.labels import ROLE
from epp.sim.oracle import Oracle
from epp.sim.profile import EngineProfile
from epp.sim.vllm import Stats
from epp.sim.world import CONNECT, RESET, Asked, Order, Policy, Reference, World
from epp.ticket import Observer, Outcome, Ticket

FRESHNESS: Final = 2.0
"""Seconds that a page may be old, `--metrics-staleness-threshold`."""
INTERVAL: Final = 0.05
"""Seconds between two pages of one server, `--refresh-metrics-interval`."""
LAG: Final = 0.005
"""Seconds from asking a server for its page to having read it."""
LONG_AGO: Final = -1000.0
"""When the servers joined: nobody starts slowly."""
HEADERS: Final = ((":method", b"POST"), (":path", b"/v1/chat/completions"), ("content-type", b"application/json"))


class Quiet:
    """An observer that remembers nothing, and lets no mistake of our own pass."""

    def decided(self, ticket: Ticket) -> None: ...

    def refused(self, request: Request | None, refusal: Refusal, duration: float) -> None: ...

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None: ...

    def stream_ended(self, duration: float) -> None: ...

    def broke(self, what: str, error: Exception) -> None:
        raise error

    def never_answered(self, peer: str) -> None: ...


class Routed:
    """The picker with a configuration."""

    def __init__(
        self, config: Config, rng: Random, pages: Random, *, lag: float = LAG, observer: Observer | None = None
    ) -> None:
        """
        Args:
            rng: what the picker spreads equals by.
            pages: what the scraper spreads its pages over an interval by.
            lag: seconds that a page is older than the moment it is read.
            observer: who watches; None: nobody, but what breaks ends the run.

        Raises:
            ConfigErrors: the configuration cannot be used.
        """
        self.running = Running(config, rng)
        attributes = dict.fromkeys(config.pages.attributes, FRESHNESS)
        self.table = EndpointTable(
            freshness=FRESHNESS, attributes=attributes, on_forget=lambda slot: self.picker.forget(slot)
        )
        self.picker = Picker(
            self.table,
            self.running.scheduler,
            Ejection(self.table, EjectionParams()),
            Quiet() if observer is None else observer,
            lambda: 0.0,
            PickerOptions(detector=self.running.detector),
        )
        self._pages = pages
        self._lag = lag

    def begin(self, world: World) -> None:
        self._world = world
        self._servers: dict[str, int] = {}
        self._seats: dict[int, Seat] = {}
        for server in world.fleet.listed:
            self._seat(server, LONG_AGO)
        for server, seat in self._seats.items():
            self._ask(server, seat, 0.0)
        world.watchers.append(self._listing)

    def choose(self, asked: Asked, now: float) -> int:
        tenant = asked.arrival.tenant.encode()
        request = dialects.read((*HEADERS, (FAIRNESS_ID[0], tenant)), asked.prepared.body)
        ticket, _ = self.picker.decide(request, None, now, now)
        asked.held = ticket
        if (prefill := ticket.decision.prefill) is not None:
            asked.prefill = self._servers[prefill.endpoints[0]]
        return self._servers[ticket.endpoint.address]

    def answered(self, asked: Asked, now: float) -> None:
        self._answered(asked, b"200", now)

    def ended(self, asked: Asked, now: float) -> None:
        if asked.refusal and not asked.first_at:
            lost = asked.refusal in (CONNECT, RESET)
            self._answered(asked, b"503" if lost else b"400", now)  # 503: the proxy's own, in the server's name
        assert isinstance(asked.held, Ticket)
        self.picker.finish(asked.held, Outcome.COMPLETE, now)
        asked.held = None

    def _answered(self, asked: Asked, status: bytes, now: float) -> None:
        assert isinstance(asked.held, Ticket)
        served = address_of(asked.server)
        self.picker.response_started(asked.held, ((":status", status),), served, now, bodies_seen=False)

    def _listing(self, server: int, listed: bool, now: float) -> None:
        """Discovery: a server came or left."""
        if listed:
            self._ask(server, self._seat(server, now), now)
        else:
            self.table.drop(name_of(server))
            del self._seats[server]

    def _seat(self, server: int, now: float) -> Seat:
        address = address_of(server)
        self._servers[address] = server
        prefill = self._world.prefill
        labels = {ROLE: "prefill" if server < prefill else "decode"} if prefill else {}
        slot = self.table.put(Endpoint(name_of(server), address, labels), now)
        seat = self._seats[server] = Seat(slot, self.table.generation(slot))
        return seat

    def _ask(self, server: int, seat: Seat, now: float) -> None:
        """Ask a server for its page, and again after the interval, as long as it is listed."""
        world = self._world
        if self._seats.get(server) is not seat:
            return
        if server not in world.fleet.dead:
            self.table.page_asked(seat.slot)
            page = page_of(world.engines[server].stats(), world.profiles[server])
            if self._lag:
                world.at(now + self._lag, partial(self._told, seat, page, now), Order.PAGE)
            else:
                self._told(seat, page, now, now)
        if not world.over:
            world.at(now + INTERVAL * self._pages.uniform(0.9, 1.1), partial(self._ask, server, seat), Order.PAGE)

    def _told(self, seat: Seat, page: Page, asked_at: float, now: float) -> None:
        self.table.page_told(seat.slot, seat.generation, page, asked_at)


class Seat(msgspec.Struct, frozen=True):
    """Where a server stands in the picker's table, from when it was listed until it left."""

    slot: int
    generation: int


def name_of(server: int) -> str:
    """What discovery calls it."""
    return f"default/server-{server}"


def address_of(server: int) -> str:
    """Where the proxy finds it."""
    return f"10.{server >> 16}.{server >> 8 & 255}.{server & 255}:8000"


def page_of(stats: Stats, profile: EngineProfile) -> Page:
    """What is read of an engine's page."""
    return Page(
        waiting=stats.waiting,
        running=stats.running,
        kv_usage=stats.kv_usage,
        kv_blocks=profile.kv_blocks,
        block_size=profile.block_size,
        max_lora=profile.max_lora,
        running_adapters=stats.running_adapters,
        waiting_adapters=stats.waiting_adapters,
        prompt_tokens=stats.prompt_tokens,
        prompts=stats.prompts,
        first_tokens=stats.first_tokens,
        steps=stats.steps,
        processed=stats.processed,
        generated=stats.generated,
    )


class RoundRobin(Reference):
    """One server after the other: a Kubernetes Service, more or less."""

    def choose(self, asked: Asked, now: float) -> int:
        listed = self.listed()
        return listed[asked.number % len(listed)]


class AtRandom(Reference):
    """Any server."""

    def choose(self, asked: Asked, now: float) -> int:
        listed = self.listed()
        return listed[self.rng.randrange(len(listed))]


class LeastRequest(Reference):
    """Who has the fewest requests, of all servers and at this moment; equals are drawn."""

    def choose(self, asked: Asked, now: float) -> int:
        counts = {server: len(self.world.engines[server]) for server in self.listed()}
        least = min(counts.values())
        return self.rng.choice([server for server, count in counts.items() if count == least])


REFERENCES: Final[dict[str, type[Reference]]] = {
    "round-robin": RoundRobin,
    "random": AtRandom,
    "least-request": LeastRequest,
    "oracle": Oracle,
}
"""By the name that stands in the place of a configuration's file."""


def reference(name: str, seed: int) -> Policy:
    """A reference by its name. Raises KeyError."""
    policy: Policy = REFERENCES[name](Random(f"{seed}/{name}"))
    return policy


def routed(config: Config, seed: int) -> Routed:
    """The picker. Raises ConfigErrors."""
    return Routed(config, Random(seed), Random(f"{seed}/pages"))
