"""A rollout of a disaggregated set: all stages of a request run on one revision.

In: a request and candidates, before any profile. Out: a mask: the endpoints of one revision.
Rules here:
- A revision that lacks a ready endpoint for any required role gets no request; of those that lack none, one is drawn
  per request, in proportion to its ready pods. Ranks of one pod are one pod.
- What is ready is what discovery lists; a revision of which guards have left no endpoint for some role is not drawn.
- A strict header is obeyed or the request is refused with 503: nothing is put in its place.
- All counting is done when the pool changes.
Source: llm-d router, disaggregatedset-rollout-screener.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.selector import Selector, parse_selector
from epp.endpoints.table import Bools, Candidates, EndpointTable, Floats, Slots
from epp.errors import ConfigError
from epp.headers import Headers, text
from epp.scheduling.plugin import Answer, Context, Params, experimental, screener

Word = Annotated[str, Meta(min_length=1)]
ABSENT: Final = -1
"""Code of a label that an endpoint does not have, and of a value that no endpoint has."""


class Scope(Params, frozen=True):
    label_selector: Word
    """Which endpoints count: a Kubernetes label selector, as `app=a,tier in (b,c)`."""


class HeaderSelector(Params, frozen=True):
    name: Word
    """Names the selector to the operator."""
    header_name: Word
    """Header of the request that asks for a value, and of the response that tells the endpoint's."""
    label_key: Word
    """Label that has the value."""
    mode: Literal["strict", "prefer"]
    """strict: only endpoints with the value that the request asks for. prefer: the response tells it, no more."""


class RequiredRoles(Params, frozen=True):
    values: Annotated[tuple[Word, ...], Meta(min_length=1)]
    """Roles of which a revision needs a ready endpoint each."""


class RevisionGating(Params, frozen=True):
    mode: Literal["sum", "max-role", "disabled"] = "sum"
    """What a revision is drawn in proportion to. sum: its pods of all required roles. max-role: its pods of the role
    that has the most in all revisions together. disabled: no revision is drawn."""
    require_roles: RequiredRoles | None = None
    """Which roles a revision needs; not for disabled."""
    revision_label_key: Word = "disaggregatedset.x-k8s.io/revision"
    """Label with an endpoint's revision."""
    role_label_key: Word = "disaggregatedset.x-k8s.io/role"
    """Label with its role."""

    def __post_init__(self) -> None:
        if self.mode != "disabled" and self.require_roles is None:
            raise ValueError(f"revisionGating: mode {self.mode} needs requireRoles.values")


class RolloutParams(Params, frozen=True):
    scope: Scope
    """Whose endpoints make a revision complete."""
    revision_gating: RevisionGating
    """How one revision is chosen."""
    header_selectors: tuple[HeaderSelector, ...] = ()
    """Headers by which a request asks for endpoints, and a response tells of its own."""

    def __post_init__(self) -> None:
        for what in ("name", "header_name"):
            given = Counter(getattr(each, what).lower() for each in self.header_selectors)
            for twice in (value for value, count in given.items() if count > 1):
                raise ValueError(f"headerSelectors: two have {twice}: each needs a name and a header of its own")
        try:
            parse_selector(self.scope.label_selector)
        except ConfigError as error:
            raise ValueError(f"scope.labelSelector: {error.message}") from None


