"""What is counted of requests: the picker's observer in production.

In: tickets when they are decided and when they are finished, refusals, mishaps. Out: accumulators that
`epp.telemetry.exposition` turns into a page, under two families of names, when somebody asks.
Rules here:
- One accumulator per set of request labels; the legacy families, which have fewer labels, are sums made at scrape time.
- A request is recorded at two moments, 2 us in all, 3 us where bodies are shown (`python -m bench.metrics`). A chunk
  of a streamed answer that Envoy shows is one observation, 0.2 us; nothing else is recorded per chunk.
- Labels are resolved when a request is decided, and found again by what the request says and where it went: its
  ticket remembers its series until it is finished.
- Who is under way is a set of tickets for each set of labels; what is told of them by endpoint is counted when somebody
  scrapes, since a ticket knows its endpoint and its tokens better than a copy of them would.
- Meaning follows the reference, so that dashboards agree, but for its gaps: exchanges that were cut count too,
  usage counts once however often an engine repeats it, and a model server's error is seen as one.
Source: llm-d router, `pkg/epp/metrics` (names, labels, buckets) and `pkg/epp/handlers` (moments).
"""

from __future__ import annotations

import re
from typing import Final

from epp.dialects.body import BYTES_PER_TOKEN
from epp.dialects.request import Request
from epp.endpoints.table import Endpoint
from epp.errors import NoEndpoint, Refusal
from epp.flow.policies import Rule
from epp.telemetry.log import Problems
from epp.telemetry.series import Capped, Counter, Histogram, LabelSets, Limits, cut
from epp.ticket import Outcome, Ticket

MODEL_SERVER_ERROR: Final = "ModelServerError"
"""`error_code` of an answer that a model server gave with a status of 400 or more."""
REAL_TOKENS: Final = 1 << 53
"""A count that no float can hold is nonsense, and adding it up would break the sum."""

COMPLETE, UNANSWERED, REFUSED = Outcome.COMPLETE, Outcome.UNANSWERED, Outcome.REFUSED  # each takes 75 ns to look up
RANK: Final = re.compile(r"-rank-\d+$")
"""What an endpoint's name has after its pod's."""
REMEMBERED: Final = 1000
"""Most sets of labels, and endpoints of each set, whose place is found in one look-up; then all are forgotten, and
found again the long way."""
NOWHERE: Final[tuple[Endpoint | None, list[float]]] = (None, [])
"""Where an endpoint is counted that is not remembered: still to be found out."""

DURATION: Final = (
    *(0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0),
    *(30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0),
)
TTFT: Final = DURATION[:24]
REQUEST_SIZE: Final = tuple(1 << exponent for exponent in range(6, 31))
# 32778 is a slip of the reference's for 32768, in three histograms. Dashboards and recording rules name buckets, and
# two pickers behind one gateway must add up, so it stays.
TOKENS: Final = (
    *(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32778, 65536, 131072, 262144, 524288, 1048576),
)
RESPONSE_SIZE: Final = TOKENS[:15]
OUTPUT_TOKENS: Final = TOKENS[:12]
NTPOT: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TPOT: Final = (
    *(0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 2.0),
)
ITL: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0)
STREAM: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SCHEDULING: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
REQUEST_PROCESSING: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
RESPONSE_PROCESSING: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
HIT_RATIO: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HIT_BYTES: Final = (0.0, *(float(1 << exponent) for exponent in range(4, 17)))


class RequestSeries:
    """Everything counted under one set of {model_name, target_model_name, fairness_id, priority}."""

    __slots__ = (
        "attempts",
        "cached_tokens",
        "duration",
        "errors",
        "input_tokens",
        "itl",
        "model",
        "ntpot",
        "output_tokens",
        "request_size",
        "requests",
        "response_size",
        "rewrites",
        "target_model",
        "tpot",
        "ttft",
        "ttft_streaming",
        "under_way",
    )

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.model, self.target_model = labels[:2]
        """As they stand in the labels."""
        self.requests = 0
        """Requests that got a decision; refused ones are errors, not requests (as in the reference)."""
        self.under_way: set[Ticket] = set()
        """Requests that are decided and not finished."""
        self.rewrites: dict[str, list[float]] = {}
        """By a rule's source: where requests are counted whose target model it chose. Forgotten when there are many."""
        self.attempts: dict[str, tuple[Endpoint, list[float]]] = {}
        """By address: where decisions for this endpoint are counted. Forgotten when there are too many."""
        self.errors: dict[str, int] = {}
        """By error code: a handful of our own, and MODEL_SERVER_ERROR."""
        self.duration = Histogram(DURATION)
        self.request_size = Histogram(REQUEST_SIZE)
        self.response_size = Histogram(RESPONSE_SIZE)
        self.input_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(OUTPUT_TOKENS)
        self.cached_tokens = Histogram(TOKENS)
        self.ntpot = Histogram(NTPOT)
        self.tpot = Histogram(TPOT)
        self.itl = Histogram(ITL)
        self.ttft = Histogram(TTFT)
        self.ttft_streaming = Histogram(TTFT)


