"""The pure whole: what the server and the simulator both build, and the only thing that decides.

In: a request, and later what the model server answered. Out: a ticket, which holds the decision and the request's
share of the endpoint's counts until `finish`.
Rules here:
- A decision is one synchronous call; it reads columns and changes nothing until it is made.
- Every ticket is finished exactly once, by whoever got it; that is what counts a request out.
- What the operator says of requests (`policies`) is one value; who watches for changes puts a new one in its place.
- Guards come before admission: an empty pool or subset is 503 whatever the priority, and only then may a request be
  refused because what is left for it is full.
- Who watches (`Observer`) sees everything and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from random import Random
from typing import Protocol

import msgspec

from epp import dialects
from epp.dialects.request import Request
from epp.dialects.usage import UsageReader, usage_reader
from epp.endpoints.ejection import Ejection
from epp.endpoints.slowstart import anyone_new, slow_start
from epp.endpoints.subset import in_subset
from epp.endpoints.table import Candidates, Endpoint, EndpointTable, Hold
from epp.errors import NoEndpoint, Refusal
from epp.flow.admission import admit
from epp.flow.policies import NO_POLICIES, Rule, apply
from epp.flow.saturation import Detector, Saturation, Utilization
from epp.headers import Headers, first
from epp.scheduling.decision import Decision, Exclusion
from epp.scheduling.scheduler import Scheduler


class Outcome(Enum):
    """How an admitted exchange ended, as far as anyone can know."""

    COMPLETE = "complete"
    """The response ended, or the stream ended where its end says nothing else (response bodies not seen)."""
    CUT = "cut"
    """The stream ended in the middle of a response that was being seen: the client left or the server died."""
    UNANSWERED = "unanswered"
    """The stream ended before a response began: the client left, or Envoy does not send the response phase."""
    REFUSED = "refused"
    """Refused after a decision had been made."""

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is Python code


class Ticket:
    """One admitted request, from its decision to its end."""

    __slots__ = (
        "decided_at",
        "decision",
        "endpoint",
        "first_byte_at",
        "gaps",
        "hold",
        "last_byte_at",
        "request",
        "response_bytes",
        "response_started_at",
        "rule",
        "saturation",
        "seen",
        "started_at",
        "status",
        "usage",
    )

    def __init__(
        self,
        request: Request,
        decision: Decision,
        endpoint: Endpoint,
        hold: Hold,
        started_at: float,
        decided_at: float,
        rule: Rule | None = None,
        saturation: Saturation | None = None,
    ) -> None:
        self.request = request
        """What was asked, without its body: a ticket lives as long as the answer takes."""
        self.decision = decision
        """In full while it is among the latest; endpoints and tokens as long as the ticket lives."""
        self.endpoint = endpoint
        """Where it runs, as far as we know: the first choice, until the proxy says otherwise."""
        self.hold = hold
        self.started_at = started_at
        """When the request's headers came."""
        self.decided_at = decided_at
        self.rule = rule
        """The one that chose the target model; None: none did."""
        self.saturation = saturation
        """How full its candidates were; None: nobody asked, for nothing depended on it."""
        self.response_started_at: float | None = None
        self.first_byte_at: float | None = None
        """First byte of a response body, where bodies are seen."""
        self.last_byte_at = 0.0
        """Latest piece of it."""
        self.status = 0
        self.usage: UsageReader | None = None
        self.response_bytes = 0
        self.gaps: Gaps | None = None
        """Who wants to know the time between two pieces of the response body, set by the observer."""
        self.seen: object = None
        """What the observer remembers of this ticket; nobody else's."""


class Gaps(Protocol):
    """Takes the seconds between two pieces of one response body."""

    def observe(self, value: float) -> None: ...


