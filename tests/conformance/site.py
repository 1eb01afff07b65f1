"""The conformance suite's base deployment without a cluster: pools in a real API server, a picker for each, one Envoy.

In: an API server, a folder. Out: gateways by name, echo servers that say who they are.
- Pods are objects whose addresses are of loopback; an echo server listens on each port of each.
- Pickers are started with the flags of the suite's manifests and the configuration of its full picker, over TLS, as an
  account with the suite's one role: pods and pools, and nothing else.
- Gateways, by name: primary, secondary, dp, http, h2c (each over its pool); also-primary (a second one over the same
  pool); rules (one listener: /primary, /secondary and a weighted route, each asking its pool's own picker); closed
  (whose picker is not there); open and open-buffered (that go on without one: the picker of their own may be stopped).
Rules here: what a Gateway's controller writes into statuses is not tested: there is none.
Source: Gateway API Inference Extension, conformance/ (v1.6).
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

import msgspec
from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap
from envoy_data_plane.envoy.config.core.v3 import GrpcService, GrpcServiceEnvoyGrpc
from envoy_data_plane.envoy.config.route.v3 import (
    Route,
    RouteAction,
    RouteMatch,
    WeightedCluster,
    WeightedClusterClusterWeight,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    ExtProcOverrides,
    ExtProcPerRoute,
)
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
from envoy_data_plane.google.protobuf import Any

from epp.demo import envoy
from epp.demo.child import child, free_ports
from epp.demo.envoy import Envoy, Gateway
from tests.conformance.conftest import Cluster
from tests.conformance.hermetic import ready
from tests.conformance.objects import Namespace
from tests.e2e import client, serving
from tests.e2e.client import Got
from tests.e2e.upstream import Answer, Seen, Upstream
from tests.kube.apiserver import EPP
from tests.kube.client import ROLE_BINDINGS, ROLES

CONFIG: Final = """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: header-based-testing-filter
- type: destination-endpoint-served-verifier
schedulingProfiles:
- name: conformance-profile
  plugins:
  - pluginRef: header-based-testing-filter
"""
PODS: Final = 3
WEIGHTS: Final = {"primary": 70, "secondary": 30}
SERVICE: Final = "inference-extension"
"""What the suite's probes ask the health service for."""


class Deployment(msgspec.Struct, frozen=True):
    """Three pods, which all listen on the same ports."""

    name: str
    ports: tuple[int, ...]
    network: int
    """Addresses are 127.0.<network>.<pod + 1>."""

    def ip(self, pod: int) -> str:
        return f"127.0.{self.network}.{pod + 1}"

    def pod(self, pod: int) -> str:
        return f"{self.name}-inference-model-server-deployment-{pod}"

    def addresses(self, *ports: int) -> list[str]:
        return [f"{self.ip(pod)}:{port}" for pod in range(PODS) for port in ports or self.ports]


class Site:
    def __init__(self, deployments: dict[str, Deployment], gateway: Envoy, doomed: serving.Picker) -> None:
        self.deployments = deployments
        self.envoy = gateway
        self.doomed = doomed
        """The picker of the gateways that go on without one."""

    async def ask(self, gateway: str, path: str, *named: str, get: bool = False) -> Got:
        """The suite's request; `named`: what the header that chooses endpoints says."""
        lines = [f"test-epp-endpoint-selection: {','.join(named)}"] if named else []
        if get:
            raw = "\r\n".join((f"GET {path} HTTP/1.1", "host: conformance.example.com", *lines, "", "")).encode()
        else:
            raw = client.post(path, b'{"model":"conformance-fake-model","prompt":"Write a poem"}', *lines)
        return await client.send(self.envoy.ports[gateway], raw)


def who(got: Got) -> tuple[str, int, str]:
    """Name of the pod that answered, its port, and the version of HTTP that it was asked in."""
    assert got.status == 200, got
    said = json.loads(got.body)
    return said["pod"], said["port"], said["version"]


