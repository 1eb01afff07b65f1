"""grpc.health.v1: is this picker alive, and should traffic come here?

In: what the server says of itself, `set_ready` and `set_draining`. Out: answers to Check, List and Watch.
Rules here:
- `liveness` is SERVING as long as the process answers at all, also while it is not ready or drains: a restart would
  help nobody.
- Every other name asks for readiness: the names of the reference's probes, ext_proc's own, the empty one, and any that
  a manifest may have made up, as the reference does without leader election.
- Watch tells every change; the reference has no Watch, and its liveness fails while it drains.
Source: grpc/health/v1/health.proto; llm-d router, `cmd/epp/runner/health.go`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import grpc
from grpc import aio
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from epp.errors import ConfigError

SERVICE: Final = "grpc.health.v1.Health"
LIVENESS: Final = "liveness"
LISTED: Final = (
    "",
    LIVENESS,
    "readiness",
    "inference-extension",
    "envoy.service.ext_proc.v3.ExternalProcessor",
)


class Health:
    """The state, and the service that tells it. Not ready until told so."""

    def __init__(self) -> None:
        self._ready = False
        self._draining = False
        self._changed = asyncio.Event()

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

    def register(self, server: aio.Server) -> None:
        """Offer the service on a server that has not started; on as many as needed."""
        handler = grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    self._check, HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
                ),
                "List": grpc.unary_unary_rpc_method_handler(
                    self._list, HealthListRequest.FromString, HealthListResponse.SerializeToString
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self._watch, HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
                ),
            },
        )
        server.add_generic_rpc_handlers((handler,))

    # -- the service ---------------------------------------------------------------------------------------------

    async def _check(self, request: HealthCheckRequest, _: object) -> HealthCheckResponse:
        return self._answer(request.service)

    async def _list(self, _: HealthListRequest, __: object) -> HealthListResponse:
        return HealthListResponse(statuses={service: self._answer(service) for service in LISTED})

    async def _watch(self, request: HealthCheckRequest, _: object) -> AsyncIterator[HealthCheckResponse]:
        told = None
        while True:
            changed = self._changed  # taken before the state is read, so that no change is missed
            serving = self.is_serving(request.service)
            if serving != told:
                told = serving
                yield self._answer(request.service)
            await changed.wait()

    def _answer(self, service: str) -> HealthCheckResponse:
        serving = self.is_serving(service)
        return HealthCheckResponse(status=HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class HealthServer:
    """The health port, in plaintext: probes have no certificates."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._server: aio.Server | None = None

    async def start(self, port: int, host: str = "[::]") -> int:
        """Bind and serve; returns the port.

        Args:
            port: 0: any that is free.
            host: "[::]" is every address, IPv4 too.

        Raises:
            ConfigError: the port cannot be bound.
        """
        self._server = aio.server(options=[("grpc.so_reuseport", 0)])  # else two pickers share a port without a word
        self._health.register(self._server)
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise ConfigError(f"--grpc-health-port {port} cannot be bound; choose another") from None
        await self._server.start()
        return bound

    async def stop(self) -> None:
        """End it, open watches included."""
        if self._server is not None:
            await self._server.stop(None)
