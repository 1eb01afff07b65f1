"""What the proxy is told of a request once its answer is whole.

In: what the model server said of its tokens. Out: dynamic metadata for the last reply to the response.
Rules here: where the proxy shows no bodies, nothing is known and nothing is told; a value that cannot be computed for
this answer is not told, and harms nobody.
Source: Gateway API Inference Extension and llm-d router, request-attribute-reporter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Final

from msgspec import Meta

from epp.dialects.request import Request
from epp.dialects.usage import Usage
from epp.scheduling.expressions import Absent, Expression, Kind, parse
from epp.scheduling.plugin import Context, Instance, Params, Plugin

NAMESPACE: Final = "envoy.lb"
Metadata = tuple[tuple[str, str, float], ...]
"""Namespace, key and value of each."""


class Reporter(Instance, frozen=True):
    """Tells the proxy something of a whole answer."""

    report: Callable[[Request, Usage], Metadata]
    """The request has no body any more."""


def reported(
    reporters: Sequence[Reporter], request: Request, usage: Usage | None, broke: Callable[[str, Exception], None]
) -> Metadata:
    """What all of them tell; nothing of an answer whose tokens are not known.

    Args:
        broke: told of a plugin that raises.
    """
    found: list[tuple[str, str, float]] = []
    if usage is None:
        return ()
    for each in reporters:
        try:
            found += each.report(request, usage)
        except Exception as error:
            broke(f"plugin {each.name} at the end of a response", error)
    return tuple(found)


class Key(Params, frozen=True):
    """Where the value stands in the proxy's dynamic metadata."""

    name: Annotated[str, Meta(min_length=1)]
    """Its key within the namespace."""
    namespace: str = NAMESPACE
    """The namespace; empty: envoy.lb."""


class Attribute(Params, frozen=True):
    key: Key
    """Where the value stands in the proxy's dynamic metadata."""
    expression: Annotated[str, Meta(min_length=1)]
    """The value, in CEL: `usage.prompt_tokens + usage.completion_tokens`. A fraction is cut off; 0 is not told."""
    condition: str = ""
    """Tell it only where this holds, in CEL: `has(usage.completion_tokens)`; empty: always."""

    def __post_init__(self) -> None:
        compiled("expression", self.expression, Kind.NUMBER)
        if self.condition:
            compiled("condition", self.condition, Kind.CHOICE)


class ReporterParams(Params, frozen=True):
    attributes: Annotated[tuple[Attribute, ...], Meta(min_length=1, max_length=1)]
    """What is told: exactly one value."""


class RequestAttribute:
    """Tell the proxy a number that is worked out from an answer's tokens, such as what the request cost.

    It comes as dynamic metadata on the last reply to the response's body; the ext_proc filter must show bodies
    (response_body_mode FULL_DUPLEX_STREAMED) and receive the namespace (metadata_options.receiving_namespaces).
    Streams tell their tokens only where the client, or somebody before us, asks for them (stream_options).
    Values: of `usage`, prompt_tokens, completion_tokens, total_tokens and prompt_tokens_details.cached_tokens.
    """

    def __init__(self, params: ReporterParams, context: Context) -> None:
        (attribute,) = params.attributes
        self._namespace, self._name = attribute.key.namespace or NAMESPACE, attribute.key.name
        self._value = compiled("expression", attribute.expression, Kind.NUMBER)
        self._holds = compiled("condition", attribute.condition or "true", Kind.CHOICE)

    def report(self, request: Request, usage: Usage) -> Metadata:
        try:
            value = float(self._value.compute(usage)) if self._holds.compute(usage) else 0.0
        except (Absent, ArithmeticError):
            return ()
        whole = math.trunc(value) if math.isfinite(value) else 0
        return ((self._namespace, self._name, float(whole)),) if whole else ()


def compiled(name: str, text: str, kind: Kind) -> Expression:
    """Raises ValueError: it is not understood, or not of this kind."""
    try:
        expression = parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if expression.kind is not kind:
        raise ValueError(f"{name}: {text!r} is {expression.kind.value}, and must be {kind.value}")
    return expression


def _make(name: str, params: Params, context: Context) -> Reporter:
    assert isinstance(params, ReporterParams)
    report = RequestAttribute(params, context).report
    return Reporter(name=name, chosen=None, forget=None, answered=None, pins=None, needs=(), report=report)


request_attribute = Plugin(
    "request-attribute-reporter", Reporter, ReporterParams, (), RequestAttribute.__doc__ or "", _make
)
