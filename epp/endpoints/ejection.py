"""Passive ejection: an endpoint that fails fast looks idle and would attract everything, so it is left out a while.

In: results of requests, as their responses begin. Out: a mask of the endpoints to leave out now.
Rules here:
- So many failures in a row eject. The pause grows with each ejection in a row; behaving well for as long as the first
  pause takes one ejection off the row again.
- After the pause the endpoint is on probation: one failure ejects again, one success ends it. It also starts slowly.
- Never more than a share of the pool is out, and never all of the candidates: where everything fails, the fault is
  not the endpoints', and somebody has to answer.
- Results that arrive during the pause change nothing, neither do those of requests sent before it ended: what was
  under way when the endpoint broke must not eject it a second time.
- State belongs to a slot and its generation: another endpoint in the same slot starts clean.
- That another endpoint served in its place is a failure only of one that the proxy knows: a refused connection looks
  like a name that is no host of the proxy's yet. Known is who was sent a request that it answered itself, with whatever
  status, since it was listed; and everyone `unknown_for` seconds after that.
  (a) Our own EDS tells a new endpoint within a fraction of a second: its first requests are passed over, then it
  answers and is judged like any other. (b) A gateway whose discovery lags by seconds: likewise. A lag of more than
  `unknown_for` costs pauses, which end before it has lasted twice as long.
  (c) One that is dead from the start never answers: it is judged after `unknown_for`, and until then slow start,
  whose window is as long, bounds what it attracts (where all are new, it gets its share); each such request is retried.
Rejected: a failure rate over a window (at one request a minute it never fires, at 1,000/s it fires late); active
probes (a model server's health path answers while its engine is wedged); counting the failed scrapes in (a page that
does not come makes values unknown, and nothing else). For who is known: its first answer alone (what is dead from the
start would be sought for ever); a time alone (a picker that has just started would overlook the death of a server that
it has used); Envoy's number of attempts (`include_attempt_count_in_response`: exact, but only where it is turned on).
Source: Envoy's outlier detection (`consecutive_5xx` 5; pause = `base_ejection_time` x ejections in a row, at most
`max_ejection_time` 300 s; `max_ejection_percent`). The base is 10 s here instead of 30 s, the share 50 % instead of
10 %: pools are small and model servers restart in place.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from epp.endpoints.table import Bools, EndpointTable, Slots


class EjectionParams(msgspec.Struct, frozen=True):
    """When an endpoint is left out, and for how long."""

    failures: int = 5
    """Failures in a row that eject."""
    pause: float = 10.0
    """Seconds of the first pause; the n-th in a row takes n times as long."""
    longest: float = 300.0
    """Seconds that no pause exceeds."""
    share: float = 0.5
    """Share of the pool that may be out at once, rounded down; one endpoint always stays in."""
    unknown_for: float = 10.0
    """Seconds after it was listed for which the proxy may not know an endpoint that has not answered yet."""


class History:
    """What one endpoint did lately."""

    __slots__ = ("failures", "generation", "in_a_row", "sound_since", "until")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.failures = 0
        """Failures since the last success."""
        self.in_a_row = 0
        """Ejections in a row; 0: never ejected."""
        self.until = -math.inf
        """End of the last pause."""
        self.sound_since: float | None = None
        """First success after the last pause; None: there was none yet."""


class Ejection:
    """Which endpoints of a table to leave out because they answer with failures."""

    def __init__(self, table: EndpointTable, params: EjectionParams) -> None:
        self._table = table
        self._params = params
        self._histories: dict[int, History] = {}  # only of slots that failed; at most one a slot of the table
        self._out: dict[int, float] = {}  # slot -> end of its pause
        self._flags: Bools = np.zeros(0, np.bool_)  # the same, one a slot
        self._seen: Slots = table.listed  # what `_out` was counted for
        self._next_return = math.inf
        self._known_from: dict[int, float] = {}  # slot -> when a request was sent that it answered while it was new
        self.total = 0
        """Ejections ever."""

    def __repr__(self) -> str:
        return f"<Ejection [Out: {len(self._out)} | Watched: {len(self._histories)}]>"

    def succeeded(self, slot: int, now: float, *, sent_at: float = math.inf) -> None:
        """The endpoint answered with anything but a failure of its own.

        Args:
            sent_at: when the request was sent; default: just now.
        """
        if now - self._table.last_join < self._params.unknown_for:
            self._answered(slot, min(sent_at, now))
        if not self._histories:
            return
        history = self._history(slot)
        if history is None or not self._counts(history, now, sent_at):
            return
        history.failures = 0
        if history.sound_since is None:
            history.sound_since = now
        if self._row_left(history, now) == 0:
            del self._histories[slot]

    def failed(self, slot: int, now: float, *, sent_at: float = math.inf) -> None:
        """The endpoint itself answered 5xx. Call it while the slot still holds the request, or has an address that was
        just looked up: so the slot cannot mean another endpoint yet.

        Args:
            sent_at: when the request was sent; default: just now.
        """
        self._answered(slot, min(sent_at, now))
        self._count(slot, now, sent_at)

    def passed_over(self, slot: int, now: float, *, sent_at: float = math.inf) -> None:
        """Another endpoint served in its place, or the proxy answered 5xx and does not say for whom: a failure of the
        endpoint, which refused the connection or reset it, unless the proxy may not have known it. Call it as `failed`.

        Args:
            sent_at: when the request was sent; default: just now.
        """
        if min(sent_at, now) >= self._known_since(slot):
            self._count(slot, now, sent_at)

    def anyone(self, now: float) -> bool:
        """Whether anyone at all is out, which is rare: a look at this saves `out` and what is done with its mask."""
        if (self._out or self._histories) and (now >= self._next_return or self._table.listed is not self._seen):
            self._recount(now)
        return bool(self._out)

    def out(self, slots: Slots, now: float) -> Bools:
        """Which of these slots to leave out, shape (N,). Never all of them."""
        if not self.anyone(now):
            return np.zeros(len(slots), np.bool_)
        mask = self._flags[slots]
        if len(slots) and mask.all():
            mask[min(range(len(slots)), key=lambda i: self._out[int(slots[i])])] = False
        return mask

    # -- inside --------------------------------------------------------------------------------------------------

    def _known_since(self, slot: int) -> float:
        """When the proxy knew the endpoint for sure."""
        listed = self._table.listed_at(slot)
        answered = self._known_from.get(slot, -math.inf)
        return answered if answered > listed else listed + self._params.unknown_for

    def _answered(self, slot: int, sent_at: float) -> None:
        """The endpoint answered a request itself: the proxy knew it when the request was sent."""
        if self._table.listed_at(slot) < sent_at < self._known_since(slot):
            self._known_from[slot] = sent_at

    def _count(self, slot: int, now: float, sent_at: float) -> None:
        history = self._history(slot)
        if history is None:
            history = self._histories[slot] = History(self._table.generation(slot))
        if not self._counts(history, now, sent_at):
            return
        history.failures += 1
        on_probation = history.in_a_row > 0 and history.sound_since is None
        if on_probation or history.failures >= self._params.failures:
            self._eject(slot, history, now)

    def _history(self, slot: int) -> History | None:
        history = self._histories.get(slot)
        if history is not None and history.generation != self._table.generation(slot):
            del self._histories[slot]
            return None
        return history

    @staticmethod
    def _counts(history: History, now: float, sent_at: float) -> bool:
        return now >= history.until and sent_at >= history.until

    def _row_left(self, history: History, now: float) -> int:
        """Ejections in a row, less one for each first pause's length of good behaviour."""
        sound = 0.0 if history.sound_since is None else now - history.sound_since
        return max(0, history.in_a_row - int(sound // self._params.pause))

    def _eject(self, slot: int, history: History, now: float) -> None:
        self._recount(now)
        if len(self._out) >= self._most():
            return  # its failures stay counted: the next one tries again
        self.total += 1
        history.in_a_row = self._row_left(history, now) + 1
        history.until = now + min(history.in_a_row * self._params.pause, self._params.longest)
        history.failures, history.sound_since = 0, None
        self._table.rejoin(slot, history.until)
        self._recount(now)

    def _most(self) -> int:
        size = len(self._table)
        return max(0, min(int(size * self._params.share), size - 1))

    def _recount(self, now: float) -> None:
        """Count again who is out; if the pool shrank below their share, those who are back soonest come back now."""
        out = [
            (history.until, slot)
            for slot, history in self._histories.items()
            if history.until > now
            and history.generation == self._table.generation(slot)
            and self._table.is_listed(slot)
        ]
        out.sort(reverse=True)
        self._out = {slot: until for until, slot in out[: self._most()]}
        self._next_return = min(self._out.values(), default=math.inf)
        self._seen = self._table.listed
        self._flags = np.zeros(self._table.width, np.bool_)
        self._flags[list(self._out)] = True
