"""What a decision costs: `Picker.decide` without a transport, reading bodies, hashing prompts or metrics.

`python -m bench.decision [ROUNDS]` prints the best of ROUNDS (default 60) rounds, in us of wall time, for 8, 100 and
1,000 endpoints: with the default profile, whose pages say what it reads, and with config/picker/cost.yaml, whose
pages carry every counter that it learns from:
- idle: nothing changes between two decisions but the count of the request that is admitted and released;
- pages: a page that says something else comes between every two decisions (telling the table is not counted), half a
  millisecond later;
- release: counting the request out again;
- kept: bytes that a running request holds while its decision can be looked at (/debug/decisions), with a page between
  every two decisions; open: bytes that it holds when later decisions have taken that place.
The yardstick of the same run, `json.loads` of 1 KB, makes ratios comparable across machines.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path

from rich.console import Console
from rich.table import Table

from epp import dialects
from epp.config.build import build
from epp.config.load import load
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.errors import Refusal
from epp.picker import Picker, PickerOptions
from epp.ticket import Outcome, Ticket

SIZES = 8, 100, 1000
CALLS = 50
"""Decisions a round."""
NOW = 100.0
PAUSE = 0.5e-3
"""Seconds between two decisions where pages come: of 1,000 endpoints none has a page that is too old."""
COST = Path(__file__).parents[1] / "config" / "picker" / "cost.yaml"
BODY = b'{"model":"m","prompt":"' + b"a short question, " * 4 + b'"}'


class Unwatched:
    """An observer that looks at nothing."""

    def decided(self, ticket: Ticket) -> None: ...

    def refused(self, request: Request | None, refusal: Refusal, duration: float) -> None: ...

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None: ...

    def broke(self, what: str, error: Exception) -> None:
        raise error

    def stream_ended(self, duration: float) -> None: ...

    def never_answered(self, peer: str) -> None: ...


class Subject:
    """A configuration, and what pages its endpoints have."""

    def __init__(self, config: str, pages: Callable[[random.Random], Iterator[Page]]) -> None:
        self.config = config
        self.pages = pages

    def picker(self, size: int, records: int = 256) -> Picker:
        table = EndpointTable()
        scheduler = build(load(self.config), random.Random(0))
        for i in range(size):
            table.put(Endpoint(f"default/pod-{i}", f"10.0.{i // 250}.{i % 250}:8000"), 0.0)
        pages = self.pages(random.Random(1))
        for slot in range(size):
            table.page_told(slot, table.generation(slot), next(pages), NOW)
        ejection = Ejection(table, EjectionParams())
        return Picker(table, scheduler, ejection, Unwatched(), time.perf_counter, PickerOptions(records=records))


def gauges(rng: random.Random) -> Iterator[Page]:
    """What the default profile reads."""
    return cycle([Page(waiting=float(rng.randrange(9)), running=1.0, kv_usage=rng.random()) for _ in range(997)])


def counters(rng: random.Random) -> Iterator[Page]:
    """Everything that an engine tells that ends ten requests of 1,000 tokens, answers of 100, between two pages."""
    for i in count(1):
        yield Page(
            waiting=float(rng.randrange(9)),
            running=1.0,
            kv_usage=rng.random(),
            kv_blocks=20_000.0,
            block_size=16.0,
            prompt_tokens=10_000.0 * i,
            prompts=10.0 * i,
            first_tokens=10.0 * i + 1.0,
            steps=100.0 * i,
            processed=11_000.0 * i,
            generated=1_000.0 * i,
        )


def asked() -> Request:
    """A request whose body has been read and let go, as it is for whoever decides a second time: nothing to hash."""
    request = dialects.read(((":method", b"POST"), (":path", b"/v1/completions")), BODY)
    assert request.tokens
    request.let_go()
    return request


def timed(subject: Subject, size: int, rounds: int, *, told: bool) -> tuple[float, float]:
    """Microseconds of a decision, and of its release."""
    picker, request, pages = subject.picker(size), asked(), subject.pages(random.Random(2))
    clock, table, slots, now = time.perf_counter, picker.table, cycle(range(size)), NOW
    best = best_release = float("inf")
    for _ in range(rounds):
        spent = released = 0.0
        for _ in range(CALLS):
            if told:
                slot, now = next(slots), now + PAUSE
                table.page_asked(slot)
                table.page_told(slot, table.generation(slot), next(pages), now)
            began = clock()
            ticket, _ = picker.decide(request, None, now, now)
            decided = clock()
            picker.finish(ticket, Outcome.COMPLETE, now)
            released += clock() - decided
            spent += decided - began
        best, best_release = min(best, spent), min(best_release, released)
    return best / CALLS * 1e6, best_release / CALLS * 1e6


def held(subject: Subject, size: int, records: int) -> float:
    """Bytes that one more running request holds where so many decisions are kept."""
    picker, request, pages = subject.picker(size, records), asked(), subject.pages(random.Random(3))
    tickets: list[Ticket] = []
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for i in range(100):
        slot = i % size
        picker.table.page_told(slot, picker.table.generation(slot), next(pages), NOW)
        tickets.append(picker.decide(request, None, NOW, NOW)[0])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / len(tickets)


def best_of(rounds: int, work: Callable[[], object]) -> float:
    """Microseconds of one call, in the best round."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(CALLS):
            work()
        best = min(best, time.perf_counter() - began)
    return best / CALLS * 1e6


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    gc.collect()
    gc.freeze()  # as the server does after its start
    text = json.dumps({"messages": [{"role": "user", "content": f"number {i} of them"} for i in range(21)]})
    yardstick = best_of(rounds, lambda: json.loads(text))
    shown = Table(title=f"One decision, us (json.loads of {len(text)} B here: {yardstick:.1f} us)")
    headings = "idle", "pages", "release", "idle / yardstick", "pages / yardstick", "kept", "open"
    for heading in ("profile", "endpoints", *headings):
        shown.add_column(heading, justify="right")
    for name, subject in {"default": Subject("", gauges), "cost": Subject(COST.read_text(), counters)}.items():
        for size in SIZES:
            idle, release = timed(subject, size, rounds, told=False)
            pages, _ = timed(subject, size, rounds, told=True)
            ratios = f"{idle / yardstick:.1f}", f"{pages / yardstick:.1f}"
            memory = f"{held(subject, size, 256):,.0f}", f"{held(subject, size, 1):,.0f}"
            shown.add_row(name, f"{size:,}", f"{idle:.1f}", f"{pages:.1f}", f"{release:.1f}", *ratios, *memory)
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
