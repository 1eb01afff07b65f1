"""The definitions of config/crd as a real API server takes them: what it accepts, refuses, and fills in.

The expected values are the published API's: limits, defaults and the table of CEL cases of the Gateway API Inference
Extension, and llm-d's objectives and rewrites.
"""

from __future__ import annotations

from typing import Final

import pytest

from tests.kube.client import (
    DEFINITIONS,
    IMPORTS,
    MODELS,
    OBJECTIVES,
    OLD_OBJECTIVES,
    OLD_POOLS,
    OLD_REWRITES,
    OLDEST_MODELS,
    POOLS,
    REWRITES,
    Client,
    Object,
    Rejected,
    Resource,
    definitions,
)

pytestmark = pytest.mark.anyio

KINDS: Final = {
    "inferencepools": "InferencePool",
    "inferenceobjectives": "InferenceObjective",
    "inferencemodelrewrites": "InferenceModelRewrite",
    "inferencemodels": "InferenceModel",
    "inferencepoolimports": "InferencePoolImport",
}
POOL: Final[Object] = {
    "selector": {"matchLabels": {"app": "llama"}},
    "targetPorts": [{"number": 8000}],
    "endpointPickerRef": {"name": "picker", "port": {"number": 9002}},
}
OLD_POOL: Final[Object] = {
    "selector": {"app": "llama"},
    "targetPortNumber": 8000,
    "extensionRef": {"name": "picker"},
}
REF: Final[Object] = {"name": "pool"}
REWRITE: Final[Object] = {"poolRef": REF, "rules": [{"targets": [{"modelRewrite": "llama-lora-1"}]}]}
MODEL: Final[Object] = {"modelName": "llama", "poolRef": REF}
CONDITION: Final[Object] = {
    "type": "Accepted",
    "status": "True",
    "reason": "Accepted",
    "message": "",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}
PORT_NEEDED: Final = "port is required when kind is 'Service' or unspecified (defaults to 'Service')"
BOTH_OBJECTIVES: Final = pytest.mark.parametrize("resource", [OBJECTIVES, OLD_OBJECTIVES], ids=lambda it: it.version)
BOTH_REWRITES: Final = pytest.mark.parametrize("resource", [REWRITES, OLD_REWRITES], ids=lambda it: it.version)


def thing(resource: Resource, namespace: str, spec: Object | None, name: str = "it") -> Object:
    made = {
        "apiVersion": resource.version,
        "kind": KINDS[resource.plural],
        "metadata": {"namespace": namespace, "name": name},
    }
    return made if spec is None else {**made, "spec": spec}


def ports(*numbers: int) -> list[Object]:
    return [{"number": number} for number in numbers]


def pending(kind: str) -> Object:
    """The condition of an object that no controller has seen."""
    return {
        "type": kind,
        "status": "Unknown",
        "reason": "Pending",
        "message": "Waiting for controller",
        "lastTransitionTime": "1970-01-01T00:00:00Z",
    }


async def refusal(admin: Client, resource: Resource, namespace: str, spec: Object) -> str:
    """Why this object is invalid, in the server's words."""
    with pytest.raises(Rejected) as caught:
        await admin.create(resource, thing(resource, namespace, spec))
    assert (caught.value.status, caught.value.reason) == (422, "Invalid")
    return caught.value.message


async def test_every_definition_is_established_as_it_is_written(admin: Client) -> None:
    served = {}
    for definition in definitions():
        found = await admin.get(DEFINITIONS, definition["metadata"]["name"])
        conditions = {condition["type"]: condition["status"] for condition in found["status"]["conditions"]}
        assert conditions["NamesAccepted"] == conditions["Established"] == "True"
        assert "NonStructuralSchema" not in conditions
        served[found["metadata"]["name"]] = [version["name"] for version in found["spec"]["versions"]]
    assert served == {
        "inferencepools.inference.networking.k8s.io": ["v1"],
        "inferencepools.inference.networking.x-k8s.io": ["v1alpha2"],
        "inferenceobjectives.llm-d.ai": ["v1alpha2"],
        "inferenceobjectives.inference.networking.x-k8s.io": ["v1alpha2"],
        "inferencemodelrewrites.llm-d.ai": ["v1alpha2"],
        "inferencemodelrewrites.inference.networking.x-k8s.io": ["v1alpha2"],
        "inferencemodels.inference.networking.x-k8s.io": ["v1alpha2", "v1alpha1"],
        "inferencepoolimports.inference.networking.x-k8s.io": ["v1alpha1"],
    }


