"""One HTTP exchange as a table: (state, event) -> handler and next state; a handler returns actions.

In: events, from the codec or from whoever decides. Out: actions, in the order in which they must be done.
Rules here:
- Every transition is in `TRANSITIONS`, but for one: a refusal closes the exchange from wherever it is found out.
- Each exchange that got a `Decided` yields exactly one `Finished`, whatever happens: `_finish` is the only place.
- Envoy is answered in its own order (headers, body, trailers) and in the way it asked: what ended by trailers is
  answered with trailers.
- In full duplex nothing but this exchange's own deadline protects a client from silence, so every state that waits
  for somebody other than the model server has one.
- Nothing reads a clock: `now` is seconds, monotonic.
Rejected: a flag per reply still owed (the reference): which replies may follow is then nowhere written down.
Source: Envoy's ext_proc protocol as Envoy 1.40 was seen to speak it; endpoint picker protocol (proposal 004).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from operator import itemgetter
from typing import Any, Final

import msgspec

from epp import dialects
from epp.errors import BadRequest, DecisionTimeout, InternalError, ProtocolError, Refusal, RequestTimeout, TooLarge
from epp.extproc.actions import (
    Action,
    AskDecision,
    Finished,
    Report,
    SendBufferedBody,
    SendImmediateResponse,
    SendRequestBody,
    SendRequestHeaders,
    SendRequestTrailers,
    SendResponseBody,
    SendResponseHeaders,
    SendResponseTrailers,
)
from epp.extproc.events import (
    BODY,
    BUFFERED,
    FULL_DUPLEX,
    NONE,
    TRAILERS,
    BodylessRequest,
    BodylessResponse,
    Decided,
    Event,
    Expired,
    Lost,
    Modes,
    Part,
    Refused,
    RequestData,
    RequestEnded,
    RequestStarted,
    ResponseData,
    ResponseEnded,
    ResponseStarted,
    TunnelRequested,
)
from epp.headers import CONTROL, DESTINATION, ROUTING, Headers, present
from epp.ticket import Outcome

CHUNK_BYTES: Final = 62_000
"""Largest piece of a body reply; the reference's, under the 64 KiB that Envoy's own documents name."""
OURS: Final = CONTROL | ROUTING
NAME: Final = itemgetter(0)


class Limits(msgspec.Struct, frozen=True):
    """What one exchange may cost."""

    max_body: int = 32 * 1024 * 1024
    """Bytes of a request body; one more is a 413."""
    body_timeout: float = 60.0
    """Seconds without a piece of a body that has not ended; then 408."""
    decision_timeout: float = 120.0
    """Seconds from the end of the request to a decision; then 503."""


class State(Enum):
    IDLE = "idle"
    READING = "reading"
    """The request is arriving."""
    DECIDING = "deciding"
    """The request is here; whoever decides has been asked."""
    FORWARDED = "forwarded"
    """The request is on its way to a model server."""
    ANSWERING = "answering"
    """The response is arriving."""
    CLOSED = "closed"
    """Nothing more is owed to Envoy."""

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is Python code, paid for at every event


WAITING: Final = frozenset((State.READING, State.DECIDING))
"""States that have a deadline."""
UNTOLD: Final = Modes()


class Exchange:
    """One request and its response, as the picker sees them on one ext_proc stream."""

    __slots__ = (
        "_deadline",
        "_ended_by",
        "_headers",
        "_is_counted",
        "_is_tunnel",
        "_limits",
        "_modes",
        "_pieces",
        "_size",
        "_subset",
        "state",
    )

    def __init__(self, limits: Limits) -> None:
        self.state = State.IDLE
        self._limits = limits
        self._modes = UNTOLD
        self._headers: Headers = ()
        self._pieces: list[bytes] = []
        self._size = 0
        self._subset: tuple[str, ...] | None = None
        self._ended_by: Part | None = None
        self._is_tunnel = False
        self._is_counted = False
        self._deadline: float | None = None

    def __repr__(self) -> str:
        counted = ", counted" if self._is_counted else ""
        return f"<Exchange [{self.state.value}{counted} | {sum(map(len, self._pieces))} bytes held]>"

    def receive(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do, in order.

        Raises:
            ProtocolError: the event is not allowed in this state; the exchange is closed then. Nothing else.
        """
        try:
            handler, after = TRANSITIONS[self.state, type(event)]
        except KeyError:
            before, self.state = self.state, State.CLOSED
            raise ProtocolError(_not_allowed(before, event)) from None
        self.state = after
        return handler(self, event, now)

    def next_deadline(self) -> float | None:
        """When `Expired` is due; None: this exchange waits for nobody but the model server."""
        return self._deadline if self.state in WAITING else None

    # -- the request ---------------------------------------------------------------------------------------------

    def _start(self, event: RequestStarted, now: float) -> list[Action]:
        self._begin(event, now + self._limits.body_timeout)
        mode = event.modes.request
        if mode is FULL_DUPLEX:
            return []
        if mode is BUFFERED:
            return [SendRequestHeaders()]  # Envoy sends the body only after this
        return self._refuse(
            InternalError(
                f"ext_proc sends request bodies as {mode.name}, which cannot be routed by content: set "
                "processing_mode.request_body_mode to FULL_DUPLEX_STREAMED (or BUFFERED)"
            )
        )

    def _start_bodyless(self, event: RequestStarted, now: float) -> list[Action]:
        self._begin(event, now + self._limits.decision_timeout)
        return [AskDecision(event.headers, b"", event.subset)]

    def _start_tunnel(self, event: RequestStarted, now: float) -> list[Action]:
        self._is_tunnel = True
        return self._start_bodyless(event, now)

    def _begin(self, event: RequestStarted, deadline: float) -> None:
        self._headers, self._modes, self._subset = event.headers, event.modes, event.subset
        self._deadline = deadline

    def _keep(self, event: RequestData | RequestEnded, now: float) -> list[Action]:
        self._size += len(event.data)
        if self._size > self._limits.max_body:
            return self._refuse(TooLarge(f"the request body is over {self._limits.max_body} bytes (--max-body)"))
        if event.data:
            self._pieces.append(event.data)
        if event.subset is not None:
            self._subset = event.subset
        self._deadline = now + self._limits.body_timeout
        return []

    def _ask(self, event: RequestEnded, now: float) -> list[Action]:
        refusal = self._keep(event, now)
        if refusal:
            return refusal
        if event.by is TRAILERS and self._modes.request is BUFFERED:
            # The headers have been answered and a reply to trailers cannot route.
            return self._refuse(BadRequest("a request that has trailers but no body cannot be routed"))
        self._ended_by = event.by
        self._deadline = now + self._limits.decision_timeout
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = [body]
        return [AskDecision(self._headers, body, self._subset)]

    def _forward(self, event: Decided, now: float) -> list[Action]:
        self._is_counted = True
        destination = ",".join(event.endpoints)
        remove = _forged(self._headers)
        if self._ended_by is not None and self._modes.request is BUFFERED:
            self._pieces.clear()
            return [SendBufferedBody(destination, event.set_headers, remove, event.body, event.scores)]
        actions: list[Action] = [SendRequestHeaders(destination, event.set_headers, remove, event.scores)]
        body = b"".join(self._pieces) if event.body is None else event.body
        self._pieces.clear()
        if self._ended_by is BODY:
            actions += _pieces_of(body, ends=True)
        elif self._ended_by is TRAILERS:
            actions += [*_pieces_of(body, ends=False), SendRequestTrailers()]
        elif self._is_tunnel and body:
            actions.append(SendRequestBody(body, last=False))
        return actions

    def _keep_frame(self, event: RequestData | RequestEnded, now: float) -> list[Action]:
        if not self._is_tunnel:
            self.state = State.CLOSED
            raise ProtocolError(_not_allowed(State.DECIDING, event))
        return self._keep(event, now)

    def _pass_frame(self, event: RequestData | RequestEnded, now: float) -> list[Action]:
        if self._is_tunnel:
            return [SendRequestBody(event.data, last=type(event) is RequestEnded)]
        if self.state is State.FORWARDED:
            self.state = State.CLOSED
            raise ProtocolError(_not_allowed(State.FORWARDED, event))
        return []  # the response overtook the request, and Envoy has dropped the rest of it

    def _end_again(self, event: RequestEnded, now: float) -> list[Action]:
        if event.by is TRAILERS and self._modes.request is not FULL_DUPLEX:
            return [SendRequestTrailers()]  # the body was answered when it came
        if event.by is BODY and not event.data and not self._is_tunnel:
            return []  # Envoy 1.35 to 1.37 was reported to end a large body twice (envoy#46237)
        return self._pass_frame(event, now)

    # -- refusing ------------------------------------------------------------------------------------------------

    def _refused(self, event: Refused, now: float) -> list[Action]:
        return self._refuse(event.refusal)

    def _expire(self, event: Expired, now: float) -> list[Action]:
        if self._ended_by is None and not self._is_tunnel:
            return self._refuse(RequestTimeout(f"no request body for {self._limits.body_timeout:g} s"))
        return self._refuse(DecisionTimeout(f"no decision within {self._limits.decision_timeout:g} s"))

    def _refuse(self, refusal: Refusal) -> list[Action]:
        self.state = State.CLOSED
        self._pieces.clear()
        answer = dialects.refuse(self._headers, refusal)
        reply = SendImmediateResponse(answer.status, answer.headers, answer.body, refusal)
        return [reply, *self._finish(Outcome.REFUSED)]

    # -- the response --------------------------------------------------------------------------------------------

    def _answer(self, event: ResponseStarted, now: float) -> list[Action]:
        if not self._headers:  # Envoy answers itself and the stream begins here
            self._modes = event.modes
        self._pieces.clear()
        return self._reported(event, SendResponseHeaders())

    def _answer_bodyless(self, event: ResponseStarted, now: float) -> list[Action]:
        return self._answer(event, now) + self._finish(Outcome.COMPLETE)

    def _pass_on(self, event: ResponseData, now: float) -> list[Action]:
        return self._reported(event, SendResponseBody(event.data, False))

    def _end(self, event: ResponseEnded, now: float) -> list[Action]:
        reply: Action = SendResponseTrailers()
        if event.by is BODY:
            reply = SendResponseBody(event.data, last=True)
        return self._reported(event, reply) + self._finish(Outcome.COMPLETE)

    def _reported(self, event: ResponseStarted | ResponseData | ResponseEnded, reply: Action) -> list[Action]:
        return [Report(event), reply] if self._is_counted else [reply]

    # -- the end -------------------------------------------------------------------------------------------------

    def _lose_request(self, event: Lost, now: float) -> list[Action]:
        self._pieces.clear()
        return self._finish(Outcome.UNANSWERED)

    def _lose_response(self, event: Lost, now: float) -> list[Action]:
        seen = self._modes.response is not NONE and not self._is_tunnel
        return self._finish(Outcome.CUT if seen else Outcome.COMPLETE)

    def _too_late(self, event: Decided, now: float) -> list[Action]:
        self._is_counted = True
        return self._finish(Outcome.UNANSWERED)

    def _ignore(self, event: Event, now: float) -> list[Action]:
        return []

    def _finish(self, outcome: Outcome) -> list[Action]:
        if not self._is_counted:
            return []
        self._is_counted = False
        return [Finished(outcome)]


