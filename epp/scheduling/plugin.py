"""The plugin contract: what a plugin of each kind gets and gives, described by decorators.

In: a request and candidates. Out: a mask, scores, an order, or a prefix match, always one array for all candidates;
of those that work on whole requests a plan, an answer, a refusal or nothing.
Rules here:
- A decorator describes and registers nothing: `catalogue.py` lists what there is. A class is described by the same
  decorator in a line below it (`lora_affinity = scorer("...", ...)(LoraAffinity)`), so that it stays a class.
- A plugin is a function, or a class where it keeps something between requests: `__init__(params, context)`, then
  the same call. A class may also have `chosen(request, candidates, slots)`, called once the decision is made,
  `forget(slot)`, called when a slot is about to mean another endpoint, `answered(request, answer)`, called when the
  response begins, which returns headers to set on it, and `pins(request)`, which says whether the request itself
  names its endpoints, so that no guard counts; a scorer may have `followed(request, over, now)`: see `Followed`.
- What a plugin would set on a response is checked before Envoy sees it: there a malformed header is a 500.
- A type may have several roles (a filter that also scores): `Plugin.also`.
- A plugin gets at least one candidate, changes none of the arrays it gets, and reads no clock: `candidates.now`.
- Parameters are a frozen struct with the reference's names in camelCase; what the struct does not know is refused.
Rejected: registration on import (a global that every test must reset); a base class for plugins (a callable will do).
Source: llm-d router's plugin kinds (screener, filter, scorer, picker, profile handler, decider, admitter, request
header processor, data producer).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Annotated, Any, ClassVar, Final, Generic, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from epp.dialects.request import Request
from epp.endpoints.table import COUNTS, FACTS, GAUGES, Bools, Candidates, Endpoint, EndpointTable, Floats, Slots
from epp.errors import ConfigError
from epp.headers import Headers
from epp.prefix.approximate import Counts
from epp.scheduling.decision import Decision, Plan, Stage

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

    instead: ClassVar[Mapping[str, str]] = {}
    """What to write instead of a parameter that is deprecated, by its name."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        """Parameters, among the names given, that change nothing, and why; the operator is told at start."""
        return {}


class NoParams(Params, frozen=True):
    """For a plugin that takes no parameters."""


class Ref(msgspec.Struct, frozen=True):
    """Says of a parameter that it names another plugin: `prefill: Annotated[str, Ref("decider")] = ""`.

    So the configuration is refused when no such plugin is declared, or one of another kind; an empty name asks for
    nothing, or for the default.
    """

    kind: str
    """Name of the plugin's kind, in small letters: "producer", "decider"; or of one of `epp.config.known`."""
    default: str = ""
    """Type, and name, of the plugin that is meant where none is named; it need not be declared."""


class ProfileRef(msgspec.Struct, frozen=True):
    """Says of a parameter that it names a profile: `decode: Annotated[str, ProfileRef(required=True)] = "decode"`."""

    required: bool = False
    """A profile of the parameter's default name must exist, too; else it may be missing."""


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
"""The request goes to these slots, destination first, which were chosen among the candidates. A producer is told the
slots that will hold the prompt: the destination, and before it whoever computes it in its place."""
RunProfile = Callable[[str], Stage]
"""Runs the profile of a name for the request. Raises NoEndpoint: nothing was left; Refusal: a plugin refused it."""


class Answer(msgspec.Struct, frozen=True):
    """How a response begins."""

    endpoint: Endpoint
    """Where the request ran, as far as is known: what served it; the first choice where the proxy does not tell, or
    where it went outside the pool."""
    served: str | None
    """Address that the proxy says it used last; None: it does not tell."""
    headers: Headers
    decision: Decision
    """That sent it there: endpoints and tokens, but perhaps no scores any more."""


Answered = Callable[[Request, Answer], Headers]
"""The response begins; returns headers to set on it, each in place of all that have its name. The request has no body
any more."""
Pins = Callable[[Request], bool]
"""Whether the request itself names its endpoints: then neither the gateway's subset nor any other guard counts."""


Followed = Callable[[Request, bool, float], None]
"""(request, it is over, now): its first token has come, where answers are seen; or it is over, whatever came of it."""
Stored = Callable[[str, int, EndpointTable, float], None]
"""(id, slot, table, now): the server in this slot keeps a response under this id, and may be asked for it again."""


class Instance(msgspec.Struct, frozen=True):
    """A plugin with its parameters, ready to be called."""

    name: str
    """Name in the configuration, which decisions and metrics show."""
    chosen: Chosen | None
    forget: Callable[[int], None] | None
    answered: Answered | None
    pins: Pins | None
    needs: tuple[str, ...]


