"""Which models there are, where InferenceModels say so: v0.5 lets others pass, and refuses them first."""

from __future__ import annotations

from random import Random

import pytest

from epp import dialects
from epp.discovery.kube.objects import Kind
from epp.discovery.kube.view import ClusterView, NamedPool
from epp.flow.policies import apply
from epp.headers import Headers

META = {"namespace": "prod", "creationTimestamp": "2026-01-01T00:00:00Z"}


def view_of(**objects: list[object]) -> ClusterView:
    """By the name of the kind."""
    kinds = {Kind[name]: things for name, things in objects.items()}
    view = ClusterView(NamedPool("prod", "pool"))
    view.set_present(kinds)
    for kind, things in kinds.items():
        view.replace(kind, things)
    return view


def model(name: str, criticality: str | None = None, pool: str = "pool") -> object:
    spec = {"modelName": name, "poolRef": {"name": pool}, "criticality": criticality}
    return {"metadata": {**META, "name": name}, "spec": spec}


def rewrite(*models: str) -> object:
    rules = [{"matches": [{"model": {"value": each}} for each in models], "targets": [{"modelRewrite": "to"}]}]
    return {"metadata": {**META, "name": "r"}, "spec": {"poolRef": {"name": "pool"}, "rules": rules}}


def priority(view: ClusterView, body: bytes, objective: str = "") -> int:
    named: Headers = (("x-gateway-inference-objective", objective.encode()),) if objective else ()
    method = b"POST" if body else b"GET"
    request = dialects.read(((":method", method), (":path", b"/v1/completions"), *named), body)
    apply(view.policies(), request, Random(1))
    return request.priority


LISTED, OTHER = b'{"model":"chat","prompt":"p"}', b'{"model":"other","prompt":"p"}'


@pytest.mark.parametrize(("criticality", "expected"), [("Critical", 1), ("Standard", 0), (None, 0), ("Sheddable", -1)])
def test_a_model_that_is_not_listed_is_sheddable_and_a_listed_one_is_what_it_says(
    criticality: str | None, expected: int
) -> None:
    view = view_of(MODEL=[model("chat", criticality)])
    assert (priority(view, LISTED), priority(view, OTHER)) == (expected, -1)


def test_without_inference_models_for_this_pool_nothing_is_sheddable() -> None:
    view = view_of(MODEL=[model("chat", pool="another")], REWRITE=[rewrite("chat")])
    assert (priority(view, LISTED), priority(view, OTHER)) == (0, 0)


def test_with_the_last_inference_model_its_list_is_gone() -> None:
    view = view_of(MODEL=[model("chat")])
    assert priority(view, OTHER) == -1
    view.drop(Kind.MODEL, model("chat"))
    assert priority(view, OTHER) == 0


@pytest.mark.parametrize("models", [("other",), ()])
def test_a_model_that_a_rewrite_names_or_that_all_rewrites_are_for_is_listed(models: tuple[str, ...]) -> None:
    assert priority(view_of(MODEL=[model("chat")], REWRITE=[rewrite(*models)]), OTHER) == 0


def test_an_objective_comes_before_the_list() -> None:
    objective = {"metadata": {**META, "name": "gold"}, "spec": {"poolRef": {"name": "pool"}, "priority": 5}}
    view = view_of(MODEL=[model("chat")], OBJECTIVE=[objective])
    assert priority(view, OTHER, "gold") == 5
    assert priority(view, OTHER, "no-such-objective") == -1


def test_a_request_that_names_no_model_is_none_of_the_lists() -> None:
    assert priority(view_of(MODEL=[model("chat")]), b"") == 0
