"""The base for those without Helm is the chart's default release, and an overlay puts it where it belongs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from scripts import manifests, tools
from tests.deploy.charts import LABELLED, ROOT, Object, Rendered, render
from tests.deploy.cluster import install
from tests.kube.client import Client

KUSTOMIZE = ROOT / "config" / "kustomize"


def kustomize(folder: Path) -> Rendered:
    """What `kubectl kustomize` makes of a folder."""
    kubectl = tools.binary("kubectl")
    if kubectl is None:
        pytest.skip(tools.missing("kubectl"))
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Rendered(list(yaml.safe_load_all(done.stdout)))


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def test_the_base_is_what_the_chart_renders_today() -> None:
    helm = tools.binary("helm")
    assert helm is not None
    objects = manifests.rendered(helm)
    assert manifests.BASE.read_text() == manifests.text(objects), "run python -m scripts.manifests"
    assert by_name(kustomize(KUSTOMIZE / "base").objects) == by_name(objects)


def test_what_differs_from_the_chart_is_where_it_lives_and_no_more() -> None:
    base = by_name(kustomize(KUSTOMIZE / "base").objects)
    chart = render(*LABELLED, namespace="default")
    assert len(base) == len(chart.objects)
    args = base["Deployment", "llm-epp"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [word.replace("$(NAMESPACE)", "default") for word in args] == chart.args
    for thing in chart.objects:
        name = "llm-epp-reviews" if thing["kind"].startswith("ClusterRole") else thing["metadata"]["name"]
        twin = base[thing["kind"], name]
        if thing["kind"] not in ("Deployment", "ClusterRoleBinding"):
            assert {key: value for key, value in twin.items() if key != "metadata"} == {
                key: value for key, value in thing.items() if key != "metadata"
            }


@pytest.mark.anyio
async def test_the_overlay_applies_in_its_namespace_with_its_image(admin: Client) -> None:
    rendered = kustomize(KUSTOMIZE / "overlay")
    await admin.ask("POST", "/api/v1/namespaces", {"metadata": {"name": "llm"}})
    assert sorted(await install(admin, rendered)) == sorted(each["kind"] for each in rendered.objects)
    homes = {each["metadata"].get("namespace", "") for each in rendered.objects}
    assert homes == {"llm", ""}
    assert rendered.picker["image"] == "registry.example.com/epp:0.1.0"
    assert rendered.flags.max_body == "64Mi"
    assert rendered.flags.pool_namespace == "$(NAMESPACE)"  # kubelet's: the downward API has it
    (subject,) = rendered.one("ClusterRoleBinding")["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "llm-epp", "namespace": "llm"}
