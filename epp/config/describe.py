"""What there is to configure, in words: every plugin type with its parameters, for people.

In: types and structs. Out: descriptions; text for a terminal, and the page docs/plugins.md.
Rules here: words come from docstrings and annotations and from nowhere else, so that they cannot go stale; the order
is the catalogue's, then that of `known.py`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from epp.config.document import unwrapped
from epp.config.known import KNOWN
from epp.config.pages import parse_metric
from epp.config.references import kinds
from epp.scheduling.catalogue import Catalogue
from epp.scheduling.plugin import Params, ProfileRef, Ref
from epp.units import Written, parse_duration, parse_quantity

WRITTEN: Final[Mapping[Callable[[str], object], str]] = {
    parse_duration: "duration",
    parse_quantity: "quantity",
    parse_metric: "metric",
}
WORDS: Final = {int: "whole number", float: "number", str: "text", bool: "true or false"}
WIDTH: Final = 110


class Parameter(msgspec.Struct, frozen=True):
    """One parameter, or one field of one that is a section."""

    name: str
    """As `profiles.decode`."""
    kind: str
    """As "number 0..1"."""
    default: str
    """As in YAML; empty: it is required."""
    doc: str


class Description(msgspec.Struct, frozen=True):
    """One plugin type."""

    type: str
    kinds: tuple[str, ...]
    doc: str
    parameters: tuple[Parameter, ...]
    experimental: bool
    instead: str
    """What to write instead; not empty: it is deprecated."""
    why: str
    """Why it has no effect; empty: it has."""
    needs: tuple[str, ...]
    """Signals that it reads."""


def descriptions(plugins: Catalogue) -> list[Description]:
    """Every type that a configuration may name."""
    return [described(type_, plugins) for type_ in dict.fromkeys((*plugins, *KNOWN))]


def described(type_: str, plugins: Catalogue) -> Description:
    """One of them. Raises KeyError: there is none of that name."""
    plugin, known = plugins.get(type_), KNOWN.get(type_)
    about = plugin or KNOWN[type_]
    return Description(
        type_,
        kinds(type_, plugin),
        inspect.cleandoc(about.doc),
        tuple(parameters(about.params)),
        about.experimental,
        about.instead,
        known.why if plugin is None and known is not None else "",
        plugin.needs if plugin is not None else (),
    )


def parameters(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[Parameter]:
    """Fields of a struct, and below each that is a section its fields."""
    docs = field_docs(kind)
    for field in msgspec.structs.fields(kind):
        name = f"{prefix}{field.encode_name}"
        yield Parameter(name, _kind(field.type), _default(field), docs.get(field.name, ""))
        plain, _ = unwrapped(field.type)
        if get_origin(plain) is tuple:
            plain, name = unwrapped(get_args(plain)[0])[0], f"{name}[]"
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            yield from parameters(plain, f"{name}.")


@cache
def field_docs(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The docstring under each field of a struct, of those that it inherits too."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, msgspec.Struct) and base not in (msgspec.Struct, Params):
            docs |= dict(_documented(_body(base)))
    return docs


def _documented(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            yield field.target.id, inspect.cleandoc(str(ast.literal_eval(after.value))).replace("\n", " ")


def _body(kind: type) -> Sequence[ast.stmt]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):  # no source, as of a struct that was made in an interpreter
        return ()
    return definition.body if isinstance(definition, ast.ClassDef) else ()


def _kind(kind: Any) -> str:
    plain, marks = unwrapped(kind)
    for mark in marks:
        if isinstance(mark, ProfileRef):
            return "name of a profile"
        if isinstance(mark, Ref):
            return f"name of a plugin ({mark.kind})" if mark.kind != "plugin" else "name of a plugin"
        if isinstance(mark, Written):
            return WRITTEN[mark.parse]
    if get_origin(plain) is Literal:
        return "one of " + ", ".join(str(each) or '""' for each in get_args(plain))
    if get_origin(plain) is tuple:
        return f"list of {_plural(_kind(get_args(plain)[0]))}"
    if get_origin(plain) in (dict, Mapping) or (isinstance(plain, type) and issubclass(plain, msgspec.Struct)):
        return "section"
    word = WORDS.get(plain, "any value" if plain is Any else "number or text")
    metas = [mark for mark in marks if isinstance(mark, msgspec.Meta)]
    return f"{word}{''.join(_range(meta) for meta in metas)}"


def _plural(word: str) -> str:
    return {"text": "texts", "any value": "any values", "section": "sections"}.get(word, word)


def _range(meta: msgspec.Meta) -> str:
    low = meta.ge if meta.ge is not None else meta.gt
    if low is not None and meta.le is not None:
        return f" {'above ' if meta.ge is None else ''}{low}..{meta.le}"
    bounds = {"at least": meta.ge, "above": meta.gt, "at most": meta.le, "below": meta.lt}
    return "".join(f", {word} {bound}" for word, bound in bounds.items() if bound is not None)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return ""
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None or isinstance(value, msgspec.Struct):
        return "-"
    return msgspec.json.encode(value).decode()


# -- for a terminal ----------------------------------------------------------------------------------------------------


def listed(every: Sequence[Description]) -> str:
    """One line for each type."""
    wide = max(len(each.type) for each in every)
    rows = ((each.type, ", ".join(each.kinds), _status(each), each.doc.partition("\n")[0]) for each in every)
    return "\n".join(f"{type_:<{wide}}  {kinds:<20} {status:<13} {doc}".rstrip() for type_, kinds, status, doc in rows)


def explained(each: Description) -> str:
    """One type in full."""
    lines = [f"{each.type} ({', '.join(each.kinds)})", "", *_notes(each), each.doc]
    if each.parameters:
        lines += ["", "Parameters:"]
    for parameter in each.parameters:
        lines.append(f"  {parameter.name}: {parameter.kind}; {_said(parameter)}")
        lines += textwrap.wrap(parameter.doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _said(parameter: Parameter) -> str:
    return f"default {parameter.default}" if parameter.default else "required"


def _status(each: Description) -> str:
    if each.instead:
        return "deprecated"
    return "no effect" if each.why else "experimental" if each.experimental else ""


def _notes(each: Description) -> list[str]:
    notes = []
    if each.experimental:
        notes.append("Experimental: it needs --allow-experimental-plugins.")
    if each.instead:
        notes.append(f"Deprecated: write {each.instead}.")
    if each.why:
        notes.append(f"It has no effect: {each.why}.")
    if each.needs:
        notes.append(f"Reads: {', '.join(each.needs)}.")
    return [*notes, ""] if notes else []


# -- for the documentation ---------------------------------------------------------------------------------------------

HEAD: Final = """# Plugins

