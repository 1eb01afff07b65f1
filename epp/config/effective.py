"""A configuration as it counts: every default spelled out, and where each value comes from.

In: a `Config`. Out: YAML that loads to the same `Config`; its comments say line, default, or why something was added.
Rules here: nothing that has no effect in a profile is repeated; the order is that in which plugins are made, and
else the file's, so that the same file always gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import yaml

from epp.config.document import Place
from epp.config.schema import API_VERSION, KIND, Config, Declared, ProfileConfig, Reference


def effective(config: Config, file: str = "") -> str:
    """The configuration as YAML, with comments.

    Args:
        file: where it was read, for the first line.
    """
    return "\n".join(_lines(config, file)) + "\n"


def _lines(config: Config, file: str) -> Iterator[str]:
    yield f"# What {file or 'the configuration'} comes to. Comments: the line that says so, or why it counts unsaid."
    yield f"apiVersion: {API_VERSION}"
    yield f"kind: {KIND}"
    if config.gates:
        yield "featureGates:"
    for gate, on in config.gates.items():
        yield _with(f"- {gate}={_scalar(on)}", _line(config.places[f"featureGates.{gate}"]))
    yield "plugins:"
    for declared in config.plugins.values():
        yield from _plugin(declared)
    yield "schedulingProfiles:"
    for profile in config.profiles:
        yield from _profile(profile, config)
    for name, section in (
        ("dataLayer", config.data),
        ("flowControl", config.flow),
        ("requestHandler", config.request_handler),
    ):
        places = {
            path.removeprefix(f"{name}."): place for path, place in config.places.items() if path.startswith(f"{name}.")
        }
        if written := list(_fields(_plain(section), places, "", "  ")):
            yield f"{name}:"
            yield from written


def _plugin(declared: Declared) -> Iterator[str]:
    why = f"added: {declared.added_for}" if declared.added_for else _line(declared.place)
    yield _with(f"- name: {_scalar(declared.name)}", why)
    yield f"  type: {_scalar(declared.type)}"
    if written := list(_fields(_plain(declared.params), declared.places, "", "    ")):
        yield "  parameters:"
        yield from written


def _profile(profile: ProfileConfig, config: Config) -> Iterator[str]:
    key = f"schedulingProfiles.{profile.name}"
    yield _with(f"- name: {_scalar(profile.name)}", _line(config.places.get(key), "default"))
    yield "  plugins:"
    for reference in profile.plugins:
        yield from _reference(reference, f"{key}.{reference.name}", config)


def _reference(reference: Reference, key: str, config: Config) -> Iterator[str]:
    declared = config.plugins[reference.name]
    added = f"added: {declared.added_for}" if declared.added_for else "default"
    yield _with(f"  - pluginRef: {_scalar(reference.name)}", _line(config.places.get(key), added))
    kinds = [role.kind.__name__ for role in declared.plugin.roles] if declared.plugin else []
    if "Scorer" in kinds:
        yield _with(f"    weight: {_scalar(reference.weight)}", _line(config.places.get(f"{key}.weight"), added))


def _fields(value: Mapping[str, Any], places: Mapping[str, Place], prefix: str, indent: str) -> Iterator[str]:
    """The fields of a struct or mapping, each leaf with where it comes from; what is None is not written."""
    for name, each in value.items():
        if each is not None:
            yield from _value(f"{indent}{_scalar(name)}:", each, places, f"{prefix}{name}", indent)


def _value(head: str, value: Any, places: Mapping[str, Place], path: str, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        yield head
        yield from _fields(value, places, f"{path}.", f"{indent}  ")
    elif isinstance(value, list | tuple) and value:
        yield head
        for index, each in enumerate(value):
            yield from _item(each, places, f"{path}[{index}]", indent)
    else:
        yield _with(f"{head} {_scalar(value)}", _line(places.get(path), "default"))


def _item(value: Any, places: Mapping[str, Place], path: str, indent: str) -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield _with(f"{indent}- {_scalar(value)}", _line(places.get(path), "default"))
        return
    first, *others = _fields(value, places, f"{path}.", f"{indent}  ")
    yield f"{indent}- {first.lstrip()}"
    yield from others


def _plain(section: msgspec.Struct) -> dict[str, Any]:
    """A struct as names and values. `Any`: whatever parameters hold."""
    plain: dict[str, Any] = msgspec.to_builtins(section)
    return plain


def _scalar(value: Any) -> str:
    """On one line, as YAML reads it back."""
    value = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**30, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _line(place: Place | None, otherwise: str = "") -> str:
    return f"line {place.line}" if place is not None and place.line else otherwise


def _with(text: str, comment: str) -> str:
    return f"{text}  # {comment}" if comment else text
