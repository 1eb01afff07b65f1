"""Every refusal and its status; what is wrong with a configuration; what a peer may not say.

Three families, and no more:
- `Refusal`: the client gets an answer of ours instead of a model's, rendered in its dialect by `epp.dialects`;
- `ConfigError`: the operator gets file, line, column, path and what was expected;
- `ProtocolError`: Envoy said something illegal; the stream ends with a gRPC status.
A mistake of our own is an `assert` or any other exception: it ends the one request with `InternalError`, is
counted and logged, and harms no other request.
"""

from __future__ import annotations

from typing import ClassVar


class Refusal(Exception):
    """The client gets an answer of ours instead of a model's."""

    status: ClassVar[int] = 500
    """HTTP status of the answer."""
    code: ClassVar[str] = "Internal"
    """Value of `error_code` in metrics; the reference's names (llm-d-router `errcommon`)."""
    reason: ClassVar[str] = ""
    """Value of `x-llm-d-request-dropped-reason`; empty sends none."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Seconds after which trying again may help; None sends no Retry-After."""


class BadRequest(Refusal):
    """The body or the path cannot be understood, or the model is missing."""

    status = 400
    code = "BadRequest"


class RequestTimeout(Refusal):
    """The client did not finish its request body in time."""

    status = 408
    code = "BadRequest"


class TooLarge(Refusal):
    """The request body is over `--max-body`."""

    status = 413
    code = "BadRequest"


class NoEndpoint(Refusal):
    """No endpoint may serve this request now: empty pool, empty subset, or every candidate filtered out."""

    status = 503
    code = "ServiceUnavailable"
    reason = "rejected-no-endpoints"

    def __init__(self, message: str, *, retry_after: float | None = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class Saturated(Refusal):
    """The servers are full, and the request's priority is below 0."""

    status = 429
    code = "ResourceExhausted"
    reason = "rejected-saturated"

    def __init__(self, message: str, *, retry_after: float | None = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class DecisionTimeout(Refusal):
    """No decision was reached before the exchange's deadline."""

    status = 503
    code = "ServiceUnavailable"
    reason = "rejected-ttl-expired"

    def __init__(self, message: str, *, retry_after: float | None = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class ShuttingDown(Refusal):
    """This picker is being stopped; another one will answer."""

    status = 503
    code = "ServiceUnavailable"
    reason = "rejected-shutting-down"

    def __init__(self, message: str, *, retry_after: float | None = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class InternalError(Refusal):
    """A mistake of our own. The message names no detail: those are in the log."""


class ConfigError(Exception):
    """What the operator wrote cannot be used; says where, what was expected and what to do."""

    def __init__(self, message: str, *, file: str = "", line: int = 0, column: int = 0, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.line = line
        """From 1; 0: the whole file."""
        self.column = column
        self.path = path
        """Where in the document, as `plugins[2].parameters.unknown`."""

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        return ": ".join(part for part in (where, self.path, self.message) if part)


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow; the stream ends with INVALID_ARGUMENT and this message."""