def test_the_two_groups_of_a_resource_have_one_schema() -> None:
    by_name = {definition["metadata"]["name"]: definition["spec"] for definition in definitions()}
    for plural in ("inferenceobjectives", "inferencemodelrewrites"):
        new, old = by_name[f"{plural}.llm-d.ai"], by_name[f"{plural}.inference.networking.x-k8s.io"]
        assert {**new, "group": ""} == {**old, "group": ""}


@pytest.mark.parametrize(
    ("group", "short"),
    [
        ("inference.networking.k8s.io/v1", {"inferencepools": ["infpool"]}),
        ("inference.networking.x-k8s.io/v1alpha2", {"inferencepools": ["xinfpool"]}),
        ("inference.networking.x-k8s.io/v1alpha1", {"inferencepoolimports": ["infpimp"]}),
    ],
)
async def test_short_names_are_known(admin: Client, group: str, short: dict[str, list[str]]) -> None:
    found = (await admin.ask("GET", f"/apis/{group}"))["resources"]
    assert {each["name"]: each["shortNames"] for each in found if "shortNames" in each} == short


# -- InferencePool v1 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"appProtocol": "kubernetes.io/h2c"},
        {"targetPorts": ports(8000, 8001, 8002, 8003)},
        {"targetPorts": ports(*range(8000, 8008))},
        {"targetPorts": ports(1, 65535)},
        {"endpointPickerRef": {"kind": "Elsewhere", "group": "example.com", "name": "picker"}},
        {"selector": {"matchLabels": {f"label-{number}": "" for number in range(64)}}},
        {"selector": {"matchLabels": {"example.com/app": "a" * 63}}},
    ],
    ids=["complete", "h2c", "four ports", "eight ports", "ends of the range", "no Service", "64 labels", "63 letters"],
)
async def test_a_valid_pool_is_accepted(admin: Client, namespace: str, change: Object) -> None:
    spec = {**POOL, **change}
    made = await admin.create(POOLS, thing(POOLS, namespace, spec))
    assert {name: made["spec"][name] for name in ("selector", "targetPorts")} == {
        name: spec[name] for name in ("selector", "targetPorts")
    }


async def test_a_pool_may_do_without_a_picker(admin: Client, namespace: str) -> None:
    made = await admin.create(POOLS, thing(POOLS, namespace, {**POOL, "endpointPickerRef": None}))
    assert "endpointPickerRef" not in made["spec"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"endpointPickerRef": {"name": "picker"}}, PORT_NEEDED),
        ({"endpointPickerRef": {"kind": "Service", "name": "picker"}}, PORT_NEEDED),
        ({"targetPorts": ports(8000, 8001, 8000)}, "port number must be unique"),
        ({"targetPorts": ports(*range(8000, 8009))}, "must have at most 8 items"),
        ({"targetPorts": []}, "spec.targetPorts in body should have at least 1 items"),
        ({"targetPorts": None}, "spec.targetPorts: Required value"),
        ({"targetPorts": ports(0)}, "should be greater than or equal to 1"),
        ({"targetPorts": ports(65536)}, "should be less than or equal to 65535"),
        ({"appProtocol": "https"}, 'supported values: "http", "kubernetes.io/h2c"'),
        ({"selector": None}, "spec.selector: Required value"),
        ({"selector": {}}, "spec.selector.matchLabels: Required value"),
        ({"selector": {"matchLabels": {}}}, "should have at least 1 properties"),
        ({"selector": {"matchLabels": {f"label-{n}": "" for n in range(65)}}}, "must have at most 64 items"),
        ({"selector": {"matchLabels": {"app": "a" * 64}}}, "may not be more than 63 bytes"),
        ({"selector": {"matchLabels": {"app": "-a"}}}, "should match"),
        ({"endpointPickerRef": {"port": {"number": 9002}}}, "spec.endpointPickerRef.name: Required value"),
        (
            {"endpointPickerRef": {"name": "picker", "port": {"number": 9002}, "failureMode": "FailShut"}},
            'supported values: "FailOpen", "FailClose"',
        ),
        ({"endpointPickerRef": {"name": "", "port": {"number": 9002}}}, "at least 1 chars"),
        ({"endpointPickerRef": {"name": "picker", "port": {"number": 70000}}}, "less than or equal to 65535"),
    ],
)
async def test_an_invalid_pool_is_refused(admin: Client, namespace: str, change: Object, words: str) -> None:
    assert words in await refusal(admin, POOLS, namespace, {**POOL, **change})


