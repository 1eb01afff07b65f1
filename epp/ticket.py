"""What is known of a request from its decision to its end, and who watches.

Made by the picker; the metrics, the debug pages and the simulator's report read it.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import msgspec

from epp.dialects.request import Request
from epp.dialects.usage import UsageReader
from epp.endpoints.table import Endpoint, Hold
from epp.errors import Refusal
from epp.flow.policies import Rule
from epp.flow.saturation import Saturation
from epp.scheduling.decision import Decision


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
        "helpers",
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
        self.helpers: tuple[Hold, ...] = ()
        """Shares of those who work for the destination, until the response begins."""
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
