"""envoy.service.endpoint.v3: the pool's endpoints, told to Envoy by the picker itself.

In: the table's list of endpoints, and what Envoys ask. Out: each Envoy's hosts, again whenever they change.
Rules here:
- Whatever name is asked for gets the pool's endpoints: a picker has one pool, and its name in Envoy is Envoy's matter.
- Every listed endpoint is told, all ranks, in plain: no health, no weight, no priority. Who may serve is the decision's
  matter, and Envoy uses a named host whatever its health says.
- One that is off the list is gone from the next response. Envoy finishes what runs there, and skips its name in lists
  that were decided before.
- An empty pool is told only once there was an endpoint: until then discovery may not have come back yet, and an Envoy
  that knew another picker keeps the hosts it has.
- One response is on its way at a time; what changes meanwhile goes out when it is answered, and only what lasts. So an
  Envoy that does not read holds one response, and a rollout of 1,000 pods is no 1,000 responses.
- A message that answers the last response and asks for nothing new is not answered. A rejection is told to the
  operator, and the next response is the next change.
While an Envoy asks, the table is looked at once in LOOK seconds: a comparison of two references. Rejected: a callback
of the table, which needs a timer all the same to say 1,000 changes once; Delta: 1,000 endpoints are 23 KB.
Source: Envoy's xDS protocol, "State of the World"; envoy/service/discovery/v3/discovery.proto.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from epp.endpoints.table import EndpointTable, Slots
from epp.errors import ProtocolError
from epp.pb.eds_pb2 import (
    Address,
    ClusterLoadAssignment,
    DiscoveryRequest,
    DiscoveryResponse,
    Endpoint,
    LbEndpoint,
    LocalityLbEndpoints,
    SocketAddress,
)
from epp.telemetry.log import Problems

STREAM: Final = "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints"
TYPE: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
LOOK: Final = 0.1
"""Seconds between two looks at the table. For so long a decision may name an endpoint that Envoy does not know yet, and
Envoy takes the next of the list: it serves nothing before, and is not blamed for that (`epp.endpoints.ejection`)."""
MOST_NAMES: Final = 64
"""Names that one stream may ask for; each is another copy of the pool."""
LONGEST_NAME: Final = 1024
"""Characters."""

Push = Callable[[bytes], None]


class Eds:
    """The pool as Envoy is told it, and the service that tells it, for any transport and for as many as needed."""

    def __init__(self, table: EndpointTable, problems: Problems) -> None:
        self.version = 0
        """Counts the changes; 0: there was no endpoint yet."""
        self.streams: set[Stream] = set()
        self._table = table
        self._problems = problems
        self._listed: Slots | None = None
        """The table's list as it was seen last."""
        self._addresses: tuple[str, ...] = ()
        self._endpoints: list[LocalityLbEndpoints] = []
        self._asked = asyncio.Event()
        """There is a stream."""

    def __repr__(self) -> str:
        return f"<Eds version={self.version} [Endpoints: {len(self._addresses)} | Streams: {len(self.streams)}]>"

    def methods(self) -> Mapping[str, Callable[[object, Push, float], Stream]]:
        return {STREAM: lambda peer, push, now: Stream(self, push)}

    async def run(self) -> None:
        """Follow the table, for ever; while nobody asks it costs nothing."""
        while True:
            await self._asked.wait()
            await asyncio.sleep(LOOK)
            self.look()

    def opened(self, stream: Stream) -> None:
        """It is told changes from now on."""
        self.streams.add(stream)
        self._asked.set()

    def left(self, stream: Stream) -> None:
        self.streams.discard(stream)
        if not self.streams:
            self._asked.clear()

    def look(self) -> None:
        """Tell every stream if other addresses are listed than at the last look."""
        listed = self._table.listed
        if listed is self._listed:
            return
        self._listed = listed
        addresses = tuple(self._table.endpoint(slot).address for slot in listed.tolist())
        if addresses == self._addresses:  # other labels
            return
        self._addresses = addresses
        self._endpoints = [LocalityLbEndpoints(lb_endpoints=map(host, addresses))] if addresses else []
        self.version += 1
        for stream in tuple(self.streams):
            stream.tell()

    def response(self, names: tuple[str, ...], nonce: str) -> bytes:
        """A DiscoveryResponse with the pool under each name."""
        assignments = (ClusterLoadAssignment(cluster_name=name, endpoints=self._endpoints) for name in names)
        resources = [Any(type_url=TYPE, value=assignment.SerializeToString()) for assignment in assignments]
        version = str(self.version)
        return DiscoveryResponse(
            version_info=version, resources=resources, type_url=TYPE, nonce=nonce
        ).SerializeToString()

    def rejected(self, node: str, request: DiscoveryRequest) -> None:
        """An Envoy did not take what it was told."""
        self._problems.tell(
            f"eds {node}",
            "Envoy %r does not take the pool's endpoints for %s and stays with version %r: %s",
            node,
            ", ".join(request.resource_names),
            request.version_info,
            request.error_detail.message,
        )


