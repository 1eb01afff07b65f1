"""What the operator says of requests: how important an objective is, and which model is really asked for.

In: a request. Out: its priority, and the model to ask the server for.
Rules here:
- Policies are one value: whoever watches for them makes a new one and puts it in place of the old, so that a request
  sees all of a change or nothing of it.
- Rules come in order of precedence (exact before generic, then oldest first), and whoever makes them sorts them: the
  first one that matches counts. Of rules with targets it decides the model, of rules with a priority the priority.
- A request that names no model has nothing to rewrite, and no rule matches it.
- Where somebody lists the models that there are, as InferenceModels do, a request for another one passes and may be
  refused first.
- One decision draws at most once.
Rejected: an index by model name (100 rules are looked through in 3 us, and most pools have a handful).
Source: InferenceObjective and InferenceModelRewrite (llm-d.ai/v1alpha2), InferenceModel
(inference.networking.x-k8s.io/v1alpha2; models that nobody lists: Gateway API Inference Extension v0.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Final

import msgspec

from epp.dialects.request import Request


class Target(msgspec.Struct, frozen=True):
    """One model that a rule may send a request to."""

    model: str
    weight: int
    """Its share is weight / the sum of the rule's weights; 0: none was given."""


class Rule(msgspec.Struct, frozen=True):
    """What happens to requests for one model, or for any."""

    model: str | None
    """The name that clients use; None: any."""
    targets: tuple[Target, ...]
    """Empty: the rule does not rewrite."""
    priority: int | None = None
    """Of requests without a known objective; an InferenceModel's criticality. None: the rule does not say."""
    source: str = ""
    """Where it was written, for the operator, as `InferenceModelRewrite default/canary rules[0]`."""


class Policies(msgspec.Struct, frozen=True):
    """All of them, as they are at one moment."""

    objectives: Mapping[str, int] = {}
    """Priority by the name of the objective."""
    rules: tuple[Rule, ...] = ()
    """In order of precedence."""
    unlisted: int = 0
    """Priority of requests for a model that no rule is for, where no objective is named."""


NO_POLICIES: Final = Policies()


def apply(policies: Policies, request: Request, rng: Random) -> Rule | None:
    """Write down the request's priority and target model; returns the rule that chose the model, None: none did."""
    rules = _matching(policies, request)
    request.priority = _priority(policies, rules, request)
    rule = _rewrite(rules)
    request.target_model = _target(rule, request, rng)
    return rule


def priority_of(policies: Policies, request: Request) -> int:
    """How important a request is: below 0 it may be refused so that others are served.

    The objective that its header names; where there is none of this name, the first matching rule that has a priority;
    else 0, and where no rule matches its model, what the policies say of such.
    """
    return _priority(policies, _matching(policies, request), request)


def target_of(policies: Policies, request: Request, rng: Random) -> str:
    """The model to ask the server for: a target of the first matching rule that has any, else the client's rewrite
    header, else the client's model."""
    return _target(_rewrite(_matching(policies, request)), request, rng)


def draw(targets: tuple[Target, ...], rng: Random) -> str:
    """One of the targets, by their weights; each with the same chance where none has a weight.

    A single one is not drawn for. Beside targets with a weight, one without is never chosen.
    """
    if len(targets) == 1:
        return targets[0].model
    total = sum(target.weight for target in targets)
    if not total:
        return targets[int(rng.random() * len(targets))].model
    at = int(rng.random() * total)
    for target in targets:
        at -= target.weight
        if at < 0:
            return target.model
    raise AssertionError("a number below the sum of the weights lies within one of them")


def _matching(policies: Policies, request: Request) -> list[Rule]:
    model = request.model
    return [rule for rule in policies.rules if rule.model == model or rule.model is None] if model else []


def _priority(policies: Policies, rules: list[Rule], request: Request) -> int:
    priority = policies.objectives.get(request.objective)
    if priority is not None:
        return priority
    if rules:
        return next((rule.priority for rule in rules if rule.priority is not None), 0)
    return policies.unlisted if request.model else 0


def _rewrite(rules: list[Rule]) -> Rule | None:
    return next((rule for rule in rules if rule.targets), None) if rules else None


def _target(rule: Rule | None, request: Request, rng: Random) -> str:
    return request.rewrite or request.model if rule is None else draw(rule.targets, rng)
