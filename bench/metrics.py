"""What metrics cost: counting a request, making the page, and how long that holds up the event loop.

`python -m bench.metrics [SCRAPES]` counts 20,000 requests for 50 models on 100 endpoints, leaves 2,000 more under way,
and prints
- the microseconds that one request's counting takes, with caches warm (best of many rounds) and cold (median, after
  3 MB of other memory were touched, as between two requests of a busy picker);
- the milliseconds that the page takes, and its slowest piece;
- the longest time that the event loop was busy without a break while another process scraped the page over HTTP
  SCRAPES times (default 20), beside the same without scrapes. That is CPU time of the loop's thread, so that others
  who use this machine do not count; best, median and worst scrape.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from random import Random
from statistics import median

import numpy as np
import uvloop

from epp.dialects.usage import Usage
from epp.endpoints.table import Endpoint, Page
from epp.flow.saturation import Utilization
from epp.telemetry.exposition import Sources, render
from epp.telemetry.http import MetricsServer, Views
from epp.telemetry.log import Problems
from epp.telemetry.metrics import Metrics
from epp.ticket import Outcome, Ticket
from tests.telemetry.builders import decision, request, table, ticket

MODELS, ENDPOINTS, REQUESTS, UNDER_WAY = 50, 100, 20_000, 2_000
PAUSE = 0.2
"""Seconds between two scrapes."""
PLACES = [Endpoint(f"default/vllm-{at}-rank-0", f"10.0.0.{at + 1}:8000") for at in range(ENDPOINTS)]


def asked(rng: Random, *, bodies: bool) -> Ticket:
    """A request for some model on some endpoint; with bodies, as where Envoy shows them."""
    made = ticket(
        request(f"model-{rng.randrange(MODELS)}", stream=rng.random() < 0.5, size=rng.randrange(100, 100_000)),
        endpoint=rng.choice(PLACES),
        made=decision(prompt=1000, matched=250),
    )
    if bodies:
        told = ticket(usage=Usage(rng.randrange(1, 9999), rng.randrange(2, 999), rng.randrange(1, 999)))
        made.usage = told.usage
        made.first_byte_at, made.response_bytes = 10.0 + rng.random(), rng.randrange(100, 100_000)
    return made


def fill(counted: Metrics, rng: Random) -> None:
    for _ in range(REQUESTS):
        made = asked(rng, bodies=True)
        counted.decided(made)
        counted.finished(made, Outcome.COMPLETE, 10.0 + 20.0 * rng.random())
    for _ in range(UNDER_WAY):
        counted.decided(asked(rng, bodies=False))


def counting(counted: Metrics, rng: Random) -> None:
    """Print what one request's counting takes."""
    there, here = (np.zeros(3 << 20, np.uint8) for _ in range(2))
    for what, bodies in (("headers alone", False), ("with bodies and usage", True)):
        made = [asked(rng, bodies=bodies) for _ in range(400)]

        def count(one: Ticket) -> None:
            counted.decided(one)
            counted.finished(one, Outcome.COMPLETE, 12.0)

        warm = min(sum(_took(count, made)) / len(made) for _ in range(30))
        cold = median(_took(count, made, lambda: np.copyto(there, here)))
        print(f"counting, {what}: {warm:.2f} us a request, {cold:.2f} us with cold caches")


def _took(work: Callable[[Ticket], None], made: list[Ticket], before: Callable[[], None] | None = None) -> list[float]:
    """Microseconds of each call, less what measuring takes."""
    took, clock = [], time.perf_counter_ns
    empty = min(-(clock() - clock()) for _ in range(1000))
    for one in made:
        if before is not None:
            before()
        began = clock()
        work(one)
        took.append((clock() - began - empty) / 1000)
    return took


def rendering(page: Callable[[], Iterator[bytes]]) -> None:
    """Print what making the page takes."""
    totals, slowest, size, lines = [], [], 0, 0
    for _ in range(10):
        pieces, steps, last = [], [], time.thread_time()
        for piece in page():
            now = time.thread_time()
            steps.append(now - last)
            pieces.append(piece)
            last = time.thread_time()
        size, lines = sum(map(len, pieces)), sum(piece.count(b"\n") for piece in pieces)
        totals.append(sum(steps))
        slowest.append(max(steps))
    print(
        f"the page: {lines} lines, {size / 1e6:.1f} MB in {min(totals) * 1e3:.1f} ms; "
        f"slowest piece {min(slowest) * 1e3:.2f} ms (worst of ten pages: {max(slowest) * 1e3:.2f})"
    )


class Heartbeat:
    """Runs once in every turn of the loop and keeps the longest time between two of its beats."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = time.thread_time()
        self._longest = 0.0
        self._loop.call_soon(self._beat)

    def take(self) -> float:
        """The longest since it was taken last, in milliseconds."""
        longest, self._longest = self._longest, 0.0
        return longest * 1e3

    def _beat(self) -> None:
        now = time.thread_time()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        self._loop.call_soon(self._beat)


READER = """
import sys, time, urllib.request
for _ in range(int(sys.argv[2])):
    urllib.request.urlopen(sys.argv[1]).read()
    print(flush=True)
    time.sleep(float(sys.argv[3]))
"""


async def scraping(page: Callable[[], Iterator[bytes]], scrapes: int) -> None:
    """Print how long scrapes hold up the loop."""
    server = MetricsServer(Views(page, lambda n: [], list))
    port = await server.start("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}/metrics"
    heart = Heartbeat()
    idle = []
    for _ in range(scrapes):
        await asyncio.sleep(PAUSE)
        idle.append(heart.take())
    command = (sys.executable, "-c", READER, url, str(scrapes), str(PAUSE))
    reader = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    heart.take()
    gaps = []
    while await reader.stdout.readline():
        gaps.append(heart.take())
    await reader.wait()
    await server.stop()
    for what, values in (("without scrapes", idle), ("in a scrape", gaps)):
        best, worst = min(values), max(values)
        print(f"the loop's longest turn {what}: best {best:.2f}, median {median(values):.2f}, worst {worst:.2f} ms")


def main(scrapes: int = 20) -> None:
    rng = Random(1)
    counted = Metrics(Problems(logging.getLogger("bench")))
    fill(counted, rng)
    counting(counted, rng)
    pool = table(PLACES, [Page(waiting=float(at), running=8.0, kv_usage=0.5) for at in range(ENDPOINTS)])
    sources = Sources(pool, "pool", lambda: 0.5, detector=Utilization())
    gc.collect()
    gc.freeze()  # what a collection of everything that was imported takes is not the page's

    def page() -> Iterator[bytes]:
        return render(counted, sources)

    rendering(page)
    uvloop.run(scraping(page, scrapes))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