class Stream:
    """One Envoy's call, from its first question until it leaves."""

    ends_with_peer = True
    closed = False

    def __init__(self, eds: Eds, push: Push) -> None:
        self._eds = eds
        self._push = push
        self._node = ""
        self._names: tuple[str, ...] = ()
        self._nonce = 0
        """Of the last response; 0: there was none."""
        self._version = 0
        """Of the last response."""
        self._unanswered = False
        """The last response was neither taken nor rejected yet."""
        eds.opened(self)

    def receive(self, message: bytes, now: float) -> list[bytes]:
        """Raises ProtocolError."""
        request = read(message)
        self._eds.look()
        if self._nonce and request.response_nonce not in ("", str(self._nonce)):
            return []  # a newer response is on its way, and will be answered with what is asked for by then
        self._node = request.node.id[:LONGEST_NAME] or self._node
        names = tuple(dict.fromkeys(request.resource_names))
        asks = not self._settles(request) or not set(names) <= set(self._names)
        self._names = names
        if not names or not self._eds.version:
            return []
        return [self._response()] if asks or self._is_behind() else []

    def tell(self) -> None:
        """The pool has changed."""
        if self._names and not self._unanswered and self._is_behind():
            self._push(self._response())

    def next_deadline(self) -> None:
        return None

    def tick(self, now: float) -> list[bytes]:
        return []

    def lose(self, now: float) -> None:
        self._eds.left(self)

    def _settles(self, request: DiscoveryRequest) -> bool:
        """It is the first to answer the last response: takes or rejects it."""
        if not self._unanswered or request.response_nonce != str(self._nonce):
            return False
        self._unanswered = False
        if request.HasField("error_detail"):
            self._eds.rejected(self._node, request)
        return True

    def _is_behind(self) -> bool:
        return self._version != self._eds.version

    def _response(self) -> bytes:
        self._nonce += 1
        self._version = self._eds.version
        self._unanswered = True
        return self._eds.response(self._names, str(self._nonce))


def read(message: bytes) -> DiscoveryRequest:
    """Raises ProtocolError."""
    try:
        request = DiscoveryRequest.FromString(message)
    except DecodeError:
        raise ProtocolError("not a DiscoveryRequest") from None
    if request.type_url not in ("", TYPE):
        raise ProtocolError(f"{request.type_url[:200]} is asked for; this service has {TYPE} only")
    names = request.resource_names
    if len(names) > MOST_NAMES or any(len(name) > LONGEST_NAME for name in names):
        raise ProtocolError(f"a stream may ask for {MOST_NAMES} names of {LONGEST_NAME} characters each")
    return request


def host(address: str) -> LbEndpoint:
    """An endpoint of the table, "ip:port", in Envoy's words."""
    ip, _, port = address.rpartition(":")
    socket = SocketAddress(address=ip.strip("[]"), port_value=int(port))
    return LbEndpoint(endpoint=Endpoint(address=Address(socket_address=socket)))
