"""Why a request went where it went.

Always built, so it is cheap: arrays as they were, no strings. Rendered only when somebody looks. Nobody writes into its
arrays again; the one exception is `let_go`, after which there are none.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
import numpy as np

from epp.endpoints.table import Bools, Candidates, Endpoint, Floats, Slots
from epp.headers import Headers

Pool = tuple[Endpoint | None, ...]
"""Endpoint by slot, shared by all decisions between two changes of the pool."""

_NO_SLOTS: Slots = np.empty(0, np.int64)
_NO_FLOATS: Floats = np.empty(0)
_NO_SCORES: Floats = np.empty((0, 0))
_NO_BOOLS: Bools = np.empty(0, np.bool_)


class Exclusion(msgspec.Struct, frozen=True, eq=False):
    """Endpoints that a guard or a filter left out."""

    name: str
    slots: Slots


class Fault(Exception):
    """What a plugin did that no exception of its own tells."""

    kind: ClassVar = "invalid"
    """What metrics call it. invalid: it returned what its kind must not."""


class Failure(msgspec.Struct, frozen=True):
    """A plugin that could not do its part in this decision, or a stage that could not be had; it was made without."""

    plugin: str
    """Its name, or that of the stage's profile."""
    reason: str
    kind: str = "stage"
    """stage; of a plugin: error (it raised one), or the kind of its `Fault`."""

    @classmethod
    def of(cls, plugin: str, error: Exception) -> Failure:
        if isinstance(error, Fault):
            return cls(plugin, str(error), error.kind)
        return cls(plugin, f"{type(error).__name__}: {error}", "error")


