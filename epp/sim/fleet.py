"""Which servers there are when: some fail and come back, an autoscaler starts some and stops others.

In: the changes that are planned, and at the autoscaler's moments how many requests are in flight. Out: which servers
are listed, which are dead, and how long each was paid for; the world is told to make, to kill and to list them.
Rules here:
- A server is a number, and a number never means another server: one that the autoscaler starts has the next number.
- A server that fails is listed until discovery has noticed; what is sent there before is lost. It comes back in its
  place, with an empty cache, when its time is over.
- A server that starts is listed when its cold start is over, and paid for from the beginning of that.
- A server that is stopped is off the list at once and ends what it has; a termination grace period that is shorter
  than the longest answer would cut some off, which is not modelled.
- At least one server is kept: the picker has no queue in which requests could wait for the first one.
Rejected: queue length or KV-cache use as the autoscaler's measure. A queue begins when it is too late for a cold start
of minutes, and the cache of a server that remembers is always full.
Source: the rule is the HorizontalPodAutoscaler's for a metric with a target average (desired = ceil(sum / target), not
within 10 % of it; every 15 s; down to the highest recommendation of 5 minutes; up by 4 servers or to twice as many at
a time), on requests in flight at the picker, which is what llm-d's KEDA guide scales on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from itertools import pairwise
from typing import Annotated, Final, Protocol

import msgspec
from msgspec import Meta

from epp.errors import ConfigError

COLD_START: Final = 180.0
"""Seconds from wanting a server to its first request. An assumption: the image is on the node, weights are read,
graphs are compiled and captured. NVIDIA's simulation of Dynamo has a cliff of about 200 s."""
DETECTION: Final = 1.0
"""Seconds until discovery knows that a server has failed. A readiness probe of ten seconds takes longer."""

Seconds = Annotated[float, Meta(ge=0)]


class Failure(msgspec.Struct, frozen=True):
    """A server that fails."""

    server: Annotated[int, Meta(ge=0)]
    at: Seconds
    """Of the world: warm-up counts."""
    down: Seconds = COLD_START
    """Until it is back, its cold start included."""


class Autoscale(msgspec.Struct, frozen=True):
    """When servers are started and stopped."""

    target: float
    """Requests in flight a server, over 0."""
    least: int = 1
    most: int = 8
    cold_start: float = COLD_START
    period: float = 15.0
    """Seconds between two looks."""
    tolerance: float = 0.1
    """Of the target; within it nothing changes."""
    calm: float = 300.0
    """Seconds for which fewer servers must have been enough before any is stopped."""

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise ValueError("an autoscaler's target must be over 0 requests a server")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"an autoscaler needs 1 server or more, and no less at most: {self.least} to {self.most}")


class Changes(msgspec.Struct, frozen=True):
    """All that happens to a fleet."""

    failures: tuple[Failure, ...] = ()
    autoscale: Autoscale | None = None
    detection: Seconds = DETECTION
    prefill: int = 0
    """The first so many servers compute prompts for the others, and make no answers."""


STEADY: Final = Changes()
"""Nothing does."""


class Autoscaler:
    """How many servers there should be."""

    def __init__(self, rule: Autoscale) -> None:
        self.rule = rule
        self._recommended: deque[tuple[float, int]] = deque()
        """When, how many: within the last `calm` seconds."""

    def wanted(self, current: int, in_flight: int, now: float) -> int:
        """Servers that there should be from now on.

        Args:
            current: servers that there are, those that start or have failed included.
        """
        rule, recommended = self.rule, self._recommended
        if not recommended:
            recommended.append((now, current))
        count = current
        if abs(in_flight / (rule.target * current) - 1.0) > rule.tolerance:
            count = math.ceil(in_flight / rule.target)
        while recommended and recommended[0][0] < now - rule.calm:
            recommended.popleft()
        recommended.append((now, count))
        calm = max(many for _, many in recommended)
        count = count if count >= current else min(current, calm)
        return min(max(rule.least, min(count, max(current + 4, 2 * current))), rule.most)


class State(Enum):
    """What a server does."""

    STARTING = "starting"
    UP = "up"
    DEAD = "dead"
    """It failed, and is listed."""
    AWAY = "away"
    """It failed, and everybody knows."""
    STOPPED = "stopped"
    """It gets nothing more, and ends what it has."""


class Life(msgspec.Struct):
    """How long a server was wanted."""

    since: float
    until: float = math.inf
    """It ran on until its last answer after that."""


class Site(Protocol):
    """Where the servers stand."""

    @property
    def in_flight(self) -> int:
        """Requests that have no answer yet."""

    @property
    def over(self) -> bool:
        """Nothing will be asked any more."""

    def later(self, at: float, happens: Callable[[float], None]) -> None:
        """Let something happen to a server then."""

    def add(self) -> None:
        """Make a server, with the next number."""

    def kill(self, server: int, now: float) -> None:
        """Fail all that a server has, and empty its cache."""

    def tell(self, server: int, listed: bool, now: float) -> None:
        """A server came onto the list, or left it."""


