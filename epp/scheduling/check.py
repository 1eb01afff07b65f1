"""What every plugin must keep to, tried out: ours in the tests, anybody's with `epp plugins --check`.

In: a plugin's description and parameters. Out: findings: what it did that it must not, and where.
Rules here:
- An error is what costs the plugin its part in a decision, or spoils decisions in silence; a warning is what its author
  wants to know. A Refusal is an answer, never a finding.
- Each trial makes the plugin anew, from the same seed: one that then says two things cannot be replayed.
- Arrays that it gets cannot be written to, so that whoever tries raises.
- Of each sort of finding one is told: a plugin that returns NaN in twenty corners needs one line.
Rejected: random pools (a finding that comes and goes; `tests/scheduling/test_contract.py` has those, for ours).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Final, Literal

import msgspec
import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import COUNTS, FACTS, Bools, Candidates, EndpointTable, Floats, Slots
from epp.errors import ConfigError, Refusal
from epp.scheduling import deciders, verdicts
from epp.scheduling.cases import Case, cases, changed, crowd
from epp.scheduling.plugin import (
    SIGNALS,
    Admitter,
    Context,
    Filter,
    Handler,
    Instance,
    Params,
    Picker,
    Plugin,
    Processor,
    Producer,
    Scorer,
    Screener,
)
from epp.scheduling.producers import approximate_prefix
from epp.scheduling.quarantine import stopped
from epp.scheduling.verdicts import Verdict

PROFILES: Final = ("decode", "prefill", "encode")
CROWD: Final = 1000
SLOW: Final = 1e-4
"""Seconds that a call may take among CROWD candidates. Ours take 1 to 30 us there, a loop in Python 140 us and more."""
CALLS: Final = 10
"""Of them the quickest counts: other programs take their time, too."""
PER_CANDIDATE: Final = (Scorer, Filter, Screener, Producer)
"""Kinds that say one thing of each candidate, so that the candidates' order must not matter."""
CHANGE_REQUESTS: Final = (Processor, Handler)
TIMED: Final = (*PER_CANDIDATE, Picker, Admitter)
BY_SLOT: Final = "an endpoint is known by its slot (candidates.slots), never by its position"
ATTRIBUTES: Final = "a configuration must have it read from pages"
BY_HAND: Final = "a test may call epp.scheduling.check.check(plugin, parameters)"
WORKED_OUT: Final = frozenset(("content", "estimate", "token_ratio"))
"""What changes in a request when somebody reads it."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that a plugin does and should not."""

    plugin: str
    severity: Literal["error", "warning"]
    message: str


class Subject(msgspec.Struct, frozen=True):
    """What is tried: one role of a plugin."""

    role: Plugin[Instance]
    params: Params

    @property
    def attributes(self) -> tuple[str, ...]:
        """Columns that it needs beside the table's own."""
        return tuple(need for need in self.role.needs if need not in SIGNALS)

    def made(self, taught: Case | None = None) -> Instance:
        """A new one, from the same seed as any other.

        Args:
            taught: its request has gone to its first candidate: that is what the prefix producer knows.

        Raises:
            ConfigError: it cannot be made with these parameters, nothing but the defaults beside it.
        """
        rng = Random(0)
        producer = approximate_prefix.make(approximate_prefix.name, approximate_prefix.params(), Context(rng=rng))
        if taught is not None and producer.chosen is not None:
            producer.chosen(taught.ask(), taught.candidates, taught.candidates.slots[:1])
        there = (deciders.always, deciders.prefix_based, deciders.multimodal)
        named = {each.name: each.make(each.name, each.params(), Context(rng=rng)) for each in there}
        context = Context({producer.name: producer}, named, rng, PROFILES, SIGNALS.union(self.attributes))
        try:
            return self.role.make(self.role.name, self.params, context)
        except ConfigError:  # a handler of one profile
            return self.role.make(self.role.name, self.params, msgspec.structs.replace(context, profiles=PROFILES[:1]))


class Attempt(msgspec.Struct, frozen=True, eq=False):
    """What came of one call."""

    verdicts: tuple[Verdict, ...]
    essence: object = None
    """Equal for equal answers."""
    array: Floats | None = None
    """What it said of each candidate; None: nothing that counts."""
    read: frozenset[str] = frozenset()
    """Columns that it read."""

    @property
    def failed(self) -> bool:
        return any(each.severity == "error" for each in self.verdicts)