Every type that a configuration may name, by what it does. [configure.md](configure.md) says how they are put together;
`epp plugins NAME` prints one of them. This page is generated: `epp plugins --markdown > docs/plugins.md`.
"""
GROUPS: Final = {
    "filter": "Filters: who may serve a request",
    "scorer": "Scorers: who should",
    "picker": "Pickers: who does",
    "handler": "Profile handlers: which profiles run",
    "decider": "Deciders: whether a stage of disaggregated serving is worth it",
    "producer": "Producers: what is worked out once for others",
    "admitter": "Admitters: whether a request may run at all",
    "processor": "Processors of request headers",
    "reporter": "Reporters: what the proxy is told of a whole answer",
    "screener": "Screeners: who is left out before anything else is asked",
    "hook": "Hooks before a request is sent",
    "detector": "Saturation detectors",
    "fairness policy": "Fairness policies",
    "ordering policy": "Ordering policies",
    "usage limit policy": "Usage limit policies",
    "eviction filter": "Eviction filters",
    "eviction order": "Eviction orders",
    "parser": "Parsers",
    "data source": "Data sources",
    "extractor": "Extractors",
    "discovery": "Discovery",
}


def page(every: Sequence[Description]) -> str:
    """docs/plugins.md."""
    groups: dict[str, list[Description]] = {kind: [] for kind in GROUPS}
    for each in every:
        groups.setdefault(each.kinds[0], []).append(each)
    parts = [HEAD]
    for kind, members in groups.items():
        if members:
            parts += [f"\n## {GROUPS.get(kind, kind.capitalize() + 's')}\n", *(_section(each) for each in members)]
    return "".join(parts)


def _section(each: Description) -> str:
    also = f"Also: {', '.join(each.kinds[1:])}." if len(each.kinds) > 1 else ""
    notes = "\n".join(note for note in (*_notes(each), also) if note)
    parts = [f"\n### `{each.type}`\n", f"\n{each.doc}\n"]
    if notes:
        parts.append(f"\n{notes}\n")
    if each.parameters:
        parts.append("\n| parameter | value | default | |\n|---|---|---|---|\n")
        parts += [
            f"| `{one.name}` | {one.kind} | {f'`{one.default}`' if one.default else 'required'} | {_cell(one.doc)} |\n"
            for one in each.parameters
        ]
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