class Observer(Protocol):
    """Who watches the picker: metrics in production, the report in the simulator."""

    def decided(self, ticket: Ticket) -> None: ...

    def refused(self, request: Request | None, refusal: Refusal, duration: float) -> None:
        """Refused before or after a decision. No request: refused before its body was read."""

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None: ...

    def stream_ended(self, duration: float) -> None:
        """An exchange's stream is over, after so many seconds, whatever came of it."""

    def broke(self, what: str, error: Exception) -> None:
        """A mistake of our own, contained: one request got a 500, or a signal was lost."""

    def never_answered(self, peer: str) -> None:
        """A connection whose exchanges end without response headers: its in-flight counts mean little."""


class Record(msgspec.Struct, frozen=True):
    """What is kept of a decision for whoever looks later; it does not keep the request's body alive."""

    at: float
    request_id: str
    model: str
    target_model: str
    decision: Decision
    priority: int
    objective: str
    """As the client named it; priority says what came of it."""
    rule: Rule | None
    saturation: Saturation | None


class PickerOptions(msgspec.Struct, frozen=True):
    """What the operator may set about the decision itself, beside the scheduling profiles."""

    use_subset: bool = True
    """False: ignore the gateway's subset hint (`--disable-endpoint-subset-filter`)."""
    slow_start: float = 10.0
    """Seconds in which a new endpoint's share grows to its full size."""
    emit_scores: bool = False
    """Tell the proxy each endpoint's total score, as dynamic metadata (`--emit-endpoint-scores`)."""
    records: int = 256
    """Decisions kept for /debug/decisions, at least 1."""
    detector: Detector = Utilization()
    """When requests below priority 0 are refused."""


