"""A YAML document whose every node knows where it stands.

In: text. Out: nodes with their place and path, and every mistake found on the way.
Rules here: nothing stops at the first mistake; a value that cannot be used is reported and then as good as absent.
Rejected: decoding first and checking later, which loses lines; a schema library, whose errors name no line.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
import yaml

from epp.errors import ConfigError
from epp.scheduling.plugin import Params

P = TypeVar("P", bound=Params)
T = TypeVar("T")


class ConfigErrors(ConfigError):
    """Everything that is wrong with one file, in the order of its lines."""

    def __init__(self, errors: Collection[ConfigError]) -> None:
        self.errors = tuple(sorted(errors, key=lambda error: (error.line, error.column)))
        super().__init__("\n".join(str(error) for error in self.errors))


class Place(msgspec.Struct, frozen=True):
    """Where something is written, for an error that is found later."""

    file: str = ""
    line: int = 0
    column: int = 0
    path: str = ""

    def error(self, message: str) -> ConfigError:
        return ConfigError(message, file=self.file, line=self.line, column=self.column, path=self.path)


class At(msgspec.Struct, frozen=True):
    """One value of the document, and where it stands."""

    node: yaml.Node
    path: str
    """As `plugins[2].parameters.unknown`; empty: the whole document."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats too: PyYAML takes 1e3 for a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Document:
    """One file while it is read. Ask it for values; what is wrong collects in `errors`."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.errors: list[ConfigError] = []
        self.root: At | None = None
        """None: the document is empty, or no YAML."""
        try:
            node = yaml.compose(text, _Loader)
        except yaml.YAMLError as error:
            self._not_yaml(error)
        else:
            self.root = None if node is None or _is_null(node) else At(node, "")

    def place(self, at: At) -> Place:
        mark = at.node.start_mark
        return Place(self.file, mark.line + 1, mark.column + 1, at.path)

    def complain(self, at: At, message: str) -> None:
        self.errors.append(self.place(at).error(message))

    def fields(self, at: At, known: Collection[str]) -> dict[str, At] | None:
        """The fields of a mapping; those not known are reported, nulls are absent. None: reported, it is no mapping."""
        if not isinstance(at.node, yaml.MappingNode):
            self.complain(at, f"expected {_named(known)}, not {_kind(at.node)}")
            return None
        found: dict[str, At] = {}
        for key, value in at.node.value:
            name = str(key.value)
            here = At(key, f"{at.path}.{name}" if at.path else name)
            if name not in known:
                self.complain(here, f"unknown field{did_you_mean(name, known)}; expected {_named(known)}")
            elif name in found:
                self.complain(here, "this field is given twice")
            elif not _is_null(value):
                found[name] = At(value, here.path)
        return found

    def items(self, at: At | None) -> list[At]:
        """The items of a list; anything else is reported. None: an empty list."""
        if at is None:
            return []
        if not isinstance(at.node, yaml.SequenceNode):
            self.complain(at, f"expected a list, not {_kind(at.node)}")
            return []
        return [At(node, f"{at.path}[{index}]") for index, node in enumerate(at.node.value)]

    def text(self, at: At) -> str | None:
        """A word; anything else, or an empty one, is reported."""
        value = self.value(at, str)
        if value == "":
            self.complain(at, "expected a word, not an empty one")
        return value or None

    def value(self, at: At, kind: type[T]) -> T | None:
        """A value of a type that msgspec knows; anything else is reported."""
        try:
            return msgspec.convert(_plain(at.node), kind)
        except msgspec.ValidationError as error:
            self.complain(at, str(error).replace("Expected", "expected", 1))
        except yaml.YAMLError as error:
            self.complain(at, str(getattr(error, "problem", error)))
        return None

    def params(self, at: At | None, kind: type[P], owner: At) -> tuple[P | None, Collection[str]]:
        """Parameters of a plugin, and the names of those that were given. None: something was reported."""
        known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        before = len(self.errors)
        given = (self.fields(at, known) if at is not None else None) or {}
        for name, field in known.items():
            if name in given:
                self.value(given[name], field.type)
            elif field.required:
                self.complain(at or owner, f"the parameter {name} is required")
        if len(self.errors) > before:
            return None, ()
        try:
            return msgspec.convert({name: _plain(value.node) for name, value in given.items()}, kind), given
        except msgspec.ValidationError as error:  # from __post_init__
            self.complain(at or owner, str(error))
            return None, ()

    def _not_yaml(self, error: yaml.YAMLError) -> None:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        self.errors.append(ConfigError(f"not YAML: {problem}", file=self.file, line=line, column=column))


def did_you_mean(word: str, known: Collection[str]) -> str:
    """ " (did you mean queue-scorer?)", or nothing when no known word is close."""
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _named(fields: Collection[str]) -> str:
    return f"fields ({', '.join(sorted(fields))})" if fields else "nothing"


def _plain(node: yaml.Node) -> Any:
    """The node as Python values. `Any`: msgspec checks it next."""
    return _Loader("").construct_object(node, deep=True)


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "fields"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the value {node.value!r}"
