"""The part of CEL (Common Expression Language) that counts tokens with: `usage.prompt_tokens + 2 * usage.total_tokens`.

In: a text, and what a model server said of its tokens. Out: a number, or a yes or no.
Rules here:
- Understood: whole and decimal numbers, `true`, `false`, fields of `usage`, `has(usage.field)`, `int()`, `double()`,
  `+ - * / %`, comparisons, `&& || !`, `a ? b : c`, parentheses. Anything else is refused when the configuration is
  read, with the place and what is understood; so is a field that no server tells, and a sum of yes and no.
- A field that this answer does not tell is Absent: then there is no value, unless `has` asked before.
- Whole numbers divide to whole ones, towards zero, as in CEL. What a server says is a decimal number, as CEL sees it
  in JSON; it may be added to whole ones, which CEL refuses as it runs.
- Either side of `&&` and `||` may be absent where the other one decides, as in CEL.
Rejected: cel-python (a parser generator and its grammar, for a dozen operators); Python's own `eval` and `ast` (another
language: what works there would fail in the reference, or the other way round).
Source: CEL language definition (google/cel-spec).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final

import msgspec

from epp.dialects.usage import Usage

Value = float | int | bool
Compute = Callable[[Usage], Value]

LONGEST: Final = 200
"""Words and signs of one text, so that none takes more stack than there is."""
DEEPEST: Final = 50
"""Parentheses, and the like, within one another."""


class Absent(Exception):
    """The answer does not tell a field that is needed."""


class Kind(Enum):
    NUMBER = "a number"
    CHOICE = "a yes or no"


class Expression(msgspec.Struct, frozen=True):
    """A text that was understood."""

    kind: Kind
    compute: Compute
    """Raises Absent, or ArithmeticError (a division by zero)."""


def _total(usage: Usage) -> int | None:
    one, other = usage.prompt_tokens, usage.completion_tokens
    return None if one is None or other is None else one + other


FIELDS: Final[Mapping[str, Callable[[Usage], int | None]]] = {
    "usage.prompt_tokens": lambda usage: usage.prompt_tokens,
    "usage.completion_tokens": lambda usage: usage.completion_tokens,
    "usage.total_tokens": _total,
    "usage.prompt_tokens_details.cached_tokens": lambda usage: usage.cached_tokens,
    "usage.prompt_token_details.cached_tokens": lambda usage: usage.cached_tokens,
    "usage.input_tokens": lambda usage: usage.prompt_tokens,
    "usage.output_tokens": lambda usage: usage.completion_tokens,
}
"""What may be asked for. The last three: the reference's spelling, and the names in Anthropic's and Responses' answers;
all mean the same whatever API answered."""
GROUPS: Final = frozenset(("usage.prompt_tokens_details", "usage.prompt_token_details"))
"""Fields of which `has` may ask, that are no numbers."""

COMPARE: Final[Mapping[str, Callable[[Value, Value], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _divide(one: Value, other: Value) -> Value:
    if isinstance(one, int) and isinstance(other, int):
        whole = abs(one) // abs(other)
        return whole if (one < 0) == (other < 0) else -whole
    return one / other


def _rest(one: Value, other: Value) -> Value:
    if not other:
        raise ZeroDivisionError
    if isinstance(one, int) and isinstance(other, int):
        return one - other * int(_divide(one, other))
    return math.fmod(_finite(one), other)


def _whole(value: Value) -> Value:
    return int(_finite(value))


def _finite(value: Value) -> Value:
    if not math.isfinite(value):
        raise ArithmeticError(f"{value} is no number to go on with")
    return value


SUMS: Final[Mapping[str, Callable[[Value, Value], Value]]] = {"+": operator.add, "-": operator.sub}
PRODUCTS: Final[Mapping[str, Callable[[Value, Value], Value]]] = {"*": operator.mul, "/": _divide, "%": _rest}
CONVERSIONS: Final[Mapping[str, Callable[[Value], Value]]] = {"int": _whole, "double": float}

TOKEN: Final = re.compile(
    r"\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|([A-Za-z_][\w]*(?:\s*\.\s*[A-Za-z_]\w*)*)|(.[=&|]|.))?"
)
TWO: Final = frozenset(("==", "!=", "<=", ">=", "&&", "||"))


def parse(text: str) -> Expression:
    """Understand a text. Raises ValueError: where it is wrong, and what was expected."""
    parser = _Parser(text)
    found = parser.choice()
    if parser.word:
        raise parser.wrong("an operator, or the end")
    return found


class _Parser:
    """Reads from left to right, one method for each level of binding."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = self.end = 0
        self.depth = self.words = 0
        self.word = ""
        self.step()

    def step(self) -> str:
        """Go on to the next word; returns the one before. Empty: there is no more."""
        before = self.word
        match = TOKEN.match(self.text, self.end)
        number, name, sign = match.groups() if match else (None, None, None)
        if sign is not None and sign not in TWO:
            sign = sign[0]
        self.words += 1
        self.word = number or "".join((name or "").split()) or sign or ""
        if match is not None:
            begins = match.start(match.lastindex) if match.lastindex else match.end()
            self.at, self.end = begins, begins + len(sign) if sign else match.end()
        if self.words > LONGEST:
            raise self.wrong(f"no more than {LONGEST} words and signs")
        return before

    def wrong(self, expected: str) -> ValueError:
        there = f"{self.word!r}" if self.word else "the end"
        return ValueError(f"at character {self.at + 1} of {self.text!r}: expected {expected}, not {there}")

    def take(self, word: str) -> None:
        if self.word != word:
            raise self.wrong(repr(word))
        self.step()

    def need(self, found: Expression, kind: Kind, what: str) -> Compute:
        if found.kind is not kind:
            raise ValueError(
                f"before character {self.at + 1} of {self.text!r}: {what} {kind.value}, not {found.kind.value}"
            )
        return found.compute

    # -- levels, the loosest first -------------------------------------------------------------------------------

    def choice(self) -> Expression:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.wrong(f"no more than {DEEPEST} levels")
        found = self.either()
        if self.word == "?":
            asked = self.need(found, Kind.CHOICE, "what stands before ? must be")
            self.step()
            yes = self.either()
            self.take(":")
            no = self.choice()
            one, other = yes.compute, self.need(no, yes.kind, "both sides of : must be")
            found = Expression(yes.kind, lambda usage: one(usage) if asked(usage) else other(usage))
        self.depth -= 1
        return found

    def either(self) -> Expression:
        found = self.both()
        while self.word == "||":
            found = self.logic(found, self.both, decides=True)
        return found

    def both(self) -> Expression:
        found = self.comparison()
        while self.word == "&&":
            found = self.logic(found, self.comparison, decides=False)
        return found

    def logic(self, found: Expression, read: Callable[[], Expression], *, decides: bool) -> Expression:
        what = f"what stands beside {self.step()} must be"
        one = self.need(found, Kind.CHOICE, what)
        other = self.need(read(), Kind.CHOICE, what)

        def compute(usage: Usage) -> Value:
            try:
                first = one(usage)
            except (Absent, ArithmeticError):
                if other(usage) is decides:
                    return decides
                raise
            return first if first is decides else other(usage)

        return Expression(Kind.CHOICE, compute)

    def comparison(self) -> Expression:
        found = self.sums()
        while self.word in COMPARE:
            sign = self.step()
            if sign not in ("==", "!="):
                self.need(found, Kind.NUMBER, f"what stands before {sign} must be")
            one, compare = found.compute, COMPARE[sign]
            other = self.need(self.sums(), found.kind, f"both sides of {sign} must be")
            found = Expression(Kind.CHOICE, _pair(compare, one, other))
        return found

    def sums(self) -> Expression:
        return self.arithmetic(self.products, SUMS)

    def products(self) -> Expression:
        return self.arithmetic(self.single, PRODUCTS)

    def arithmetic(
        self, read: Callable[[], Expression], signs: Mapping[str, Callable[[Value, Value], Value]]
    ) -> Expression:
        found = read()
        while self.word in signs:
            sign = self.step()
            what = f"what stands beside {sign} must be"
            one, other = self.need(found, Kind.NUMBER, what), self.need(read(), Kind.NUMBER, what)
            found = Expression(Kind.NUMBER, _pair(signs[sign], one, other))
        return found

    def single(self) -> Expression:
        signs = []
        while self.word in ("!", "-"):
            signs.append(self.step())
        found = self.plain()
        for sign in reversed(signs):
            kind, change = (Kind.CHOICE, operator.not_) if sign == "!" else (Kind.NUMBER, operator.neg)
            found = Expression(kind, _change(change, self.need(found, kind, f"what stands behind {sign} must be")))
        return found

    def plain(self) -> Expression:
        word = self.word
        if word == "(":
            self.step()
            found = self.choice()
            self.take(")")
            return found
        if word[:1].isdigit():
            self.step()
            number: Value = int(word) if word.isdigit() else float(word)
            return Expression(Kind.NUMBER, lambda usage: number)
        if word in ("true", "false"):
            self.step()
            return Expression(Kind.CHOICE, lambda usage: word == "true")
        if word in FIELDS:
            self.step()
            return Expression(Kind.NUMBER, _field(word))
        if word == "has":
            return self.has()
        if word in CONVERSIONS:
            self.step()
            self.take("(")
            inner = self.need(self.choice(), Kind.NUMBER, f"{word}() takes")
            self.take(")")
            return Expression(Kind.NUMBER, _change(CONVERSIONS[word], inner))
        if word.startswith("usage"):
            raise self.wrong(f"one of {', '.join(FIELDS)}")
        raise self.wrong("a number, a field of usage, has(), int(), double() or a parenthesis")

    def has(self) -> Expression:
        self.step()
        self.take("(")
        name = self.word
        if name not in FIELDS and name not in GROUPS:
            raise self.wrong(f"one of {', '.join(FIELDS)}")
        self.step()
        self.take(")")
        look = FIELDS[f"{name}.cached_tokens" if name in GROUPS else name]
        return Expression(Kind.CHOICE, lambda usage: look(usage) is not None)


def _field(name: str) -> Compute:
    look = FIELDS[name]

    def compute(usage: Usage) -> Value:
        count = look(usage)
        if count is None:
            raise Absent(name)
        return float(count)

    return compute


def _pair(work: Callable[[Value, Value], Value], one: Compute, other: Compute) -> Compute:
    return lambda usage: work(one(usage), other(usage))


def _change(work: Callable[[Value], Value], one: Compute) -> Compute:
    return lambda usage: work(one(usage))
