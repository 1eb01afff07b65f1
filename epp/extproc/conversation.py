"""One ext_proc stream: message bytes in, reply bytes out. What every transport drives, and nothing else does.

In: `receive` for each message, `lose` when the stream is gone, `tick` when `next_deadline` has passed.
Out: encoded replies, in order. After them `closed` says whether the stream is to be ended with OK.
Rules here:
- A decision is asked for and given within one call.
- Whatever goes wrong in one exchange ends it (a 500, or a gRPC status) and nothing else.
"""

from __future__ import annotations

from typing import ClassVar, Final

from epp import dialects
from epp.dialects.request import Request
from epp.errors import InternalError, ProtocolError, Refusal
from epp.extproc.actions import (
    Action,
    AskDecision,
    Finished,
    Report,
    SendImmediateResponse,
    SendResponseBody,
    SendResponseHeaders,
    SendResponseTrailers,
)
from epp.extproc.codec import Codec
from epp.extproc.events import (
    BODY,
    EXPIRED,
    LOST,
    NONE,
    Decided,
    Event,
    Refused,
    ResponseEnded,
    ResponseEvent,
    ResponseStarted,
)
from epp.extproc.exchange import Exchange, Limits
from epp.picker import Picker
from epp.ticket import Outcome, Ticket

PROCESS: Final = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
"""The method whose calls are conversations."""
SILENT_EXCHANGES: Final = 20
"""So many exchanges in a row without response headers: the proxy does not send them."""


class Connection:
    """What is remembered of one peer across its streams."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._silent = 0

    def ended(self, outcome: Outcome) -> bool:
        """Take an outcome in; True once, when the peer is seen never to send the response phase."""
        self._silent = self._silent + 1 if outcome is Outcome.UNANSWERED else 0
        return self._silent == SILENT_EXCHANGES


class Conversation:
    """Drives one exchange: bytes to events, actions to bytes, questions to the picker."""

    ends_with_peer: ClassVar = True
    """A peer that says no more has left."""

    __slots__ = (
        "_codec",
        "_connection",
        "_exchange",
        "_is_lost",
        "_limits",
        "_picker",
        "_request",
        "_started_at",
        "_ticket",
        "closed",
    )

    def __init__(self, picker: Picker, limits: Limits, connection: Connection, now: float) -> None:
        self._picker = picker
        self._limits = limits
        self._connection = connection
        self._codec = Codec()
        self._exchange = Exchange(limits)
        self._started_at = now
        self._request: Request | None = None
        self._ticket: Ticket | None = None
        self._is_lost = False
        self.closed = False
        """Our own answer has been sent: end the stream with OK."""

    def __repr__(self) -> str:
        return f"<Conversation with {self._connection.peer}: {self._exchange!r}>"

    def receive(self, message: bytes, now: float) -> list[bytes]:
        """Take one message; return the replies to send, in order.

        Raises:
            ProtocolError: the peer broke the protocol; end the stream with INVALID_ARGUMENT. Nothing else.
        """
        try:
            return self._handle(self._codec.decode(message), now)
        except ProtocolError:
            self.lose(now)
            raise
        except Exception as error:
            self._picker.observer.broke("an exchange", error)
            self.lose(now)
            raise ProtocolError("the endpoint picker failed on this exchange; its log says why") from None

    def next_deadline(self) -> float | None:
        """When `tick` is due; None: nothing of ours is."""
        return self._exchange.next_deadline()

    def tick(self, now: float) -> list[bytes]:
        """The deadline has passed: answer instead of those who did not."""
        return self._handle(EXPIRED, now)

    def lose(self, now: float) -> None:
        """The stream is gone, for whatever reason. Calling it again does nothing."""
        if self._is_lost:
            return
        self._is_lost = True
        self._handle(LOST, now)
        self._picker.observer.stream_ended(now - self._started_at)

    def _handle(self, event: Event, now: float) -> list[bytes]:
        replies: list[bytes] = []
        exchange, encode = self._exchange, self._codec.encode
        actions: list[Action] = exchange.receive(event, now)
        for action in actions:  # a decision appends what follows from it
            if isinstance(action, Report):
                if (reply := self._report(action.event, now)) is not None:  # in place of the one that comes next
                    actions[actions.index(action) + 1] = reply
            elif isinstance(action, AskDecision):
                actions += exchange.receive(self._decide(action, now), now)
            elif isinstance(action, Finished):
                self._finish(action.outcome, now)
            else:
                if isinstance(action, SendImmediateResponse):
                    self.closed = True
                    self._picker.observer.refused(self._request, action.refusal, now - self._started_at)
                replies.append(encode(action))
        return replies

    def _decide(self, ask: AskDecision, now: float) -> Decided | Refused:
        try:
            self._request = request = dialects.read(ask.headers, ask.body, limit=self._limits.max_body)
            self._ticket, body = self._picker.decide(request, ask.subset, self._started_at, now)
            decision = self._ticket.decision
            return Decided(decision.endpoints, decision.set_headers, body, self._picker.scores(self._ticket))
        except Refusal as refusal:
            return Refused(refusal)
        except Exception as error:
            self._picker.observer.broke("a decision", error)
            return Refused(InternalError("the endpoint picker failed on this request; its log says why"))

    def _report(self, event: ResponseEvent, now: float) -> Action | None:
        """Tell the picker; returns the reply to this event where plugins have something to say in it."""
        picker, ticket = self._picker, self._ticket
        assert ticket is not None
        try:
            if isinstance(event, ResponseStarted):
                bodies_seen = event.modes.response is not NONE
                set_headers = picker.response_started(ticket, event.headers, event.served, now, bodies_seen=bodies_seen)
                return SendResponseHeaders(set_headers) if set_headers else None
            if event.data:
                picker.response_data(ticket, event.data, now)
            if isinstance(event, ResponseEnded) and (told := picker.response_ended(ticket)):
                by_body = event.by is BODY
                return SendResponseBody(event.data, True, told) if by_body else SendResponseTrailers(told)
        except Exception as error:  # the response goes on whatever we could not read of it
            picker.observer.broke("a response", error)
        return None

    def _finish(self, outcome: Outcome, now: float) -> None:
        assert self._ticket is not None
        try:
            self._picker.finish(self._ticket, outcome, now)
        except Exception as error:  # the stream still ends as it should
            self._picker.observer.broke("the end of an exchange", error)
        if self._connection.ended(outcome):
            self._picker.observer.never_answered(self._connection.peer)
