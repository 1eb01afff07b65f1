"""The API server takes the Job of the load client as it stands, and would let its pod in under the strictest rules.

There is no controller and no kubelet: that the Job's pod is made and runs is not tried here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.deploy.charts import Object
from tests.deploy.cluster import apply
from tests.kube.client import NAMESPACES, Client, Rejected

pytestmark = pytest.mark.anyio

FILE: Final = Path(__file__).parents[2] / "config" / "load" / "job.yaml"


def job(namespace: str) -> Object:
    read: Object = yaml.safe_load(FILE.read_text())
    read["metadata"]["namespace"] = namespace
    return read


async def test_the_load_job_applies_cleanly_and_a_second_time_changes_nothing(admin: Client, namespace: str) -> None:
    first = await apply(admin, job(namespace))
    again = await apply(admin, job(namespace))
    assert first is not None
    assert again is not None
    assert (
        first["spec"]["template"]["spec"]["containers"][0]["args"]
        == (job(namespace)["spec"]["template"]["spec"]["containers"][0]["args"])
    )
    assert first["metadata"]["resourceVersion"] == again["metadata"]["resourceVersion"]


async def test_a_misspelt_field_of_the_load_job_would_be_refused(admin: Client, namespace: str) -> None:
    """So the test above means something."""
    misspelt = copy.deepcopy(job(namespace))
    misspelt["spec"]["template"]["spec"]["containers"][0]["recources"] = {}
    with pytest.raises(Rejected, match="recources"):
        await apply(admin, misspelt, dryRun="All")


async def test_the_load_jobs_pod_may_run_where_pods_are_restricted(admin: Client, namespace: str) -> None:
    """Pod Security Standards judge pods, and only warn of Jobs: so the pod is tried that a controller would make."""
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    await admin.patch(NAMESPACES, namespace, label)
    template = job(namespace)["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] = {**template["metadata"], "name": "epp-load", "namespace": namespace}
    assert await apply(admin, pod, dryRun="All") is not None
    del pod["spec"]["containers"][0]["securityContext"]
    with pytest.raises(Rejected, match="PodSecurity"):
        await apply(admin, pod, dryRun="All")