class Metrics:
    """Implements `epp.picker.Observer`. One event loop calls it; it never waits and never raises."""

    def __init__(self, problems: Problems, limits: Limits | None = None) -> None:
        """
        Args:
            problems: where mistakes of our own and connections that never answer are told.
        """
        self._problems = problems
        self._limits = limits = limits or Limits()
        self._models = Capped(limits.models)
        self._fairness_ids = Capped(limits.fairness_ids)
        self._known: dict[tuple[str, str, str, int], RequestSeries] = {}
        """Series by what requests say, which is short: nearly always one look-up. Forgotten when there are too many."""
        self.requests: LabelSets[RequestSeries] = LabelSets(4, limits.label_sets, RequestSeries)
        """By model_name, target_model_name, fairness_id, priority."""
        self.attempts = Counter(4, limits.endpoint_sets)
        """Decisions by target model, pod, namespace and port."""
        self.failed_attempts = Counter(1, limits.label_sets)
        """Requests for which no endpoint was found, by target model."""
        self.rewrites = Counter(3, limits.label_sets)
        """Decisions whose target model a rule chose, by the name of its resource, model and target model."""
        self.plans = Counter(4, limits.label_sets)
        """Decisions for which a handler weighed stages, by its name and type, target model, and what came of it."""
        self.scheduling = Histogram(SCHEDULING)
        self.request_processing = Histogram(REQUEST_PROCESSING)
        self.response_processing = Histogram(RESPONSE_PROCESSING)
        self.hit_ratio = Histogram(HIT_RATIO)
        self.hit_bytes = Histogram(HIT_BYTES)
        self.refusals = Counter(2)
        """By reason and status."""
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.unanswered = Histogram(DURATION)
        """Seconds until exchanges ended that saw no response headers."""
        self.unknown_signals = 0
        """Decisions in which a signal that a scorer needs was unknown for a candidate."""
        self.plugin_failures = Counter(2)
        """Decisions made without a plugin that failed, by plugin and kind of failure."""
        self.mistakes = Counter(1)
        """Mistakes of our own, by what broke."""
        self.silent_connections = 0
        """Connections whose exchanges end without response headers."""
        self.streams = Histogram(STREAM)
        """Seconds that ext_proc streams were open."""

    # -- the picker's observer -----------------------------------------------------------------------------------

    def decided(self, ticket: Ticket) -> None:
        request, decision = ticket.request, ticket.decision
        series = ticket.seen = self._series(request)
        if request.stream:
            ticket.gaps = series.itl
        series.requests += 1
        series.under_way.add(ticket)
        series.request_size.observe(request.size_bytes)
        self.request_processing.observe(ticket.decided_at - ticket.started_at)
        self.scheduling.observe(decision.cost_us * 1e-6)
        if decision.prompt_tokens:
            self.hit_ratio.observe(decision.matched_tokens / decision.prompt_tokens)
            self.hit_bytes.observe(decision.matched_tokens * BYTES_PER_TOKEN)
        if 1 in decision.unknown.tobytes():  # any() costs a microsecond more, whatever the length
            self.unknown_signals += 1
        for failure in decision.every_failure():
            self.plugin_failures.add(failure.plugin, failure.kind)
        if ticket.rule is not None:
            self._rewrites_of(series, ticket.rule)[0] += 1.0
        if decision.plan:
            self.plans.add(*decision.handler, series.target_model, decision.plan)
        endpoint = ticket.endpoint
        known, cell = series.attempts.get(endpoint.address, NOWHERE)
        if known is not endpoint:
            cell = self._attempts_of(series, endpoint)
        cell[0] += 1.0

    def refused(self, request: Request | None, refusal: Refusal, duration: float) -> None:
        """Counted as an error and by reason, not as a request, and not in the requests' duration: refusals take no
        time, and thousands of them would make an overloaded pool look fast."""
        series = self._admit(("", "", "", 0)) if request is None else self._series(request)
        series.errors[refusal.code] = series.errors.get(refusal.code, 0) + 1
        self.refusals.add(refusal.reason or refusal.code, str(refusal.status))
        self.request_processing.observe(duration)
        if isinstance(refusal, NoEndpoint):
            self.failed_attempts.add(series.target_model)

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """Durations are recorded for whatever was answered, cut streams included; the reference leaves those out, and
        so the slowest requests, whose clients gave up. What saw no response headers has no duration of its own to
        tell (Envoy may not send the response phase at all) and goes into `unanswered` alone. Sizes and tokens are
        recorded for whole answers."""
        series = ticket.seen
        assert isinstance(series, RequestSeries), "a ticket is decided before it is finished"
        series.under_way.discard(ticket)
        self.outcomes[outcome] += 1
        took = now - ticket.started_at
        if outcome is UNANSWERED:
            self.unanswered.observe(took)
        if outcome is UNANSWERED or outcome is REFUSED:
            return
        series.duration.observe(took)
        if ticket.status >= 400:
            series.errors[MODEL_SERVER_ERROR] = series.errors.get(MODEL_SERVER_ERROR, 0) + 1
        first = ticket.first_byte_at
        if first is not None:
            ttft = series.ttft_streaming if ticket.request.stream else series.ttft
            ttft.observe(first - ticket.started_at)
        if outcome is COMPLETE:
            self._answered(series, ticket, now)

    def broke(self, what: str, error: Exception) -> None:
        self.mistakes.add(what)
        kind = type(error).__name__  # str(error), not repr: that of a UnicodeDecodeError holds the body
        self._problems.tell(f"{kind} in {what}", "a mistake of our own in %s: %s: %s", what, kind, error, error=error)

    def never_answered(self, peer: str) -> None:
        self.silent_connections += 1
        self._problems.tell(
            "never answered",
            "the proxy at %s sends no response headers, so requests count as ended once they are routed; "
            "set response_header_mode SEND in its ext_proc filter",
            peer,
        )

    def stream_ended(self, duration: float) -> None:
        """An ext_proc stream is gone that was open for so many seconds: for transports, and no part of the observer."""
        self.streams.observe(duration)

    # -- inside --------------------------------------------------------------------------------------------------

    def _answered(self, series: RequestSeries, ticket: Ticket, now: float) -> None:
        """A whole answer: its size and what it says of its tokens, as far as bodies were seen."""
        if ticket.response_started_at is not None and not ticket.request.stream:
            self.response_processing.observe(now - ticket.response_started_at)
        if ticket.response_bytes:
            series.response_size.observe(ticket.response_bytes)
        usage = None if ticket.usage is None else ticket.usage.usage
        if usage is None:
            return
        prompt, cached, tokens = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
        if prompt is not None and 0 < prompt < REAL_TOKENS:
            series.input_tokens.observe(prompt)
        if cached is not None and 0 <= cached < REAL_TOKENS:
            series.cached_tokens.observe(cached)
        if tokens is not None and 0 < tokens < REAL_TOKENS:
            series.output_tokens.observe(tokens)
            series.ntpot.observe((now - ticket.started_at) / tokens)
            if ticket.request.stream and tokens > 1 and ticket.first_byte_at is not None:
                series.tpot.observe((now - ticket.first_byte_at) / (tokens - 1))

    def _series(self, request: Request) -> RequestSeries:
        key = (request.model, request.target_model, request.fairness_id, request.priority)
        known = self._known.get(key)
        return known if known is not None else self._admit(key)

    def _admit(self, key: tuple[str, str, str, int]) -> RequestSeries:
        """The series of labels that are new, or that had to be changed."""
        length = self._limits.label_length
        model, target = (self._models.bound(cut(name, length)) for name in key[:2])
        fairness_id = self._fairness_ids.bound(cut(key[2], length))
        labels = (model, target, fairness_id, str(key[3]))
        series = self.requests.get(labels)
        if max(map(len, key[:3])) <= length:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = series
        return series

    def _rewrites_of(self, series: RequestSeries, rule: Rule) -> list[float]:
        """Where requests are counted whose target model this rule chose."""
        cell = series.rewrites.get(rule.source)
        if cell is None:
            name = cut(resource_name(rule.source), self._limits.label_length)
            cell = self.rewrites.cell(name, series.model, series.target_model)
            if len(series.rewrites) >= REMEMBERED:
                series.rewrites.clear()
            series.rewrites[rule.source] = cell
        return cell

    def _attempts_of(self, series: RequestSeries, endpoint: Endpoint) -> list[float]:
        """Where decisions for an endpoint are counted that was not asked for yet, or is another than it was."""
        namespace, _, pod = endpoint.name.rpartition("/")
        port = endpoint.address.rpartition(":")[2]
        cell = self.attempts.cell(series.target_model, RANK.sub("", pod), namespace, port)
        if len(series.attempts) >= REMEMBERED:
            series.attempts.clear()
        series.attempts[endpoint.address] = endpoint, cell
        return cell


def resource_name(source: str) -> str:
    """The name of the resource that a rule was written in: "canary" of "InferenceModelRewrite default/canary rules[0]";
    all of it where it is written otherwise."""
    words = source.split()
    return words[1].rpartition("/")[2] if len(words) > 1 else source
