"""The plugin contract: filters, scorers, pickers and producers, described by decorators.

In: a request and candidates. Out: a mask, scores, an order, or a prefix match; always one array for all candidates.
Rules here:
- A decorator describes and registers nothing: `catalogue.py` lists what there is. A class is described by the same
  decorator in a line below it (`lora_affinity = scorer("...", ...)(LoraAffinity)`), so that it stays a class.
- A plugin is a function, or a class where it keeps something between requests: `__init__(params, context)`, then
  the same call. A class may also have `chosen(request, candidates, slots)`, called once the decision is made, and
  `forget(slot)`, called when a slot is about to mean another endpoint.
- A plugin gets at least one candidate, changes none of the arrays it gets, and reads no clock: `candidates.now`.
- Parameters are a frozen struct with the reference's names in camelCase; what the struct does not know is refused.
Rejected: registration on import (a global that every test must reset); a base class for plugins (a callable will do).
Source: llm-d router's plugin kinds (filter, scorer, picker, data producer).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Annotated, Any, Final, Generic, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from epp.dialects.request import Request
from epp.endpoints.table import COUNTS, FACTS, GAUGES, Bools, Candidates, Floats, Slots
from epp.errors import ConfigError
from epp.prefix.approximate import Counts

Scores = Floats
"""Shape (N,), 0..1, higher is better."""
Totals = Floats
"""Shape (N,): the weighted sum of all scores."""
Order = npt.NDArray[np.int64]
"""Positions 0..N-1 among the candidates, best first, none twice: as many as the picker's parameters ask for, or all.
More are not read."""

PREFIX_MATCH: Final = "prefix-match"
ADAPTERS: Final = "adapters"
DEFAULT_PRODUCER: Final = "approx-prefix-cache-producer"
SIGNALS: Final = frozenset((*GAUGES, *FACTS, *COUNTS, ADAPTERS, PREFIX_MATCH))
"""What a plugin may name in `needs`: the table's columns, its adapters, and what a prefix producer finds."""


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Parameters of a plugin, checked when the configuration is read. A `__post_init__` may raise ValueError."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        """Parameters, among the names given, that change nothing, and why; the operator is told at start."""
        return {}


class NoParams(Params, frozen=True):
    """For a plugin that takes no parameters."""


class PickerParams(Params, frozen=True):
    max_num_of_endpoints: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Endpoints sent to the proxy: the destination, and then fallbacks, best first."""


class PrefixMatch(msgspec.Struct, frozen=True, eq=False):
    """How much of a prompt each candidate is believed to hold."""

    blocks: Counts
    """Shape (N,): leading blocks held, 0..total."""
    total: int
    """Whole blocks of the prompt; 0: shorter than one."""
    block_tokens: int
    """Tokens a block."""


Chosen = Callable[[Request, Candidates, Slots], None]
"""The request goes to these slots, destination first, which were chosen among the candidates."""


class Instance(msgspec.Struct, frozen=True):
    """A plugin with its parameters, ready to be called."""

    name: str
    """Name in the configuration, which decisions and metrics show."""
    chosen: Chosen | None
    forget: Callable[[int], None] | None
    needs: tuple[str, ...]


class Filter(Instance, frozen=True):
    keep: Callable[[Request, Candidates], Bools]


class Scorer(Instance, frozen=True):
    score: Callable[[Request, Candidates], Scores]


class Picker(Instance, frozen=True):
    order: Callable[[Request, Candidates, Totals, Random], Order]
    endpoints: int
    """Endpoints sent to the proxy."""


class Producer(Instance, frozen=True):
    match: Callable[[Request, Candidates], PrefixMatch]
    blocks: Callable[[], int]
    """Blocks that it remembers in all."""


class Context(msgspec.Struct, frozen=True):
    """What a plugin class may use beside its own parameters."""

    producers: Mapping[str, Producer] = {}

    def producer(self, name: str) -> Producer:
        """The producer with this name in the configuration; empty: the default one.

        Raises:
            ConfigError: none has it.
        """
        try:
            return self.producers[name or DEFAULT_PRODUCER]
        except KeyError:
            there = ", ".join(self.producers) or "none"
            raise ConfigError(f"no prefix producer is named {name!r} (there are: {there})") from None


Made = TypeVar("Made", bound=Instance, covariant=True)