async def test_what_a_pool_leaves_out_is_filled_in(admin: Client, namespace: str) -> None:
    made = await admin.create(POOLS, thing(POOLS, namespace, POOL))
    assert made["spec"] == {
        "selector": {"matchLabels": {"app": "llama"}},
        "targetPorts": [{"number": 8000}],
        "appProtocol": "http",
        "endpointPickerRef": {
            "group": "",
            "kind": "Service",
            "name": "picker",
            "port": {"number": 9002},
            "failureMode": "FailClose",
        },
    }
    assert "status" not in made


async def test_a_pools_status_is_written_apart_from_its_spec(admin: Client, namespace: str) -> None:
    parents = [{"parentRef": {"name": "gateway"}, "controllerName": "example.com/gateway", "conditions": [CONDITION]}]
    given = thing(POOLS, namespace, POOL)
    made = await admin.create(POOLS, {**given, "status": {"parents": parents}})
    assert "status" not in made
    told = await admin.patch_status(POOLS, "it", {"parents": parents}, namespace)
    assert told["status"]["parents"] == [
        {
            "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gateway"},
            "controllerName": "example.com/gateway",
            "conditions": [CONDITION],
        }
    ]
    assert told["metadata"]["generation"] == 1
    changed = await admin.patch(POOLS, "it", {"spec": {"appProtocol": "http"}, "status": None}, namespace)
    assert changed["status"] == told["status"]


@pytest.mark.parametrize(
    ("parents", "words"),
    [
        ([{"parentRef": {"name": f"gateway-{number}"}} for number in range(33)], "must have at most 32 items"),
        ([{}], "parentRef: Required value"),
        ([{"parentRef": {"name": "gateway"}, "controllerName": "gateway"}], "should match"),
        ([{"parentRef": {"name": "gateway"}, "conditions": [CONDITION, CONDITION]}], "Duplicate value"),
        (
            [{"parentRef": {"name": "gateway"}, "conditions": [{**CONDITION, "type": f"T{n}"} for n in range(9)]}],
            "must have at most 8 items",
        ),
        ([{"parentRef": {"name": "gateway"}, "conditions": [{**CONDITION, "status": "Yes"}]}], "Unsupported value"),
    ],
)
async def test_an_invalid_pool_status_is_refused(
    admin: Client, namespace: str, parents: list[Object], words: str
) -> None:
    await admin.create(POOLS, thing(POOLS, namespace, POOL))
    with pytest.raises(Rejected) as caught:
        await admin.patch_status(POOLS, "it", {"parents": parents}, namespace)
    assert caught.value.status == 422
    assert words in caught.value.message


async def test_a_change_of_a_pool_is_held_to_the_same_rules(admin: Client, namespace: str) -> None:
    await admin.create(POOLS, thing(POOLS, namespace, POOL))
    with pytest.raises(Rejected, match="port number must be unique"):
        await admin.patch(POOLS, "it", {"spec": {"targetPorts": ports(8000, 8000)}}, namespace)
    changed = await admin.patch(POOLS, "it", {"spec": {"targetPorts": ports(8000, 8001)}}, namespace)
    assert changed["metadata"]["generation"] == 2


