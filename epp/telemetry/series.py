"""Accumulators behind /metrics: counts that cost well under a microsecond, and sets of labels that stay bounded.

In: observations, on the path of a request. Out: plain numbers, read when somebody scrapes.
Rules here:
- Nothing that a client sends makes memory grow without a limit: values of labels are cut, sets of labels are counted,
  and whatever is over a limit is added up under `other`.
- A set of labels that was admitted stays admitted, and one that was not never is: what is counted up under some
  labels is counted down under the same.
- Bounds of what is measured in seconds are floats, of what is counted are ints: comparing one with the other would
  make an observation cost half as much again.
- Pure: no clock, no lock (one event loop), no format.
Rejected: prometheus_client's histograms on the hot path: ten observations under four labels take 19 us (9 us where the
labels are looked up before) against 1.9 us here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Final, Generic, TypeVar

import msgspec

OTHER: Final = "other"
"""Value of every label of whatever is over a limit; the reference's word."""

Bounds = tuple[float, ...]
Accumulator = TypeVar("Accumulator")


class Limits(msgspec.Struct, frozen=True):
    """What keeps the number and the size of series bounded."""

    label_sets: int = 100
    """Sets of request labels. A full one takes 4.5 KiB of memory, and of the page 255 lines (40 KiB) and, where it
    brings a model of its own, 160 more (60 KiB in all), where names have 16 characters."""
    endpoint_sets: int = 10_000
    """Sets of labels that name an endpoint: 100 models on 100 endpoints are told apart. One takes 300 bytes of memory
    and a line under each of two names."""
    models: int = 1000
    """Distinct model names, target models included (the reference's cap)."""
    fairness_ids: int = 1000
    """Distinct fairness ids (the reference's cap)."""
    label_length: int = 128
    """Characters of a label's value."""


class Histogram:
    """Counts per bucket and their sum. A value equal to a bound belongs to that bound's bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Bounds) -> None:
        """
        Args:
            bounds: upper bounds, ascending, without +Inf.
        """
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Not cumulative; the last is everything over the last bound."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Add another histogram of the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> Iterator[int]:
        """Observations up to each bound, the last up to +Inf."""
        return accumulate(self.counts)


class Capped:
    """The first `limit` distinct values are themselves; every later one is `other`."""

    __slots__ = ("_limit", "_seen")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def bound(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value


class LabelSets(Generic[Accumulator]):
    """One accumulator for each set of labels, up to a limit; the rest share one, whose labels are all `other`."""

    __slots__ = ("_limit", "_make", "_other", "_sets", "_width")

    def __init__(self, width: int, limit: int, make: Callable[[tuple[str, ...]], Accumulator]) -> None:
        """
        Args:
            width: number of labels.
            limit: sets of labels, `other` not counted.
            make: makes the accumulator of a set of labels.
        """
        self._width = width
        self._limit = limit
        self._make = make
        self._sets: dict[tuple[str, ...], Accumulator] = {}
        self._other: Accumulator | None = None

    def get(self, labels: tuple[str, ...]) -> Accumulator:
        """The accumulator of these labels. They are kept when new: cut them first (`cut`)."""
        found = self._sets.get(labels)
        if found is not None:
            return found
        if len(self._sets) < self._limit:
            self._sets[labels] = made = self._make(labels)
            return made
        if self._other is None:
            self._other = self._make((OTHER,) * self._width)
        return self._other

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], Accumulator]]:
        """Labels and accumulators, in the order in which they were first seen, `other` last. Sets may be added
        meanwhile; whoever goes through in slices does not see those."""
        for labels in list(self._sets):  # ten times faster to copy than items(), and no set is ever taken away
            yield labels, self._sets[labels]
        if self._other is not None:
            yield (OTHER,) * self._width, self._other


class Counter:
    """Counts by labels. Those that a client may choose must be cut and bounded before."""

    __slots__ = ("_sets",)

    def __init__(self, width: int, limit: int = 100) -> None:
        self._sets: LabelSets[list[float]] = LabelSets(width, limit, lambda _: [0.0])

    def add(self, *labels: str) -> None:
        self._sets.get(labels)[0] += 1.0

    def cell(self, *labels: str) -> list[float]:
        """Where these labels are counted, for whoever remembers it: one number, to be added to."""
        return self._sets.get(labels)

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], float]]:
        return ((labels, cell[0]) for labels, cell in self._sets)


def cut(value: str, length: int) -> str:
    """A label's value that is short enough and can be encoded: half of a surrogate pair would break every page."""
    if len(value) <= length and value.isascii():
        return value
    return value[:length].encode("utf-8", "replace").decode("utf-8")