class Watched(Candidates):
    """Candidates that know which columns were read, and whose slots cannot be written to."""

    __slots__ = ("read",)

    def __init__(self, table: EndpointTable, slots: Slots, now: float) -> None:
        slots = slots.copy()
        slots.flags.writeable = False
        super().__init__(table, slots, now)
        self.read: set[str] = set()

    def column(self, name: str) -> tuple[Floats, Bools]:
        self.read.add(name)
        return super().column(name)


def check(
    plugin: Plugin[Instance], params: Params | None = None, stopwatch: Callable[[], float] = stopped
) -> list[Finding]:
    """Try a plugin in every corner.

    Args:
        params: not given: its defaults.
        stopwatch: seconds; one that stands still finds nothing slow.
    """
    found = [] if plugin.doc.strip() else [Finding(plugin.name, "error", "has no docstring")]
    for role in plugin.roles:
        try:
            subject = Subject(role, role.params() if params is None else params)
            subject.made()
        except (ConfigError, TypeError, ValueError) as error:
            what = f"was not tried, for it cannot be made with its defaults: {error}; {BY_HAND}"
            return [*found, Finding(plugin.name, "warning", what)]
        told = (
            (each.severity, "; ".join(filter(None, (each.message, each.advice)))) for each in _tried(subject, stopwatch)
        )
        found += [Finding(plugin.name, severity, message) for severity, message in told]
    return found


def trial(subject: Subject, case: Case) -> Iterator[Verdict]:
    """What a plugin does wrong in one corner."""
    first = _attempt(subject, case.ask, case.candidates)
    yield from first.verdicts
    if first.failed:
        return
    if _attempt(subject, case.ask, case.candidates).essence != first.essence:
        yield Verdict("replay", "error", "said two things of one request", "draw from context.rng, and read no clock")
    elif first.array is not None and issubclass(subject.role.kind, PER_CANDIDATE):
        yield from _of_order(subject, case, first.array)
    if first.array is not None and subject.role.kind is Scorer:
        yield from _of_the_unknown(case.candidates, first.array, first.read)
    yield from _of_hooks(subject.made(case), case)


# -- inside ------------------------------------------------------------------------------------------------------------


def _tried(subject: Subject, stopwatch: Callable[[], float]) -> list[Verdict]:
    """One verdict of each sort, and of the first corner in which it was found."""
    told: dict[str, Verdict] = {each.sort: each for each in _of_needs(subject)}
    for case in cases(subject.attributes):
        for each in trial(subject, case):
            told.setdefault(each.sort, msgspec.structs.replace(each, message=f"{each.message}, for {case.name}"))
    if not any(each.severity == "error" for each in told.values()):
        for each in (*_of_changes(subject), *_of_speed(subject, stopwatch)):
            told.setdefault(each.sort, each)
    return list(told.values())


def _attempt(
    subject: Subject, ask: Callable[[], Request], candidates: Candidates, instance: Instance | None = None
) -> Attempt:
    """Call it once, a new one unless it is given, and see what it says and what it changes."""
    instance = subject.made(Case("", candidates, ask)) if instance is None else instance
    request, shown = ask(), Watched(candidates.table, candidates.slots, candidates.now)
    labels = [dict(endpoint.labels) for endpoint in candidates.endpoints()]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            answer = verdicts.call(instance, request, shown)
        except Refusal as refusal:
            return Attempt((), type(refusal))
        except Exception as error:
            return Attempt((Verdict("raises", "error", f"raised {type(error).__name__}: {error}"),))
    found = [*verdicts.judged(instance, answer, len(candidates))]
    if labels != [endpoint.labels for endpoint in candidates.endpoints()]:
        found.append(Verdict("labels", "error", "changed the labels of an endpoint"))
    if not isinstance(instance, CHANGE_REQUESTS) and (names := _differing(request, ask())):
        found.append(Verdict("request", "error", f"changed the request ({', '.join(names)})", "processors may"))
    found += [Verdict("warning", "warning", f"made Python warn: {each.message}") for each in warned]
    found += _of_reading(instance, shown.read)
    if any(each.severity == "error" for each in found):
        return Attempt(tuple(found))
    said = verdicts.essence(answer), verdicts.per_candidate(answer)
    return Attempt(tuple(found), *said, frozenset(shown.read))


