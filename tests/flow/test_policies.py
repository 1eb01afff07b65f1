"""Objectives and rewrites: precedence, priorities, and what is drawn."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp import dialects
from epp.dialects.request import Request
from epp.flow.policies import Policies, Rule, Target, apply, draw, priority_of, target_of

CHAT = b'{"model":"%b","messages":[{"role":"user","content":"hello"}]}'


def ask(model: str = "m", **headers: str) -> Request:
    """`objective` and `rewrite` become the headers that clients send."""
    names = {"objective": "x-llm-d-inference-objective", "rewrite": "x-gateway-model-name-rewrite"}
    own = tuple((names[name], value.encode()) for name, value in headers.items())
    return dialects.read(((":path", b"/v1/chat/completions"), *own), CHAT % model.encode())


def to(*models: str, weight: int = 0) -> tuple[Target, ...]:
    return tuple(Target(model, weight) for model in models)


def target(policies: Policies, request: Request) -> str:
    return target_of(policies, request, Random(1))


# -- priority ----------------------------------------------------------------------------------------------------------

OBJECTIVES = {"urgent": 5, "batch": -1, "none": 0}
SHEDDABLE = Rule("m", to("m-v1"), priority=-2)


@pytest.mark.parametrize(
    ("objective", "rules", "priority"),
    [
        ("urgent", (), 5),
        ("batch", (), -1),
        ("nobody", (), 0),
        ("URGENT", (), 0),  # names of Kubernetes objects have one spelling
        ("", (), 0),
        ("", (SHEDDABLE,), -2),
        ("nobody", (SHEDDABLE,), -2),
        ("urgent", (SHEDDABLE,), 5),
        ("none", (SHEDDABLE,), 0),  # an objective of 0 is an objective
        ("", (Rule("other", (), priority=-2),), 0),
        ("", (Rule("m", to("x")), SHEDDABLE), -2),  # a rewrite does not hide how critical the model is
        ("", (Rule("m", (), priority=3), SHEDDABLE), 3),
        ("", (Rule(None, (), priority=7),), 7),
    ],
)
def test_an_objective_counts_then_a_rule_for_the_model(objective: str, rules: tuple[Rule, ...], priority: int) -> None:
    assert priority_of(Policies(OBJECTIVES, rules), ask(objective=objective)) == priority


def test_the_canonical_objective_header_comes_before_its_legacy_twin() -> None:
    headers = (("x-gateway-inference-objective", b"urgent"), ("x-llm-d-inference-objective", b"batch"))
    request = dialects.read(((":path", b"/v1/chat/completions"), *headers), CHAT % b"m")
    assert priority_of(Policies(OBJECTIVES), request) == -1


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "rewrite", "model"),
    [
        ((), "", "m"),
        ((), "forced", "forced"),
        ((Rule("m", to("v2")),), "", "v2"),
        ((Rule("m", to("v2")),), "forced", "v2"),
        ((Rule("other", to("v2")),), "forced", "forced"),
        ((Rule("M", to("v2")),), "", "m"),
        ((Rule("m", to("exact")), Rule(None, to("any"))), "", "exact"),
        ((Rule("m", to("first")), Rule("m", to("second"))), "", "first"),
        ((Rule("other", to("no")), Rule(None, to("any"))), "", "any"),
        ((Rule("m", (), priority=1),), "forced", "forced"),  # an InferenceModel without targets rewrites nothing
        ((Rule("m", (), priority=1), Rule(None, to("any"))), "", "any"),
        ((Rule("m", to("m")),), "forced", "m"),
    ],
)
def test_the_first_rule_that_rewrites_counts_then_the_header(rules: tuple[Rule, ...], rewrite: str, model: str) -> None:
    request = ask(rewrite=rewrite) if rewrite else ask()
    assert target(Policies({}, rules), request) == model


def test_a_request_without_a_model_has_nothing_to_rewrite() -> None:
    request = dialects.read(((":method", b"GET"), (":path", b"/v1/models")), b"")
    policies = Policies({"batch": -1}, (Rule(None, to("any"), priority=-1),))
    assert apply(policies, request, Random(1)) is None
    assert (request.target_model, request.priority) == ("", 0)


def test_what_is_applied_is_what_is_told_and_the_rule_that_rewrote_is_named() -> None:
    critical, canary = Rule("m", (), priority=4), Rule("m", to("v1", "v2", weight=1), source="canary")
    policies = Policies({}, (critical, canary))
    for seed in range(20):
        request = ask()
        assert apply(policies, request, Random(seed)) is canary
        assert request.priority == priority_of(policies, request) == 4
        assert request.target_model == target_of(policies, request, Random(seed))


# -- the draw ----------------------------------------------------------------------------------------------------------


class Counting(Random):
    """Counts what is drawn from it."""

    draws = 0

    def random(self) -> float:
        self.draws += 1
        return super().random()


def test_shares_are_the_weights() -> None:
    """4,000 draws of 9 to 1: 400 of the second, standard deviation 19."""
    targets, rng = (Target("stable", 90), Target("canary", 10)), Counting(7)
    counts = Counter(draw(targets, rng) for _ in range(4_000))
    assert abs(counts["canary"] - 400) < 4 * 19
    assert rng.draws == 4_000


def test_without_weights_all_have_the_same_share() -> None:
    """3,000 draws among three: 1,000 each, standard deviation 26."""
    rng = Counting(7)
    counts = Counter(draw(to("a", "b", "c"), rng) for _ in range(3_000))
    assert sorted(counts) == ["a", "b", "c"]
    assert all(abs(count - 1_000) < 4 * 26 for count in counts.values())
    assert rng.draws == 3_000


def test_beside_weights_a_target_without_one_is_never_chosen() -> None:
    rng = Random(3)
    assert {draw((Target("a", 0), Target("b", 1), Target("c", 0)), rng) for _ in range(200)} == {"b"}


def test_one_target_needs_no_chance() -> None:
    rng = Counting(1)
    assert draw((Target("only", 0),), rng) == "only"
    assert rng.draws == 0


class Fixed(Random):
    """Says the same number again and again."""

    def __init__(self, said: float) -> None:
        super().__init__(0)
        self.said = said

    def random(self) -> float:
        return self.said


@pytest.mark.parametrize(
    ("said", "model"),
    [(0.0, "a"), (0.24, "a"), (0.25, "b"), (0.74, "b"), (0.75, "c"), (0.999, "c"), (1 - 2**-53, "c")],
)
def test_the_number_drawn_falls_into_the_weights_in_their_order(said: float, model: str) -> None:
    """Weights 1, 2, 1: quarters of the line."""
    assert draw((Target("a", 1), Target("b", 2), Target("c", 1)), Fixed(said)) == model


@given(st.lists(st.integers(0, 1_000_000), min_size=1, max_size=12), st.floats(0, 1, exclude_max=True))
def test_whatever_is_drawn_is_a_target_that_may_be_chosen(weights: list[int], said: float) -> None:
    targets = tuple(Target(str(i), weight) for i, weight in enumerate(weights))
    chosen = targets[int(draw(targets, Fixed(said)))]
    assert chosen.weight or not any(weights)


@given(
    st.lists(st.tuples(st.sampled_from(["m", "x", None]), st.booleans(), st.sampled_from([None, -1, 2])), max_size=8)
)
def test_precedence_is_the_order_of_the_rules(parts: list[tuple[str | None, bool, int | None]]) -> None:
    """Against the words of the contract: among rules for this model or any, the first that says something."""
    rules = tuple(
        Rule(model, to(f"t{i}") if rewrites else (), priority) for i, (model, rewrites, priority) in enumerate(parts)
    )
    mine = [i for i, rule in enumerate(rules) if rule.model != "x"]
    targets = [f"t{i}" for i in mine if parts[i][1]] + ["m"]
    priorities = [parts[i][2] for i in mine if parts[i][2] is not None] + [0]
    policies = Policies({}, rules)
    assert (target(policies, ask()), priority_of(policies, ask())) == (targets[0], priorities[0])