class Filter(Instance, frozen=True):
    keep: Callable[[Request, Candidates], Bools]
    stored: Stored | None = None
    """Told of responses that their servers keep."""


class Scorer(Instance, frozen=True):
    score: Callable[[Request, Candidates], Scores]
    followed: Followed | None = None
    """Told how its requests go on."""


class Picker(Instance, frozen=True):
    order: Callable[[Request, Candidates, Totals, Random], Order]
    endpoints: int
    """Endpoints sent to the proxy."""


class Producer(Instance, frozen=True):
    match: Callable[[Request, Candidates], PrefixMatch]
    blocks: Callable[[], int]
    """Blocks that it remembers in all."""
    computed: Callable[[EndpointTable, int, float], None] | None = None
    """Told of a slot that it has computed so many tokens beyond those of the prompts that went there, such as answers;
    below 0: fewer than those."""


class Handler(Instance, frozen=True):
    """Which profiles run for a request, and what becomes of their decisions."""

    plan: Callable[[Request, RunProfile], Plan]
    profiles: tuple[str, ...]
    """Those that it may run; where it fails, the first one decides alone. Empty: whichever a header names."""
    type: str
    """Public name of the plugin."""


class Decider(Instance, frozen=True):
    """Whether a stage of disaggregated serving is worth its transfer."""

    decide: Callable[[Request, Decision | None], bool]
    """Of the decode stage's decision; None: it is not made yet."""


class Screener(Instance, frozen=True):
    """Leaves endpoints out before any profile, so that all stages of a request agree."""

    screen: Callable[[Request, Candidates], Bools]
    """Where a candidate stays, shape (N,)."""


class Admitter(Instance, frozen=True):
    admit: Callable[[Request, Candidates], None]
    """Raises Refusal: the request may not run now."""


class Processor(Instance, frozen=True):
    """Reads a request's headers before anything is decided."""

    process: Callable[[Request], None]


class Context(msgspec.Struct, frozen=True):
    """What a plugin class may use beside its own parameters."""

    producers: Mapping[str, Producer] = {}
    deciders: Mapping[str, Decider] = {}
    rng: Random = Random(0)
    """For what is drawn per request; pickers get it with each call."""
    profiles: tuple[str, ...] = ()
    """Names of the scheduling profiles, in the order of the configuration."""
    signals: Collection[str] = SIGNALS
    """What is provided: for a plugin whose parameters name a signal."""
    settings: Mapping[str, Params] = {}
    """Parameters of those plugins of the configuration that only say something, such as topology-extractor, by name."""

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

    def decider(self, name: str) -> Decider:
        """Raises ConfigError: none has this name in the configuration."""
        try:
            return self.deciders[name]
        except KeyError:
            there = ", ".join(self.deciders) or "none"
            raise ConfigError(f"no decider is named {name!r} (there are: {there})") from None


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
    also: tuple[Plugin[Instance], ...] = ()
    """Its other roles: plugins of the same name and parameters."""
    experimental: bool = False
    """It is used only with --allow-experimental-plugins."""
    instead: str = ""
    """What to write instead of it; not empty: it is deprecated."""

    @property
    def roles(self) -> tuple[Plugin[Instance], ...]:
        return (self, *self.also)


def experimental(plugin: Plugin[Made]) -> Plugin[Made]:
    """Mark a plugin as one that may change: a decorator above that of its kind."""
    return msgspec.structs.replace(plugin, experimental=True)


def deprecated(instead: str) -> Callable[[Plugin[Made]], Plugin[Made]]:
    """Mark a plugin as one that goes away, and say what to write instead: a decorator above that of its kind."""
    return lambda plugin: msgspec.structs.replace(plugin, instead=instead)


P = TypeVar("P", bound=Params, contravariant=True)
Call = TypeVar("Call")
Described = Callable[[Call | Callable[[P, Context], Call]], Plugin[Made]]
"""A decorator of a function, or of a class whose instances are called like it."""
KeepCall = Callable[[Request, Candidates, P], Bools]
ScoreCall = Callable[[Request, Candidates, P], Scores]
DecideCall = Callable[[Request, Decision | None, P], bool]
AdmitCall = Callable[[Request, Candidates, P], None]
ProcessCall = Callable[[Request, P], None]


class OrderCall(Protocol[P]):
    def __call__(
        self, request: Request, candidates: Candidates, totals: Totals, params: P, rng: Random, /
    ) -> Order: ...


class Produces(Protocol):
    """A producer is always a class: it learns where requests went. It may have `computed`, as a `Producer` has."""

    def match(self, request: Request, candidates: Candidates) -> PrefixMatch: ...

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None: ...

    def forget(self, slot: int) -> None: ...

    def blocks(self) -> int: ...


