"""What users must see, and what a GPU costs: as an operator writes it.

In: "ttft_p90=2s,itl_p90=50ms" and "h100=2.5"; requests of a world. Out: a `Goal`, and whether requests keep it; what a
server costs an hour.
Rules here: times are a client's, so what HTTP and the tokenizer take is in them. A request that failed is over every
limit, so that nobody meets a goal by refusing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from epp.errors import ConfigError
from epp.sim.figures import FLOOR, FLOOR_A_TOKEN, ranked
from epp.sim.profile import EngineProfile
from epp.sim.world import Asked
from epp.units import parse_duration

_LIMIT: Final = re.compile(r"(ttft|itl|e2e)_p([1-9]\d?)", re.ASCII)


class Limit(msgspec.Struct, frozen=True):
    """So many of a hundred requests are within so many seconds."""

    measure: Literal["ttft", "itl", "e2e"]
    percent: int
    """1..99."""
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.measure}_p{self.percent}"

    def of(self, asked: Asked) -> float:
        """A request's seconds; infinite: it failed."""
        if asked.refusal:
            return math.inf
        floor = 0.0 if self.measure == "itl" else FLOOR + FLOOR_A_TOKEN * asked.prompt_tokens
        return floor + float(getattr(asked, self.measure))

    def reached(self, requests: Sequence[Asked]) -> float:
        """The percentile of these requests, at least one, by nearest rank."""
        found = ranked(sorted(map(self.of, requests)), self.percent / 100)
        assert found is not None
        return found


class Goal(msgspec.Struct, frozen=True):
    """All limits that requests must keep together; one a measure."""

    limits: tuple[Limit, ...]

    def met(self, requests: Sequence[Asked]) -> bool:
        return all(limit.reached(requests) <= limit.seconds for limit in self.limits)

    def missed(self, asked: Asked) -> bool:
        """Whether one request is over any limit."""
        return any(limit.of(asked) > limit.seconds for limit in self.limits)


def parse_goal(text: str) -> Goal:
    """Read "ttft_p90=2s,itl_p90=50ms".

    Raises:
        ConfigError: it is none.
    """
    limits = tuple(_limit(text, part.strip()) for part in text.split(","))
    if len({limit.measure for limit in limits}) < len(limits):
        raise ConfigError(f"--slo {text}: one limit for each of ttft, itl and e2e is expected")
    return Goal(limits)


def _limit(text: str, part: str) -> Limit:
    name, _, duration = part.partition("=")
    match = _LIMIT.fullmatch(name.strip())
    try:
        seconds = parse_duration(duration)
    except ValueError as error:
        raise ConfigError(f"--slo {text}: {error}") from error
    if match is None:
        raise ConfigError(f"--slo {text}: {name!r} is none of ttft_p1 to ttft_p99, itl_p1 … and e2e_p1 …")
    return msgspec.convert({"measure": match[1], "percent": int(match[2]), "seconds": seconds}, Limit)


# -- prices ------------------------------------------------------------------------------------------------------------


def parse_prices(texts: Sequence[str]) -> dict[str, float]:
    """Read "h100=2.5,l40s=0.8": what a GPU costs an hour, by its name in engine profiles.

    Raises:
        ConfigError: it is none.
    """
    prices = {}
    for part in (part for text in texts for part in text.split(",")):
        name, _, price = part.partition("=")
        try:
            prices[name.strip().lower()] = msgspec.convert(price, float, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--price {part}: expected a GPU and what it costs an hour, as in h100=2.5") from error
    if not all(0 <= price < math.inf for price in prices.values()):
        raise ConfigError("--price: what a GPU costs an hour is expected, 0 or more")
    return prices


def price_of(engine: EngineProfile, prices: dict[str, float]) -> float | None:
    """What a server with this engine costs an hour; None: no price was given.

    Raises:
        ConfigError: prices were given, and none for its GPU.
    """
    if not prices:
        return None
    if engine.gpu not in prices:
        missing = f"--price {engine.gpu}=…" if engine.gpu else "gpu: and gpus: in its profile"
        raise ConfigError(f"engine {engine.name} needs {missing}; prices are known of {', '.join(prices)}")
    return engine.gpus * prices[engine.gpu]
