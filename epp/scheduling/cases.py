"""Pools and requests to try a plugin on: the corners in which plugins go wrong, each with a name.

In: names of attributes. Out: candidates, and requests.
Rules here: small enough to work out by hand, and always the same; endpoint i has the address 10.0.0.(i+1):8000, pages
are as old as they say at NOW, and nothing else tells the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page
from epp.headers import Headers

NOW: Final = 100.0
LATER: Final = 100.05
"""When each page has been followed by another."""
FRESHNESS: Final = 2.0
"""Seconds after which a page is too old."""
ADAPTER: Final = "adapter-1"
ROLES: Final = ("decode", "prefill", "prefill-decode", "encode")

NO_PAGE: Final = None
BARE_PAGE: Final = Page(kv_blocks=1000.0, block_size=16.0, max_lora=4.0, running_adapters=(), waiting_adapters=())
"""Of an engine that tells no load, though it answers: every gauge is unknown."""


class Case(msgspec.Struct, frozen=True, eq=False):
    """One corner."""

    name: str
    """Ends the sentence "for ...": "a completion among busy endpoints"."""
    candidates: Candidates
    ask: Callable[[], Request]
    """The same request, made anew."""


def pool(
    *pages: Page | None,
    labels: Sequence[dict[str, str]] = (),
    inflight: Sequence[int] = (),
    ages: Sequence[float] = (),
    attributes: Collection[str] = (),
) -> Candidates:
    """As many endpoints as there are pages.

    Args:
        pages: what each endpoint's last page said; None: there never was one.
        labels: of each endpoint; not given: none.
        inflight: requests that we have sent to each and that still run; not given: none.
        ages: seconds since each page was asked for; not given: 0.
        attributes: names of further columns, which pages may tell.
    """
    table = EndpointTable(freshness=FRESHNESS, attributes=dict.fromkeys(attributes, FRESHNESS))
    endpoints = [
        Endpoint(f"default/pod{i}-rank-0", f"10.0.{i // 250}.{i % 250 + 1}:8000", labels[i] if labels else {})
        for i in range(len(pages))
    ]
    table.replace(endpoints, 0.0)
    for i, (endpoint, page) in enumerate(zip(endpoints, pages, strict=True)):
        slot = table.slot_at(endpoint.address)
        assert slot is not None
        if page is not None:
            table.page_told(slot, table.generation(slot), page, NOW - (ages[i] if ages else 0.0))
        for _ in range(inflight[i] if inflight else 0):
            table.admit(slot, 100.0)
    return table.candidates(NOW)


def ask(prompt: str = "hello", model: str = "base", headers: Headers = ()) -> Request:
    """A completion."""
    body = json.dumps({"model": model, "prompt": prompt})
    return read(((":method", b"POST"), (":path", b"/v1/completions"), *headers), body.encode())


def page(load: float, attributes: Collection[str] = ()) -> Page:
    """Of an engine under so much load, 0..1: ten waiting, twenty running and a full cache are 1."""
    return Page(
        waiting=round(10 * load),
        running=round(20 * load),
        kv_usage=load,
        kv_blocks=1000.0,
        block_size=16.0,
        max_lora=4.0,
        running_adapters=(ADAPTER,) if load > 0.5 else (),
        waiting_adapters=(),
        attributes=tuple((name, load) for name in attributes),
    )


def cases(attributes: Collection[str] = ()) -> Iterator[Case]:
    """Every pool with every request.

    Args:
        attributes: further columns that the plugin needs; where a page tells its load, it tells these, too.
    """
    for pool_name, candidates in _pools(attributes):
        for request_name, request in REQUESTS.items():
            yield Case(f"{request_name} and {pool_name}", candidates, request)


def crowd(count: int, attributes: Collection[str] = ()) -> Case:
    """As many endpoints as a large pool has, no two alike."""
    pages = [page(i / count, attributes) for i in range(count)]
    labels = [_labels(i) for i in range(count)]
    return Case(
        f"a completion and {count:,} endpoints", pool(*pages, labels=labels, attributes=attributes), _completion
    )


def changed(candidates: Candidates, on_forget: Callable[[int], None]) -> Candidates:
    """The same table after the first endpoint has left, another has come in its slot, and the last one's labels are
    others; and a page of each, of a moment later.

    Args:
        on_forget: told of the slot that means another endpoint now.
    """
    table, slots = candidates.table, candidates.slots.tolist()
    gone, last = table.endpoint(slots[0]), table.endpoint(slots[-1])
    table.drop(gone.name)
    on_forget(slots[0])
    table.put(Endpoint("default/new-rank-0", "10.1.0.1:8000", {"llm-d.ai/role": "decode", "zone": "c"}), NOW)
    table.put(msgspec.structs.replace(last, labels={"llm-d.ai/role": "prefill", "zone": "c"}), NOW)
    for slot in table.listed.tolist():
        table.page_told(slot, table.generation(slot), page(slot / 10), LATER)
    return table.candidates(LATER)


def _pools(attributes: Collection[str]) -> Iterator[tuple[str, Candidates]]:
    idle, busy, busier, full = (page(load, attributes) for load in (0.0, 0.8, 0.9, 1.0))

    def of(*pages: Page | None, inflight: Sequence[int] = (), ages: Sequence[float] = ()) -> Candidates:
        labels = [_labels(i) for i in range(len(pages))]
        return pool(*pages, labels=labels, inflight=inflight, ages=ages, attributes=attributes)

    yield "one endpoint", of(busy)
    yield "one endpoint that never had a page", of(NO_PAGE)
    yield "three idle endpoints that are all the same", pool(idle, idle, idle, attributes=attributes)
    yield "three full endpoints that are all the same", of(full, full, full, inflight=(9, 9, 9))
    yield "five endpoints under different load", of(idle, busy, full, busier, idle, inflight=(0, 3, 9, 3, 1))
    yield "three endpoints that never had a page", of(NO_PAGE, NO_PAGE, NO_PAGE)
    yield "busy endpoints and one that never had a page", of(busy, NO_PAGE, full, inflight=(4, 0, 9))
    yield "busy endpoints and one whose page tells no load", of(busier, BARE_PAGE, full, inflight=(4, 4, 9))
    yield "busy endpoints and an idle one whose page is too old", of(busy, idle, full, ages=(0, 2 * FRESHNESS, 0))
    six = of(idle, busy, full, busier, idle, busy)
    yield "what a filter has left of six endpoints", six.keep(np.array([False, True, False, True, True, False]))


def _labels(number: int) -> dict[str, str]:
    return {"llm-d.ai/role": ROLES[number % len(ROLES)], "zone": "ab"[number % 2]}


def _completion() -> Request:
    return ask("Once upon a time. " * 200)


def _chat() -> Request:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "What is this? " * 200}, image]
    body = {"model": ADAPTER, "stream": True, "messages": [{"role": "user", "content": content}]}
    path = (":path", b"/v1/chat/completions")
    return read(((":method", b"POST"), path, ("x-session-token", b"s1")), json.dumps(body).encode())


def _without_body() -> Request:
    return read(((":method", b"GET"), (":path", b"/v1/models")), b"")


REQUESTS: Final[dict[str, Callable[[], Request]]] = {
    "a completion": _completion,
    "a chat with an image, for an adapter,": _chat,
    "a request without a body": _without_body,
}
