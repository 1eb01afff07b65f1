"""Tickets and tables, made from the real types."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from epp import dialects
from epp.dialects.request import Request
from epp.dialects.usage import Usage, UsageReader
from epp.endpoints.table import Endpoint, EndpointTable, Hold, Page
from epp.flow.policies import Rule
from epp.scheduling.decision import Decision, Failure
from epp.telemetry.exposition import Sources, render
from epp.telemetry.log import Problems
from epp.telemetry.metrics import Metrics
from epp.telemetry.series import Limits
from epp.ticket import Ticket

ENDPOINT = Endpoint("default/vllm-0-rank-0", "10.0.0.1:8000")


class Told:
    """A reader that has come to its end."""

    def __init__(self, usage: Usage) -> None:
        self.usage: Usage | None = usage
        self.done = True
        self.response_id = ""

    def feed(self, data: bytes) -> None:
        raise AssertionError("it has come to its end")

    def end(self) -> None:
        raise AssertionError("it has come to its end")


def metrics(*, limits: Limits | None = None, logger: logging.Logger | None = None) -> Metrics:
    return Metrics(Problems(logger or logging.getLogger("epp.test"), lambda: 0.0), limits)


def request(
    model: str = "m",
    *,
    target: str = "",
    fairness_id: str = "f",
    priority: int = 0,
    stream: bool = False,
    size: int = 100,
) -> Request:
    headers = (
        (":method", b"POST"),
        (":path", b"/v1/completions"),
        ("x-llm-d-inference-fairness-id", fairness_id.encode("utf-8", "surrogatepass")),
    )
    made = dialects.read(headers, b'{"model":"m","prompt":"x"}')
    made.model, made.target_model, made.priority = model, target or model, priority
    made.fairness_id = fairness_id
    made.stream = stream
    made.size_bytes = size
    return made


def decision(
    *,
    prompt: float = 0.0,
    matched: float = 0.0,
    unknown: bool = False,
    failures: tuple[str, ...] = (),
    plan: str = "",
    handler: tuple[str, str] = ("", ""),
) -> Decision:
    return Decision(
        profile="default",
        slots=np.array([0]),
        exclusions=(),
        scorers=(),
        raw=np.zeros((0, 1)),
        unknown=np.array([unknown]),
        totals=np.array([1.0]),
        order=np.array([0]),
        endpoints=(ENDPOINT.address,),
        failures=tuple(Failure(plugin, "broken", "error") for plugin in failures),
        plan=plan,
        handler=handler,
        pool=(ENDPOINT,),
        page_ages=np.array([0.0]),
        prompt_tokens=prompt,
        matched_tokens=matched,
        cost_us=150.0,
    )


def ticket(
    asked: Request | None = None,
    *,
    endpoint: Endpoint = ENDPOINT,
    made: Decision | None = None,
    status: int = 200,
    first_byte_at: float | None = None,
    usage: Usage | None = None,
    response_bytes: int = 0,
    rule: Rule | None = None,
    hold: Hold | None = None,
) -> Ticket:
    """Headers came at 10.0 s, the decision at 10.003, response headers at 10.2."""
    hold = hold or table([endpoint]).admit(0)
    built = Ticket(asked or request(), made or decision(), endpoint, hold, 10.0, 10.003, rule)
    built.status = status
    built.response_started_at = 10.2
    built.first_byte_at = first_byte_at
    built.response_bytes = response_bytes
    reader: UsageReader | None = None if usage is None else Told(usage)
    built.usage = reader
    return built


def table(endpoints: list[Endpoint], pages: list[Page | None] | None = None, *, asked_at: float = 0.0) -> EndpointTable:
    """The endpoints, in slots from 0, with a page each where one is given."""
    made = EndpointTable()
    for endpoint, page in zip(endpoints, pages or [None] * len(endpoints), strict=True):
        slot = made.put(endpoint, 0.0)
        if page is not None:
            made.page_told(slot, made.generation(slot), page, asked_at)
    return made


def page_of(counted: Metrics, sources: Sources | None = None) -> dict[str, Metric]:
    """The page as prometheus_client reads it, by family; counters under their full name."""
    return dict(read(b"".join(render(counted, sources or Sources(table([]), "p", zero)))))


def read(page: bytes) -> Iterator[tuple[str, Metric]]:
    for family in text_string_to_metric_families(page.decode()):
        yield (f"{family.name}_total" if family.type == "counter" else family.name), family


def zero() -> float:
    return 0.0


def value(families: dict[str, Metric], name: str, /, **labels: str) -> float:
    """The value of the one sample of that name that has (at least) these labels."""
    family = families[next(base for base in (name, *_bases(name)) if base in families)]
    found = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    assert len(found) == 1, f"{len(found)} samples of {name} with {labels}"
    return float(found[0])


def _bases(name: str) -> Iterator[str]:
    for suffix in ("_bucket", "_sum", "_count"):
        if name.endswith(suffix):
            yield name.removesuffix(suffix)
