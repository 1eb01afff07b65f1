"""Single requests of a run, as columns: what distributions and courses over time are drawn from.

In: times of each request. Out: `Samples` by stage, `Busy` by server. The simulator and the load client both fill them.
Rules here: times are of requests that were answered; how many were asked stands beside them, so that a distribution can
end below 1 where some were refused. A request is on its server from when it was sent to its last token.
Rejected: to keep every request itself (a run of 17,000 holds 17,000 prompts; its columns are 0.5 MB).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

POINTS: Final = 300
"""Moments at which the servers are looked at, over a whole run."""

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]
Times = tuple[float, float | None, float]
"""TTFT, ITL and E2E of one request; ITL is None where there is one token."""


class Columns(msgspec.Struct, frozen=True, eq=False):
    """Equal where every array is."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True) for name in self.__struct_fields__
        )


class Samples(Columns, frozen=True, eq=False):
    """Answered requests, stage by stage; all of shape (answered,). Seconds."""

    ttft: Floats
    itl: Floats
    """NaN: there was one token, and nothing between two."""
    e2e: Floats
    stage: Counts
    """Which of the measured stages, from 0."""
    asked: Counts
    """Requests of each stage, refused ones among them; shape (stages,)."""


class Busy(Columns, frozen=True, eq=False):
    """Requests on each server over time, those that wait there among them."""

    at: Floats
    """Seconds from the begin; shape (K,)."""
    counts: Counts
    """Shape (servers, K)."""


class Point(msgspec.Struct, frozen=True):
    """One stage."""

    rate: float
    values: Mapping[str, tuple[float, float]]
    """By the figure's name: its mean over seeds, and half the width of its 95 % interval, 0 where nothing is known of
    it. What nobody measured is missing."""


class Shown(msgspec.Struct, frozen=True, eq=False):
    """One policy, or one target."""

    name: str
    points: tuple[Point, ...]
    """In the order of its stages."""
    samples: tuple[Samples, ...]
    """One a seed."""
    busy: Busy
    """Of one seed."""


def samples(stages: Sequence[Sequence[Times | None]]) -> Samples:
    """Columns of all requests, stage by stage; None is one that was not answered."""
    answered = [(*times, at) for at, stage in enumerate(stages) for times in stage if times is not None]
    columns = np.array(answered, dtype=np.float64).reshape(-1, 4).T.copy()  # None becomes NaN
    asked = np.array([len(each) for each in stages], np.int32)
    return Samples(columns[0], columns[1], columns[2], columns[3].astype(np.int32), asked)


def busy(requests: Iterable[tuple[int, float, float]], servers: int, begin: float, end: float) -> Busy:
    """How many requests each server had, at `POINTS` moments.

    Args:
        requests: server, when it was sent there, when its last token came; a negative server is none.
        begin: seconds, of what is shown; what came before and has not ended counts.
    """
    at = np.linspace(begin, end, POINTS)
    return Busy(at - begin, in_flight(requests, servers, at))


def in_flight(requests: Iterable[tuple[int, float, float]], servers: int, at: Floats) -> Counts:
    """Requests on each server at these moments, sorted; shape (servers, K). A request is there until it ends."""
    rows = np.array(list(requests), dtype=np.float64).reshape(-1, 3)
    counts = np.zeros((servers, len(at)), np.int32)
    for server in range(servers):
        mine = rows[rows[:, 0] == server]
        came = np.searchsorted(np.sort(mine[:, 1]), at, side="right")
        counts[server] = came - np.searchsorted(np.sort(mine[:, 2]), at, side="right")
    return counts
