"""Label selectors: which pods are meant.

In: the text of `--endpoint-selector` or of a plugin's parameter, or a pool's `matchLabels`. Out:
`Selector.matches(labels)`.
Rules here:
- All requirements must hold. `!=` and `notin` hold for a label that is missing, as in Kubernetes.
- What Kubernetes' parser takes is taken: `a=b`, `a==b`, `a!=b`, `a in (b,c)`, `a notin (b)`, `a`, `!a`, `a>1`, `a<1`,
  with blanks anywhere, and an empty value where one is left out (`a=`, `a in (,b)`).
Source: k8s.io/apimachinery `labels.Parse`; syntax of labels: the Kubernetes documentation, "Labels and Selectors".
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from epp.errors import ConfigError

_TOKEN: Final = re.compile(r"==|!=|[=!(),<>]|[^\s=!(),<>]+")
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_PREFIX: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,19}")
_END: Final = ""


class Operator(enum.Enum):
    """How a label is held against a requirement's values."""

    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    MISSING = "!"
    ABOVE = ">"
    BELOW = "<"


class Requirement(msgspec.Struct, frozen=True):
    """What one label must be."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()
    """Of ABOVE and BELOW exactly one, a whole number; of EXISTS and MISSING none."""

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case Operator.IN:
                return value in self.values
            case Operator.NOT_IN:
                return value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.MISSING:
                return value is None
        if value is None or not _INTEGER.fullmatch(value):
            return False
        (bound,) = self.values
        return int(value) > int(bound) if self.operator is Operator.ABOVE else int(value) < int(bound)


class Selector(msgspec.Struct, frozen=True):
    """Requirements that must all hold. None: everything is selected."""

    requirements: tuple[Requirement, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.holds(labels) for requirement in self.requirements)


def select_equal(labels: Mapping[str, str]) -> Selector:
    """The selector of a pool's `matchLabels`: each label has exactly this value."""
    return Selector(tuple(Requirement(key, Operator.IN, frozenset((labels[key],))) for key in sorted(labels)))


def parse_selector(text: str) -> Selector:
    """Read a selector in Kubernetes' grammar.

    Raises:
        ConfigError: what was expected, and after how much of the text. An empty text is refused too: it would select
            every pod of the namespace.
    """
    tokens = _Tokens(text)
    requirements = [_requirement(tokens)]
    while tokens.next != _END:
        tokens.expect(",", "a comma, or the end")
        requirements.append(_requirement(tokens))
    return Selector(tuple(requirements))


class _Tokens:
    """The words and symbols of a text, one after the other."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found = list(_TOKEN.finditer(text))
        self._at = 0

    @property
    def next(self) -> str:
        return self._found[self._at].group() if self._at < len(self._found) else _END

    def take(self) -> str:
        token = self.next
        self._at += 1
        return token

    def expect(self, token: str, name: str) -> None:
        if self.next != token:
            raise self.error(name)
        self._at += 1

    def word(self, pattern: re.Pattern[str], name: str) -> str:
        if not pattern.fullmatch(self.next):
            raise self.error(name)
        return self.take()

    def value(self) -> str:
        """A label's value; one that is left out is empty."""
        if self.next in (_END, ",", ")"):
            return ""
        return self.word(_NAME, "a label's value (at most 63 letters, digits, '-', '_', '.')")

    def key(self) -> str:
        key = self.next
        prefix, slash, name = key.rpartition("/")
        if not _NAME.fullmatch(name) or (slash and (len(prefix) > 253 or not _PREFIX.fullmatch(prefix))):
            raise self.error("a label's name, as app or example.com/app")
        return self.take()

    def error(self, expected: str) -> ConfigError:
        offset = self._found[self._at].start() if self._at < len(self._found) else len(self._text)
        found = repr(self.next) if self.next != _END else "the end"
        return ConfigError(f"expected {expected}, not {found}, after {self._text[:offset]!r}", column=offset + 1)


def _requirement(tokens: _Tokens) -> Requirement:
    if tokens.next == "!":
        tokens.take()
        return Requirement(tokens.key(), Operator.MISSING)
    key = tokens.key()
    match tokens.next:
        case "," | "":
            return Requirement(key, Operator.EXISTS)
        case "=" | "==":
            tokens.take()
            return Requirement(key, Operator.IN, frozenset((tokens.value(),)))
        case "!=":
            tokens.take()
            return Requirement(key, Operator.NOT_IN, frozenset((tokens.value(),)))
        case "in" | "notin" | ">" | "<":
            operator = Operator(tokens.take())
            is_set = operator in (Operator.IN, Operator.NOT_IN)
            return Requirement(
                key, operator, _values(tokens) if is_set else frozenset((tokens.word(_INTEGER, "a whole number"),))
            )
    raise tokens.error("=, !=, in, notin, <, > or a comma")


def _values(tokens: _Tokens) -> frozenset[str]:
    tokens.expect("(", "a list in parentheses")
    values = [tokens.value()]
    while tokens.next == ",":
        tokens.take()
        values.append(tokens.value())
    tokens.expect(")", "a comma or ')'")
    return frozenset(values)
