"""Quantities and durations as operators write them in Kubernetes and Go.

Rules here: a parameter of type `Duration` or `Quantity` holds what was written; whoever uses it parses it, once.
Source: apimachinery's resource.Quantity; Go's time.ParseDuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Final

import msgspec

_BINARY: Final = {name: Fraction(1024**power) for power, name in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)}
_DECIMAL: Final = {name: Fraction(1000**power) for power, name in enumerate(("k", "M", "G", "T", "P", "E"), 1)}
_SMALL: Final = {"n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000)}
_SUFFIXES: Final = {"": Fraction(1), **_BINARY, **_DECIMAL, **_SMALL}
_QUANTITY: Final = re.compile(r"\+?(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,3})|([a-zA-Z]*))", re.ASCII)

_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART: Final = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_DURATION: Final = re.compile(rf"\+?(?:{_PART.pattern})+", re.ASCII)


def parse_quantity(text: str) -> int:
    """A Kubernetes quantity as a whole number, rounded up: "32Mi", "1.5G", "1e6", "4096"; "32MiB" is tolerated.

    Raises:
        ValueError: it is none, or negative.
    """
    match = _QUANTITY.fullmatch(text.strip())
    suffix = (match[3] or "").removesuffix("B") if match else ""
    if match is None or suffix not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity: write a number, as 4096, 32Mi or 1.5G")
    scale = Fraction(10) ** int(match[2]) if match[2] else _SUFFIXES[suffix]
    return math.ceil(Fraction(match[1]) * scale)


def parse_duration(text: str) -> float:
    """A Go duration in seconds: "50ms", "1.5s", "2h45m", "0".

    Raises:
        ValueError: it is none, or negative.
    """
    stripped = text.strip()
    if stripped == "0":
        return 0.0
    if not _DURATION.fullmatch(stripped):
        raise ValueError(f"{text!r} is not a duration: write a number with a unit, as 50ms, 2s, 1.5h or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(stripped))


class Written(msgspec.Struct, frozen=True):
    """Says of a parameter how its text is to be written, so that a mistake is told at its place."""

    parse: Callable[[str], object]
    """Raises ValueError, which says what was expected."""


_NUMBER: Final = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
Duration = Annotated[
    str,
    Written(parse_duration),
    msgspec.Meta(extra_json_schema={"pattern": rf"^\s*(0|\+?({_NUMBER}(ns|us|µs|μs|ms|s|m|h))+)\s*$"}),
]
"""A Go duration."""
Quantity = Annotated[
    int | str,
    Written(parse_quantity),
    msgspec.Meta(extra_json_schema={"pattern": rf"^\s*\+?{_NUMBER}([eE][+-]?[0-9]{{1,3}}|[a-zA-Z]*)\s*$"}),
]
"""A Kubernetes quantity; a plain number too."""
