"""Who refers to whom: names in parameters, checked, and the order in which plugins can be made.

In: structs whose fields are marked with `Ref` or `ProfileRef`. Out: what they name, and where.
Rules here: a name is looked up by the kind that its mark asks for; what refers to each other in a circle is an error;
the order follows from the file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from epp.config.document import unwrapped
from epp.config.known import FURTHER, KNOWN
from epp.scheduling.plugin import Instance, Plugin, ProfileRef, Ref


class Mention(msgspec.Struct, frozen=True):
    """One field that names something."""

    path: str
    """Within the struct, as `deciders.prefill`."""
    name: str
    """Empty: nothing is named."""
    to: Ref | ProfileRef


def mentions(value: msgspec.Struct, prefix: str = "") -> Iterator[Mention]:
    """Every field that refers to a plugin or a profile, in the order of the fields, at any depth."""
    for field in msgspec.structs.fields(value):
        yield from _mentions(getattr(value, field.name), field.type, f"{prefix}{field.encode_name}")


def _mentions(value: Any, kind: Any, path: str) -> Iterator[Mention]:
    _, marks = unwrapped(kind)
    for mark in marks:
        if isinstance(mark, Ref | ProfileRef):
            yield Mention(path, value, mark)
    if isinstance(value, msgspec.Struct):
        yield from mentions(value, f"{path}.")
    elif isinstance(value, tuple):
        for index, each in enumerate(value):
            yield from _mentions(each, type(each), f"{path}[{index}]")


def own_kinds(plugin: Plugin[Instance]) -> tuple[str, ...]:
    """Kinds of a plugin of ours, in small letters."""
    return tuple(role.kind.__name__.lower() for role in plugin.roles)


def kinds(type_: str, plugin: Plugin[Instance] | None) -> tuple[str, ...]:
    """What a plugin type may be referred to as, its own kinds first."""
    if plugin is None:
        return KNOWN[type_].roles
    return tuple(dict.fromkeys((*own_kinds(plugin), *FURTHER.get(type_, ()))))


def in_order(
    names: Sequence[str], needs: Mapping[str, Sequence[str]], circle: Callable[[Sequence[str]], None]
) -> list[str]:
    """The names, each after those that it needs, else in the order given.

    Args:
        needs: of each name, others among them.
        circle: told of each circle, from the name where it was found back to it.
    """
    done: dict[str, None] = {}
    way: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in way:
            circle([*way[way.index(name) :], name])
            return
        way.append(name)
        for needed in needs.get(name, ()):
            visit(needed)
        way.pop()
        done[name] = None

    for name in names:
        visit(name)
    return list(done)
