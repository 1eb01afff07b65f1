"""What users of a cluster write: pools, pods, objectives, rewrites, models, each in the group and version asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tests.kube.client import MODELS, OLD_POOLS, PODS, POOLS, Client, Object, Resource

APP: Final = "vllm-llama3-8b-instruct-pool"
"""Label of the pods, as the reference's fixtures have it."""
POOL: Final = "vllm-llama3-8b-instruct-pool"


class Namespace:
    """One namespace, and who may write there."""

    def __init__(self, admin: Client, name: str) -> None:
        self.admin = admin
        self.name = name

    async def pool(self, *ports: int, name: str = POOL, app: str = APP) -> None:
        await self._create(POOLS, "InferencePool", name, {
            "selector": {"matchLabels": {"app": app}},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": "epp", "port": {"number": 9002}},
        })  # fmt: skip

    async def older_pool(self, port: int) -> None:
        spec = {"selector": {"app": APP}, "targetPortNumber": port, "extensionRef": {"name": "epp"}}
        await self._create(OLD_POOLS, "InferencePool", POOL, spec)

    async def pod(
        self, name: str, ip: str, *, app: str = APP, node: str = "", annotations: Mapping[str, str] | None = None
    ) -> None:
        """A pod that is ready. On a node it has a kubelet's grace when it is deleted."""
        metadata = {"namespace": self.name, "name": name, "labels": {"app": app}, "annotations": annotations or {}}
        spec = {"containers": [{"name": "vllm", "image": "vllm"}], **({"nodeName": node} if node else {})}
        await self.admin.create(PODS, {"metadata": metadata, "spec": spec})
        await self.be_ready(name, ip)

    async def be_ready(self, name: str, ip: str, status: str = "True") -> None:
        told = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": status}],
        }
        await self.admin.patch_status(PODS, name, told, self.name)

    async def objective(self, resource: Resource, name: str, priority: int | None, pool: str = POOL) -> None:
        spec: Object = {"poolRef": {"name": pool}}
        if priority is not None:
            spec["priority"] = priority
        await self._create(resource, "InferenceObjective", name, spec)

    async def rewrite(self, resource: Resource, name: str, rules: Sequence[Object]) -> None:
        spec = {"poolRef": {"name": POOL}, "rules": list(rules)}
        await self._create(resource, "InferenceModelRewrite", name, spec)

    async def model(self, name: str, model: str, criticality: str | None, targets: Mapping[str, int | None]) -> None:
        """An InferenceModel. A target's weight of None is left out."""
        spec: Object = {"modelName": model, "poolRef": {"name": POOL}}
        if criticality is not None:
            spec["criticality"] = criticality
        if targets:
            spec["targetModels"] = [
                {"name": target} if weight is None else {"name": target, "weight": weight}
                for target, weight in targets.items()
            ]
        await self._create(MODELS, "InferenceModel", name, spec)

    async def _create(self, resource: Resource, kind: str, name: str, spec: Object) -> None:
        metadata = {"namespace": self.name, "name": name}
        await self.admin.create(
            resource, {"apiVersion": resource.version, "kind": kind, "metadata": metadata, "spec": spec}
        )


def rule(target: str, *models: str, weight: int | None = None) -> Object:
    """A rule of a rewrite; no models: it matches all."""
    to: Object = {"modelRewrite": target} if weight is None else {"modelRewrite": target, "weight": weight}
    return {"matches": [{"model": {"value": model}} for model in models], "targets": [to]}
