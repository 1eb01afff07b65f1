"""Pools, requests and plugins, made the way production makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import TypeVar

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Page
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import Context, Filter, Instance, Params, Picker, PickerParams, Plugin, Producer, Scorer
from epp.scheduling.producers import approximate_prefix
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler

T = TypeVar("T", bound=Instance)

NOW = 100.0


def ask(prompt: str = "hello", model: str = "base", salt: str = "") -> Request:
    body = {"model": model, "prompt": prompt, **({"cache_salt": salt} if salt else {})}
    return read(((":path", b"/v1/completions"),), json.dumps(body).encode())


def pool(
    *pages: Page | None,
    inflight: Sequence[int] = (),
    labels: Sequence[dict[str, str]] = (),
    table: EndpointTable | None = None,
) -> Candidates:
    """Endpoint i is 192.168.1.(i+1):8000 in slot i. A page of None: there never was one."""
    table = EndpointTable() if table is None else table
    for i, page in enumerate(pages):
        endpoint = Endpoint(f"default/pod{i}-rank-0", f"192.168.1.{i + 1}:8000", labels[i] if labels else {})
        slot = table.put(endpoint, 0.0)
        if page is not None:
            table.page_told(slot, table.generation(slot), page, NOW)
        for _ in range(inflight[i] if inflight else 0):
            table.admit(slot)
    return table.candidates(NOW)


def made(plugin: Plugin[T], params: Params | None = None, context: Context | None = None) -> T:
    return plugin.make(plugin.name, plugin.params() if params is None else params, context or Context())


def with_prefix(params: Params | None = None) -> tuple[Producer, Context]:
    producer = made(approximate_prefix, params)
    return producer, Context({producer.name: producer})


def profile(
    *scorers: tuple[Scorer, float], filters: Sequence[Filter] = (), picker: Picker | None = None, endpoints: int = 1
) -> Profile:
    picker = made(max_score, PickerParams(max_num_of_endpoints=endpoints)) if picker is None else picker
    return Profile("default", filters, scorers, picker)


def scheduler(chosen: Profile, *producers: Producer, seed: int = 0) -> Scheduler:
    return Scheduler(Lineup([chosen], producers), Random(seed))


def winners(chosen: Profile, candidates: Candidates, request: Request, draws: int) -> list[int]:
    """How often each slot came first."""
    choosing = scheduler(chosen)
    counts = [0] * len(candidates)
    for _ in range(draws):
        counts[choosing.schedule(request, candidates).first] += 1
    return counts