def _differing(one: Request, other: Request) -> list[str]:
    names = [name for name in Request.__slots__ if not name.startswith("_") and name not in WORKED_OUT]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _of_needs(subject: Subject) -> Iterator[Verdict]:
    if subject.attributes:
        names, columns = ", ".join(subject.attributes), ", ".join(sorted(SIGNALS))
        yield Verdict("attributes", "warning", f"needs {names}, which is no column: there are {columns}", ATTRIBUTES)


def _of_reading(instance: Instance, read: set[str]) -> Iterator[Verdict]:
    """Of a scorer: what a filter does not know it says by whom it keeps."""
    missing = sorted(read - {*instance.needs, *FACTS, *COUNTS})
    if missing and isinstance(instance, Scorer):
        message = f"reads {', '.join(missing)}, not named in its needs"
        yield Verdict("needs", "warning", message, "so decisions do not tell where it was not known")


def _of_order(subject: Subject, case: Case, said: Floats) -> Iterator[Verdict]:
    backwards = Candidates(case.candidates.table, case.candidates.slots[::-1], case.candidates.now)
    instance = subject.made(case)
    again = _attempt(subject, case.ask, backwards, instance)
    if again.failed:
        yield from again.verdicts
    elif again.array is None or not np.allclose(again.array, said[::-1], rtol=0.0, atol=1e-9):
        yield Verdict("order", "error", "said other things of the same candidates in another order", BY_SLOT)


def _of_the_unknown(candidates: Candidates, scores: Floats, read: frozenset[str]) -> Iterator[Verdict]:
    """Of a fresh page that lacks a value. Where there is none, the profile itself caps the total."""
    for name in sorted(read - {*FACTS, *COUNTS}):
        _, known = candidates.column(name)
        unknown = ~known & candidates.fresh()
        if known.any() and unknown.any() and scores[unknown].max() > scores[known].max():
            yield Verdict(
                "unknown",
                "error",
                f"prefers an endpoint whose {name} is not known",
                "give it at most what the known ones have on average: with_unknown in epp.scheduling.scorers does",
            )


def _of_hooks(instance: Instance, case: Case) -> Iterator[Verdict]:
    try:
        yield from verdicts.judged_hooks(instance, case.ask, case.candidates)
    except Exception as error:
        yield Verdict("hooks", "error", f"raised {type(error).__name__} when told of a request: {error}")


def _of_changes(subject: Subject) -> Iterator[Verdict]:
    """One that has seen the pool before it changed, against one that has not."""
    for case in cases(subject.attributes):
        if len(case.candidates) == 1:
            continue
        instance = subject.made()
        _attempt(subject, case.ask, case.candidates, instance)
        after = changed(case.candidates, instance.forget or (lambda slot: None))
        old = _attempt(subject, case.ask, after, instance)
        if old.failed:
            yield from old.verdicts
        elif old.essence != _attempt(subject, case.ask, after, subject.made()).essence:
            yield Verdict(
                "changes",
                "warning",
                f"keeps facts of endpoints that have changed, for {case.name}, some of which change then",
                "keep them as long as candidates.table.listed is the same array, or until forget is called",
            )


def _of_speed(subject: Subject, stopwatch: Callable[[], float]) -> Iterator[Verdict]:
    case = crowd(CROWD, subject.attributes)
    tried = _attempt(subject, case.ask, case.candidates)
    if tried.failed or not issubclass(subject.role.kind, TIMED):
        yield from (
            msgspec.structs.replace(each, message=f"{each.message}, for {case.name}") for each in tried.verdicts
        )
        return
    instance, request = subject.made(case), case.ask()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        took = min(_seconds(instance, request, case.candidates, stopwatch) for _ in range(CALLS))
    if took > SLOW:
        yield Verdict(
            "slow",
            "warning",
            f"takes {took * 1e6:.0f} us among {CROWD:,} candidates, more than {SLOW * 1e6:.0f}",
            "work on whole columns, and on facts of endpoints only when candidates.table.listed is another array",
        )


def _seconds(instance: Instance, request: Request, candidates: Candidates, stopwatch: Callable[[], float]) -> float:
    shown, calls = Candidates(candidates.table, candidates.slots, candidates.now), 1
    began = stopwatch()
    with suppress(Refusal):
        answer = verdicts.call(instance, request, shown)
        calls = len(answer) if isinstance(answer, tuple) else 1
    return (stopwatch() - began) / calls
