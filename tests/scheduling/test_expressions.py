"""The part of CEL that is understood, and what is said of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects.usage import Usage
from epp.scheduling.expressions import DEEPEST, LONGEST, Absent, Kind, Value, parse

USAGE = Usage(prompt_tokens=32, completion_tokens=10, cached_tokens=16)


def value(text: str, usage: Usage = USAGE) -> Value:
    return parse(text).compute(usage)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        (" 7 \n", 7),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("2.5e-1", 0.25),
        ("-3", -3),
        ("--3", 3),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("2 * 3 % 4", 2),
        ("7 / 2", 3),  # whole numbers divide to whole ones
        ("-7 / 2", -3),  # towards zero
        ("-7 % 2", -1),
        ("7 % -2", 1),
        ("7.0 / 2", 3.5),
        ("7.5 % 2", 1.5),
        ("int(3.9)", 3),
        ("int(-3.9)", -3),
        ("double(7) / 2", 3.5),
        ("usage.prompt_tokens", 32.0),
        ("usage . completion_tokens", 10.0),
        ("usage.total_tokens", 42.0),
        ("usage.prompt_tokens_details.cached_tokens", 16.0),
        ("usage.prompt_token_details.cached_tokens", 16.0),
        ("usage.input_tokens + usage.output_tokens", 42.0),
        ("usage.prompt_tokens + 2 * usage.completion_tokens", 52.0),
        ("usage.completion_tokens / 4", 2.5),
        ("(usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens) * 0.25 + usage.completion_tokens", 14.0),
        ("usage.prompt_tokens > 100 ? 1 : 2", 2),
        ("true ? 1 : false ? 2 : 3", 1),
        ("false ? 1 : false ? 2 : 3", 3),
        ("true", True),
        ("!true", False),
        ("!!true", True),
        ("1 < 2", True),
        ("2 <= 2.0", True),
        ("1 > 2", False),
        ("2 >= 3", False),
        ("1 == 1.0", True),
        ("1 != 1", False),
        ("true == false", False),
        ("1 < 2 == true", True),
        ("true || false && false", True),  # && binds tighter
        ("(true || false) && false", False),
        ("has(usage.prompt_tokens) && usage.prompt_tokens >= 32.0", True),
        ("has(usage.prompt_tokens_details)", True),
    ],
)
def test_what_is_understood_has_the_value_that_it_has_in_cel(text: str, expected: Value) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


NOTHING = Usage()


@pytest.mark.parametrize(
    "text",
    [
        "usage.prompt_tokens",
        "1 + usage.completion_tokens",
        "usage.total_tokens",
        "true && usage.prompt_tokens > 1",
        "usage.prompt_tokens > 1 || false",
    ],
)
def test_what_an_answer_does_not_tell_has_no_value(text: str) -> None:
    with pytest.raises(Absent):
        value(text, NOTHING)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("has(usage.prompt_tokens)", False),
        ("has(usage.prompt_tokens_details)", False),
        ("has(usage.completion_tokens) ? usage.completion_tokens : 0", 0),
        ("has(usage.total_tokens) && usage.total_tokens > 5", False),
        ("usage.prompt_tokens > 1 && false", False),  # the other side decides
        ("usage.prompt_tokens > 1 || true", True),
        ("1 / 0 > 1 || true", True),
    ],
)
def test_what_decides_needs_nothing_else(text: str, expected: Value) -> None:
    assert value(text, NOTHING) == expected


def test_a_sum_of_which_one_part_is_told_is_not_told() -> None:
    assert value("has(usage.total_tokens)", Usage(prompt_tokens=3)) is False


@pytest.mark.parametrize(
    "text",
    [
        "1 / 0",
        "1.0 / 0.0",
        "1 % 0",
        "usage.prompt_tokens % 0",
        "5 % 0.0",
        "int(1e999)",
        "int(1e999 - 1e999)",
        "1e999 % 2",
    ],
)
def test_a_division_by_zero_is_an_arithmetic_error(text: str) -> None:
    with pytest.raises(ArithmeticError):
        value(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"at character 1 of '': expected a number, .* not the end"),
        ("1 +", r"at character 4 of '1 \+': expected a number, .* not the end"),
        ("1 1", "at character 3 of '1 1': expected an operator, or the end, not '1'"),
        ("(1", r"at character 3 of '\(1': expected '\)', not the end"),
        ("usage.tokens", r"at character 1 .* expected one of usage\.prompt_tokens, .* not 'usage\.tokens'"),
        ("usage", "expected one of usage.prompt_tokens"),
        ("usage['prompt_tokens']", "expected one of usage.prompt_tokens"),
        ("has(1)", r"at character 5 .* expected one of usage\.prompt_tokens"),
        ("usage.prompt_tokens_details", "expected one of"),
        ("request.path", "expected a number, a field of usage"),
        ("math.greatest(1, 2)", "not 'math.greatest'"),
        ("size(usage)", "not 'size'"),
        ("'text'", 'not "\'"'),
        ("1 & 2", "at character 3 .* not '&'"),
        ("1 = 2", "at character 3 .* not '='"),
        ("1 + true", r"before character 9 .* what stands beside \+ must be a number, not a yes or no"),
        ("!1", "what stands behind ! must be a yes or no, not a number"),
        ("-true", "what stands behind - must be a number, not a yes or no"),
        ("1 && true", "what stands beside && must be a yes or no, not a number"),
        ("1 < 2 < 3", "what stands before < must be a number, not a yes or no"),
        ("1 == true", "both sides of == must be a number, not a yes or no"),
        ("1 ? 2 : 3", r"what stands before \? must be a yes or no, not a number"),
        ("true ? 2 : false", "both sides of : must be a number, not a yes or no"),
        ("true ? 2", "expected ':', not the end"),
        ("int(true)", r"int\(\) takes a number, not a yes or no"),
        ("(" * (DEEPEST + 1), f"no more than {DEEPEST} levels"),
        ("-" * (LONGEST + 1), f"no more than {LONGEST} words and signs"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_the_longest_and_the_deepest_are_still_computed() -> None:
    assert value("+".join(["1"] * (LONGEST // 2))) == LONGEST // 2
    assert value("(" * (DEEPEST - 1) + "1" + ")" * (DEEPEST - 1)) == 1
    assert value("-" * (LONGEST - 2) + "1") == 1


@given(st.text(alphabet="usage.promt_kn()&|!?:+-*/%<>=0123456789e \n", max_size=60))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        expression = parse(text)
    except ValueError:
        return
    try:
        found = expression.compute(USAGE)
    except ArithmeticError:
        return
    assert isinstance(found, bool) is (expression.kind is Kind.CHOICE)


@given(one=st.integers(-50, 50), two=st.integers(-50, 50), three=st.integers(1, 50))
def test_sums_and_products_bind_as_in_arithmetic(one: int, two: int, three: int) -> None:
    assert value(f"{one} + {two} * {three}") == one + two * three
    assert value(f"{one} - {two} - {three}") == one - two - three
    assert value(f"{one} / {three} * {three} + {one} % {three}") == one  # as the definition of both says