class Picker:
    """Where should each request run, and what runs where."""

    def __init__(
        self,
        table: EndpointTable,
        scheduler: Scheduler,
        ejection: Ejection,
        observer: Observer,
        stopwatch: Callable[[], float],
        options: PickerOptions,
        rng: Random | None = None,
    ) -> None:
        """
        Args:
            stopwatch: seconds, to say what a decision cost; it never influences one.
            rng: what the targets of rewrites are drawn by; None: by a seed of 0.
        """
        self.table = table
        self.policies = NO_POLICIES
        self.observer = observer
        self.records: deque[Record] = deque(maxlen=options.records)
        self._scheduler = scheduler
        self._ejection = ejection
        self._stopwatch = stopwatch
        self._options = options
        self._rng = Random(0) if rng is None else rng

    def decide(
        self, request: Request, subset: tuple[str, ...] | None, started_at: float, now: float
    ) -> tuple[Ticket, bytes | None]:
        """Choose where the request runs, and count it there.

        Returns:
            The ticket, and the body to send instead of the client's; None: the client's.

        Raises:
            Refusal: NoEndpoint, Saturated, or what a plugin refuses with.
        """
        began = self._stopwatch()
        rule = saturation = None
        if self.policies is NO_POLICIES:  # without Kubernetes always; saves 0.3 us
            request.target_model = request.rewrite or request.model
        else:
            rule = apply(self.policies, request, self._rng)
        candidates, exclusions = self._guard(self.table.candidates(now), subset, now)
        if request.priority < 0:
            saturation = admit(request, candidates, self._options.detector)
        decision = self._scheduler.schedule(request, candidates, exclusions)
        if self._options.detector.weighs:
            decision.prompt_tokens = decision.prompt_tokens or float(request.tokens)
        body = None if request.target_model == request.model else dialects.rename(request, request.target_model)
        hold = self.table.admit(decision.first, max(0.0, decision.prompt_tokens - decision.matched_tokens))
        try:
            ticket = Ticket(request, decision, self.table.endpoint(hold.slot), hold, started_at, now, rule, saturation)
            decision.cost_us = (self._stopwatch() - began) * 1e6
            asked = (request.request_id, request.model, request.target_model)
            self._remember(Record(now, *asked, decision, request.priority, request.objective, rule, saturation))
            self.observer.decided(ticket)
        except BaseException:
            self.table.release(hold)  # without a ticket nobody else would
            raise
        request.let_go()
        return ticket, body

    def response_started(
        self, ticket: Ticket, headers: Headers, served: str | None, now: float, *, bodies_seen: bool
    ) -> None:
        """The model server, or the proxy in its place, has begun to answer.

        Args:
            served: endpoint that the proxy used last; None: not told.
            bodies_seen: `response_data` will follow.
        """
        ticket.response_started_at = now
        status = first(headers, ":status") or b""
        ticket.status = int(status) if status.isdigit() else 0
        if served is not None and served != ticket.endpoint.address:
            self._move(ticket, served, now)
        if ticket.status >= 500:
            self._ejection.failed(ticket.hold.slot, now, sent_at=ticket.decided_at)
        else:
            self._ejection.succeeded(ticket.hold.slot, now, sent_at=ticket.decided_at)
        if bodies_seen:
            ticket.usage = usage_reader(ticket.request, headers)

    def response_data(self, ticket: Ticket, data: bytes, now: float) -> None:
        """A piece of the response body."""
        if ticket.first_byte_at is None:
            ticket.first_byte_at = now
            self.table.prefill_done(ticket.hold)
        elif ticket.gaps is not None:
            ticket.gaps.observe(now - ticket.last_byte_at)
        ticket.last_byte_at = now
        ticket.response_bytes += len(data)
        if ticket.usage is not None:
            ticket.usage.feed(data)

    def response_ended(self, ticket: Ticket) -> None:
        """The response is whole; what it says of its usage can be read."""
        if ticket.usage is not None:
            ticket.usage.end()

    def finish(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """Count the request out."""
        self.table.release(ticket.hold)
        if ticket.usage is not None and ticket.usage.done and outcome is Outcome.CUT:
            outcome = Outcome.COMPLETE  # clients hang up right after the last event of a stream
        self.observer.finished(ticket, outcome, now)

    def scores(self, ticket: Ticket) -> tuple[tuple[str, float], ...]:
        """Endpoints and their totals, where the operator wants them told; else none."""
        if not self._options.emit_scores:
            return ()
        return ticket.decision.scores()

    # -- inside --------------------------------------------------------------------------------------------------

    def _remember(self, record: Record) -> None:
        """Keep it for whoever looks later; the oldest gives way, and with it what its ticket need not know."""
        records = self.records
        if len(records) == records.maxlen:
            records[0].decision.let_go()
        records.append(record)

    def _guard(
        self, candidates: Candidates, subset: tuple[str, ...] | None, now: float
    ) -> tuple[Candidates, list[Exclusion]]:
        """Leave out what no profile may choose: outside the subset, ejected, or new and busy enough already."""
        exclusions: list[Exclusion] = []
        if not len(candidates):
            raise NoEndpoint("the pool has no endpoints")
        if subset is not None and self._options.use_subset:
            allowed = in_subset(candidates, subset)
            if not allowed.any():
                raise NoEndpoint("none of the pool's endpoints is in the subset that the gateway allows")
            exclusions.append(Exclusion("subset", candidates.slots[~allowed]))
            candidates = candidates.keep(allowed)
        if self._ejection.anyone(now):
            out = self._ejection.out(candidates.slots, now)
            if out.any():
                exclusions.append(Exclusion("ejected", candidates.slots[out]))
                candidates = candidates.keep(~out)
        window = self._options.slow_start
        if anyone_new(self.table, window, now):
            warm = slow_start(candidates, window)
            if not warm.all():
                exclusions.append(Exclusion("slow-start", candidates.slots[~warm]))
                candidates = candidates.keep(warm)
        return candidates, exclusions

    def _move(self, ticket: Ticket, served: str, now: float) -> None:
        """Another endpoint served it: those before it in the list failed, and the counts belong to this one."""
        for address in ticket.decision.endpoints:
            if address == served:
                break
            failed = self.table.slot_at(address)
            if failed is not None:
                self._ejection.failed(failed, now, sent_at=ticket.decided_at)
        slot = self.table.slot_at(served)
        if slot is None:
            return  # the proxy's own choice, outside the pool
        tokens = ticket.hold.tokens
        self.table.release(ticket.hold)
        ticket.hold = self.table.admit(slot, tokens)
        ticket.endpoint = self.table.endpoint(slot)