class Coded:
    """One label of every endpoint as a number, and which number a value has."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._listed: Slots | None = None
        self.values: dict[str, int] = {}
        self.by_slot: npt.NDArray[np.int64] = np.empty(0, np.int64)
        """ABSENT where an endpoint does not have the label."""

    def see(self, table: EndpointTable) -> None:
        if self._listed is table.listed:
            return
        self._listed, self.values = table.listed, {}
        self.by_slot = np.full(table.width, ABSENT)
        for slot in table.listed.tolist():
            value = table.endpoint(slot).labels.get(self._key)
            if value is not None:
                self.by_slot[slot] = self.values.setdefault(value, len(self.values))


class Revisions:
    """Which revisions are complete, and how many pods each has for what it is drawn by."""

    def __init__(self, gating: RevisionGating, scope: Selector) -> None:
        assert gating.require_roles is not None
        self._roles = gating.require_roles.values
        self._by_largest = gating.mode == "max-role"
        self._role_key = gating.role_label_key
        self._scope = scope
        self._listed: Slots | None = None
        self.revision = Coded(gating.revision_label_key)
        self._role_by_slot: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.weights: Floats = np.empty(0)
        """By code of a revision; 0: it lacks a role."""

    def see(self, table: EndpointTable) -> None:
        self.revision.see(table)
        if self._listed is table.listed:
            return
        self._listed = table.listed
        self._role_by_slot = np.full(table.width, ABSENT)
        pods: dict[tuple[int, int], set[str]] = {}
        for slot in table.listed.tolist():
            endpoint = table.endpoint(slot)
            revision, role = self.revision.by_slot.item(slot), endpoint.labels.get(self._role_key)
            if revision != ABSENT and role in self._roles and self._scope.matches(endpoint.labels):
                self._role_by_slot[slot] = self._roles.index(role)
                pod = endpoint.name.rpartition("-rank-")[0] or endpoint.name
                pods.setdefault((revision, self._roles.index(role)), set()).add(pod)
        counts = np.zeros((len(self.revision.values), len(self._roles)))
        for place, names in pods.items():
            counts[place] = len(names)
        counts[~counts.all(axis=1)] = 0.0
        self.weights = counts[:, counts.sum(axis=0).argmax()] if self._by_largest else counts.sum(axis=1)

    def servable(self, candidates: Candidates, mask: Bools) -> Floats:
        """Weights of the revisions that have, among these candidates, an endpoint for each role; 0 for the others."""
        slots = candidates.slots[mask]
        revisions, roles = self.revision.by_slot[slots], self._role_by_slot[slots]
        counted = roles != ABSENT
        places = revisions[counted] * len(self._roles) + roles[counted]
        there = np.bincount(places, minlength=self.weights.size * len(self._roles)).reshape(-1, len(self._roles))
        return self.weights * there.all(axis=1)


class RolloutScreener:
    """Keep the endpoints of one revision of a disaggregated set, so that a request's stages suit each other.

    A request whose strict header names a revision gets that one; any other gets one that is drawn among the complete
    ones, in proportion to their ready pods. Other strict headers keep the endpoints that have the label's value. Where
    nobody is left the request is refused with 503. The response tells the labels of the endpoint that served it.
    """

    def __init__(self, params: RolloutParams, context: Context) -> None:
        gating = params.revision_gating
        self._told = tuple((each.header_name.lower(), each.label_key) for each in params.header_selectors)
        self._strict = tuple(
            (each.header_name.lower(), each.label_key == gating.revision_label_key, Coded(each.label_key))
            for each in params.header_selectors
            if each.mode == "strict"
        )
        scope = parse_selector(params.scope.label_selector)
        self._revisions = None if gating.mode == "disabled" else Revisions(gating, scope)
        self._rng = context.rng

    def __call__(self, request: Request, candidates: Candidates, params: RolloutParams) -> Bools:
        mask, asked = np.ones(len(candidates), np.bool_), False
        for header, is_revision, label in self._strict:
            if value := text(request.headers, header):
                label.see(candidates.table)
                mask &= label.by_slot[candidates.slots] == label.values.get(value, ABSENT - 1)
                asked |= is_revision
        return mask if self._revisions is None else mask & self._one(self._revisions, candidates, mask, asked)

    def answered(self, request: Request, answer: Answer) -> Headers:
        labels = answer.endpoint.labels
        return tuple((header, labels[key].encode()) for header, key in self._told if key in labels)

    def _one(self, revisions: Revisions, candidates: Candidates, mask: Bools, asked: bool) -> Bools:
        """The endpoints of one revision: of the one asked for, if it is complete; else of one that is drawn."""
        revisions.see(candidates.table)
        codes = revisions.revision.by_slot[candidates.slots]
        if asked:
            complete: Bools = np.append(revisions.weights > 0, False)  # ABSENT is the last
            return complete[codes]
        weights = np.cumsum(revisions.servable(candidates, mask))
        if not len(weights) or not weights[-1]:
            return np.zeros(len(candidates), np.bool_)
        drawn = int(np.searchsorted(weights, self._rng.random() * weights[-1], side="right"))
        kept: Bools = codes == drawn
        return kept


rollout = experimental(screener("disaggregatedset-rollout-screener", params=RolloutParams)(RolloutScreener))
