"""Filters by what endpoints are, which their labels say; and how such facts are read for all candidates at once.

In: candidates. Out: a mask.
Rules here:
- Labels are looked at when the pool changes, once per endpoint; a request costs one look-up in an array, whatever the
  number of endpoints (1 us for 8, 2 us for 1,000).
- Who is left out here cannot serve the request at all, so that nobody left is 503 and never a full pool (429).
Source: llm-d router, label and role filters; Kubernetes' LabelSelector (metav1) for matchLabels and matchExpressions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Endpoint, Slots
from epp.scheduling.plugin import Context, NoParams, Params, deprecated, filter_

ROLE: Final = "llm-d.ai/role"

Labels = Mapping[str, str]


class PerEndpoint:
    """A fact of every endpoint, found out again only when an endpoint came, left or changed."""

    def __init__(self, fact: Callable[[Endpoint], float]) -> None:
        self._fact = fact
        self._listed: Slots | None = None
        self._by_slot: npt.NDArray[Any] = np.empty(0)

    def __call__(self, candidates: Candidates) -> npt.NDArray[Any]:
        """The fact of each candidate, shape (N,): of bool_, int64 or float64, as the facts are."""
        table = candidates.table
        if self._listed is not table.listed:
            facts = [self._fact(table.endpoint(slot)) for slot in table.listed.tolist()]
            self._by_slot = np.zeros(table.width, np.array(facts).dtype)
            self._by_slot[table.listed] = facts
            self._listed = table.listed
        return self._by_slot.take(candidates.slots)


Key = Annotated[str, Meta(min_length=1)]


class LabelRequirement(Params, frozen=True):
    """One entry of matchExpressions."""

    key: Key
    """Name of the label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """In, NotIn: its value is, or is not, one of `values`; an endpoint without the label is NotIn any."""
    values: tuple[str, ...] = ()
    """For In and NotIn at least one, for the others none."""

    def __post_init__(self) -> None:
        if (self.operator in ("In", "NotIn")) != bool(self.values):
            expected = "none" if self.values else "at least one"
            raise ValueError(f"{self.key}: {self.operator} takes {expected} of values")

    def holds(self, labels: Labels) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value in self.values
            case "NotIn":
                return value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None


class SelectorParams(Params, frozen=True):
    match_labels: Mapping[str, str] = {}
    """Labels, and the value that each must have."""
    match_expressions: tuple[LabelRequirement, ...] = ()
    """Requirements of other kinds. All of both must hold; none at all: every endpoint is kept."""

    def holds(self, labels: Labels) -> bool:
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.holds(labels) for requirement in self.match_expressions
        )


class LabelSelector:
    """Keep the endpoints whose labels a Kubernetes label selector selects.

    Where it selects none the request is refused with 503.
    """

    def __init__(self, params: SelectorParams, context: Context) -> None:
        self._selected = PerEndpoint(lambda endpoint: params.holds(endpoint.labels))

    def __call__(self, request: Request, candidates: Candidates, params: SelectorParams) -> Bools:
        return self._selected(candidates)


class ByLabelParams(Params, frozen=True):
    label: Key
    """Name of the label."""
    valid_values: tuple[str, ...] = ()
    """Values that keep an endpoint."""
    allows_no_label: bool = False
    """Keep endpoints without the label too."""

    def __post_init__(self) -> None:
        if not self.valid_values and not self.allows_no_label:
            raise ValueError("validValues is empty and allowsNoLabel false, which keeps no endpoint: give a value")

    def holds(self, labels: Labels) -> bool:
        value = labels.get(self.label)
        return self.allows_no_label if value is None else value in self.valid_values


class ByLabel:
    """Keep the endpoints that have one of some values of a label.

    Where none has the request is refused with 503.
    """

    def __init__(self, params: ByLabelParams, context: Context) -> None:
        self._selected = PerEndpoint(lambda endpoint: params.holds(endpoint.labels))

    def __call__(self, request: Request, candidates: Candidates, params: ByLabelParams) -> Bools:
        return self._selected(candidates)


class _ByRole:
    roles: ClassVar[frozenset[str | None]]
    """Values of llm-d.ai/role; None: endpoints without that label."""

    def __init__(self, params: NoParams, context: Context) -> None:
        self._selected = PerEndpoint(lambda endpoint: endpoint.labels.get(ROLE) in self.roles)

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
        return self._selected(candidates)


class DecodeRole(_ByRole):
    """Keep the endpoints that decode.

    Those whose llm-d.ai/role is decode, prefill-decode, encode-prefill-decode or both, and those that have no such
    label. Where there are none the request is refused with 503.
    """

    roles = frozenset(("decode", "prefill-decode", "encode-prefill-decode", "both", None))


class PrefillRole(_ByRole):
    """Keep the endpoints that compute prompts for others.

    Those whose llm-d.ai/role is prefill, encode-prefill, prefill-decode, encode-prefill-decode or both.
    """

    roles = frozenset(("prefill", "encode-prefill", "prefill-decode", "encode-prefill-decode", "both"))


class EncodeRole(_ByRole):
    """Keep the endpoints that compute images, audio and video for others.

    Those whose llm-d.ai/role is encode, encode-prefill or encode-prefill-decode.
    """

    roles = frozenset(("encode", "encode-prefill", "encode-prefill-decode"))


label_selector = filter_("label-selector-filter", params=SelectorParams)(LabelSelector)
by_label_selector = deprecated("type label-selector-filter, with the same parameters")(
    filter_("by-label-selector", params=SelectorParams)(LabelSelector)
)
by_label = deprecated("type label-selector-filter, with matchExpressions")(
    filter_("by-label", params=ByLabelParams)(ByLabel)
)
decode_role = filter_("decode-filter", params=NoParams)(DecodeRole)
prefill_role = filter_("prefill-filter", params=NoParams)(PrefillRole)
encode_role = filter_("encode-filter", params=NoParams)(EncodeRole)