def _echo(pod: str, port: int) -> Callable[[Seen], Answer]:
    def answer(seen: Seen) -> Answer:
        said = {"pod": pod, "port": port, "version": seen.version, "path": seen.path}
        return Answer(steps=(json.dumps(said).encode(),))

    return answer


@asynccontextmanager
async def site(cluster: Cluster, folder: Path) -> AsyncIterator[Site]:
    """Run it all, with every picker serving."""
    http, h2c, *ranks = free_ports(5)
    deployments = {
        "primary": Deployment("primary", (http,), 80),
        "secondary": Deployment("secondary", (http,), 81),
        "dp": Deployment("dp", tuple(ranks), 82),
        "appprotocol": Deployment("appprotocol", (http, h2c), 83),
    }
    namespace = await cluster.namespace()
    await _allow(namespace)
    async with AsyncExitStack() as stack:
        for deployment in deployments.values():
            await _deploy(namespace, deployment, stack)
        pools = {
            "primary": "primary",
            "secondary": "secondary",
            "dp": "dp",
            "http": "appprotocol",
            "h2c": "appprotocol",
        }
        ports = {"http": (http,), "h2c": (h2c,)}
        for pool, name in pools.items():
            chosen = ports.get(pool, deployments[name].ports)
            await namespace.pool(*chosen, name=f"{pool}-inference-pool", app=name)
            envoy.write_endpoints(folder / f"{pool}.json", deployments[name].addresses(*chosen))
        starting = [(pool, await _start(cluster, namespace, folder, pool, stack)) for pool in pools]
        for _, picker in starting:
            await ready(picker, SERVICE)
        doomed = await _start(cluster, namespace, folder, "secondary", stack, name="doomed")
        await ready(doomed, SERVICE)
        config = _configure(folder, dict(starting), doomed)
        running = await stack.enter_async_context(envoy.running(config, folder))
        yield Site(deployments, running, doomed)


async def _allow(namespace: Namespace) -> None:
    """The suite's role: inference-model-reader."""
    read = ["get", "list", "watch"]
    rules = [
        {"apiGroups": ["inference.networking.k8s.io"], "resources": ["inferencepools"], "verbs": read},
        {"apiGroups": [""], "resources": ["pods"], "verbs": read},
    ]
    metadata = {"namespace": namespace.name, "name": "inference-model-reader"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "inference-model-reader"}
    subject = {"kind": "ServiceAccount", "name": EPP, "namespace": "default"}
    await namespace.admin.create(ROLES, {"metadata": metadata, "rules": rules})
    await namespace.admin.create(ROLE_BINDINGS, {"metadata": metadata, "roleRef": role, "subjects": [subject]})


async def _deploy(namespace: Namespace, deployment: Deployment, stack: AsyncExitStack) -> None:
    for pod in range(PODS):
        await namespace.pod(deployment.pod(pod), deployment.ip(pod), app=deployment.name)
        for port in deployment.ports:
            server = Upstream(deployment.ip(pod))
            server.address = f"{deployment.ip(pod)}:{port}"
            server.answer = _echo(deployment.pod(pod), port)
            await server.listen()
            stack.push_async_callback(server.close)


async def _start(
    cluster: Cluster, namespace: Namespace, folder: Path, pool: str, stack: AsyncExitStack, name: str = ""
) -> serving.Picker:
    """A picker with the flags of the suite's manifests, and a configuration."""
    config = folder / "conformance-plugins.yaml"
    config.write_text(CONFIG)
    grpc, health, metrics = free_ports(3)
    flags: tuple[str, ...]
    flags = ("--pool-name", f"{pool}-inference-pool", "--pool-namespace", namespace.name, "--grpc-port", str(grpc))
    flags = (*flags, "--grpc-health-port", str(health), "--metrics-port", str(metrics), "--config-file", str(config))
    command = (sys.executable, "-m", "epp", "serve", *flags, "--drain-timeout", "100ms")
    environment = {"KUBECONFIG": str(cluster.server.kubeconfig(EPP, namespace.name))}
    name = name or f"{pool}-endpoint-picker"
    process = await stack.enter_async_context(child(name, *command, folder=folder, env=environment))
    return serving.Picker(process, grpc, health, metrics)


