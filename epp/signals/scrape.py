"""The scraper: asks every listed endpoint for its metrics page, all the time, and tells the table what it says.

In: the endpoints that the table lists. Out: pages told to the table; counts and log lines of what went wrong.
Rules here:
- One connection an endpoint, kept alive, one request at a time on it; a server that never answers costs nothing else.
- A page is asked for `page_asked` first and told with the time at which it was asked for, so neither its age nor the
  requests that it cannot know are understated.
- Intervals are jittered, so that 100 servers do not answer at once; a page that takes long is asked for less often: a
  server is busy with our pages half of the time at most. After failures pauses grow to `LONGEST_PAUSE`.
- A failure makes this endpoint's values stale and nothing else. One log line when its trouble begins and one when it
  ends, at most once in `QUIET` seconds.
- One timer for all endpoints, not a task each.
Rejected: aiohttp's client. Measured beside it (bench/scrape.py: 100 vLLM pages of 58 KB every 50 ms, two shared cores,
uvloop, reading the page included) it takes 190 us of CPU a page, this 83 us: 0.38 cores against 0.16, of the 0.4 that
scraping may cost at all. On asyncio's own loop, reading left out, 240 us against 50 us: there receiving into a buffer
of our own instead of new bytes takes 95 us to 54, and one timer instead of two an endpoint takes off 5 more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from typing import Final, cast

from epp.endpoints.table import EndpointTable, Page, Slots
from epp.signals.page import Engine, labelled, read_page, recognise
from epp.signals.response import Failure, Problem, ResponseReader

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
    def poll_errors(self) -> int:
        """Pages that did not come (`datalayer_poll_errors_total`)."""
        return sum(self.failures.values()) - self.extract_errors

    @property
    def extract_errors(self) -> int:
        """Pages that came and said nothing (`datalayer_extract_errors_total`)."""
        return self.failures[Problem.GARBAGE]


class Scraper:
    """Keeps the pages of all listed endpoints fresh."""

    def __init__(
        self,
        table: EndpointTable,
        rng: random.Random,
        *,
        interval: float = 0.05,
        deadline: float = 1.0,
        path: str = "/metrics",
        limit: int = 4 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            rng: spreads the requests of many endpoints and of many pickers.
            interval: seconds between two pages of one endpoint (`--refresh-metrics-interval`).
            deadline: seconds for connecting and for each page.
            path: where the page is.
            limit: bytes of the largest page that is read.
            clock: the table's clock.
        """
        self.table = table
        self.rng = rng
        self.interval = interval
        self.deadline = deadline
        self.path = path
        self.limit = limit
        self.clock = clock
        self.counts = ScrapeCounts()
        self._targets: dict[Key, Target] = {}
        self._followed: Slots | None = None

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
        for slot in table.listed.tolist():
            endpoint = table.endpoint(slot)
            address = endpoint.metrics_address or endpoint.address
            key = (slot, table.generation(slot), address, labelled(endpoint.labels))
            due = now + self.rng.uniform(0, self.interval)
            self._targets[key] = before.pop(key) if key in before else Target(self, *key, due=due)
        for target in before.values():
            target.close()


Key = tuple[int, int, str, Engine | None]
"""Slot, generation, address and labelled engine: while they stay, the target stays."""


class Target:
    """One endpoint's page: when it is due, what became of it, and what is told about that."""

    def __init__(
        self, scraper: Scraper, slot: int, generation: int, address: str, engine: Engine | None, *, due: float
    ) -> None:
        self.scraper = scraper
        self.slot = slot
        self.generation = generation
        self.address = address
        self.due = due
        """When something must be done: ask again, or give up what is under way."""
        self.reader = ResponseReader(scraper.limit)
        self._request = (
            f"GET {scraper.path} HTTP/1.1\r\nhost: {address}\r\nuser-agent: epp\r\naccept: text/plain\r\n"
            "accept-encoding: identity\r\n\r\n"
        ).encode()
        self._engine = engine
        self._is_labelled = engine is not None
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
        try:
            await asyncio.get_running_loop().create_connection(lambda: link, host.strip("[]"), int(port))
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
        self.reader.begin()
        table.page_asked(self.slot)
        link.transport.write(self._request)

    def received(self, link: Link, count: int) -> None:
        if link is not self._link:
            return
        got = self.reader.received(count) if self._is_busy else Failure(Problem.PROTOCOL, "an answer to no question")
        if got is not None:
            link.has_served = True
            self._finish(got)

    def lost(self, link: Link) -> None:
        """The connection ended. A server may close one that idles, even while we write to it: that is no failure."""
        if link is not self._link:
            return
        self._link = None
        if not self._is_busy:
            return
        if link.has_served and not self.reader.has_begun:
            self._connect(self.scraper.clock())
        else:
            self._finish(self.reader.closed())

    # -- what became of it ---------------------------------------------------------------------------------------

    def _finish(self, got: bytes | Failure) -> None:
        now = self.scraper.clock()
        if isinstance(got, Failure):
            self.fail(got, now)
            return
        page = self._read(got)
        if page is None:
            self.fail(Failure(Problem.GARBAGE, "the page has none of the metrics of a known engine"), now)
            return
        self.scraper.table.page_told(self.slot, self.generation, page, self._asked_at)
        self.scraper.counts.pages += 1
        self._is_busy = False
        pause = self.scraper.interval * self.scraper.rng.uniform(0.9, 1.1)
        self.due = self._asked_at + max(pause, 2 * (now - self._asked_at))
        if not self.reader.keep:
            self.close()
        if self._failures:
            self._recover(now)

    def _read(self, body: bytes) -> Page | None:
        engine = self._engine or recognise(body)
        page = Page() if engine is None else read_page(body, engine)
        if page == Page() and not self._is_labelled:
            engine = recognise(body)  # another kind of server may run at this address now
            page = Page() if engine is None else read_page(body, engine)
        self._engine = engine
        return None if page == Page() else page

    def fail(self, failure: Failure, now: float) -> None:
        """No page this time: close the connection, and try again later each time."""
        self.close()
        self._is_busy = False
        self.scraper.counts.failures[failure.problem] += 1
        self._failures += 1
        pause = min(self.scraper.interval * 2.0 ** min(self._failures, 10), LONGEST_PAUSE)
        self.due = now + pause * self.scraper.rng.uniform(0.5, 1.0)
        if self._failures == 1:
            self._failing_since = now
        if not self._is_told and now >= self._quiet_until:
            self._is_told, self._quiet_until = True, now + QUIET
            log.warning("no metrics from %s (%s): %s", self.address, failure.problem.value, failure.detail)

    def _recover(self, now: float) -> None:
        if self._is_told:
            lasted = now - self._failing_since
            log.info("metrics from %s again, after %d failures in %.1f s", self.address, self._failures, lasted)
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
        return self._target.reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._target.received(self, nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._target.lost(self)
