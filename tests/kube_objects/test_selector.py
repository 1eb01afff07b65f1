"""Label selectors. Texts marked so are those of Kubernetes' own tests (apimachinery, `labels/selector_test.go`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.selector import Operator, Requirement, Selector, parse_selector, select_equal
from epp.errors import ConfigError


def require(key: str, operator: Operator, *values: str) -> Requirement:
    return Requirement(key, operator, frozenset(values))


IN, NOT_IN, EXISTS, MISSING = Operator.IN, Operator.NOT_IN, Operator.EXISTS, Operator.MISSING


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("a=b", [require("a", IN, "b")]),
        ("a==b", [require("a", IN, "b")]),
        ("a!=b", [require("a", NOT_IN, "b")]),
        ("a in (b,c)", [require("a", IN, "b", "c")]),
        ("a notin (b)", [require("a", NOT_IN, "b")]),
        ("a", [require("a", EXISTS)]),
        ("!a", [require("a", MISSING)]),
        (" ! a ,b", [require("a", MISSING), require("b", EXISTS)]),
        ("app=vllm,tier in(gpu , h100),!canary", [
            require("app", IN, "vllm"), require("tier", IN, "gpu", "h100"), require("canary", MISSING),
        ]),
        ("in in (in,notin),notin notin(in)", [require("in", IN, "in", "notin"), require("notin", NOT_IN, "in")]),
        # Kubernetes' own:
        ("x=,z= ", [require("x", IN, ""), require("z", IN, "")]),
        ("x>1,z<5", [require("x", Operator.ABOVE, "1"), require("z", Operator.BELOW, "5")]),
        ("\rx", [require("x", EXISTS)]),
        ("this-is-another-dns.domain.com/key-with-dash in (so,what)", [
            require("this-is-another-dns.domain.com/key-with-dash", IN, "so", "what"),
        ]),
        ("0.1.2.domain/99 notin (10.10.100.1, tick.tack.clock)", [
            require("0.1.2.domain/99", NOT_IN, "10.10.100.1", "tick.tack.clock"),
        ]),
        ("x  notin   \t    (abc,def)", [require("x", NOT_IN, "abc", "def")]),
        ("x in (abc,)", [require("x", IN, "abc", "")]),
        ("x notin (abc,,def),bar,z in (),w", [
            require("x", NOT_IN, "abc", "", "def"), require("bar", EXISTS), require("z", IN, ""), require("w", EXISTS),
        ]),
    ],
)  # fmt: skip
def test_a_selector_in_kubernetes_grammar_is_read(text: str, requirements: list[Requirement]) -> None:
    assert parse_selector(text) == Selector(tuple(requirements))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a label's name, as app or example.com/app, not the end, after ''"),
        (",a", "expected a label's name, as app or example.com/app, not ',', after ''"),
        ("a,", "expected a label's name, as app or example.com/app, not the end, after 'a,'"),
        ("!x=a", "expected a comma, or the end, not '=', after '!x'"),
        ("x==a==b", "expected a comma, or the end, not '==', after 'x==a'"),
        ("x=a||y=b", "expected a label's value (at most 63 letters, digits, '-', '_', '.'), not 'a||y', after 'x='"),
        ("x<a", "expected a whole number, not 'a', after 'x<'"),
        ("x in a", "expected a list in parentheses, not 'a', after 'x in '"),
        ("x in (a", "expected a comma or ')', not the end, after 'x in (a'"),
        ("x in (a b)", "expected a comma or ')', not 'b', after 'x in (a '"),
        ("xyz (a)", "expected =, !=, in, notin, <, > or a comma, not '(', after 'xyz '"),
        ("-a=b", "expected a label's name, as app or example.com/app, not '-a', after ''"),
        ("/a", "expected a label's name, as app or example.com/app, not '/a', after ''"),
        ("A.com/a", "expected a label's name, as app or example.com/app, not 'A.com/a', after ''"),
        ("a=" + "b" * 64, "after 'a='"),
    ],
)  # fmt: skip
def test_what_is_no_selector_is_refused_and_says_what_was_expected_where(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_selector(text)
    assert refused.value.message.endswith(expected)


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("a=b", {"a": "b"}, True),
        ("a=b", {"a": "c"}, False),
        ("a=b", {}, False),
        ("a=", {"a": ""}, True),
        ("a=", {}, False),
        ("a!=b", {}, True),
        ("a!=b", {"a": "b"}, False),
        ("a notin (b,c)", {"a": "d"}, True),
        ("a notin (b,c)", {"a": "c"}, False),
        ("a notin (b,c)", {}, True),
        ("a in (b,c)", {"a": "c"}, True),
        ("a", {"a": ""}, True),
        ("a", {"b": ""}, False),
        ("!a", {"b": ""}, True),
        ("!a", {"a": ""}, False),
        ("a>1", {"a": "2"}, True),
        ("a>1", {"a": "1"}, False),
        ("a<-1", {"a": "-2"}, True),
        ("a>1", {"a": "many"}, False),
        ("a<1", {}, False),
        ("a=b,c", {"a": "b"}, False),
        ("a=b,c", {"a": "b", "c": "d"}, True),
    ],
)
def test_all_requirements_must_hold(text: str, labels: Mapping[str, str], expected: bool) -> None:
    assert parse_selector(text).matches(labels) is expected


def test_a_pools_labels_must_all_be_there_with_their_values() -> None:
    selector = select_equal({"a": "1", "b": "2"})
    assert selector.matches({"a": "1", "b": "2", "c": "3"})
    assert not selector.matches({"a": "1"})
    assert not selector.matches({"a": "1", "b": "1"})


LABELS = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "x", "y", "7", "-3"]))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "x", "7"])), min_size=1, max_size=3), LABELS)
def test_equality_written_in_three_ways_selects_the_same(pairs: list[tuple[str, str]], labels: dict[str, str]) -> None:
    texts = [",".join(form.format(key, value) for key, value in pairs) for form in ("{}={}", "{} == {}", "{} in ({})")]
    expected = all(labels.get(key) == value for key, value in pairs)
    assert [parse_selector(text).matches(labels) for text in texts] == [expected] * 3
    assert [parse_selector(f"{key}!={value}").matches(labels) for key, value in pairs] == [
        labels.get(key) != value for key, value in pairs
    ]


@given(st.text(alphabet="ab1 =!(),<>/-.in\té", max_size=20) | st.text(max_size=20))
def test_any_text_is_a_selector_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_selector(text).matches({"a": "1"})
