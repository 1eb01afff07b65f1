"""The scraper: asks every listed endpoint for its pages, all the time, and tells the table what they say.

In: the endpoints that the table lists, and the pages that each has. Out: pages told to the table; counts and log lines
of what went wrong.
Rules here:
- One connection a page, kept alive, one request at a time on it; a server that never answers costs nothing else.
- A page is asked for `page_asked` first and told with the time at which it was asked for, so neither its age nor the
  requests that it cannot know are understated.
- Intervals are jittered, so that 100 servers do not answer at once; a page that takes long is asked for less often: a
  server is busy with our pages half of the time at most. After failures pauses grow to `LONGEST_PAUSE`.
- A failure makes this page's values stale and nothing else. One log line when its trouble begins and one when it
  ends, at most once in `QUIET` seconds.
- One timer for all endpoints, not a task each.
Rejected: aiohttp's client. Measured beside it (bench/scrape.py: 100 vLLM pages of 58 KB every 50 ms, two shared cores,
uvloop, reading the page included) it takes 190 us of CPU a page, this 83 us: 0.38 cores against 0.16, of the 0.4 that
scraping may cost at all. Over TLS ours took 169 us a page beside 99 in plaintext, and aiohttp 199 in plaintext. On
asyncio's own loop, reading left out, 240 us against 50 us: there receiving into a buffer of our own instead of new
bytes takes 95 us to 54, and one timer instead of two an endpoint takes off 5 more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

from epp.endpoints.table import Endpoint, EndpointTable, Slots
from epp.signals.response import Failure, Problem, ResponseReader
from epp.signals.sources import GpuPages, MetricsPages, Source

TICK: Final = 0.005
"""Seconds between two looks at who is due. Requests of one tick share a turn of the event loop."""
LONGEST_PAUSE: Final = 2.0
"""Seconds between two attempts after many failures."""
QUIET: Final = 60.0
"""Seconds in which an endpoint's trouble is told at most once."""

log = logging.getLogger(__name__)


class ScrapeCounts:
    """What happened since the start; only ever grows."""

    def __init__(self) -> None:
        self.pages = 0
        self.failures = dict.fromkeys(Problem, 0)

    @property
    def errors(self) -> tuple[int, int]:
        """Pages that did not come, and those that came and said nothing (`datalayer_{poll,extract}_errors_total`)."""
        garbage = self.failures[Problem.GARBAGE]
        return sum(self.failures.values()) - garbage, garbage