class Plans(Protocol):
    """A handler is always a class: which profiles it runs follows from its parameters."""

    profiles: tuple[str, ...]

    def plan(self, request: Request, run: RunProfile) -> Plan: ...


def filter_(name: str, *, params: type[P], needs: tuple[str, ...] = ()) -> Described[KeepCall[P], P, Filter]:
    """Describe a filter: `(request, candidates, params) -> mask`, shape (N,), true where the candidate stays.

    A class may have `stored`, as a `Filter` has, and `needs` of its own, where its parameters say what it reads.
    """

    def fields(call: Any, given: P) -> tuple[object, ...]:
        return lambda request, candidates: call(request, candidates, given), getattr(call, "stored", None)

    return _described(Filter, name, params, needs, fields)


def scorer(name: str, *, params: type[P], needs: tuple[str, ...] = ()) -> Described[ScoreCall[P], P, Scorer]:
    """Describe a scorer: `(request, candidates, params) -> scores`, shape (N,), 0..1.

    A class may have `followed`, as a `Scorer` has; `needs` as of a filter.
    """

    def fields(call: Any, given: P) -> tuple[object, ...]:
        return lambda request, candidates: call(request, candidates, given), getattr(call, "followed", None)

    return _described(Scorer, name, params, needs, fields)


def picker(name: str, *, params: type[P], needs: tuple[str, ...] = ()) -> Described[OrderCall[P], P, Picker]:
    """Describe a picker: `(request, candidates, totals, params, rng) -> order`. Its params extend `PickerParams`."""
    assert issubclass(params, PickerParams)

    def fields(call: Any, given: Any) -> tuple[object, ...]:
        return (
            lambda request, candidates, totals, rng: call(request, candidates, totals, given, rng),
            given.max_num_of_endpoints,
        )

    return _described(Picker, name, params, needs, fields)


def producer(name: str, *, params: type[P]) -> Callable[[Callable[[P, Context], Produces]], Plugin[Producer]]:
    """Describe a producer of prefix matches."""

    def fields(made: Any, given: P) -> tuple[object, ...]:
        return made.match, made.blocks, getattr(made, "computed", None)

    return _described(Producer, name, params, (), fields)


def handler(name: str, *, params: type[P]) -> Callable[[Callable[[P, Context], Plans]], Plugin[Handler]]:
    """Describe a profile handler."""
    return _described(Handler, name, params, (), lambda made, given: (made.plan, made.profiles, name))


def decider(name: str, *, params: type[P], needs: tuple[str, ...] = ()) -> Described[DecideCall[P], P, Decider]:
    """Describe a decider: `(request, decode stage's decision, params) -> bool`."""
    return _described(Decider, name, params, needs, _of_candidates)


def screener(name: str, *, params: type[P]) -> Described[KeepCall[P], P, Screener]:
    """Describe a screener: `(request, candidates, params) -> mask`, as a filter's."""
    return _described(Screener, name, params, (), _of_candidates)


def admitter(name: str, *, params: type[P], needs: tuple[str, ...] = ()) -> Described[AdmitCall[P], P, Admitter]:
    """Describe an admitter: `(request, candidates, params)`, which raises a Refusal or does nothing."""
    return _described(Admitter, name, params, needs, _of_candidates)


def processor(name: str, *, params: type[P]) -> Described[ProcessCall[P], P, Processor]:
    """Describe a processor of request headers: `(request, params)`; it may change what the request says of itself."""
    return _described(Processor, name, params, (), lambda call, given: (lambda request: call(request, given),))


def _described(
    kind: type[Made],
    name: str,
    params: type[Params],
    needs: tuple[str, ...],
    fields: Callable[[Any, Any], tuple[object, ...]],
) -> Callable[[object], Plugin[Made]]:
    """What all kinds have in common. Types are erased here: each decorator's signature has checked them.

    Args:
        fields: (what is called for each request, parameters) -> what the kind has beyond an `Instance`, in order.
    """

    build: Callable[..., Made] = kind

    def describe(body: object) -> Plugin[Made]:
        def make(called: str, given: Params, context: Context) -> Made:
            call: Any = body(given, context) if isinstance(body, type) else body
            hooks = (getattr(call, hook, None) for hook in ("chosen", "forget", "answered", "pins"))
            return build(called, *hooks, getattr(call, "needs", needs), *fields(call, given))

        assert body.__doc__, f"{body!r} needs a docstring: it is the catalogue's entry"
        return Plugin(name, kind, params, needs, body.__doc__, make)

    return describe


def _of_candidates(call: Any, given: Any) -> tuple[object, ...]:
    """For calls with a request, one thing more, and the parameters."""
    return (lambda request, other: call(request, other, given),)
