"""An observer that remembers: what tests look at instead of metrics."""

from __future__ import annotations

from epp.dialects.request import Request
from epp.errors import Refusal
from epp.ticket import Outcome, Ticket


class Watch:
    """Implements `epp.picker.Observer`. Mistakes of our own are raised again at the end by `check`."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.refusals: list[Refusal] = []
        self.outcomes: list[Outcome] = []
        self.mistakes: list[Exception] = []
        self.silent: list[str] = []
        self.streams: list[float] = []

    def decided(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)

    def refused(self, request: Request | None, refusal: Refusal, duration: float) -> None:
        self.refusals.append(refusal)

    def finished(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        self.outcomes.append(outcome)

    def stream_ended(self, duration: float) -> None:
        self.streams.append(duration)

    def broke(self, what: str, error: Exception) -> None:
        self.mistakes.append(error)

    def never_answered(self, peer: str) -> None:
        self.silent.append(peer)

    def check(self) -> None:
        """Every ticket was finished once, and nothing broke."""
        for mistake in self.mistakes:
            raise mistake
        assert len(self.outcomes) == len(self.tickets)
