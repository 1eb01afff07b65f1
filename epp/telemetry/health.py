"""grpc.health.v1: is this picker alive, and should traffic come here?

In: what the server says of itself, `set_ready` and `set_draining`. Out: answers to Check, List and Watch.
Rules here:
- `liveness` is SERVING as long as the process answers at all, also while it is not ready or drains: a restart would
  help nobody.
- Every other name asks for readiness: the names of the reference's probes, ext_proc's own, the empty one, and any that
  a manifest may have made up, as the reference does without leader election.
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
LISTED: Final = (
    "",
    LIVENESS,
    "readiness",
    "inference-extension",
    "envoy.service.ext_proc.v3.ExternalProcessor",
)

Push = Callable[[bytes], None]


class Health:
    """The state, and the service that tells it. Not ready until told so."""

    def __init__(self) -> None:
        self._ready = False
        self._draining = False
        self.watching: set[Watch] = set()

    def __repr__(self) -> str:
        return f"<Health ready={self._ready} draining={self._draining}>"

    def set_ready(self, ready: bool) -> None:
        """Decisions can be made, or not any more."""
        self._ready = ready
        self._tell()

    def set_draining(self) -> None:
        """No new traffic, for good: this process is about to end."""
        self._draining = True
        self._tell()

    def is_serving(self, service: str) -> bool:
        return service == LIVENESS or (self._ready and not self._draining)

    def methods(self) -> Mapping[str, Callable[[object, Push, float], Answer | Watch]]:
        """The service, for any transport and for as many as needed."""
        return {
            "/grpc.health.v1.Health/Check": lambda peer, push, now: Answer(self._check),
            "/grpc.health.v1.Health/List": lambda peer, push, now: Answer(self._list),
            "/grpc.health.v1.Health/Watch": lambda peer, push, now: Watch(self, push),
        }

    def told(self, service: str) -> bytes:
        """A HealthCheckResponse."""
        answer: bytes = self._answer(service).SerializeToString()
        return answer

    def _check(self, request: bytes) -> bytes:
        return self.told(service_of(request))

    def _list(self, _: bytes) -> bytes:
        answers = {service: self._answer(service) for service in LISTED}
        listed: bytes = HealthListResponse(statuses=answers).SerializeToString()
        return listed

    def _answer(self, service: str) -> HealthCheckResponse:
        serving = self.is_serving(service)
        return HealthCheckResponse(status=HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

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
        self._told: bool | None = None

    def receive(self, message: bytes, now: float) -> list[bytes]:
        self._service = service_of(message)
        self._health.watching.add(self)
        self._told = self._health.is_serving(self._service)
        return [self._health.told(self._service)]

    def tell(self) -> None:
        """Something may have changed."""
        serving = self._health.is_serving(self._service)
        if serving != self._told:
            self._told = serving
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