class Scraper:
    """Keeps the pages of all listed endpoints fresh."""

    def __init__(
        self,
        table: EndpointTable,
        rng: random.Random,
        sources: Sequence[Source] = (MetricsPages(),),
        *,
        deadline: float = 1.0,
        limit: int = 4 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            rng: spreads the requests of many endpoints and of many pickers.
            sources: the pages that every endpoint has.
            deadline: seconds for connecting and for each page.
            limit: bytes of the largest page that is read.
            clock: the table's clock.
        """
        self.table = table
        self.rng = rng
        self.deadline = deadline
        self.limit = limit
        self.clock = clock
        self._sources = tuple(sources)
        self._counts = {what: ScrapeCounts() for what in (MetricsPages.what, GpuPages.what)}
        self.counts = self._counts[MetricsPages.what]
        """Of metrics pages."""
        self._targets: dict[Key, Target] = {}
        self._followed: Slots | None = None

    def counts_of(self, what: str) -> ScrapeCounts:
        """Of the pages of a kind, as `Source.what` names it."""
        return self._counts[what]

    async def run(self) -> None:
        """Scrape until cancelled; leaves no connection open."""
        awake = self.clock()
        try:
            while True:
                now = self.clock()
                if self.table.listed is not self._followed:
                    self._follow(now)
                late = now - awake
                for target in self._targets.values():
                    if late > 10 * TICK:
                        target.excuse(late)
                    if target.due <= now + TICK / 2:
                        target.step(now)
                awake = now + TICK
                await asyncio.sleep(TICK)
        finally:
            for target in self._targets.values():
                target.close()

    def _follow(self, now: float) -> None:
        """Scrape exactly what is listed now. An endpoint whose labels or metrics address changed starts anew."""
        table = self.table
        self._followed = table.listed
        before, self._targets = self._targets, {}
        for source in self._sources:
            for slot in table.listed.tolist():
                endpoint = table.endpoint(slot)
                key = (source, slot, table.generation(slot), source.address(endpoint), source.identity(endpoint))
                due = now + self.rng.uniform(0, source.way.interval)
                self._targets[key] = before.pop(key) if key in before else Target(self, source, slot, endpoint, due=due)
        for target in before.values():
            target.close()


Key = tuple[Source, int, int, str, object]
"""Source, slot, generation, address and what the source says of the endpoint: while they stay, the target stays."""


class Target:
    """One page of one endpoint: when it is due, what became of it, and what is told about that."""

    def __init__(self, scraper: Scraper, source: Source, slot: int, endpoint: Endpoint, *, due: float) -> None:
        self.scraper = scraper
        self.source = source
        self.slot = slot
        self.generation = scraper.table.generation(slot)
        self.address = source.address(endpoint)
        self.due = due
        """When something must be done: ask again, or give up what is under way."""
        self.response = ResponseReader(scraper.limit)
        self._reader = source.reader(scraper.table, slot, endpoint)
        self._counts = scraper.counts_of(source.what)
        self._request = (
            f"GET {source.way.path} HTTP/1.1\r\nhost: {self.address}\r\nuser-agent: epp\r\naccept: text/plain\r\n"
            "accept-encoding: identity\r\n\r\n"
        ).encode()
        self._link: Link | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_busy = False
        self._asked_at = 0.0
        self._failures = 0
        self._failing_since = 0.0
        self._is_told = False
        self._quiet_until = -math.inf

    def step(self, now: float) -> None:
        """`due` has come."""
        if self._is_busy:
            self.fail(Failure(Problem.TIMEOUT, f"no page within {self.scraper.deadline:g} s"), now)
        elif self._link is None:
            self._connect(now)
        else:
            self._ask(self._link, now)

    def excuse(self, late: float) -> None:
        """The event loop stood still: answers may have come that nobody read yet."""
        if self._is_busy:
            self.due += late

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None and link.transport is not None:
            link.transport.abort()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None

    # -- the connection ------------------------------------------------------------------------------------------

    def _connect(self, now: float) -> None:
        self._is_busy, self.due = True, now + self.scraper.deadline
        self._link = Link(self)
        self._connecting = asyncio.get_running_loop().create_task(self._open(self._link))

    async def _open(self, link: Link) -> None:
        host, _, port = self.address.rpartition(":")
        loop, tls = asyncio.get_running_loop(), self.source.way.tls
        context = None if tls is None else tls.context()
        try:
            await loop.create_connection(lambda: link, host.strip("[]"), int(port), ssl=context)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
            if link is self._link:
                self.fail(Failure(Problem.CONNECT, str(error)), self.scraper.clock())

    def opened(self, link: Link, transport: asyncio.Transport) -> None:
        if link is self._link:
            self._ask(link, self.scraper.clock())
        else:
            transport.abort()

    def _ask(self, link: Link, now: float) -> None:
        table = self.scraper.table
        if link.transport is None or table.generation(self.slot) != self.generation:
            self.due = math.inf  # it has just left the list, and is about to be closed
            return
        self._is_busy, self._asked_at, self.due = True, now, now + self.scraper.deadline
        self.response.begin()
        self._reader.asked()
        link.transport.write(self._request)

    def received(self, link: Link, count: int) -> None:
        if link is not self._link:
            return
        got = self.response.received(count) if self._is_busy else Failure(Problem.PROTOCOL, "an answer to no question")
        if got is not None:
            link.has_served = True
            self._finish(got)

    def lost(self, link: Link, why: Exception | None) -> None:
        """The connection ended. A server may close one that idles, even while we write to it: that is no failure."""
        if link is not self._link:
            return
        self._link = None
        if not self._is_busy:
            return
        if link.has_served and not self.response.has_begun:
            self._connect(self.scraper.clock())
        else:
            got = self.response.closed()
            if why is not None and isinstance(got, Failure):  # such as an alert: our certificate was not taken
                got = Failure(got.problem, f"{got.detail}: {why}")
            self._finish(got)

    # -- what became of it ---------------------------------------------------------------------------------------

    def _finish(self, got: bytes | Failure) -> None:
        now = self.scraper.clock()
        if isinstance(got, Failure):
            self.fail(got, now)
            return
        if not self._reader.take(got, self._asked_at):
            self.fail(Failure(Problem.GARBAGE, f"the page has none of the {self.source.what} that are known"), now)
            return
        self._counts.pages += 1
        self._is_busy = False
        pause = self.source.way.interval * self.scraper.rng.uniform(0.9, 1.1)
        self.due = self._asked_at + max(pause, 2 * (now - self._asked_at))
        if not self.response.keep:
            self.close()
        if self._failures:
            self._recover(now)

    def fail(self, failure: Failure, now: float) -> None:
        """No page this time: close the connection, and try again later each time."""
        self.close()
        self._is_busy = False
        self._counts.failures[failure.problem] += 1
        self._failures += 1
        pause = min(self.source.way.interval * 2.0 ** min(self._failures, 10), LONGEST_PAUSE)
        self.due = now + pause * self.scraper.rng.uniform(0.5, 1.0)
        if self._failures == 1:
            self._failing_since = now
        if not self._is_told and now >= self._quiet_until:
            self._is_told, self._quiet_until = True, now + QUIET
            why = failure.problem.value
            log.warning("no %s from %s (%s): %s", self.source.what, self.address, why, failure.detail)

    def _recover(self, now: float) -> None:
        if self._is_told:
            lasted = now - self._failing_since
            failures = self._failures
            log.info("%s from %s again, after %d failures in %.1f s", self.source.what, self.address, failures, lasted)
        self._is_told = False
        self._failures = 0


class Link(asyncio.BufferedProtocol):
    """One connection: the event loop writes what comes straight into the reader's buffer."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.transport: asyncio.Transport | None = None
        self.has_served = False
        """An answer came over it: that it is closed later is no failure."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._target.opened(self, self.transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target.response.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._target.received(self, nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._target.lost(self, exc)
