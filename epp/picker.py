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
from collections.abc import Callable, Sequence
from random import Random

import msgspec

from epp import dialects, guards
from epp.dialects.request import Request
from epp.dialects.usage import usage_reader
from epp.endpoints.ejection import Ejection
from epp.endpoints.table import EndpointTable, Hold
from epp.errors import NoEndpoint
from epp.flow.admission import admit
from epp.flow.policies import NO_POLICIES, apply
from epp.flow.saturation import Detector, Utilization
from epp.headers import Headers, first
from epp.learning import learn_of_counters, learn_of_usage
from epp.prefix.ratio import TokenRatios
from epp.scheduling.answers import headers_of_answer, pinned
from epp.scheduling.decision import Decision
from epp.scheduling.plugin import Answer
from epp.scheduling.reporters import Metadata, reported
from epp.scheduling.scheduler import Scheduler
from epp.ticket import Observer, Outcome, Record, Ticket


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
        self.ratios = TokenRatios()
        self._scheduler = scheduler
        self._ejection = ejection
        self._stopwatch = stopwatch
        self._options = options
        self._rng = Random(0) if rng is None else rng

    def reconfigure(self, scheduler: Scheduler, detector: Detector) -> None:
        """Decide by another configuration from now on. What runs is counted as before, and out where it was."""
        self._scheduler = scheduler
        self._options = msgspec.structs.replace(self._options, detector=detector)

    def forget(self, slot: int) -> None:
        """A slot is about to mean another endpoint: `EndpointTable(on_forget=...)`."""
        self._scheduler.forget(slot)
        self.ratios.forget(slot)

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
        request.token_ratio = self.ratios.of(request.target_model)
        lineup, options = self._scheduler.lineup, self._options
        is_pinned = lineup.pins and pinned(lineup.pins, request, self.observer.broke)
        left = allowed = guards.allowed(
            self.table.candidates(now), None if is_pinned or not options.use_subset else subset
        )
        if not is_pinned:
            left = guards.preferred(allowed, self.table, self._ejection, options.slow_start, now)
        candidates, exclusions = left
        if request.priority < 0:
            saturation = admit(request, candidates, options.detector)
        try:
            decision = self._scheduler.schedule(request, candidates, exclusions, self._stopwatch)
        except NoEndpoint:
            if len(candidates) == len(allowed[0]):
                raise
            decision = self._scheduler.schedule(request, *allowed, self._stopwatch)
        if options.detector.weighs:
            decision.prompt_tokens = decision.prompt_tokens or float(request.tokens)
        body = None if request.target_model == request.model else dialects.rename(request, request.target_model)
        hold, *helpers = holds = self._count(decision)
        try:
            ticket = Ticket(request, decision, self.table.endpoint(hold.slot), hold, started_at, now, rule, saturation)
            ticket.helpers = tuple(helpers)
            decision.cost_us = (self._stopwatch() - began) * 1e6
            asked = (request.request_id, request.model, request.target_model)
            self._remember(Record(now, *asked, decision, request.priority, request.objective, rule, saturation))
            self.observer.decided(ticket)
        except BaseException:
            for each in holds:  # without a ticket nobody else would
                self.table.release(each)
            self._tell(self._scheduler.lineup.followed, "at the end of a request", request, True, now)
            raise
        request.let_go()
        return ticket, body

    def response_started(
        self, ticket: Ticket, headers: Headers, served: str | None, now: float, *, bodies_seen: bool
    ) -> Headers:
        """The model server, or the proxy in its place, has begun to answer; returns headers to set on the response.

        Args:
            served: endpoint that the proxy used last; None: not told.
            bodies_seen: `response_data` will follow.
        """
        ticket.response_started_at = now
        status = first(headers, ":status") or b""
        ticket.status = int(status) if status.isdigit() else 0
        self._dismiss(ticket)
        if served is not None and served != ticket.decision.endpoints[0]:
            self._move(ticket, served, now)
        self._judge(ticket, served, now)
        if bodies_seen:
            ticket.usage = usage_reader(ticket.request, headers)
        if not (hooks := self._scheduler.lineup.answered):
            return ()
        answer = Answer(ticket.endpoint, served, headers, ticket.decision)
        return headers_of_answer(hooks, ticket.request, answer, self.observer.broke)

    def response_data(self, ticket: Ticket, data: bytes, now: float) -> None:
        """A piece of the response body."""
        if ticket.first_byte_at is None:
            ticket.first_byte_at = now
            self.table.prefill_done(ticket.hold)
            self._tell(self._scheduler.lineup.followed, "at a first token", ticket.request, False, now)
        elif ticket.gaps is not None:
            ticket.gaps.observe(now - ticket.last_byte_at)
        ticket.last_byte_at = now
        ticket.response_bytes += len(data)
        if ticket.usage is not None:
            ticket.usage.feed(data)

    def response_ended(self, ticket: Ticket) -> Metadata:
        """The response is whole; what it says of its usage can be read. Returns what the proxy is told of it."""
        if ticket.usage is None:
            return ()
        ticket.usage.end()
        return reported(self._scheduler.lineup.reporters, ticket.request, ticket.usage.usage, self.observer.broke)

    def finish(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """Count the request out."""
        if ticket.usage is not None:
            if (usage := ticket.usage.usage) is not None:
                learn_of_usage(ticket, usage, self.ratios, self.table, self._scheduler)
            if self._scheduler.lineup.stored and ticket.usage.response_id:
                what, response = "at the end of a response", ticket.usage.response_id
                self._tell(self._scheduler.lineup.stored, what, response, ticket.hold.slot, self.table, now)
        elif outcome is Outcome.COMPLETE and ticket.decision.prefill is None:
            learn_of_counters(ticket, self.ratios, self.table, self._scheduler)
        self.table.release(ticket.hold)
        self._dismiss(ticket)
        self._tell(self._scheduler.lineup.followed, "at the end of a request", ticket.request, True, now)
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

    def _tell(self, hooks: Sequence[tuple[str, Callable[..., None]]], what: str, *args: object) -> None:
        """Tell plugins of something, by name; one that fails harms nobody."""
        for name, hook in hooks:
            try:
                hook(*args)
            except Exception as error:
                self.observer.broke(f"plugin {name} {what}", error)

    def _judge(self, ticket: Ticket, served: str | None, now: float) -> None:
        """Note how the endpoint did that answered; where it is none of the pool's, nobody's merit or fault."""
        slot, sent_at = ticket.hold.slot, ticket.decided_at
        if served is not None and served != ticket.endpoint.address and not self._reached(ticket, served):
            return
        if ticket.status < 500:
            self._ejection.succeeded(slot, now, sent_at=sent_at)
        elif served is None:  # may be the proxy's own answer: it has no host at all
            self._ejection.passed_over(slot, now, sent_at=sent_at)
        else:
            self._ejection.failed(slot, now, sent_at=sent_at)

    @staticmethod
    def _reached(ticket: Ticket, served: str) -> bool:
        """Whether the request went where it was sent, though it is counted elsewhere: on the rank behind that port."""
        return served == ticket.decision.endpoints[0] and ticket.hold.slot == ticket.decision.first

    def _count(self, decision: Decision) -> list[Hold]:
        """Count the request in: first at its destination, then at those who work for it."""
        prefill = decision.prefill or decision
        to_prefill = prefill.uncached if prefill is decision else 0.0
        holds = [self.table.admit(decision.first, to_prefill, decision.output_tokens)]
        if decision.prefill is not None:
            holds.append(self.table.admit(prefill.first, prefill.uncached))
        if decision.encode is not None:
            holds.append(self.table.admit(decision.encode.first))
        return holds

    def _dismiss(self, ticket: Ticket) -> None:
        """The response begins, so those who worked for the destination have done so."""
        for each in ticket.helpers:
            self.table.release(each)
        ticket.helpers = ()

    def _move(self, ticket: Ticket, served: str, now: float) -> None:
        """Another endpoint served it: those before it in the list failed, and the counts belong to this one."""
        for address in ticket.decision.endpoints:
            if address == served:
                break
            failed = self.table.slot_at(address)
            if failed is not None:
                self._ejection.passed_over(failed, now, sent_at=ticket.decided_at)
        slot = self.table.slot_at(served)
        if slot is None:
            return  # the proxy's own choice, outside the pool
        left, output = ticket.hold, ticket.hold.output_tokens
        ticket.hold = self.table.admit(slot, left.tokens - output, output)
        self.table.release(left)  # only now: a slot that is about to leave goes with its last request
        ticket.endpoint = self.table.endpoint(slot)