class Plugin(msgspec.Struct, Generic[Made], frozen=True):
    """The description of a plugin: what the catalogue lists."""

    name: str
    """Public name, the `type` in a configuration."""
    kind: type[Made]
    params: type[Params]
    needs: tuple[str, ...]
    """Signals that it reads; a configuration in which one is not provided is refused."""
    doc: str
    make: Callable[[str, Params, Context], Made]
    """(name, parameters, context) -> instance. Raises ConfigError."""


P = TypeVar("P", bound=Params, contravariant=True)
KeepCall = Callable[[Request, Candidates, P], Bools]
ScoreCall = Callable[[Request, Candidates, P], Scores]


class OrderCall(Protocol[P]):
    def __call__(
        self, request: Request, candidates: Candidates, totals: Totals, params: P, rng: Random, /
    ) -> Order: ...


class Produces(Protocol):
    """A producer is always a class: it learns where requests went."""

    def match(self, request: Request, candidates: Candidates) -> PrefixMatch: ...

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None: ...

    def forget(self, slot: int) -> None: ...

    def blocks(self) -> int: ...


def filter_(
    name: str, *, params: type[P], needs: tuple[str, ...] = ()
) -> Callable[[KeepCall[P] | Callable[[P, Context], KeepCall[P]]], Plugin[Filter]]:
    """Describe a filter: `(request, candidates, params) -> mask`, shape (N,), true where the candidate stays."""

    def describe(body: KeepCall[P] | Callable[[P, Context], KeepCall[P]]) -> Plugin[Filter]:
        def make(called: str, given: Params, context: Context) -> Filter:
            call = _started(body, given, context)
            return Filter(called, *_hooks(call), needs, lambda request, candidates: call(request, candidates, given))

        return Plugin(name, Filter, params, needs, _doc(body), make)

    return describe


def scorer(
    name: str, *, params: type[P], needs: tuple[str, ...] = ()
) -> Callable[[ScoreCall[P] | Callable[[P, Context], ScoreCall[P]]], Plugin[Scorer]]:
    """Describe a scorer: `(request, candidates, params) -> scores`, shape (N,), 0..1."""

    def describe(body: ScoreCall[P] | Callable[[P, Context], ScoreCall[P]]) -> Plugin[Scorer]:
        def make(called: str, given: Params, context: Context) -> Scorer:
            call = _started(body, given, context)
            return Scorer(called, *_hooks(call), needs, lambda request, candidates: call(request, candidates, given))

        return Plugin(name, Scorer, params, needs, _doc(body), make)

    return describe


def picker(
    name: str, *, params: type[P], needs: tuple[str, ...] = ()
) -> Callable[[OrderCall[P] | Callable[[P, Context], OrderCall[P]]], Plugin[Picker]]:
    """Describe a picker: `(request, candidates, totals, params, rng) -> order`. Its params extend `PickerParams`."""
    assert issubclass(params, PickerParams)

    def describe(body: OrderCall[P] | Callable[[P, Context], OrderCall[P]]) -> Plugin[Picker]:
        def make(called: str, given: Params, context: Context) -> Picker:
            assert isinstance(given, PickerParams)
            call = _started(body, given, context)
            return Picker(
                called,
                *_hooks(call),
                needs,
                lambda request, candidates, totals, rng: call(request, candidates, totals, given, rng),
                given.max_num_of_endpoints,
            )

        return Plugin(name, Picker, params, needs, _doc(body), make)

    return describe


def producer(name: str, *, params: type[P]) -> Callable[[Callable[[P, Context], Produces]], Plugin[Producer]]:
    """Describe a producer of prefix matches."""

    def describe(body: Callable[[P, Context], Produces]) -> Plugin[Producer]:
        def make(called: str, given: Params, context: Context) -> Producer:
            made: Produces = _started(body, given, context)
            return Producer(called, made.chosen, made.forget, (), made.match, made.blocks)

        return Plugin(name, Producer, params, (), _doc(body), make)

    return describe


def _started(body: Any, params: Params, context: Context) -> Any:
    """What to call for each request. `Any`: the decorators have checked the types; here they are erased."""
    return body(params, context) if isinstance(body, type) else body


def _hooks(call: Any) -> tuple[Chosen | None, Callable[[int], None] | None]:
    return getattr(call, "chosen", None), getattr(call, "forget", None)


def _doc(body: object) -> str:
    assert body.__doc__, f"{body!r} needs a docstring: it is the catalogue's entry"
    return body.__doc__