class Decision(msgspec.Struct, eq=False, kw_only=True):
    """N endpoints were scored by S scorers."""

    profile: str
    slots: Slots
    """Shape (N,): the scored endpoints; the arrays below are in this order."""
    exclusions: tuple[Exclusion, ...]
    """What guards and filters left out, in the order in which they ran."""
    scorers: tuple[tuple[str, float], ...]
    """Name and weight of each."""
    raw: Floats
    """Shape (S, N), 0..1: what each scorer said; 0 where its vote was lost."""
    unknown: Bools
    """Shape (N,): a signal that a scorer needs was not known."""
    totals: Floats
    """Shape (N,): the weighted sum, capped where there was no fresh page."""
    order: Slots
    """Shape (K,): the slots of `endpoints`."""
    endpoints: tuple[str, ...]
    """Addresses for the proxy, best first; never empty."""
    failures: tuple[Failure, ...]
    pool: Pool
    page_ages: Floats
    """Seconds since each slot's page was asked for, by slot; inf: there never was one."""
    prompt_tokens: float = 0.0
    """Estimate; 0 when no plugin asks for the prompt, since finding it out costs a parse."""
    matched_tokens: float = 0.0
    """Those believed to be cached on the first endpoint; never more than prompt_tokens."""
    output_tokens: float = 0.0
    """Those that the answer is taken to have, where the operator wants them counted."""
    cost_us: float = 0.0
    """Filled in by whoever has a clock."""
    prefill: Decision | None = None
    """Of disaggregated serving: who computes the prompt for the destination."""
    encode: Decision | None = None
    """Who computes its images, audio and video."""
    set_headers: Headers = ()
    """For whoever serves the request: how its stages find each other."""
    plan: str = ""
    """What the stages come to, such as prefill-decode; empty: one endpoint does it all."""
    handler: tuple[str, str] = ("", "")
    """Name and type of the plugin that made the plan; empty where there is none."""

    @property
    def first(self) -> int:
        """The slot that the request is sent to."""
        return int(self.order[0])

    @property
    def uncached(self) -> float:
        """Prompt tokens that the first endpoint must compute; 0 when nobody asked how long the prompt is."""
        return max(0.0, self.prompt_tokens - self.matched_tokens)

    def every_failure(self) -> tuple[Failure, ...]:
        """Those of all stages."""
        helpers = [stage.failures for stage in (self.prefill, self.encode) if stage is not None]
        return sum(helpers, self.failures)

    @property
    def ties(self) -> int:
        """Number of endpoints that share the best total."""
        return int((self.totals == self.totals.max(initial=-np.inf)).sum())

    def scores(self) -> tuple[tuple[str, float], ...]:
        """Address and total of every scored endpoint, in the order of `slots`."""
        return tuple(zip(map(self._address, self.slots.tolist()), self.totals.tolist(), strict=True))

    def render(self) -> dict[str, Any]:
        """The decision as JSON values, by the field names of `protos/decision.proto`."""
        failed = {failure.plugin: failure.reason for failure in self.failures}
        told = {name for name, _ in self.scorers}
        others = [{"plugin": each.plugin, "reason": each.reason} for each in self.failures if each.plugin not in told]
        return {
            "profile": self.profile,
            "endpoints": list(self.endpoints),
            "candidates": [*self._scored(), *self._excluded()],
            "scorers": [
                {"name": name, "weight": weight, "failed": failed[name]}
                if name in failed
                else {"name": name, "weight": weight, "scores": scores.tolist()}
                for (name, weight), scores in zip(self.scorers, self.raw, strict=True)
            ],
            **({"plan": self.plan} if self.plan else {}),
            **({"prefill": self.prefill.render()} if self.prefill else {}),
            **({"encode": self.encode.render()} if self.encode else {}),
            **({"failures": others} if others else {}),
            "matched_tokens": self.matched_tokens,
            "prompt_tokens": self.prompt_tokens,
            "ties": self.ties,
            "cost_us": self.cost_us,
        }

    def let_go(self) -> None:
        """Forget what was scored: nobody can look any more, but its request may run for minutes.

        At 1,000 endpoints this is 40 KB of 41 KB. What the request itself needs stays: endpoints and tokens.
        """
        for helper in (self.prefill, self.encode):
            if helper is not None:
                helper.let_go()
        self.slots = _NO_SLOTS
        self.raw, self.scorers, self.exclusions = _NO_SCORES, (), ()
        self.totals = self.page_ages = _NO_FLOATS
        self.unknown = _NO_BOOLS
        self.pool = ()

    # -- inside --------------------------------------------------------------------------------------------------

    def _scored(self) -> list[dict[str, Any]]:
        facts = zip(self.slots.tolist(), self.unknown.tolist(), self.totals.tolist(), strict=True)
        return [{**self._told(slot), "unknown": unknown, "total": total} for slot, unknown, total in facts]

    def _excluded(self) -> list[dict[str, Any]]:
        return [
            {**self._told(slot), "excluded_by": exclusion.name}
            for exclusion in self.exclusions
            for slot in exclusion.slots.tolist()
        ]

    def _told(self, slot: int) -> dict[str, Any]:
        endpoint = self.pool[slot]
        assert endpoint is not None
        age = float(self.page_ages[slot])
        told: dict[str, Any] = {"address": endpoint.address, "name": endpoint.name}
        return told if math.isinf(age) else {**told, "page_age": age}

    def _address(self, slot: int) -> str:
        endpoint = self.pool[slot]
        assert endpoint is not None
        return endpoint.address


class Stage(msgspec.Struct, frozen=True, eq=False):
    """What one profile came to for a request."""

    decision: Decision
    scored: Candidates
    position: int
    """Of the destination among the scored."""


class Plan(msgspec.Struct, frozen=True, eq=False):
    """What a handler makes of the stages that it ran."""

    primary: Stage
    """Where the proxy sends the request."""
    prefill: Stage | None = None
    """Who computes the prompt in its place."""
    encode: Stage | None = None
    """Who computes images, audio and video."""
    set_headers: Headers = ()
    name: str = ""
    """As `Decision.plan`."""
    failures: tuple[Failure, ...] = ()
    """Stages that were wanted and could not be had, and why."""
