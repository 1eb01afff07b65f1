"""The API server takes every object that the chart renders, with no field that it does not know."""

from __future__ import annotations

import copy

import pytest

from tests.deploy.charts import LABELLED, MATRIX, render
from tests.deploy.cluster import NOT_VALIDATED, apply, install
from tests.kube.client import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, POOLS, Client, Rejected

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
async def test_a_release_applies_cleanly_and_a_second_time_changes_nothing(
    admin: Client, namespace: str, values: tuple[str, ...]
) -> None:
    rendered = render(*values, namespace=namespace)
    applied = await install(admin, rendered)
    known = [each["kind"] for each in rendered.objects if each["kind"] not in NOT_VALIDATED]
    assert applied == known
    for thing in rendered.objects:
        if thing["kind"] not in NOT_VALIDATED:
            first = await apply(admin, thing)
            again = await apply(admin, thing)
            assert first is not None
            assert again is not None
            assert first["metadata"]["resourceVersion"] == again["metadata"]["resourceVersion"]
    for kind, resource in (("ClusterRole", CLUSTER_ROLES), ("ClusterRoleBinding", CLUSTER_ROLE_BINDINGS)):
        for thing in rendered.all(kind):
            await admin.delete(resource, thing["metadata"]["name"])


async def test_the_server_would_refuse_a_field_that_it_does_not_know(admin: Client, namespace: str) -> None:
    """So the test above means something."""
    deployment = copy.deepcopy(render(*LABELLED, namespace=namespace).one("Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(Rejected, match="readynessProbe"):
        await apply(admin, deployment, dryRun="All")


async def test_one_release_can_become_another(admin: Client, namespace: str) -> None:
    """What an upgrade changes may be changed: selectors of a Deployment, for one, may not."""
    for name in ("gateway", "a leader and two standbys", "everything else", "standalone", "gateway"):
        await install(admin, render(*MATRIX[name], namespace=namespace))
    pool = await admin.get(POOLS, "llm", namespace)
    assert pool["spec"]["endpointPickerRef"] == {
        "group": "",
        "kind": "Service",
        "name": "llm-epp",
        "port": {"number": 9002},
        "failureMode": "FailOpen",
    }