class Fleet:
    """The servers of one run."""

    def __init__(self, site: Site, servers: int, changes: Changes) -> None:
        self.states = [State.UP] * servers
        self.lives = [Life(0.0) for _ in range(servers)]
        self.listed = tuple(range(servers))
        """Servers that discovery names, in order; another tuple whenever one came or went."""
        self.dead: set[int] = set()
        """Those that answer nothing, listed or not."""
        self._site = site
        self._changes = changes
        self._times_failed = [0] * servers
        self._autoscaler = Autoscaler(changes.autoscale) if changes.autoscale else None

    def __repr__(self) -> str:
        return f"<Fleet [Servers: {len(self._existing())} | Listed: {len(self.listed)} | Dead: {len(self.dead)}]>"

    def begin(self) -> None:
        """Plan what is known in advance."""
        for failure in self._changes.failures:
            self._site.later(failure.at, partial(self._fail, failure))
        if self._autoscaler is not None:
            self._site.later(self._autoscaler.rule.period, self._look)

    # -- failures -------------------------------------------------------------------------------------------------

    def _fail(self, failure: Failure, now: float) -> None:
        server = failure.server
        if server >= len(self.states) or self.states[server] is not State.UP or self._site.over:
            return
        self.states[server] = State.DEAD
        self.dead.add(server)
        self._times_failed[server] += 1
        time = self._times_failed[server]
        self._site.later(now + self._changes.detection, partial(self._notice, server, time))
        self._site.later(now + failure.down, partial(self._come_back, server, time))
        self._site.kill(server, now)

    def _notice(self, server: int, time: int, now: float) -> None:
        if self.states[server] is State.DEAD and self._times_failed[server] == time:
            self.states[server] = State.AWAY
            self._list(server, False, now)

    def _come_back(self, server: int, time: int, now: float) -> None:
        state = self.states[server]
        if state not in (State.DEAD, State.AWAY) or self._times_failed[server] != time:
            return
        self.states[server] = State.UP
        self.dead.discard(server)
        if state is State.AWAY:
            self._list(server, True, now)

    # -- the autoscaler -------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Every period: start servers, or stop some."""
        assert self._autoscaler is not None
        if self._site.over:
            return
        self._site.later(now + self._autoscaler.rule.period, self._look)
        existing = self._existing()
        more = self._autoscaler.wanted(len(existing), self._site.in_flight, now) - len(existing)
        for _ in range(more):
            self._start(self._autoscaler.rule.cold_start, now)
        for server in self._expendable(existing)[: max(0, -more)]:
            self._stop(server, now)

    def _existing(self) -> list[int]:
        return [server for server, state in enumerate(self.states) if state is not State.STOPPED]

    def _expendable(self, existing: Sequence[int]) -> list[int]:
        """Who is stopped first: what does not serve, then what came last; as a ReplicaSet does."""
        return sorted(existing, key=lambda server: (self.states[server] is State.UP, -server))

    def _start(self, cold_start: float, now: float) -> None:
        server = len(self.states)
        self.states.append(State.STARTING)
        self.lives.append(Life(now))
        self._times_failed.append(0)
        self._site.add()
        self._site.later(now + cold_start, partial(self._ready, server))

    def _ready(self, server: int, now: float) -> None:
        if self.states[server] is State.STARTING:
            self.states[server] = State.UP
            self._list(server, True, now)

    def _stop(self, server: int, now: float) -> None:
        self.states[server] = State.STOPPED
        self.lives[server].until = now
        if server in self.listed:
            self._list(server, False, now)

    def _list(self, server: int, listed: bool, now: float) -> None:
        others = (each for each in self.listed if each != server)
        self.listed = tuple(sorted((*others, server))) if listed else tuple(others)
        self._site.tell(server, listed, now)


def parse_failures(texts: Sequence[str], servers: int) -> tuple[Failure, ...]:
    """Read "2@60" or "2@60:120": server 2 of 0, 1, … fails at second 60 and is back 120 s later.

    Raises:
        ConfigError: it is none, or there is no such server, or a server fails that has not come back.
    """
    failures = tuple(_failure(text, servers) for each in texts for text in each.split(","))
    in_order = sorted(failures, key=lambda failure: (failure.server, failure.at))
    for first, then in pairwise(in_order):
        back = first.at + first.down
        if first.server == then.server and then.at <= back:
            raise ConfigError(
                f"--fail {then.server}@{then.at:g}: server {then.server} fails at {first.at:g} s and is back at "
                f"{back:g} s: say it once, as long as it is down, or let it fail later"
            )
    return failures


def _failure(text: str, servers: int) -> Failure:
    server, _, when = text.partition("@")
    at, _, down = when.partition(":")
    given = {"server": server, "at": at, **({"down": down} if down else {})}
    try:
        failure = msgspec.convert(given, Failure, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--fail {text}: expected SERVER@SECOND or SERVER@SECOND:SECONDS, as in 2@60:120 for server 2, which fails "
            "60 s from the beginning and is back 120 s later"
        ) from error
    if failure.server >= servers:
        raise ConfigError(f"--fail {text}: there are servers 0 to {servers - 1}")
    return failure
