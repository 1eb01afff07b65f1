"""A YAML document whose every node knows where it stands.

In: text. Out: nodes with their place and path, and every mistake found on the way.
Rules here: nothing stops at the first mistake; a value that cannot be used is reported and then as good as absent.
Rejected: decoding first and checking later, which loses lines; a schema library, whose errors name no line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from epp.errors import ConfigError
from epp.scheduling.plugin import Params, ProfileRef, Ref
from epp.units import Written

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


class Named(msgspec.Struct, frozen=True):
    """A name of something else, as it was read."""

    place: Place
    name: str
    to: Ref | ProfileRef


class Given(msgspec.Struct, Generic[P], frozen=True):
    """A struct that was read."""

    value: P
    places: Mapping[str, Place]
    """Where each field of it is written, by its path within it, as `profiles.decode`; others have their defaults."""


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
        self.named: list[Named] = []
        """What `params` came across that names plugins and profiles; whether they exist is not looked up here."""
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
            self.complain(at, str(error).replace("Expected", "expected", 1) + _choices(at, kind))
        except yaml.YAMLError as error:
            self.complain(at, str(getattr(error, "problem", error)))
        return None

    def params(self, at: At | None, kind: type[P], owner: At) -> Given[P] | None:
        """A struct, with where each of its fields is written. None: something was reported.

        Args:
            at: None: it is not written, and its defaults count.
            owner: who misses the fields that are required.
        """
        given: dict[str, Place] = {}
        fields = self._struct(at, kind, owner, "", given)
        if fields is None:
            return None
        return Given(msgspec.convert(fields, kind), given)

    # -- any value, by its type ----------------------------------------------------------------------------------

    def _any(self, at: At, kind: Any, name: str, given: dict[str, Place]) -> Any:
        """What is written, as plain values; of no use where something was reported.

        Args:
            name: of the field, from the struct that is read.
            given: gets the places of what is read.
        """
        given[name] = self.place(at)
        before = len(self.errors)
        plain, marks = unwrapped(kind)
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            return self._struct(at, plain, at, f"{name}.", given)
        read: Any = None
        if get_origin(plain) is tuple:
            item = get_args(plain)[0]
            read = [self._any(each, item, f"{name}[{i}]", given) for i, each in enumerate(self.items(at))]
        elif get_origin(plain) in (dict, Mapping) and isinstance(at.node, yaml.MappingNode):
            values = self.fields(at, [str(key.value) for key, _ in at.node.value]) or {}
            read = {key: self._any(value, get_args(plain)[1], f"{name}.{key}", given) for key, value in values.items()}
        elif self.value(at, kind) is not None:
            read = _plain(at.node)
        if len(self.errors) == before:
            self._check(at, read, kind, marks)
        return read

    def _struct(
        self, at: At | None, kind: type[msgspec.Struct], owner: At, prefix: str, given: dict[str, Place]
    ) -> dict[str, Any] | None:
        known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        before = len(self.errors)
        written = (self.fields(at, known) if at is not None else None) or {}
        read = {
            name: self._any(value, known[name].type, f"{prefix}{name}", given)
            for name, value in written.items()
            if not self._is_left_out(value, known[name], f"{prefix}{name}", given)
        }
        for name, field in known.items():
            if field.required and name not in written:
                self.complain(at or owner, _missing(name, field.type))
        if len(self.errors) > before:
            return None
        try:
            msgspec.convert(read, kind)
        except msgspec.ValidationError as error:  # from __post_init__
            self.complain(at or owner, str(error))
            return None
        return read

    def _is_left_out(self, at: At, field: msgspec.structs.FieldInfo, name: str, given: dict[str, Place]) -> bool:
        """A default that is spelled out says nothing: an empty text, whatever else it would have to look like, and the
        name of a profile that may be missing."""
        if not isinstance(at.node, yaml.ScalarNode) or at.node.value != field.default:
            return False
        may_miss = any(isinstance(mark, ProfileRef) and not mark.required for mark in unwrapped(field.type)[1])
        if field.default != "" and not may_miss:
            return False
        given[name] = self.place(at)
        return True

    def _check(self, at: At, read: Any, kind: Any, marks: Sequence[Any]) -> None:
        """What a type says beside the types of its parts: how many there are, how a text is written."""
        try:
            msgspec.convert(read, kind)
            for mark in marks:
                if isinstance(mark, Written):
                    mark.parse(str(read))
                elif isinstance(mark, Ref | ProfileRef) and read:
                    self.named.append(Named(self.place(at), str(read), mark))
        except (msgspec.ValidationError, ValueError) as error:
            self.complain(at, str(error).replace("Expected", "expected", 1))

    def _not_yaml(self, error: yaml.YAMLError) -> None:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        self.errors.append(ConfigError(f"not YAML: {problem}", file=self.file, line=line, column=column))


def did_you_mean(word: str, known: Collection[str]) -> str:
    """ " (did you mean queue-scorer?)", or nothing when no known word is close."""
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def unwrapped(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations and without "or None", and the annotations."""
    marks: tuple[Any, ...] = ()
    while True:
        if get_origin(kind) is Annotated:
            kind, *found = get_args(kind)
            marks = (*marks, *found)
        elif (
            get_origin(kind) in (Union, UnionType)
            and len(rest := [k for k in get_args(kind) if k is not NoneType]) == 1
        ):
            (kind,) = rest
        else:
            return kind, marks


def _choices(at: At, kind: Any) -> str:
    """Of a word out of few: "; expected requests, tokens or hybrid"."""
    plain, _ = unwrapped(kind)
    if get_origin(plain) is not Literal or not isinstance(at.node, yaml.ScalarNode):
        return ""
    *others, last = map(str, get_args(plain))
    hint = did_you_mean(at.node.value, [*others, last])
    return f"{hint}; expected {', '.join(others)} or {last}" if others else f"{hint}; expected {last}"


def _missing(name: str, kind: Any) -> str:
    if any(isinstance(mark, Ref) for mark in unwrapped(kind)[1]):
        return f"{name} is missing: name a plugin"
    return f"the parameter {name} is required"


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