# -- InferencePool v1alpha2 --------------------------------------------------------------------------------------------


async def test_what_an_older_pool_leaves_out_is_filled_in(admin: Client, namespace: str) -> None:
    made = await admin.create(OLD_POOLS, thing(OLD_POOLS, namespace, OLD_POOL))
    assert made["spec"] == {
        "selector": {"app": "llama"},
        "targetPortNumber": 8000,
        "extensionRef": {"group": "", "kind": "Service", "name": "picker", "failureMode": "FailClose"},
    }
    assert made["status"]["parent"] == [
        {
            "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Status", "name": "default"},
            "conditions": [pending("Accepted")],
        }
    ]


async def test_pools_of_both_groups_may_have_one_name(admin: Client, namespace: str) -> None:
    for resource, spec in ((POOLS, POOL), (OLD_POOLS, OLD_POOL)):
        await admin.create(resource, thing(resource, namespace, spec))
        assert len((await admin.list(resource, namespace))[0]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targetPortNumber": None}, "spec.targetPortNumber: Required value"),
        ({"targetPortNumber": 0}, "greater than or equal to 1"),
        ({"extensionRef": None}, "spec.extensionRef: Required value"),
        ({"extensionRef": {"name": "picker", "portNumber": 65536}}, "less than or equal to 65535"),
        ({"extensionRef": {"name": "picker", "failureMode": "Open"}}, "Unsupported value"),
    ],
)
async def test_an_invalid_older_pool_is_refused(admin: Client, namespace: str, change: Object, words: str) -> None:
    assert words in await refusal(admin, OLD_POOLS, namespace, {**OLD_POOL, **change})


async def test_the_selector_of_v1_does_not_fit_an_older_pool(admin: Client, namespace: str) -> None:
    spec = {**OLD_POOL, "selector": {"matchLabels": {"app": "llama"}}}
    with pytest.raises(Rejected, match=r"unknown field .spec\.selector\.matchLabels\.app"):
        await admin.create(OLD_POOLS, thing(OLD_POOLS, namespace, spec))


# -- InferenceObjective ------------------------------------------------------------------------------------------------


@BOTH_OBJECTIVES
async def test_what_an_objective_leaves_out_is_filled_in(admin: Client, namespace: str, resource: Resource) -> None:
    made = await admin.create(resource, thing(resource, namespace, {"poolRef": REF}))
    assert made["spec"] == {
        "poolRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "pool"}
    }
    assert made["status"] == {"conditions": [pending("Ready")]}


@BOTH_OBJECTIVES
async def test_an_objective_has_any_priority_beyond_32_bits_too(
    admin: Client, namespace: str, resource: Resource
) -> None:
    """The server takes `format: int32` for a hint; whoever reads objectives must take such a number in."""
    for name, priority in (("least", -(2**31)), ("most", 2**31 - 1), ("more", 2**31), ("far-more", 2**63 - 1)):
        spec = {"poolRef": REF, "priority": priority}
        made = await admin.create(resource, thing(resource, namespace, spec, name))
        assert made["spec"]["priority"] == priority


@BOTH_OBJECTIVES
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"priority": 1}, "spec.poolRef: Required value"),
        ({"poolRef": {}}, "spec.poolRef.name: Required value"),
        ({"poolRef": REF, "priority": "high"}, "must be of type integer"),
    ],
)
async def test_an_invalid_objective_is_refused(
    admin: Client, namespace: str, resource: Resource, spec: Object, words: str
) -> None:
    assert words in await refusal(admin, resource, namespace, spec)


