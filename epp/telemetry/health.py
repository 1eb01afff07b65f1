"""grpc.health.v1: is this picker alive, and should traffic come here?

In: what the server says of itself: `set_ready`, `set_leading`, `set_draining`. Out: answers to Check, List and Watch.
Rules here:
- `liveness` is SERVING as long as the process answers at all, also while it is not ready or drains: a restart would
  help nobody.
- Without an election every other name asks for readiness: the names of the reference's probes, ext_proc's own, the
  empty one, and any that a manifest may have made up.
- With one, `readiness`, ext_proc's name and the empty one ask whether we are ready and lead; no other name is known.
  Check says so in an answer, SERVICE_UNKNOWN, as the reference does, rather than with the status NOT_FOUND.
- Watch tells every change that lasts; the reference has no Watch, and its liveness fails while it drains.
Source: grpc/health/v1/health.proto; llm-d router, `cmd/epp/runner/health.go`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListResponse,
)

from epp.errors import ProtocolError

LIVENESS: Final = "liveness"
ELECTED: Final = ("", LIVENESS, "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
"""The names that are known where there is an election."""
LISTED: Final = (*ELECTED, "inference-extension")

SERVING: Final[int] = HealthCheckResponse.SERVING
NOT_SERVING: Final[int] = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Final[int] = HealthCheckResponse.SERVICE_UNKNOWN

Push = Callable[[bytes], None]


class Health:
    """The state, and the service that tells it. Not ready until told so."""

    def __init__(self, *, elected: bool = False) -> None:
        """
        Args:
            elected: there is an election, which nobody has won yet.
        """
        self._elected = elected
        self._ready = False
        self._leading = not elected
        self._draining = False
        self.watching: set[Watch] = set()

    def __repr__(self) -> str:
        return f"<Health ready={self._ready} leading={self._leading} draining={self._draining}>"

    def set_ready(self, ready: bool) -> None:
        """Decisions can be made, or not any more."""
        self._ready = ready
        self._tell()

    def set_leading(self, leads: bool) -> None:
        """The election is won, or lost again."""
        self._leading = leads
        self._tell()

    def set_draining(self) -> None:
        """No new traffic, for good: this process is about to end."""
        self._draining = True
        self._tell()

    def status(self, service: str) -> int:
        if self._elected and service not in ELECTED:
            return SERVICE_UNKNOWN
        if service == LIVENESS or (self._ready and self._leading and not self._draining):
            return SERVING
        return NOT_SERVING

    def methods(self) -> Mapping[str, Callable[[object, Push, float], Answer | Watch]]:
        """The service, for any transport and for as many as needed."""
        return {
            "/grpc.health.v1.Health/Check": lambda peer, push, now: Answer(self._check),
            "/grpc.health.v1.Health/List": lambda peer, push, now: Answer(self._list),
            "/grpc.health.v1.Health/Watch": lambda peer, push, now: Watch(self, push),
        }

    def told(self, service: str) -> bytes:
        """A HealthCheckResponse."""
        answer: bytes = HealthCheckResponse(status=self.status(service)).SerializeToString()
        return answer

    def _check(self, request: bytes) -> bytes:
        return self.told(service_of(request))

    def _list(self, _: bytes) -> bytes:
        names = ELECTED if self._elected else LISTED
        answers = {name: HealthCheckResponse(status=self.status(name)) for name in names}
        listed: bytes = HealthListResponse(statuses=answers).SerializeToString()
        return listed

    def _tell(self) -> None:
        for watch in tuple(self.watching):
            watch.tell()


class Answer:
    """A call of one question and one answer."""

    ends_with_peer = True

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self.closed = False

    def receive(self, message: bytes, now: float) -> list[bytes]:
        self.closed = True
        return [self._answer(message)]

    def next_deadline(self) -> None:
        return None

    def tick(self, now: float) -> list[bytes]:
        return []

    def lose(self, now: float) -> None:
        pass


class Watch:
    """A call that is told every change until its client leaves."""

    ends_with_peer = False
    closed = False

    def __init__(self, health: Health, push: Push) -> None:
        self._health = health
        self._push = push
        self._service = ""
        self._told: int | None = None

    def receive(self, message: bytes, now: float) -> list[bytes]:
        self._service = service_of(message)
        self._health.watching.add(self)
        self._told = self._health.status(self._service)
        return [self._health.told(self._service)]

    def tell(self) -> None:
        """Something may have changed."""
        status = self._health.status(self._service)
        if status != self._told:
            self._told = status
            self._push(self._health.told(self._service))

    def next_deadline(self) -> None:
        return None

    def tick(self, now: float) -> list[bytes]:
        return []

    def lose(self, now: float) -> None:
        self._health.watching.discard(self)


def service_of(request: bytes) -> str:
    """Raises ProtocolError."""
    try:
        service: str = HealthCheckRequest.FromString(request).service
    except DecodeError:
        raise ProtocolError("not a HealthCheckRequest") from None
    return service
