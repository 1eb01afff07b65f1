"""Objects as the API server sends them, with no more in them than the test needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]
NAMESPACE = "prod"
LABELS = {"app": "vllm"}


def meta(name: str, created: str = "2026-01-01T00:00:00Z", **more: object) -> Json:
    return {"namespace": NAMESPACE, "name": name, "creationTimestamp": created, **more}


def pool(name: str = "pool", ports: Sequence[int] = (8000,), labels: Mapping[str, str] = LABELS) -> Json:
    spec = {"selector": {"matchLabels": dict(labels)}, "targetPorts": [{"number": port} for port in ports]}
    return {"apiVersion": "inference.networking.k8s.io/v1", "metadata": meta(name), "spec": spec}


def legacy_pool(name: str = "pool", port: int = 8000, labels: Mapping[str, str] = LABELS) -> Json:
    spec = {"selector": dict(labels), "targetPortNumber": port, "extensionRef": {"name": "epp"}}
    return {"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "metadata": meta(name), "spec": spec}


def pod(
    name: str,
    ip: str | None = "10.0.0.1",
    *,
    labels: Mapping[str, str] = LABELS,
    ready: str = "True",
    declared: Sequence[int] = (),
    created: str = "2026-01-01T00:00:00Z",
    **more: object,
) -> Json:
    """A pod. `more` goes into its metadata."""
    ports = [{"containerPort": port, "protocol": "TCP"} for port in declared]
    return {
        "metadata": meta(name, created, labels=dict(labels), **more),
        "spec": {"containers": [{"name": "server", "ports": ports}], "nodeName": "node"},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}],
        },
    }


def ref(name: str = "pool", group: str = "inference.networking.k8s.io", kind: str = "InferencePool") -> Json:
    return {"name": name, "group": group, "kind": kind}


def objective(name: str, priority: int | None = None, pool: str = "pool", **more: Any) -> Json:
    spec = {"poolRef": ref(pool)} if priority is None else {"poolRef": ref(pool), "priority": priority}
    return {"metadata": meta(name, **more), "spec": spec}


def rule(models: Sequence[str], **targets: int | None) -> Json:
    """A rule for these models (none: all), and its targets with their weights."""
    matches = [{"model": {"type": "Exact", "value": model}} for model in models]
    entries = [
        {"modelRewrite": target} if weight is None else {"modelRewrite": target, "weight": weight}
        for target, weight in targets.items()
    ]
    return {"matches": matches, "targets": entries}


def rewrite(name: str, *rules: Json, pool: str = "pool", created: str = "2026-01-01T00:00:00Z", **more: Any) -> Json:
    return {"metadata": meta(name, created, **more), "spec": {"poolRef": ref(pool), "rules": list(rules)}}


def model(
    name: str,
    model_name: str,
    criticality: str | None = None,
    pool: str = "pool",
    created: str = "2026-01-01T00:00:00Z",
    targets: Mapping[str, int | None] | None = None,
) -> Json:
    spec: Json = {"modelName": model_name, "poolRef": ref(pool, "inference.networking.x-k8s.io")}
    if criticality is not None:
        spec["criticality"] = criticality
    if targets is not None:
        spec["targetModels"] = [
            {"name": target} if weight is None else {"name": target, "weight": weight}
            for target, weight in targets.items()
        ]
    return {"metadata": meta(name, created), "spec": spec}