@BOTH_OBJECTIVES
async def test_an_objectives_conditions_are_written_apart_from_its_spec(
    admin: Client, namespace: str, resource: Resource
) -> None:
    await admin.create(resource, thing(resource, namespace, {"poolRef": REF, "priority": 3}))
    told = await admin.patch_status(resource, "it", {"conditions": [CONDITION]}, namespace)
    assert told["status"] == {"conditions": [CONDITION]}
    assert told["spec"]["priority"] == 3
    assert told["metadata"]["generation"] == 1


# -- InferenceModelRewrite ---------------------------------------------------------------------------------------------


@BOTH_REWRITES
async def test_what_a_rewrite_leaves_out_is_filled_in(admin: Client, namespace: str, resource: Resource) -> None:
    rules = [{"matches": [{"model": {"value": "llama"}}], "targets": [{"modelRewrite": "a"}]}]
    made = await admin.create(resource, thing(resource, namespace, {"poolRef": REF, "rules": rules}))
    assert made["spec"]["poolRef"]["group"] == "inference.networking.k8s.io"
    assert made["spec"]["rules"] == [
        {"matches": [{"model": {"type": "Exact", "value": "llama"}}], "targets": [{"modelRewrite": "a"}]}
    ]
    assert [condition["reason"] for condition in made["status"]["conditions"]] == ["Pending"]


@BOTH_REWRITES
async def test_a_rewrite_may_match_everything_and_have_weights(
    admin: Client, namespace: str, resource: Resource
) -> None:
    targets = [{"modelRewrite": "a", "weight": 1}, {"modelRewrite": "b", "weight": 1_000_000}, {"modelRewrite": "c"}]
    made = await admin.create(resource, thing(resource, namespace, {"poolRef": REF, "rules": [{"targets": targets}]}))
    assert made["spec"]["rules"] == [{"targets": targets}]


@BOTH_REWRITES
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poolRef": None}, "spec.poolRef: Required value"),
        ({"rules": None}, "spec.rules: Required value"),
        ({"rules": [{}]}, "targets: Required value"),
        ({"rules": [{"targets": []}]}, "should have at least 1 items"),
        ({"rules": [{"targets": [{"weight": 1}]}]}, "modelRewrite: Required value"),
        ({"rules": [{"targets": [{"modelRewrite": "a", "weight": 0}]}]}, "greater than or equal to 1"),
        ({"rules": [{"targets": [{"modelRewrite": "a", "weight": 1_000_001}]}]}, "less than or equal to 1000000"),
        (
            {"rules": [{"matches": [{"model": {"type": "Prefix", "value": "l"}}], "targets": [{"modelRewrite": "a"}]}]},
            'supported values: "Exact"',
        ),
        ({"rules": [{"matches": [{"model": {}}], "targets": [{"modelRewrite": "a"}]}]}, "value: Required value"),
    ],
)
async def test_an_invalid_rewrite_is_refused(
    admin: Client, namespace: str, resource: Resource, change: Object, words: str
) -> None:
    assert words in await refusal(admin, resource, namespace, {**REWRITE, **change})


# -- InferenceModel ----------------------------------------------------------------------------------------------------


async def test_what_a_model_leaves_out_is_filled_in(admin: Client, namespace: str) -> None:
    made = await admin.create(MODELS, thing(MODELS, namespace, MODEL))
    assert made["spec"] == {
        "modelName": "llama",
        "poolRef": {"group": "inference.networking.x-k8s.io", "kind": "InferencePool", "name": "pool"},
    }
    assert made["status"] == {"conditions": [pending("Accepted")]}


async def test_a_model_of_either_version_is_read_in_the_other(admin: Client, namespace: str) -> None:
    spec = {**MODEL, "criticality": "Sheddable", "targetModels": [{"name": "a", "weight": 1}]}
    for written, read, name in ((MODELS, OLDEST_MODELS, "new"), (OLDEST_MODELS, MODELS, "old")):
        made = await admin.create(written, thing(written, namespace, spec, name))
        found = await admin.get(read, name, namespace)
        assert found["apiVersion"] == read.version
        assert found["spec"] == made["spec"]
        assert found["spec"]["criticality"] == "Sheddable"


