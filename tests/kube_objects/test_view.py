"""What objects say together: cases worked out by hand. The stateful test beside this one covers their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from epp.discovery.kube.objects import ACTIVE_PORTS, Condition, Kind, Pool
from epp.discovery.kube.view import ClusterView, NamedPool, SelectedPods
from epp.endpoints.selector import parse_selector
from epp.endpoints.table import EndpointTable
from epp.flow.policies import Rule, Target
from tests.kube_objects.builders import Json, legacy_pool, meta, model, objective, pod, pool, ref, rewrite, rule

ALL = tuple(Kind)
POOL = NamedPool("prod", "pool")
OLD, MIDDLE, NEW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"


def view_of(
    objects: Mapping[Kind, Collection[object]],
    scope: NamedPool | SelectedPods = POOL,
    present: Collection[Kind] = ALL,
) -> ClusterView:
    view = ClusterView(scope)
    view.set_present(present)
    for kind in present:
        view.replace(kind, objects.get(kind, ()))
    return view


def names(view: ClusterView) -> list[str]:
    return [endpoint.name for endpoint in view.endpoints()]


def notes(view: ClusterView) -> list[str]:
    return [str(said) for said in view.notes()]


def synced(view: ClusterView) -> bool:
    return view.is_synced


def statuses(view: ClusterView) -> dict[str, tuple[str, str]]:
    """Status and reason of the condition to be written, by name of the object."""
    return {each.name: (each.condition.status, each.condition.reason) for each in view.statuses()}


# -- pool and pods ----------------------------------------------------------------------------------------------------


def test_a_pool_may_come_after_its_pods() -> None:
    view = view_of({Kind.POD: [pod("b", "10.0.0.2"), pod("a")]})
    assert (names(view), view.is_synced) == ([], False)
    view.put(Kind.POOL, pool(ports=(8000, 8001)))
    assert names(view) == ["prod/a-rank-0", "prod/a-rank-1", "prod/b-rank-0", "prod/b-rank-1"]
    assert synced(view)


def test_a_view_is_synced_once_every_kind_that_there_is_was_listed() -> None:
    view = ClusterView(NamedPool("prod", "pool"))
    view.set_present((Kind.POOL, Kind.REWRITE))
    view.put(Kind.POOL, pool())
    view.replace(Kind.POD, ())
    view.replace(Kind.POOL, [pool()])
    assert not synced(view)
    view.replace(Kind.REWRITE, ())
    assert synced(view)
    view.set_present((Kind.POOL, Kind.REWRITE, Kind.MODEL))
    assert not synced(view)
    view.set_present((Kind.POOL,))
    assert synced(view)


def test_other_pools_and_other_namespaces_are_passed_over() -> None:
    elsewhere = pod("c")
    elsewhere["metadata"]["namespace"] = "dev"
    view = view_of(
        {Kind.POOL: [pool(), pool("other", (9,)), {"metadata": meta("bad")}], Kind.POD: [pod("a"), elsewhere]}
    )
    assert names(view) == ["prod/a-rank-0"]
    assert notes(view) == []


def test_a_change_of_ports_or_selector_reads_the_pods_again() -> None:
    view = view_of({Kind.POOL: [pool()], Kind.POD: [pod("a"), pod("b", "10.0.0.2", labels={"app": "sglang"})]})
    assert names(view) == ["prod/a-rank-0"]
    view.put(Kind.POOL, pool(ports=(9000, 8000)))
    assert [endpoint.address for endpoint in view.endpoints()] == ["10.0.0.1:9000", "10.0.0.1:8000"]
    view.put(Kind.POOL, pool(labels={"app": "sglang"}))
    assert names(view) == ["prod/b-rank-0"]


def test_a_deleted_pool_empties_the_endpoints_and_keeps_the_policies() -> None:
    view = view_of({
        Kind.POOL: [pool()], Kind.POD: [pod("a")],
        Kind.OBJECTIVE: [objective("gold", 3)], Kind.REWRITE: [rewrite("r", rule(["a"], x=1))],
    })  # fmt: skip
    before = view.policies()
    view.drop(Kind.POOL, pool())
    assert (names(view), view.is_synced, view.pool) == ([], False, None)
    assert view.policies() is before
    assert before.objectives == {"gold": 3}
    view.put(Kind.POOL, pool())
    assert names(view) == ["prod/a-rank-0"]


def test_a_pool_of_the_older_group_serves_where_that_is_asked_for() -> None:
    objects = {Kind.LEGACY_POOL: [legacy_pool(port=9000)], Kind.POD: [pod("a")]}
    assert names(view_of(objects)) == []
    view = view_of(objects, NamedPool("prod", "pool", (Kind.POOL, Kind.LEGACY_POOL)))
    assert [endpoint.address for endpoint in view.endpoints()] == ["10.0.0.1:9000"]
    view.put(Kind.POOL, pool())
    assert [endpoint.address for endpoint in view.endpoints()] == ["10.0.0.1:8000"]
    assert notes(view) == [
        "InferencePool prod/pool: apiVersion: ignored, since inference.networking.k8s.io has a pool of this name"
    ]
    view.drop(Kind.POOL, pool())
    assert [endpoint.address for endpoint in view.endpoints()] == ["10.0.0.1:9000"]


def test_pods_are_served_without_a_pool_when_a_selector_says_which() -> None:
    scope = SelectedPods("prod", "epp", Pool(parse_selector("app in (vllm, sglang), !canary"), (8000,)))
    canary = pod("c", "10.0.0.3", labels={"app": "vllm", "canary": ""})
    view = ClusterView(scope)
    assert not synced(view)
    view.replace(Kind.POD, [pod("a"), pod("b", "10.0.0.2", labels={"app": "sglang"}), canary])
    assert synced(view)
    assert names(view) == ["prod/a-rank-0", "prod/b-rank-0"]
    view.set_present((Kind.OBJECTIVE,))
    view.replace(Kind.OBJECTIVE, [objective("gold", 2, "epp"), objective("lead", 1, "pool")])
    assert view.policies().objectives == {"gold": 2}


def test_a_relist_drops_what_it_lacks_and_nothing_else() -> None:
    view = view_of({Kind.POOL: [pool()], Kind.POD: [pod("a"), pod("b", "10.0.0.2")]})
    view.replace(Kind.POD, [pod("b", "10.0.0.2"), pod("c", "10.0.0.3")])
    assert names(view) == ["prod/b-rank-0", "prod/c-rank-0"]


def test_what_does_not_change_the_endpoints_returns_the_same_ones() -> None:
    view = view_of({Kind.POOL: [pool()], Kind.POD: [pod("a")], Kind.OBJECTIVE: [objective("gold", 1)]})
    before, policies, said = view.endpoints(), view.policies(), view.notes()
    heartbeat = pod("a", resourceVersion="7")
    heartbeat["status"]["conditions"][0]["lastTransitionTime"] = NEW
    view.put(Kind.POD, heartbeat)
    view.put(Kind.POD, pod("z", labels={"app": "other"}))
    view.replace(Kind.POD, [pod("a"), pod("y", ready="False")])
    view.put(Kind.POOL, pool())
    view.put(Kind.OBJECTIVE, objective("gold", 1, resourceVersion="8"))
    assert view.endpoints() is before
    assert view.policies() is policies
    assert view.notes() == said


@pytest.mark.parametrize(("older", "younger"), [("a", "b"), ("b", "a")])
def test_of_two_pods_with_one_address_the_younger_has_it_whichever_came_first(older: str, younger: str) -> None:
    old, new = pod(older, created=OLD), pod(younger, created=NEW)
    for order in ([old, new], [new, old]):
        view = view_of({Kind.POOL: [pool()], Kind.POD: order})
        assert names(view) == [f"prod/{younger}-rank-0"]
        assert notes(view) == [
            f"Pod prod/{older}: status.podIP: 10.0.0.1:8000 is that of the younger pod {younger}; left out here"
        ]
        view.drop(Kind.POD, new)
        assert (names(view), notes(view)) == ([f"prod/{older}-rank-0"], [])


def test_pods_of_one_host_that_serve_on_different_ports_are_all_listed() -> None:
    pods = [pod("a", annotations={ACTIVE_PORTS[0]: "8000"}), pod("b", annotations={ACTIVE_PORTS[0]: "8001"})]
    view = view_of({Kind.POOL: [pool(ports=(8000, 8001))], Kind.POD: pods})
    assert (names(view), notes(view)) == (["prod/a-rank-0", "prod/b-rank-1"], [])


def test_a_pod_that_flaps_keeps_its_requests_in_flight() -> None:
    view = view_of({Kind.POOL: [pool()], Kind.POD: [pod("a")]})
    table = EndpointTable()
    table.replace(view.endpoints(), 0.0)
    slot = int(table.listed[0])
    hold = table.admit(slot)
    view.put(Kind.POD, pod("a", ready="False"))
    table.replace(view.endpoints(), 1.0)
    assert len(table) == 0
    view.put(Kind.POD, pod("a"))
    table.replace(view.endpoints(), 2.0)
    assert table.listed.tolist() == [slot]
    assert table.fact("inflight", slot) == 1.0
    table.release(hold)
    assert table.fact("inflight", slot) == 0.0


def test_an_object_that_cannot_be_read_harms_no_other_and_is_noted_until_it_is_mended() -> None:
    view = view_of({Kind.POOL: [pool()], Kind.POD: [pod("a"), pod("b", "nowhere"), "no object"]})
    assert names(view) == ["prod/a-rank-0"]
    assert notes(view) == ["Pod prod/b: status.podIP: expected an IP address, found 'nowhere'"]
    view.put(Kind.POD, pod("b", "10.0.0.2"))
    assert (names(view), notes(view)) == (["prod/a-rank-0", "prod/b-rank-0"], [])


def test_what_is_true_of_many_pods_is_one_note() -> None:
    pods = [pod(f"p{index}", f"10.0.0.{index}", declared=(8000, 9090)) for index in range(1, 4)]
    assert notes(view_of({Kind.POOL: [pool()], Kind.POD: pods})) == [
        "Pod prod/p1 (and 2 more): spec.containers[].ports: no target port of the pool, so never routed to: 9090"
    ]


# -- policies ---------------------------------------------------------------------------------------------------------


def test_rules_come_exact_first_then_oldest_then_by_name_then_as_written() -> None:
    view = view_of({Kind.REWRITE: [
        rewrite("new", rule([], g=1), rule(["m", "n"], a=1), rule(["m"], b=1), created=NEW),
        rewrite("b", rule([], h=1), rule(["m"], c=1), created=OLD),
        rewrite("a", rule(["m"], d=1), created=OLD),
    ]})  # fmt: skip
    assert [(each.model, each.targets[0].model) for each in view.policies().rules] == [
        ("m", "d"), ("m", "c"), ("m", "a"), ("n", "a"), ("m", "b"), (None, "h"), (None, "g"),
    ]  # fmt: skip
    assert view.policies().rules[3].source == "InferenceModelRewrite prod/new rules[1]"
    said = (
        "InferenceModelRewrite prod/{}: spec.rules[{}]: has no effect on {}: InferenceModelRewrite prod/{} comes first"
    )
    assert notes(view) == [
        said.format("b (and 1 more)", 1, "model 'm'", "a rules[0]"),
        said.format("new", 0, "any model", "b rules[0]"),
        said.format("new", 2, "model 'm'", "a rules[0]"),
    ]


def test_an_inference_model_is_a_rule_with_a_priority() -> None:
    view = view_of({Kind.MODEL: [
        model("a", "chat", "Critical", targets={"chat-v1": 9, "chat-v2": 1}, created=NEW),
        model("b", "batch", "Sheddable", created=OLD),
        model("c", "elsewhere", pool="other"),
    ]})  # fmt: skip
    assert view.policies().rules == (
        Rule("batch", (), -1, "InferenceModel prod/b"),
        Rule("chat", (Target("chat-v1", 9), Target("chat-v2", 1)), 1, "InferenceModel prod/a"),
    )
    assert view.policies().objectives == {}


def test_of_two_inference_models_for_one_name_the_older_has_it_and_the_younger_is_told() -> None:
    young = model("a", "chat", "Sheddable", created=NEW)
    view = view_of({Kind.MODEL: [young, model("b", "chat", "Critical", created=OLD)]})
    assert [each.source for each in view.policies().rules] == ["InferenceModel prod/b"]
    assert statuses(view) == {"a": ("False", "ModelNameInUse"), "b": ("True", "Accepted")}
    told = "InferenceModel prod/b, which is older, has the model name 'chat'"
    assert notes(view) == [f"InferenceModel prod/a: spec.modelName: {told}"]
    assert {each.condition.message for each in view.statuses() if each.name == "a"} == {told}
    view.drop(Kind.MODEL, model("b", "chat"))
    assert [each.source for each in view.policies().rules] == ["InferenceModel prod/a"]
    assert statuses(view) == {"a": ("True", "Accepted")}


def test_models_of_the_same_age_are_told_apart_by_name() -> None:
    view = view_of({Kind.MODEL: [model("b", "chat"), model("a", "chat")]})
    assert [each.source for each in view.policies().rules] == ["InferenceModel prod/a"]


def test_objects_of_the_legacy_group_count_until_the_new_group_is_installed() -> None:
    legacy = {
        Kind.LEGACY_OBJECTIVE: [objective("gold", 1), objective("lead", 1), objective("theirs", 5, "other")],
        Kind.LEGACY_REWRITE: [rewrite("r", rule([], x=1))],
    }
    view = view_of(legacy, present=(Kind.LEGACY_OBJECTIVE, Kind.LEGACY_REWRITE))
    assert view.policies().objectives == {"gold": 1, "lead": 1}
    assert len(view.policies().rules) == 1
    assert set(statuses(view)) == {"gold", "lead", "r"}
    view.set_present((Kind.OBJECTIVE, *legacy))
    assert view.policies().objectives == {}
    view.replace(Kind.OBJECTIVE, [objective("gold", 9)])
    assert view.policies().objectives == {"gold": 9}
    assert len(view.policies().rules) == 1
    assert set(statuses(view)) == {"gold", "r"}
    assert notes(view) == [
        "InferenceObjective prod/gold (and 1 more): apiVersion: ignored, since llm-d.ai is installed; move it there"
    ]
    view.set_present(legacy)
    assert view.policies().objectives == {"gold": 1, "lead": 1}


def test_the_objects_of_a_kind_that_is_uninstalled_are_gone() -> None:
    view = view_of({Kind.OBJECTIVE: [objective("gold", 1)]})
    view.set_present(())
    view.put(Kind.OBJECTIVE, objective("late", 1))
    assert view.policies().objectives == {}
    view.set_present((Kind.OBJECTIVE,))
    assert view.policies().objectives == {}


def test_policies_of_other_pools_are_passed_over_in_silence() -> None:
    service = {"metadata": meta("s"), "spec": {"poolRef": ref("pool", "", "Service")}}
    view = view_of({
        Kind.OBJECTIVE: [objective("theirs", 1, "other"), service],
        Kind.REWRITE: [rewrite("r", rule(["m"], x=1), pool="other")],
    })  # fmt: skip
    assert (view.policies().objectives, view.policies().rules) == ({}, ())
    assert (view.statuses(), view.notes()) == ((), ())


# -- statuses ---------------------------------------------------------------------------------------------------------


def with_status(raw: Json, *conditions: Json) -> Json:
    return {**raw, "status": {"conditions": list(conditions)}}


ACCEPTED = {
    "type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "observedGeneration": 2,
    "lastTransitionTime": "2026-02-02T00:00:00Z",
}  # fmt: skip


@pytest.mark.parametrize(
    ("conditions", "since"),
    [
        ([], None),
        ([{"type": "Ready", "status": "Unknown", "reason": "Pending"}], None),
        ([{**ACCEPTED, "status": "Unknown", "reason": "Pending"}], None),
        ([{**ACCEPTED, "observedGeneration": 1}], "2026-02-02T00:00:00Z"),
        ([{**ACCEPTED, "message": "outdated"}], "2026-02-02T00:00:00Z"),
    ],
)
def test_a_condition_that_an_object_lacks_is_to_be_written(conditions: list[Json], since: str | None) -> None:
    raw = with_status(objective("gold", generation=2), *conditions)
    (status,) = view_of({Kind.OBJECTIVE: [raw]}).statuses()
    assert (status.kind, status.namespace, status.name) == (Kind.OBJECTIVE, "prod", "gold")
    assert status.condition == Condition("Accepted", "True", "Accepted", "", 2, since)


def test_a_condition_that_an_object_has_is_not_written_again() -> None:
    raw = with_status(objective("gold", generation=2), {"type": "Ready", "status": "Unknown"}, ACCEPTED)
    assert view_of({Kind.OBJECTIVE: [raw]}).statuses() == ()


def test_a_rule_without_effect_is_told_in_the_status_of_its_object() -> None:
    view = view_of({
        Kind.REWRITE: [rewrite("r", rule(["chat"], x=1), rule([], y=1), created=NEW)],
        Kind.MODEL: [model("m", "chat", targets={"z": 1}, created=MIDDLE)],
    })  # fmt: skip
    messages = {each.name: each.condition.message for each in view.statuses()}
    assert messages == {"m": "", "r": "spec.rules[0] has no effect on model 'chat': InferenceModel prod/m comes first"}
    assert set(statuses(view).values()) == {("True", "Accepted")}


def test_an_older_rewrite_comes_before_an_inference_model_which_still_has_its_priority() -> None:
    view = view_of({
        Kind.REWRITE: [rewrite("r", rule(["chat"], x=1), created=OLD)],
        Kind.MODEL: [model("m", "chat", "Critical", targets={"z": 1}, created=NEW)],
    })  # fmt: skip
    assert [(each.targets[0].model, each.priority) for each in view.policies().rules] == [("x", None), ("z", 1)]
    assert notes(view) == [
        "InferenceModel prod/m: spec.targetModels: has no effect on model 'chat': "
        "InferenceModelRewrite prod/r rules[0] comes first"
    ]
    assert statuses(view)["m"] == ("True", "Accepted")


def test_a_model_without_targets_takes_no_rewrite_s_effect() -> None:
    view = view_of({
        Kind.REWRITE: [rewrite("r", rule(["chat"], x=1), created=NEW)],
        Kind.MODEL: [model("m", "chat", "Critical", created=OLD)],
    })  # fmt: skip
    assert [(each.priority, len(each.targets)) for each in view.policies().rules] == [(1, 0), (None, 1)]
    assert notes(view) == []
