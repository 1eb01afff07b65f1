"""One profile: filters, then weighted scorers, then a picker.

In: a request and candidates. Out: a `Decision`, or NoEndpoint.
Rules here:
- Filters run in order and each sees what the one before left; scores are clamped to 0..1, weighted and summed.
- A plugin that raises or returns nonsense loses its part in this one decision and is named in it; it never loses the
  request. A filter then lets everybody through; a picker is replaced by the highest total.
- What is unknown never wins: an endpoint without a fresh page totals at most the mean of those that have one. A server
  whose page hangs or never was good so gets no more than its share, however good its last value was or its prefixes
  are; when all the known ones tie, it may tie with them, and no more. A fresh page that lacks one gauge (Triton tells
  no KV usage) is no such case: there the scorer gives at most the mean of what it gives the others.
- Sums are taken row by row, never as a matrix product, whose rounding differs between columns: equal scores must
  stay equal, or ties are not spread.
Source: llm-d router, scheduling engine; the rule for the unknown is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import COUNTS, FACTS, Bools, Candidates, Floats, all_true
from epp.errors import NoEndpoint, Refusal
from epp.scheduling.decision import Decision, Exclusion, Failure, Fault, Pool, Stage
from epp.scheduling.pickers import best_first
from epp.scheduling.plugin import ADAPTERS, PREFIX_MATCH, Filter, Instance, Order, Picker, Scorer, Totals
from epp.scheduling.quarantine import Quarantine

ALWAYS_KNOWN = frozenset((*COUNTS, *FACTS, PREFIX_MATCH))
"""Our own counts; facts, which a server may never tell and which do not age; what we remember ourselves."""


class Profile:
    """Where should a request run? Built once, then called for every request."""

    def __init__(
        self, name: str, filters: Sequence[Filter], scorers: Sequence[tuple[Scorer, float]], picker: Picker
    ) -> None:
        """
        Args:
            scorers: each with its weight, 0 or more; weights need not sum to anything.
        """
        self.name = name
        self.filters = tuple(filters)
        self.scorers = tuple(scorer for scorer, _ in scorers)
        self.picker = picker
        self._labels = tuple((scorer.name, weight) for scorer, weight in scorers)
        self._weights = np.array([[weight] for _, weight in scorers], np.float64).reshape(-1, 1)
        self._wide = self._weights  # as wide as the candidates last were: equal shapes multiply in a third of the time
        self._nobody: Bools = np.zeros(1, np.bool_)  # as wide, too
        self._ageing = tuple(sorted({need for scorer in self.scorers for need in scorer.needs} - ALWAYS_KNOWN))

    def decide(
        self, request: Request, candidates: Candidates, exclusions: Sequence[Exclusion], pool: Pool, rng: Random
    ) -> Stage:
        """Decide where the request runs.

        Args:
            candidates: those that no guard has left out.
            exclusions: those that guards have left out; filters add theirs.
            pool: every endpoint, by slot.

        Raises:
            NoEndpoint: nothing is left. Says what left the last ones out.
            Refusal: what a plugin refuses with.
        """
        failures: list[Failure] = []
        left, excluded = self._filtered(request, candidates, exclusions, failures)
        count = len(left.slots)
        if len(self._nobody) != count:
            self._widen(count)
        raw = self._scored(request, left, failures)
        unknown = self._unknown(left)
        totals = np.add.reduce(raw * self._wide)
        if unknown is not self._nobody:
            totals = capped(totals, ~left.fresh())
        best = self._ordered(request, left, totals, rng, failures)
        order = left.slots.take(best)
        decision = Decision(
            profile=self.name,
            slots=left.slots,
            exclusions=excluded,
            scorers=self._labels,
            raw=raw,
            unknown=unknown,
            totals=totals,
            order=order,
            endpoints=tuple([_address(pool, slot) for slot in order.tolist()]),
            failures=tuple(failures),
            pool=pool,
            page_ages=left.table.page_ages(left.now),
        )
        return Stage(decision, left, best.item(0))

    def watched(self, by: Quarantine) -> Profile:
        """The same profile, with each of its plugins watched."""
        scorers = [(by.watched(each), weight) for each, (_, weight) in zip(self.scorers, self._labels, strict=True)]
        return Profile(self.name, [by.watched(each) for each in self.filters], scorers, by.watched(self.picker))

    @property
    def plugins(self) -> tuple[Instance, ...]:
        return (*self.filters, *self.scorers, self.picker)

    # -- inside --------------------------------------------------------------------------------------------------

    def _filtered(
        self, request: Request, candidates: Candidates, exclusions: Sequence[Exclusion], failures: list[Failure]
    ) -> tuple[Candidates, tuple[Exclusion, ...]]:
        excluded = [*exclusions]
        for each in self.filters:
            if not len(candidates):
                break
            try:
                mask = checked(each.keep(request, candidates), candidates)
            except Refusal:
                raise
            except Exception as error:
                failures.append(Failure.of(each.name, error))
                continue
            if not mask.all():
                excluded.append(Exclusion(each.name, candidates.slots[~mask]))
                candidates = candidates.keep(mask)
        if not len(candidates.slots):
            raise NoEndpoint(_left_out(excluded), retry_after=1.0)
        return candidates, tuple(excluded)

    def _scored(self, request: Request, candidates: Candidates, failures: list[Failure]) -> Floats:
        """What each scorer says, clamped; 0 for a scorer that failed. Shape (S, N)."""
        count = len(candidates.slots)
        raw = np.empty((len(self.scorers), count))
        for i, each in enumerate(self.scorers):
            try:
                scores = each.score(request, candidates)
                if scores.shape != (count,):
                    raise Fault(f"returned shape {scores.shape}, not {(count,)}")
                raw[i] = scores
            except Refusal:
                raise
            except Exception as error:
                raw[i] = 0.0
                failures.append(Failure.of(each.name, error))
        # argmin and argmax find NaN first, and take a quarter of the time that min, max and isnan take.
        if raw.size and not (raw.item(raw.argmin()) >= 0.0 and raw.item(raw.argmax()) <= 1.0):
            self._clean(raw, failures)
        return raw

    def _clean(self, raw: Floats, failures: list[Failure]) -> None:
        """Clamp to 0..1; a scorer that said NaN loses its vote."""
        for lost in np.flatnonzero(np.isnan(raw).any(axis=1)).tolist():
            raw[lost] = 0.0
            failures.append(Failure.of(self.scorers[lost].name, Fault("returned NaN")))
        np.clip(raw, 0.0, 1.0, out=raw)

    def _unknown(self, candidates: Candidates) -> Bools:
        """Where a signal is unknown that a scorer needs and that ages, shape (N,); `_nobody` where all are known."""
        unknown = self._nobody
        for need in self._ageing:
            known = candidates.fresh() if need == ADAPTERS else candidates.column(need)[1]
            if not all_true(known):
                unknown = unknown | ~known
        return unknown

    def _ordered(
        self, request: Request, candidates: Candidates, totals: Totals, rng: Random, failures: list[Failure]
    ) -> Order:
        """Positions of the endpoints to send, best first."""
        wanted = min(self.picker.endpoints, len(totals))
        try:
            order = self.picker.order(request, candidates, totals, rng)
            best = order[:wanted]
            if not (wanted <= len(order) <= len(totals) and order.dtype.kind == "i" and _distinct(best, len(totals))):
                raise Fault(f"returned {order}, not the best {wanted} of {len(totals)}")
        except Refusal:
            raise
        except Exception as error:
            failures.append(Failure.of(self.picker.name, error))
            return best_first(totals, wanted, rng)
        return best

    def _widen(self, count: int) -> None:
        self._wide = np.repeat(self._weights, count, axis=1)
        self._nobody = np.zeros(count, np.bool_)
        self._nobody.flags.writeable = False


def checked(mask: Bools, candidates: Candidates) -> Bools:
    """The mask that a plugin returned. Raises Fault: it is none of these candidates."""
    if mask.dtype != np.bool_ or mask.shape != candidates.slots.shape:
        raise Fault(f"returned {mask.dtype} of shape {mask.shape}, not a mask of {len(candidates)}")
    return mask


def capped(totals: Totals, unknown: Bools) -> Totals:
    """Totals, but at most the mean of the known ones where unknown; as they are when nothing, or all, is unknown."""
    if not unknown.any() or unknown.all():
        return totals
    known = totals[~unknown]
    # Between lowest and highest: the mean of equal floats may round to more than each of them.
    mean = min(max(known.mean(), known.min()), known.max())
    return np.where(unknown, np.minimum(totals, mean), totals)


def _distinct(positions: Order, count: int) -> bool:
    """Whether these are positions among so many, none twice."""
    listed = positions.tolist()  # few: np.unique takes 5 us for 4 of them, this 0.3
    return len(set(listed)) == len(listed) and min(listed) >= 0 and max(listed) < count


def _address(pool: Pool, slot: int) -> str:
    endpoint = pool[slot]
    assert endpoint is not None
    return endpoint.address


def _left_out(exclusions: Sequence[Exclusion]) -> str:
    if not exclusions:
        return "the pool has no endpoints"
    total = sum(len(exclusion.slots) for exclusion in exclusions)
    parts = ", then ".join(f"{exclusion.name} left out {len(exclusion.slots)}" for exclusion in exclusions)
    return f"no endpoint may serve this request: of {total} endpoints, {parts}"
