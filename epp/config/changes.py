"""What is different between two configurations, as an operator would say it.

In: two `Config`s. Out: one line for each difference, in the order of the newer one.
Rules here: a plugin is known by its name, a profile's entry by its plugin; what is added or gone is one line with what
it was given, not one for each of its defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from epp.config.schema import Config, Declared

Values = dict[str, str]
"""By path; each as JSON."""


def changes(before: Config, after: Config) -> list[str]:
    """Every difference; empty: there is none but in comments and order of fields."""
    return [
        *_plugins(before.plugins, after.plugins),
        *_differing(_profiles(before), _profiles(after)),
        *_differing(_sections(before), _sections(after)),
    ]


def _plugins(before: Mapping[str, Declared], after: Mapping[str, Declared]) -> Iterator[str]:
    for name, now in after.items():
        was = before.get(name)
        if was is None:
            yield f"plugins.{name}: added, {_written(now)}"
        elif was.type != now.type:
            yield f"plugins.{name}: {_written(was)} -> {_written(now)}"
        else:
            yield from _differing(_flat(was.params, f"plugins.{name}"), _flat(now.params, f"plugins.{name}"))
    for name, was in before.items():
        if name not in after:
            yield f"plugins.{name}: removed, {_written(was)}"


def _written(declared: Declared) -> str:
    """A plugin with the parameters that are not its defaults."""
    usual = _defaults(declared.params)
    given = [f"{path}: {value}" for path, value in _flat(declared.params).items() if usual.get(path) != value]
    return f"type {declared.type}{' with ' if given else ''}{', '.join(given)}"


def _defaults(params: msgspec.Struct) -> Values:
    """Of the fields that need not be given."""
    fields = msgspec.structs.fields(params)
    usual = {field.encode_name: field.default for field in fields if field.default is not msgspec.NODEFAULT}
    return _flat(usual)


def _profiles(config: Config) -> Values:
    values = {"handler": config.handler} if config.handler else {}
    for profile in config.profiles:
        key = f"schedulingProfiles.{profile.name}"
        values[key] = ", ".join(each.name for each in profile.plugins)
        values |= {f"{key}.{each.name}.weight": f"{each.weight:g}" for each in profile.plugins if each.weight != 1.0}
    return values


def _sections(config: Config) -> Values:
    return {
        **_flat(dict(config.gates), "featureGates"),
        **_flat(config.data, "dataLayer"),
        **_flat(config.flow, "flowControl"),
        **_flat(config.request_handler, "requestHandler"),
    }


def _flat(value: Any, path: str = "") -> Values:
    """Each leaf by its path; none where something is empty. `Any`: whatever parameters hold."""
    plain = msgspec.to_builtins(value)
    if isinstance(plain, dict):
        inner = [_flat(each, f"{path}.{name}" if path else str(name)) for name, each in plain.items()]
    elif isinstance(plain, list | tuple):
        inner = [_flat(each, f"{path}[{index}]") for index, each in enumerate(plain)]
    else:
        return {path: msgspec.json.encode(plain).decode()}
    return {key: leaf for each in inner for key, leaf in each.items()}


def _differing(before: Values, after: Values) -> Iterator[str]:
    for path, now in after.items():
        was = before.get(path)
        if was is None:
            yield f"{path}: added, {now}"
        elif was != now:
            yield f"{path}: {was} -> {now}"
    for path, was in before.items():
        if path not in after:
            yield f"{path}: removed, was {was}"
