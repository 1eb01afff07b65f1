"""What single objects say, by tables written by hand from the published APIs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.discovery.kube.objects import (
    ACTIVE_PORTS,
    Condition,
    Kind,
    Model,
    Note,
    Objective,
    Pod,
    Pool,
    Rewrite,
    RewriteRule,
    endpoints_of,
    key_of,
    read,
)
from epp.endpoints.selector import select_equal
from epp.endpoints.table import Endpoint
from epp.flow.policies import Target
from tests.kube_objects.builders import Json, legacy_pool, meta, model, objective, pod, pool, ref, rewrite, rule

SERVED = Pool(select_equal({"app": "vllm"}), (8000, 8001, 8002))


def pod_of(raw: object) -> Pod:
    found = read(Kind.POD, raw)
    assert isinstance(found, Pod)
    return found


def addresses(raw: object, served: Pool = SERVED) -> dict[str, str]:
    return {endpoint.name: endpoint.address for endpoint in endpoints_of(pod_of(raw), served)[0]}


def notes(raw: object, served: Pool = SERVED) -> list[str]:
    return [str(said) for said in endpoints_of(pod_of(raw), served)[1]]


# -- pools ------------------------------------------------------------------------------------------------------------


def test_a_pool_is_read_in_each_of_its_shapes() -> None:
    selector = select_equal({"app": "vllm", "tier": "gpu"})
    labels = {"app": "vllm", "tier": "gpu"}
    assert read(Kind.POOL, pool(ports=(8000, 8001), labels=labels)) == Pool(selector, (8000, 8001), "http")
    assert read(Kind.LEGACY_POOL, legacy_pool(port=9000, labels=labels)) == Pool(selector, (9000,), "http")
    h2c = pool(labels=labels)
    h2c["spec"]["appProtocol"] = "kubernetes.io/h2c"
    assert read(Kind.POOL, h2c) == Pool(selector, (8000,), "kubernetes.io/h2c")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "spec: object missing required field `selector`"),
        ({"selector": {"matchLabels": {}}, "targetPorts": [{"number": 1}]},
         "spec.selector.matchLabels: expected `object` of length >= 1"),
        ({"selector": {"matchLabels": {"a": 1}}, "targetPorts": [{"number": 1}]},
         "spec.selector.matchLabels[...]: expected `str`, got `int`"),
        ({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": []},
         "spec.targetPorts: expected `array` of length >= 1"),
        ({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": port} for port in range(1, 10)]},
         "spec.targetPorts: expected `array` of length <= 8"),
        ({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 1}, {"number": 65536}]},
         "spec.targetPorts[1].number: expected `int` <= 65535"),
        ({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 1}, {"number": 1}]},
         "spec.targetPorts: expected each port once, found 1, 1"),
    ],
)  # fmt: skip
def test_a_pool_that_cannot_be_read_says_where_and_what_was_expected(spec: Json, said: str) -> None:
    assert str(read(Kind.POOL, {"metadata": meta("pool"), "spec": spec})) == f"InferencePool prod/pool: {said}"


# -- pods -------------------------------------------------------------------------------------------------------------


def test_each_target_port_of_a_ready_pod_is_an_endpoint_with_the_pods_labels() -> None:
    labels = {
        "app": "vllm", "llm-d.ai/role": "decode", "llm-d.ai/engine-type": "sglang", "topology.kubernetes.io/zone": "a",
    }  # fmt: skip
    endpoints, said = endpoints_of(pod_of(pod("a", "10.0.0.7", labels=labels)), SERVED)
    assert endpoints == (
        Endpoint("prod/a-rank-0", "10.0.0.7:8000", labels, node="node"),
        Endpoint("prod/a-rank-1", "10.0.0.7:8001", labels, node="node"),
        Endpoint("prod/a-rank-2", "10.0.0.7:8002", labels, node="node"),
    )
    assert said == ()


@pytest.mark.parametrize(
    ("host_ip", "address"), [("10.1.0.4", "10.1.0.4"), ("fd00:0:0::4", "[fd00::4]"), (None, ""), ("somewhere", "")]
)
def test_the_nodes_address_is_told_where_it_is_one(host_ip: str | None, address: str) -> None:
    raw = pod("a", "10.0.0.7")
    raw["status"]["hostIP"] = host_ip
    endpoints, _ = endpoints_of(pod_of(raw), SERVED)
    assert {endpoint.node_address for endpoint in endpoints} == {address}
    assert {endpoint.address for endpoint in endpoints} == {"10.0.0.7:8000", "10.0.0.7:8001", "10.0.0.7:8002"}


@pytest.mark.parametrize(
    "raw",
    [
        pod("a", ready="False"),
        pod("a", ready="Unknown"),
        pod("a", deletionTimestamp="2026-01-02T00:00:00Z"),
        pod("a", None),
        pod("a", ""),
        pod("a", labels={"app": "other"}),
        {"metadata": meta("a", labels={"app": "vllm"})},
        {"metadata": meta("a", labels={"app": "vllm"}), "spec": {"containers": None}, "status": {"conditions": None}},
        {"metadata": meta("a", labels=None)},
    ],
)
def test_a_pod_that_cannot_serve_now_is_no_endpoint_and_no_trouble(raw: Json) -> None:
    assert endpoints_of(pod_of(raw), SERVED) == ((), ())


@pytest.mark.parametrize(
    ("ip", "address"),
    [
        ("10.0.0.1", "10.0.0.1:8000"),
        ("fd00:0:0::1", "[fd00::1]:8000"),
        ("FD00::00AB", "[fd00::ab]:8000"),
        ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:8000"),
    ],
)
def test_an_address_is_spelled_as_envoy_does(ip: str, address: str) -> None:
    assert addresses(pod("a", ip), Pool(SERVED.selector, (8000,))) == {"prod/a-rank-0": address}


def test_of_a_dual_stack_pod_the_primary_address_is_taken() -> None:
    raw = pod("a", "fd00::1")
    raw["status"]["podIPs"] = [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]
    assert addresses(raw, Pool(SERVED.selector, (8000,))) == {"prod/a-rank-0": "[fd00::1]:8000"}


@pytest.mark.parametrize("name", ACTIVE_PORTS)
def test_only_active_ports_are_endpoints_and_keep_their_rank(name: str) -> None:
    raw = pod("a", annotations={name: "8002, 8000"})
    assert addresses(raw) == {"prod/a-rank-0": "10.0.0.1:8000", "prod/a-rank-2": "10.0.0.1:8002"}
    assert notes(raw) == []


def test_the_new_annotation_of_active_ports_goes_before_the_legacy_one() -> None:
    raw = pod("a", annotations={ACTIVE_PORTS[1]: "8000", ACTIVE_PORTS[0]: "8001"})
    assert addresses(raw) == {"prod/a-rank-1": "10.0.0.1:8001"}


def test_an_active_port_that_is_no_target_port_is_noted_and_the_others_count() -> None:
    raw = pod("a", annotations={ACTIVE_PORTS[0]: "8001,9000,many"})
    assert addresses(raw) == {"prod/a-rank-1": "10.0.0.1:8001"}
    assert notes(raw) == [
        "Pod prod/a: metadata.annotations[llm-d.ai/active-ports]: expected target ports of the pool "
        "(8000, 8001, 8002) with commas between them, found '9000', 'many'"
    ]


def test_no_active_port_at_all_is_noted_since_the_pod_gets_nothing() -> None:
    raw = pod("a", annotations={ACTIVE_PORTS[0]: ""})
    assert addresses(raw) == {}
    assert notes(raw) == [
        "Pod prod/a: metadata.annotations[llm-d.ai/active-ports]: "
        "names no target port of the pool, so that the pod gets no requests"
    ]


def test_container_ports_that_no_request_reaches_are_noted() -> None:
    raw = pod("a", declared=(9090, 8000, 8100))
    raw["spec"]["containers"].append({"name": "b", "ports": [{"containerPort": 53, "protocol": "UDP"}]})
    raw["spec"]["containers"].append({"name": "c", "ports": [{"containerPort": 7000}, {"containerPort": 9090}]})
    assert len(addresses(raw)) == 3
    assert notes(raw) == [
        "Pod prod/a: spec.containers[].ports: no target port of the pool, so never routed to: 7000, 8100, 9090"
    ]


def test_a_pod_with_an_address_that_is_none_is_noted() -> None:
    assert str(read(Kind.POD, pod("a", "10.0.0.256"))) == (
        "Pod prod/a: status.podIP: expected an IP address, found '10.0.0.256'"
    )


# -- objectives, rewrites, models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.OBJECTIVE, Kind.LEGACY_OBJECTIVE])
@pytest.mark.parametrize(("priority", "expected"), [(None, 0), (0, 0), (7, 7), (-2, -2), (-(2**31), -(2**31))])
def test_an_objective_without_a_priority_has_priority_0(kind: Kind, priority: int | None, expected: int) -> None:
    assert read(kind, objective("gold", priority)) == Objective(
        kind, "prod", "gold", "2026-01-01T00:00:00Z", None, "pool", (), (), expected
    )


def test_an_explicit_null_is_as_good_as_nothing() -> None:
    raw = {
        "metadata": meta("gold", labels=None),
        "spec": {"poolRef": {"name": "pool"}, "priority": None},
        "status": None,
    }
    found = read(Kind.OBJECTIVE, raw)
    assert isinstance(found, Objective)
    assert (found.priority, found.pool) == (0, "pool")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"name": "pool"}, "pool"),
        (ref("pool"), "pool"),
        (ref("pool", "inference.networking.x-k8s.io"), "pool"),
        (ref("pool", "", ""), "pool"),
        (ref("pool", "example.com"), None),
        (ref("pool", kind="Service"), None),
    ],
)
def test_a_reference_is_to_an_inference_pool_of_either_group(reference: Json, expected: str | None) -> None:
    found = read(Kind.OBJECTIVE, {"metadata": meta("gold"), "spec": {"poolRef": reference}})
    assert isinstance(found, Objective)
    assert found.pool == expected


def test_conditions_and_generation_are_kept_for_whoever_writes_statuses() -> None:
    raw = objective("gold", generation=3)
    raw["status"] = {"conditions": [
        {"type": "Ready", "status": "Unknown", "reason": "Pending", "lastTransitionTime": "1970-01-01T00:00:00Z"},
    ]}  # fmt: skip
    found = read(Kind.OBJECTIVE, raw)
    assert isinstance(found, Objective)
    assert found.generation == 3
    assert found.conditions == (Condition("Ready", "Unknown", "Pending", "", None, "1970-01-01T00:00:00Z"),)


@pytest.mark.parametrize("kind", [Kind.REWRITE, Kind.LEGACY_REWRITE])
def test_a_rewrite_has_its_rules_in_order_and_each_match_once(kind: Kind) -> None:
    found = read(kind, rewrite("r", rule(["a", "b", "a"], x=90, y=10), rule([], z=None)))
    assert isinstance(found, Rewrite)
    assert found.rules == (
        RewriteRule(("a", "b"), (Target("x", 90), Target("y", 10))),
        RewriteRule((), (Target("z", 0),)),
    )
    assert found.notes == ()


def test_a_match_without_a_type_is_exact_and_rules_without_matches_match_all() -> None:
    raw = rewrite("r", {"matches": [{"model": {"value": "a"}}], "targets": [{"modelRewrite": "x"}]},
                  {"targets": [{"modelRewrite": "y"}]})  # fmt: skip
    found = read(Kind.REWRITE, raw)
    assert isinstance(found, Rewrite)
    assert [each.models for each in found.rules] == [("a",), ()]


def test_a_target_without_a_weight_beside_weighted_ones_is_noted() -> None:
    found = read(Kind.REWRITE, rewrite("r", rule(["a"], x=None, y=None), rule(["b"], x=3, y=None)))
    assert isinstance(found, Rewrite)
    assert found.rules[1].targets == (Target("x", 3), Target("y", 0))
    assert [path for path, _ in found.notes] == ["spec.rules[1].targets[1].weight"]


@pytest.mark.parametrize(
    ("given_rule", "said"),
    [
        ({"targets": []}, "spec.rules[0].targets: expected `array` of length >= 1"),
        ({"targets": [{"modelRewrite": ""}]}, "spec.rules[0].targets[0].modelRewrite: expected `str` of length >= 1"),
        ({"targets": [{"modelRewrite": "a", "weight": 1_000_001}]},
         "spec.rules[0].targets[0].weight: expected `int` <= 1000000"),
        ({"targets": [{"modelRewrite": "a"}], "matches": [{"model": {"type": "Prefix", "value": "a"}}]},
         "spec.rules[0].matches[0].model.type: invalid enum value 'Prefix'"),
        ({"targets": [{"modelRewrite": "a"}], "matches": [{}]},
         "spec.rules[0].matches[0]: object missing required field `model`"),
    ],
)  # fmt: skip
def test_a_rewrite_with_one_bad_rule_is_left_out_whole(given_rule: Json, said: str) -> None:
    found = read(Kind.REWRITE, rewrite("r", given_rule, rule([], z=1)))
    assert str(found) == f"InferenceModelRewrite prod/r: {said}"


@pytest.mark.parametrize(("criticality", "priority"), [("Critical", 1), ("Standard", 0), (None, 0), ("Sheddable", -1)])
def test_an_inference_model_is_a_rewrite_and_a_priority(criticality: str | None, priority: int) -> None:
    found = read(Kind.MODEL, model("m", "chat", criticality, targets={"chat-v1": 90, "chat-v2": 10}))
    assert isinstance(found, Model)
    assert (found.model, found.priority, found.pool) == ("chat", priority, "pool")
    assert found.targets == (Target("chat-v1", 90), Target("chat-v2", 10))


def test_an_inference_model_without_targets_rewrites_nothing() -> None:
    found = read(Kind.MODEL, model("m", "chat", "Critical"))
    assert isinstance(found, Model)
    assert found.targets == ()


def test_a_criticality_that_does_not_exist_is_noted() -> None:
    assert read(Kind.MODEL, model("m", "chat", "Vital")) == Note(
        "InferenceModel", "prod/m", "spec.criticality", "invalid enum value 'Vital'"
    )


# -- anything at all --------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
WHOLE: list[tuple[Kind, Json]] = [
    (Kind.POD, pod("a", declared=(8000,), annotations={ACTIVE_PORTS[0]: "8000"})),
    (Kind.POOL, pool()),
    (Kind.LEGACY_POOL, legacy_pool()),
    (Kind.OBJECTIVE, objective("o", 1)),
    (Kind.REWRITE, rewrite("r", rule(["a"], x=1))),
    (Kind.MODEL, model("m", "chat", "Critical", targets={"x": 1})),
]


def spoilt(raw: object, data: st.DataObject, value: object) -> object:
    """A copy with one part, somewhere, replaced."""
    children = list(raw) if isinstance(raw, dict) else list(range(len(raw))) if isinstance(raw, list) else []
    at: Any = data.draw(st.sampled_from([None, *children]))
    if at is None:
        return value
    copy: Any = raw.copy() if isinstance(raw, dict | list) else raw
    copy[at] = spoilt(copy[at], data, value)
    return copy


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert str(read(Kind.POD, {"metadata": meta("a"), "\ud800": 1})) == (
        "Pod prod/a: expected text in Unicode, found half of a surrogate pair"
    )


@given(st.sampled_from(list(Kind)), JSON)
def test_any_json_at_all_is_a_reading_or_a_note(kind: Kind, raw: object) -> None:
    assert isinstance(read(kind, raw), Note)


@given(st.sampled_from(WHOLE), st.data(), JSON)
def test_an_object_with_any_part_replaced_is_a_reading_or_a_note(
    whole: tuple[Kind, Json], data: st.DataObject, value: object
) -> None:
    kind, raw = whole
    changed = spoilt(raw, data, value)
    found = read(kind, changed)
    if isinstance(found, Note):
        assert found.message
        assert found.kind == kind.title
        assert found.name == "/".join(key_of(changed))
    elif isinstance(found, Pod):
        endpoints_of(found, SERVED)