@pytest.mark.parametrize(
    "targets",
    [
        [],
        [{"name": "a"}, {"name": "b"}],
        [{"name": "a", "weight": 1}, {"name": "b", "weight": 1_000_000}],
        [{"name": f"target-{number}"} for number in range(10)],
    ],
    ids=["none", "without weights", "with weights", "ten"],
)
async def test_a_models_targets_have_weights_all_or_none(admin: Client, namespace: str, targets: list[Object]) -> None:
    made = await admin.create(MODELS, thing(MODELS, namespace, {**MODEL, "targetModels": targets}))
    assert made["spec"]["targetModels"] == targets


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"targetModels": [{"name": "a", "weight": 1}, {"name": "b"}]},
            "give a weight to all target models or to none",
        ),
        ({"targetModels": [{"name": f"target-{number}"} for number in range(11)]}, "must have at most 10 items"),
        ({"targetModels": [{"name": "a", "weight": 0}]}, "greater than or equal to 1"),
        ({"targetModels": [{"name": "a", "weight": 1_000_001}]}, "less than or equal to 1000000"),
        ({"targetModels": [{"name": "a" * 254}]}, "may not be more than 253 bytes"),
        ({"criticality": "Urgent"}, 'supported values: "Critical", "Standard", "Sheddable"'),
        ({"modelName": "a" * 257}, "may not be more than 256 bytes"),
        ({"modelName": None}, "spec.modelName: Required value"),
        ({"poolRef": None}, "spec.poolRef: Required value"),
    ],
)
async def test_an_invalid_model_is_refused(admin: Client, namespace: str, change: Object, words: str) -> None:
    assert words in await refusal(admin, MODELS, namespace, {**MODEL, **change})


async def test_a_model_keeps_its_name_for_good(admin: Client, namespace: str) -> None:
    await admin.create(MODELS, thing(MODELS, namespace, MODEL))
    with pytest.raises(Rejected, match="modelName is immutable"):
        await admin.patch(MODELS, "it", {"spec": {"modelName": "other"}}, namespace)
    changed = await admin.patch(MODELS, "it", {"spec": {"criticality": "Critical"}}, namespace)
    assert (changed["spec"]["modelName"], changed["spec"]["criticality"]) == ("llama", "Critical")


# -- InferencePoolImport -----------------------------------------------------------------------------------------------


async def test_an_import_is_all_status(admin: Client, namespace: str) -> None:
    await admin.create(IMPORTS, thing(IMPORTS, namespace, None))
    controller = {
        "name": "example.com/import",
        "exportingClusters": [{"name": "west"}, {"name": "east"}],
        "parents": [{"parentRef": {"name": "gateway"}, "conditions": [CONDITION]}],
        "conditions": [CONDITION],
    }
    told = await admin.patch_status(IMPORTS, "it", {"controllers": [controller]}, namespace)
    (found,) = told["status"]["controllers"]
    assert found["exportingClusters"] == controller["exportingClusters"]
    assert found["parents"][0]["parentRef"] == {
        "group": "gateway.networking.k8s.io",
        "kind": "Gateway",
        "name": "gateway",
    }


@pytest.mark.parametrize(
    ("controllers", "words"),
    [
        ([{"name": f"example.com/import-{number}"} for number in range(9)], "must have at most 8 items"),
        ([{"name": "example.com/import"}, {"name": "example.com/import"}], "Duplicate value"),
        ([{"name": "import"}], "should match"),
        ([{"name": "example.com/import", "exportingClusters": [{}]}], "name: Required value"),
    ],
)
async def test_an_invalid_import_is_refused(
    admin: Client, namespace: str, controllers: list[Object], words: str
) -> None:
    await admin.create(IMPORTS, thing(IMPORTS, namespace, None))
    with pytest.raises(Rejected) as caught:
        await admin.patch_status(IMPORTS, "it", {"controllers": controllers}, namespace)
    assert caught.value.status == 422
    assert words in caught.value.message
