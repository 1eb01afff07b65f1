"""Plugins that misbehave: each loses its part in a request, and after some requests in a row it is left out.

In: what failed in a decision, and when. Out: copies of plugins that are timed, and that stand aside while left out.
The rule, all of it:
- A plugin fails when it raises anything but a Refusal, returns what its kind must not (a wrong shape or type, NaN), or,
  while plugins are watched, takes longer than SLOW. It has no part in that request then, is named in its decision and
  counted by its name and the kind of failure; the others, and the request, go on.
- One that fails in IN_A_ROW of the requests that ask it, none MEMORY after the one before, is left out for PAUSE. The
  first request after that tries it: either it is back, or left out for twice as long as before, at most LONGEST. One
  that nobody asks for MEMORY after its pause is back, too.
- Left out, a filter or a screener keeps everybody, a scorer has no vote, the highest total is picked, the first profile
  decides alone, nobody is refused by an admitter, a processor finds nothing, a producer learns nothing. Each such
  decision names it. Of slots that are forgotten it is told all the same.
- Plugins are watched for MEMORY after a failure, and after a decision that took longer than SLOW: so the first call
  that is slow is only seen as a slow decision, and a plugin that is slow often is found. A look at the clock around
  each plugin of every decision would cost more than the rest of all this.
- A new configuration forgets all of it.
Not watched: deciders (a handler names one that fails, and goes on without its stage), and what plugins do when a
response begins or ends (counted as mistakes). No call can be cut short: there is one thread.
Rejected: a try, a look at the clock and a look-up around each call of every decision; leaving out at the first failure
(one odd prompt would take a scorer from everybody); a background check (a plugin is tried by what it is for).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from epp.scheduling.decision import Decision, Failure, Fault
from epp.scheduling.peers import Hook
from epp.scheduling.plugin import (
    Admitter,
    Filter,
    Handler,
    Instance,
    Picker,
    Processor,
    Producer,
    Scorer,
    Screener,
)

IN_A_ROW: Final = 5
"""Requests in which a plugin fails until it is left out."""
PAUSE: Final = 10.0
"""Seconds for which it is left out at first."""
LONGEST: Final = 300.0
"""Seconds for which it is left out at most."""
MEMORY: Final = 60.0
"""Seconds for which plugins are watched after a slow decision, and after which a failure no longer counts."""
SLOW: Final = 0.05
"""Seconds that a call may take."""
PER_BYTE: Final = 1e-8
"""Seconds more for each byte of the request: whoever asks for the prompt first reads it, at 3 ns a byte."""

CALLS: Final[Mapping[type[Instance], str]] = {
    Filter: "keep",
    Scorer: "score",
    Picker: "order",
    Producer: "match",
    Handler: "plan",
    Screener: "screen",
    Admitter: "admit",
    Processor: "process",
    Hook: "headers",
}
"""What is watched of each kind."""

Watched = TypeVar("Watched", bound=Instance)


class TooSlow(Fault):
    kind: ClassVar = "slow"


class LeftOut(Fault):
    kind: ClassVar = "left-out"


class Row(msgspec.Struct):
    """Failures of one plugin, without a success between them."""

    failed: int = 0
    at: float = -inf
    """The latest of them."""
    reason: str = ""
    """Of that one."""
    pause: float = 0.0
    """Seconds for which it was left out last; 0: it never was."""

    def is_over(self, now: float) -> bool:
        """Nobody has asked it for so long that its failures no longer count."""
        return now - self.at > self.pause + MEMORY


class Quarantine:
    """Who fails, and who is left out for it: of one scheduler."""

    def __init__(self) -> None:
        self.alert = False
        """Whether the next decision must be made by watched plugins; nearly never."""
        self._rows: dict[str, Row] = {}
        self._late: dict[str, Failure] = {}
        self._asked: set[str] = set()
        self._watched_until = -inf
        self._now = 0.0
        self._stopwatch: Callable[[], float] = stopped

    def __repr__(self) -> str:
        failing = {name: row.failed for name, row in self._rows.items()}
        return f"<Quarantine [failing: {failing}{', watched' if self.alert else ''}]>"

    def begin(self, now: float, stopwatch: Callable[[], float]) -> None:
        """A decision is about to be made by watched plugins."""
        self._now, self._stopwatch = now, stopwatch
        self._asked.clear()

    def remember(self, failure: Failure) -> None:
        """A plugin failed outside of any decision; the next one names it."""
        self._late[failure.plugin] = failure
        self.alert = True

    def settle(self, decision: Decision, took: float, now: float) -> None:
        """A decision is made: take in who failed, and who did not though it had failed before."""
        if self._late:
            decision.failures = (*decision.failures, *self._late.values())
            self._late.clear()
        if took > SLOW:
            self._watched_until = now + MEMORY
        failed = {each.plugin: each for each in decision.every_failure() if each.kind not in NO_FAULTS}
        for name in self._asked - failed.keys():
            self._rows.pop(name, None)
        for name, failure in failed.items():
            self._note(name, failure, now)
        self._asked.clear()
        self._rows = {name: row for name, row in self._rows.items() if not row.is_over(now)}
        self.alert = bool(self._rows) or now < self._watched_until

    def watched(self, each: Watched) -> Watched:
        """The same plugin, timed, and standing aside while it is left out."""
        call = CALLS[type(each)]
        guard = self._guarded if type(each) is not Handler else self._guarded_untimed
        changed: dict[str, Any] = {call: guard(each.name, getattr(each, call))}
        if each.chosen is not None:
            changed["chosen"] = self._told(each.name, each.chosen)
        return msgspec.structs.replace(each, **changed)

    # -- inside --------------------------------------------------------------------------------------------------

    def _note(self, name: str, failure: Failure, now: float) -> None:
        row = self._rows.get(name)
        if row is None or row.is_over(now):
            row = self._rows[name] = Row()
        row.failed += 1
        row.at, row.reason = now, failure.reason
        if row.failed >= IN_A_ROW:
            row.pause = min(row.pause * 2 or PAUSE, LONGEST)

    def _is_out(self, name: str) -> bool:
        row = self._rows.get(name)
        return row is not None and self._now - row.at < row.pause

    def _ask(self, name: str) -> None:
        """Raises LeftOut."""
        if self._is_out(name):
            row = self._rows[name]
            raise LeftOut(f"left out for {row.pause:g} s after {row.failed} failures in a row, the last: {row.reason}")
        self._asked.add(name)

    # What is called differs by kind, and so do its arguments and results: `Any`.

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*given: Any) -> Any:
            self._ask(name)
            began = self._stopwatch()
            result = call(*given)
            took = self._stopwatch() - began
            if took > SLOW + given[0].size_bytes * PER_BYTE:
                raise TooSlow(f"took {took * 1e3:.0f} ms")
            return result

        return guarded

    def _guarded_untimed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Of a handler, which calls all the others."""

        def guarded(*given: Any) -> Any:
            self._ask(name)
            return call(*given)

        return guarded

    def _told(self, name: str, chosen: Callable[..., None]) -> Callable[..., None]:
        def told(*given: Any) -> None:
            if not self._is_out(name):
                chosen(*given)

        return told


NO_FAULTS: Final = frozenset((LeftOut.kind, "stage"))
"""Kinds that say nothing new of a plugin."""


def stopped() -> float:
    """A clock that stands still: nothing is slow."""
    return 0.0