# -- Envoy -------------------------------------------------------------------------------------------------------------


def _configure(folder: Path, pickers: dict[str, serving.Picker], doomed: serving.Picker) -> Bootstrap:
    asked = {name: envoy.Picker(address=picker.address, tls=True) for name, picker in pickers.items()}
    nobody = envoy.Picker(address=f"127.0.0.1:{free_ports(1)[0]}", tls=True)
    without = envoy.Picker(address=doomed.address, tls=True)
    buffered = msgspec.structs.replace(without, request_body="BUFFERED")

    def gateway(name: str, pool: str, picker: envoy.Picker, *, h2c: bool = False) -> Gateway:
        return Gateway(name=name, endpoints=folder / f"{pool}.json", picker=picker, h2c=h2c)

    config = envoy.bootstrap([
        *(gateway(name, name, asked[name], h2c=name == "h2c") for name in asked),
        gateway("also-primary", "primary", asked["primary"]),
        gateway("rules", "primary", asked["primary"]),
        gateway("closed", "primary", nobody),
        gateway("open", "secondary", without),
        gateway("open-buffered", "secondary", buffered),
    ])  # fmt: skip
    _change(config, "rules", lambda manager: _rules(manager, asked))
    for name in ("open", "open-buffered"):
        _change(config, name, _go_on_without)
    return config


def _change(config: Bootstrap, name: str, change: Callable[[HttpConnectionManager], None]) -> None:
    assert config.static_resources is not None
    (listener,) = (each for each in config.static_resources.listeners if each.name == name)
    network = listener.filter_chains[0].filters[0]
    assert network.typed_config is not None
    manager = network.typed_config.unpack()
    assert isinstance(manager, HttpConnectionManager)
    change(manager)
    network.typed_config = Any.pack(manager)


def _go_on_without(manager: HttpConnectionManager) -> None:
    """failureMode: FailOpen."""
    ask = manager.http_filters[0]
    assert ask.typed_config is not None
    filter_ = ask.typed_config.unpack()
    assert isinstance(filter_, ExternalProcessor)
    filter_.failure_mode_allow = True
    ask.typed_config = Any.pack(filter_)


def _rules(manager: HttpConnectionManager, asked: dict[str, envoy.Picker]) -> None:
    """Routes whose pools have pickers of their own."""
    assert manager.route_config is not None
    routes = manager.route_config.virtual_hosts[0].routes
    (pattern,) = routes
    weighted = [
        WeightedClusterClusterWeight(name=pool, weight=weight, typed_per_filter_config=_ask(asked[pool]))
        for pool, weight in WEIGHTS.items()
    ]
    routes[:] = [
        _route(pattern, "/weighted-two-pools-test", RouteAction(weighted_clusters=WeightedCluster(clusters=weighted))),
        *(_route(pattern, f"/{pool}", RouteAction(cluster=pool), asked[pool]) for pool in WEIGHTS),
    ]


def _route(pattern: Route, path: str, action: RouteAction, picker: envoy.Picker | None = None) -> Route:
    assert pattern.route is not None
    action.timeout, action.retry_policy = timedelta(0), pattern.route.retry_policy
    return Route(
        match=RouteMatch(prefix=path),
        request_body_buffer_limit=pattern.request_body_buffer_limit,
        route=action,
        typed_per_filter_config={} if picker is None else _ask(picker),
    )


def _ask(picker: envoy.Picker) -> dict[str, Any]:
    service = GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=f"picker-{picker.address}"))
    return {"picker": Any.pack(ExtProcPerRoute(overrides=ExtProcOverrides(grpc_service=service)))}


def shares(pods: Sequence[str], deployment: Deployment) -> float:
    """Which share of the answers came from a deployment."""
    return sum(pod.startswith(f"{deployment.name}-") for pod in pods) / len(pods)