def _forged(headers: Headers) -> tuple[str, ...]:
    """Headers that the model server must not see: the client's copies of ours, but for the one that is overwritten."""
    if OURS.isdisjoint(map(NAME, headers)):  # nearly always, and quickly known
        return ()
    return tuple(name for name in present(headers, OURS) if name != DESTINATION)


def _pieces_of(body: bytes, *, ends: bool) -> list[SendRequestBody]:
    if len(body) <= CHUNK_BYTES:
        return [SendRequestBody(body, ends)] if body or ends else []
    view = memoryview(body)  # 4 MB take 2 to 4 ms instead of 7 to 13: fresh memory costs more than copying into it
    starts = range(0, len(body), CHUNK_BYTES)
    return [SendRequestBody(view[at : at + CHUNK_BYTES], ends and at + CHUNK_BYTES >= len(body)) for at in starts]


def _not_allowed(state: State, event: Event) -> str:
    what = f"{type(event).__name__} is not allowed while the exchange is {state.value}"
    if state is State.IDLE:
        what += ": set processing_mode.request_header_mode of the ext_proc filter to SEND"
    return what


# One handler takes one event type; the table pairs them, which mypy cannot follow.
Handler = Callable[[Exchange, Any, float], list[Action]]

TRANSITIONS: Final[dict[tuple[State, type], tuple[Handler, State]]] = {
    (State.IDLE, RequestStarted): (Exchange._start, State.READING),
    (State.IDLE, BodylessRequest): (Exchange._start_bodyless, State.DECIDING),
    (State.IDLE, TunnelRequested): (Exchange._start_tunnel, State.DECIDING),
    (State.READING, RequestData): (Exchange._keep, State.READING),
    (State.READING, RequestEnded): (Exchange._ask, State.DECIDING),
    (State.DECIDING, RequestData): (Exchange._keep_frame, State.DECIDING),
    (State.DECIDING, RequestEnded): (Exchange._keep_frame, State.DECIDING),
    (State.DECIDING, Decided): (Exchange._forward, State.FORWARDED),
    (State.FORWARDED, RequestData): (Exchange._pass_frame, State.FORWARDED),
    (State.FORWARDED, RequestEnded): (Exchange._end_again, State.FORWARDED),
    (State.FORWARDED, ResponseStarted): (Exchange._answer, State.ANSWERING),
    (State.FORWARDED, BodylessResponse): (Exchange._answer_bodyless, State.CLOSED),
    (State.FORWARDED, ResponseData): (Exchange._pass_on, State.ANSWERING),  # response_header_mode SKIP
    (State.FORWARDED, ResponseEnded): (Exchange._end, State.CLOSED),
    (State.ANSWERING, RequestData): (Exchange._pass_frame, State.ANSWERING),
    (State.ANSWERING, RequestEnded): (Exchange._pass_frame, State.ANSWERING),
    (State.ANSWERING, ResponseData): (Exchange._pass_on, State.ANSWERING),
    (State.ANSWERING, ResponseEnded): (Exchange._end, State.CLOSED),
    # Envoy answers itself (400, 413, 431, 504): before a request, or overtaking one.
    **{
        (state, event): (handler, after)
        for state in (State.IDLE, State.READING, State.DECIDING)
        for event, handler, after in (
            (ResponseStarted, Exchange._answer, State.ANSWERING),
            (BodylessResponse, Exchange._answer_bodyless, State.CLOSED),
        )
    },
    # Refused: no endpoint, a full queue; after a decision it is an eviction.
    **{(state, Refused): (Exchange._refused, State.CLOSED) for state in (State.DECIDING, State.FORWARDED)},
    **{(state, Expired): (Exchange._expire, State.CLOSED) for state in (State.READING, State.DECIDING)},
    # A decision or refusal that crossed a disconnect or a local reply.
    **{(state, Decided): (Exchange._too_late, state) for state in (State.ANSWERING, State.CLOSED)},
    **{(state, Refused): (Exchange._ignore, state) for state in (State.ANSWERING, State.CLOSED)},
    **{(state, Expired): (Exchange._ignore, state) for state in (State.FORWARDED, State.ANSWERING, State.CLOSED)},
    # The stream may end at any point, and what was under way when we closed is of no interest.
    **{(state, Lost): (Exchange._lose_request, State.CLOSED) for state in State if state is not State.ANSWERING},
    (State.ANSWERING, Lost): (Exchange._lose_response, State.CLOSED),
    **{
        (State.CLOSED, event): (Exchange._ignore, State.CLOSED)
        for event in (RequestData, RequestEnded, ResponseStarted, BodylessResponse, ResponseData, ResponseEnded)
    },
}
