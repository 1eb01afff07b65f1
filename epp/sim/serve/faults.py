"""What a simulated server does wrong, on purpose: for tests and for the soak, in which servers fail all the time.

In: a spec such as `stall=0.02,reset=0.02,error=0.05,metrics=hang`, or the same as JSON while the server runs. Out: for
each request, one `Fault` or none, drawn from a seeded generator.
"""

from __future__ import annotations

from enum import Enum
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta

from epp.errors import ConfigError

Share = Annotated[float, Meta(ge=0, le=1)]


class Fault(Enum):
    """What happens to one request."""

    STALL = "stall"
    """It is taken and never answered."""
    RESET = "reset"
    """The connection is cut before the headers."""
    CUT = "cut"
    """The connection is cut after the headers."""
    ERROR = "error"
    """It gets a 500 at once."""


class MetricsFault(Enum):
    """What happens to every fetch of the metrics page."""

    NONE = "none"
    HANG = "hang"
    """It is never answered."""
    GARBAGE = "garbage"
    """The answer is a 200 with bytes that mean nothing."""
    DIE = "die"
    """The connection is cut."""


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shares of the requests, and what is wrong with the metrics page."""

    stall: Share = 0.0
    reset: Share = 0.0
    """Half of them before the headers, half after."""
    error: Share = 0.0
    metrics: MetricsFault = MetricsFault.NONE

    def __post_init__(self) -> None:
        if self.stall + self.reset + self.error > 1:
            raise ValueError("stall, reset and error together must not be over 1")

    def draw(self, rng: Random) -> Fault | None:
        """What happens to the next request. Takes one number of the generator, whatever the shares are."""
        at = rng.random()
        edges = (
            (Fault.STALL, self.stall),
            (Fault.RESET, self.reset / 2),
            (Fault.CUT, self.reset / 2),
            (Fault.ERROR, self.error),
        )
        for fault, share in edges:
            if at < share:
                return fault
            at -= share
        return None


def parse_faults(spec: str) -> Faults:
    """Read `name=value,name=value`; empty: none.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    pairs = [part.partition("=") for part in spec.split(",") if part.strip()]
    try:
        return msgspec.convert({name.strip(): value.strip() for name, _, value in pairs}, Faults, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--faults {spec!r}: {error}; expected as in stall=0.02,reset=0.02,error=0.05,metrics=hang|garbage|die"
        ) from error
