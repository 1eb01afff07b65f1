"""Write config/kustomize/base from the chart, for those who apply manifests without Helm.

In: what `helm template` makes of the chart with its default values, a pool `llm` and pods labelled app=llm. Out: one
file, whose kustomization.yaml is written by hand. Three things differ from the chart, since a base belongs to no
namespace yet: no object names one, the picker takes its pool's from its environment, and cluster roles have none in
their names.
Rejected: a base written by hand (two truths, and the one that fewer people use rots first).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from scripts import tools

CHART: Final = tools.ROOT / "config" / "charts" / "epp"
BASE: Final = tools.ROOT / "config" / "kustomize" / "base" / "epp.yaml"
RELEASE: Final = "llm"
NAMESPACE: Final = "default"
HEAD: Final = "# Written by `python -m scripts.manifests` from config/charts/epp: change that.\n"

Object = dict[str, Any]


def rendered(helm: Path) -> list[Object]:
    """The chart's objects, as a base has them."""
    values = ("--set", f"inferencePool.modelServers.matchLabels.app={RELEASE}")
    version = ("--kube-version", tools.version("kube"))
    command = (helm, "template", RELEASE, CHART, "--namespace", NAMESPACE, *version, *values)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own words
    objects = [each for each in yaml.safe_load_all(text) if each is not None]
    for each in objects:
        _belong_nowhere(each)
    return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))


def _belong_nowhere(thing: Object) -> None:
    thing["metadata"].pop("namespace", None)
    match thing["kind"]:
        case "ClusterRole":
            thing["metadata"]["name"] = f"{RELEASE}-epp-reviews"
        case "ClusterRoleBinding":
            thing["metadata"]["name"] = thing["roleRef"]["name"] = f"{RELEASE}-epp-reviews"
        case "Deployment":
            (picker,) = thing["spec"]["template"]["spec"]["containers"]
            where = picker["args"].index("--pool-namespace") + 1
            picker["args"][where] = "$(NAMESPACE)"
            del thing["spec"]["template"]["metadata"]["annotations"]  # a checksum that kustomize would not keep true


def text(objects: list[Object]) -> str:
    return HEAD + yaml.safe_dump_all(objects, sort_keys=False, width=120)


def main() -> int:
    helm = tools.binary("helm")
    if helm is None:
        print(tools.missing("helm"), file=sys.stderr)
        return 1
    BASE.write_text(text(rendered(helm)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
