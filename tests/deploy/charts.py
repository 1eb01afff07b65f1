"""What the chart renders, for tests: `helm template` as an operator would call it.

In: values as `--set` has them. Out: the objects, and of the Deployment what tests ask for most. Rendering twice with
the same values costs once.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from epp.cli import app
from epp.flags import ServeFlags, normalised
from scripts import tools

Object = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "config" / "charts" / "epp"

LABELLED: Final = ("inferencePool.modelServers.matchLabels.app=llm",)
SELECTED: Final = (
    "mode=standalone",
    "inferenceExtension.endpointsServer.createInferencePool=false",
    "inferenceExtension.endpointsServer.endpointSelector=app=llm\\,tier in (gpu)",
    "inferenceExtension.endpointsServer.targetPorts=8000\\,8001",
)
MATRIX: Final[dict[str, tuple[str, ...]]] = {
    "gateway": LABELLED,
    "gateway in plaintext": (*LABELLED, "inferenceExtension.flags.secure-serving=false"),
    "a leader and a standby": (*LABELLED, "inferenceExtension.replicas=2"),
    "a leader and two standbys": (*LABELLED, "inferenceExtension.replicas=3"),
    "three that all serve": (
        *LABELLED,
        "inferenceExtension.replicas=3",
        "inferenceExtension.flags.ha-enable-leader-election=false",
        "inferenceExtension.podDisruptionBudget.enabled=true",
    ),
    "an election of one": (*LABELLED, "inferenceExtension.flags.ha-enable-leader-election=true"),
    "a pool before v1": (
        *LABELLED,
        "inferencePool.apiVersion=inference.networking.x-k8s.io/v1alpha2",
        "inferencePool.failureMode=FailClose",
    ),
    "gRPC and two ports": (
        *LABELLED,
        "inferencePool.modelServerProtocol=grpc",
        "inferencePool.targetPorts[0].number=8000",
        "inferencePool.targetPorts[1].number=8001",
    ),
    "objectives": (*LABELLED, "inferenceObjectives[0].name=batch", "inferenceObjectives[0].priority=-1"),
    "monitoring": (*LABELLED, "inferenceExtension.monitoring.prometheus.enabled=true"),
    "monitoring by anybody": (
        *LABELLED,
        "inferenceExtension.monitoring.prometheus.enabled=true",
        "inferenceExtension.monitoring.prometheus.auth.enabled=false",
    ),
    "a network policy": (
        *LABELLED,
        "inferenceExtension.networkPolicy.enabled=true",
        "inferenceExtension.networkPolicy.gateways[0].podSelector.matchLabels.app=gateway",
    ),
    "everything else": (
        *LABELLED,
        "inferenceExtension.tracing.enabled=true",
        "inferenceExtension.image.registry=registry.example.com",
        "inferenceExtension.imagePullSecrets[0].name=pull",
        "inferenceExtension.env[0].name=A",
        "inferenceExtension.env[0].value=b",
        "inferenceExtension.podAnnotations.note=yes sir",
        "inferenceExtension.tolerations[0].operator=Exists",
        "inferenceExtension.volumes[0].name=scratch",
        "inferenceExtension.volumes[0].emptyDir.sizeLimit=1Mi",
        "inferenceExtension.volumeMounts[0].name=scratch",
        "inferenceExtension.volumeMounts[0].mountPath=/scratch",
        "inferenceExtension.extraContainerPorts[0].name=zmq",
        "inferenceExtension.extraContainerPorts[0].containerPort=5557",
        "inferenceExtension.extraServicePorts[0].name=zmq",
        "inferenceExtension.extraServicePorts[0].port=5557",
        "inferenceExtension.flags.max-body=64Mi",
        "inferenceExtension.flags.zap-encoder=console",
        "inferenceExtension.flags.seed=1048576",
        "inferenceExtension.flags.grpc-port=19002",
        "inferenceExtension.flags.grpc-health-port=19003",
        "inferenceExtension.flags.metrics-port=19090",
        "inferenceExtension.extProcPort=9012",
        "inferenceExtension.deploymentStrategy.type=Recreate",
    ),
    "Istio": (*LABELLED, "provider.name=istio", "provider.istio.destinationRule.trafficPolicy.tls.sni=epp"),
    "GKE": (*LABELLED, "provider.name=gke", "inferenceExtension.monitoring.prometheus.enabled=true"),
    "GKE Autopilot": (
        *LABELLED,
        "provider.name=gke",
        "provider.gke.autopilot=true",
        "inferenceExtension.monitoring.prometheus.enabled=true",
        "experimentalHttpRoute.enabled=true",
    ),
    "standalone": (*LABELLED, "mode=standalone"),
    "standalone in plaintext": (*LABELLED, "mode=standalone", "inferenceExtension.flags.secure-serving=false"),
    "standalone on IPv6": (
        *LABELLED,
        "mode=standalone",
        "inferenceExtension.sidecar.address=::",
        "inferenceExtension.networkPolicy.enabled=true",
    ),
    "standalone without a pool": SELECTED,
    "standalone without a pool, with a standby": (*SELECTED, "inferenceExtension.replicas=2"),
}
"""Values to try, by what they ask for."""


class Refused(Exception):
    """Helm's words."""


class Rendered:
    """The objects of a release."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def all(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, ending: str = "") -> Object:
        """The only one of its kind whose name ends so."""
        (found,) = [each for each in self.all(kind) if each["metadata"]["name"].endswith(ending)]
        return found

    @property
    def pod(self) -> Object:
        """Of the Deployment's template."""
        spec: Object = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def containers(self) -> Iterator[Object]:
        yield from self.pod.get("initContainers", ())
        yield from self.pod["containers"]

    @property
    def picker(self) -> Object:
        (container,) = self.pod["containers"]
        found: Object = container
        return found

    @property
    def args(self) -> list[str]:
        args: list[str] = self.picker["args"]
        return args

    @property
    def flags(self) -> ServeFlags:
        """What `epp serve` makes of the container's args."""
        _, bound, _ = app.parse_args(normalised(["serve", *self.args]), print_error=False, exit_on_error=False)
        flags = bound.arguments["flags"]
        assert isinstance(flags, ServeFlags)
        return flags

    def write_config(self, folder: Path) -> Path:
        """Write the files that are mounted at /config into a folder; returns the one that the picker is to read."""
        for name, text in self.one("ConfigMap", "-epp")["data"].items():
            (folder / name).write_text(text)
        return folder / self.flags.config_file.removeprefix("/config/")


@functools.cache
def render(*values: str, name: str = "llm", namespace: str = "models") -> Rendered:
    """What `helm template` makes of these values.

    Raises:
        Refused: it does not like them.
    """
    sets = (word for value in values for word in ("--set", value))
    version = tools.version("kube")
    text = helm("template", name, str(CHART), "--namespace", namespace, "--kube-version", version, *sets)
    return Rendered([each for each in yaml.safe_load_all(text) if each is not None])


def helm(*words: str, kubeconfig: Path | None = None) -> str:
    """Run helm; returns what it says.

    Raises:
        Refused: it fails.
    """
    program = tools.binary("helm")
    assert program is not None
    environment = {"HOME": "/nowhere", "PATH": "/nowhere", "KUBECONFIG": str(kubeconfig or "")}
    done = subprocess.run([program, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(done.stderr)
    return done.stdout
