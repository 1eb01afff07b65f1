"""Endpoint discovery, message by message, written and read with Envoy's own messages (xds-protos)."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2 as xds
from google.protobuf.any_pb2 import Any
from grpc import StatusCode, aio
from hypothesis import given
from hypothesis import strategies as st

from epp.endpoints.table import Endpoint, EndpointTable
from epp.errors import ProtocolError
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.wire import WireTransport
from epp.telemetry.eds import LONGEST_NAME, MOST_NAMES, STREAM, Eds, Stream, read
from epp.telemetry.log import Problems

TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
A, B, C = "10.0.0.1:8000", "10.0.0.1:8001", "[2001:db8::2]:8000"


class Told:
    """A DiscoveryResponse, read."""

    def __init__(self, message: bytes) -> None:
        response = xds.DiscoveryResponse.FromString(message)
        assert response.type_url == TYPE
        self.version = int(response.version_info)
        self.nonce: str = response.nonce
        self.hosts = dict(map(assignment, response.resources))
        """Addresses by the name that was asked for."""
        assert len(self.hosts) == len(response.resources)


def assignment(resource: Any) -> tuple[str, list[str]]:
    told = endpoint_pb2.ClusterLoadAssignment()
    assert resource.Unpack(told)
    places = [place.endpoint.address.socket_address for each in told.endpoints for place in each.lb_endpoints]
    return told.cluster_name, [
        f"[{place.address}]:{place.port_value}" if ":" in place.address else f"{place.address}:{place.port_value}"
        for place in places
    ]


def ask(*names: str, nonce: str = "", error: str | None = None, type_url: str = TYPE) -> bytes:
    """A DiscoveryRequest: a question without `nonce`, else the answer to that response."""
    node = base_pb2.Node(id="gateway", cluster="gateway", user_agent_name="envoy")
    request = xds.DiscoveryRequest(
        node=node, resource_names=names, type_url=type_url, response_nonce=nonce, version_info="6"
    )
    if error is not None:
        request.error_detail.code, request.error_detail.message = 13, error
    message: bytes = request.SerializeToString()
    return message


class Site:
    """A table, the service over it, and one stream."""

    def __init__(self, *addresses: str) -> None:
        self.log = io.StringIO()
        logger = logging.getLogger("epp.test.eds")
        logger.handlers, logger.propagate = [logging.StreamHandler(self.log)], False
        self.table = EndpointTable()
        self.eds = Eds(self.table, Problems(logger, lambda: 0.0))
        self.pushed: list[bytes] = []
        self.stream = self.open()
        self.discover(*addresses)

    def open(self) -> Stream:
        return self.eds.methods()[STREAM](None, self.pushed.append, 0.0)

    def discover(self, *addresses: str) -> None:
        """Discovery lists these now."""
        self.table.replace([Endpoint(f"default/{address}", address) for address in addresses], now=0.0)

    def receive(self, message: bytes) -> list[Told]:
        """What is said at once, pushed or replied."""
        replies = self.stream.receive(message, 0.0)
        return [*self.take(), *map(Told, replies)]

    def look(self) -> list[Told]:
        self.eds.look()
        return self.take()

    def take(self) -> list[Told]:
        taken, self.pushed[:] = [Told(message) for message in self.pushed], []
        return taken


def test_a_question_is_answered_with_every_endpoint_under_the_name_asked_for() -> None:
    (told,) = Site(A, B, C).receive(ask("pool"))
    assert told.hosts == {"pool": [A, B, C]}
    assert (told.version, told.nonce) == (1, "1")


def test_whatever_name_and_however_many_are_asked_for_get_the_pool() -> None:
    (told,) = Site(A).receive(ask("outbound|8000||pool.default", "b", "b"))
    assert told.hosts == {"outbound|8000||pool.default": [A], "b": [A]}


def test_a_response_that_was_taken_is_not_sent_again() -> None:
    site = Site(A)
    (told,) = site.receive(ask("pool"))
    assert site.receive(ask("pool", nonce=told.nonce)) == []
    assert site.look() == []


def test_a_change_is_pushed_with_the_next_version_and_nonce() -> None:
    site = Site(A)
    (told,) = site.receive(ask("pool"))
    site.receive(ask("pool", nonce=told.nonce))
    site.discover(A, B)
    (pushed,) = site.look()
    assert (pushed.hosts, pushed.version, pushed.nonce) == ({"pool": [A, B]}, 2, "2")


def test_many_changes_between_two_looks_are_one_response() -> None:
    site = Site(A)
    site.receive(ask("pool", nonce=site.receive(ask("pool"))[0].nonce))
    for port in range(8001, 8101):
        site.table.put(Endpoint(f"default/{port}", f"10.0.0.1:{port}"), now=0.0)
    (pushed,) = site.look()
    assert len(pushed.hosts["pool"]) == 101


def test_other_labels_of_the_same_endpoints_are_no_change() -> None:
    site = Site(A)
    site.receive(ask("pool", nonce=site.receive(ask("pool"))[0].nonce))
    site.table.replace([Endpoint(f"default/{A}", A, {"role": "decode"})], now=0.0)
    assert site.look() == []


def test_an_endpoint_that_left_is_gone_though_requests_run_on_it() -> None:
    site = Site(A, B)
    site.receive(ask("pool", nonce=site.receive(ask("pool"))[0].nonce))
    slot = site.table.slot_at(A)
    assert slot is not None
    site.table.admit(slot)
    site.discover(B)
    assert [told.hosts for told in site.look()] == [{"pool": [B]}]


def test_the_last_endpoint_that_left_leaves_an_empty_pool() -> None:
    site = Site(A)
    site.receive(ask("pool", nonce=site.receive(ask("pool"))[0].nonce))
    site.discover()
    assert [told.hosts for told in site.look()] == [{"pool": []}]


def test_before_there_was_any_endpoint_nothing_is_told() -> None:
    """An Envoy that comes from another picker keeps the hosts that it has while this one's discovery begins."""
    site = Site()
    assert site.receive(ask("pool")) == []
    assert site.receive(ask("pool")) == []
    assert site.look() == []
    site.discover(A)
    assert [told.hosts for told in site.look()] == [{"pool": [A]}]


def test_what_changes_while_a_response_is_unanswered_is_sent_once_it_is_answered() -> None:
    site = Site(A)
    (told,) = site.receive(ask("pool"))
    site.discover(A, B)
    assert site.look() == []
    site.discover(B, C)
    assert [told.hosts for told in site.receive(ask("pool", nonce=told.nonce))] == [{"pool": [B, C]}]


def test_a_rejection_is_told_to_the_operator_and_not_answered_until_something_changes() -> None:
    site = Site(A)
    (told,) = site.receive(ask("pool"))
    assert site.receive(ask("pool", nonce=told.nonce, error="malformed IP address")) == []
    assert site.log.getvalue() == (
        "Envoy 'gateway' does not take the pool's endpoints for pool and stays with version '6': malformed IP address\n"
    )
    assert site.look() == []
    site.discover(B)
    assert [told.hosts for told in site.look()] == [{"pool": [B]}]


def test_a_rejection_of_what_is_not_the_pool_any_more_is_answered_with_what_is() -> None:
    site = Site(A)
    (told,) = site.receive(ask("pool"))
    site.discover(B)
    assert [told.hosts for told in site.receive(ask("pool", nonce=told.nonce, error="no"))] == [{"pool": [B]}]


def test_an_answer_to_an_older_response_is_ignored() -> None:
    site = Site(A)
    (first,) = site.receive(ask("pool"))
    (second,) = site.receive(ask("pool"))
    site.discover(B)
    assert site.receive(ask("pool", nonce=first.nonce, error="no")) == []
    assert site.log.getvalue() == ""
    assert [told.hosts for told in site.receive(ask("pool", nonce=second.nonce))] == [{"pool": [B]}]


def test_a_name_that_is_added_in_an_answer_is_answered() -> None:
    site = Site(A)
    (told,) = site.receive(ask("a"))
    assert [told.hosts for told in site.receive(ask("a", "b", nonce=told.nonce))] == [{"a": [A], "b": [A]}]


def test_a_name_that_is_left_out_is_not_answered_and_not_told_again() -> None:
    site = Site(A)
    (told,) = site.receive(ask("a", "b"))
    assert site.receive(ask("b", nonce=told.nonce)) == []
    site.discover(B)
    assert [told.hosts for told in site.look()] == [{"b": [B]}]


def test_who_asks_for_no_name_is_told_nothing() -> None:
    site = Site(A)
    (told,) = site.receive(ask("a"))
    assert site.receive(ask(nonce=told.nonce)) == []
    site.discover(B)
    assert site.look() == []


def test_the_same_question_asked_again_is_answered_again() -> None:
    """Envoy subscribes anew under the last nonce when a cluster of the same name is made anew, and waits."""
    site = Site(A)
    (told,) = site.receive(ask("pool"))
    assert site.receive(ask("pool", nonce=told.nonce)) == []
    assert [told.hosts for told in site.receive(ask("pool", nonce=told.nonce))] == [{"pool": [A]}]


def test_who_connects_again_is_told_the_pool_at_once() -> None:
    site = Site(A)
    site.receive(ask("pool"))
    site.stream.lose(0.0)
    site.discover(B)
    site.stream = site.open()
    (told,) = site.receive(ask("pool"))
    assert (told.hosts, told.version, told.nonce) == ({"pool": [B]}, 2, "1")


def test_every_stream_is_told_and_one_that_is_lost_is_forgotten() -> None:
    site = Site(A)
    other = site.open()
    for stream in (site.stream, other):
        (reply,) = stream.receive(ask("pool"), 0.0)
        stream.receive(ask("pool", nonce=Told(reply).nonce), 0.0)
    site.discover(B)
    assert [told.hosts for told in site.look()] == [{"pool": [B]}] * 2
    other.lose(0.0)
    other.lose(0.0)
    assert site.eds.streams == {site.stream}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\xff\xff", "not a DiscoveryRequest"),
        (ask("a", type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster"), "v3.ClusterLoadAssignment only"),
        (ask(*map(str, range(MOST_NAMES + 1))), "may ask for 64 names"),
        (ask("n" * (LONGEST_NAME + 1)), "of 1024 characters"),
    ],
)
def test_what_cannot_be_asked_is_said(message: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Site(A).receive(message)


def test_the_bounds_themselves_may_be_asked_for() -> None:
    names = ["n" * LONGEST_NAME, *map(str, range(MOST_NAMES - 1))]
    (told,) = Site(A).receive(ask(*names, type_url=""))
    assert list(told.hosts) == names


def test_fields_that_we_leave_out_are_skipped_and_those_that_we_read_are_envoys() -> None:
    request = read(ask("a", "b", nonce="3", error="no"))
    assert list(request.resource_names) == ["a", "b"]
    assert (request.node.id, request.type_url, request.response_nonce) == ("gateway", TYPE, "3")
    assert (request.version_info, request.error_detail.message) == ("6", "no")


LISTS = st.lists(st.sampled_from([A, B, C, "10.0.0.4:8000"]), unique=True).map(tuple)
STEPS = st.lists(st.one_of(LISTS, st.sampled_from(["look", "take", "reject", "late", "ask", "again"])), max_size=30)


def step(site: Site, heard: list[Told], what: tuple[str, ...] | str) -> None:
    """One thing that happens; what Envoy hears of it is added to `heard`."""
    nonces = [told.nonce for told in heard]
    match what:
        case tuple():
            site.discover(*what)
        case "take" if nonces:
            heard += site.receive(ask("pool", nonce=nonces[-1]))
        case "reject" if nonces:
            heard += site.receive(ask("pool", nonce=nonces[-1], error="no"))
        case "late" if len(nonces) > 1:
            heard += site.receive(ask("pool", nonce=nonces[-2]))
        case "ask":
            heard += site.receive(ask("pool"))
        case "again":
            site.stream.lose(0.0)
            site.stream = site.open()
            heard[:] = site.receive(ask("pool"))
        case _:
            heard += site.look()


@given(STEPS)
def test_whatever_happens_the_last_response_is_the_pool_once_the_one_before_is_answered(
    steps: Sequence[tuple[str, ...] | str],
) -> None:
    site, heard = Site(), list[Told]()
    for what in ("ask", *steps):
        step(site, heard, what)
        assert [told.nonce for told in heard] == [str(at) for at in range(1, len(heard) + 1)]
        assert sorted(told.version for told in heard) == [told.version for told in heard]
    for what in ("look", "take", "take"):
        step(site, heard, what)
    listed = [site.table.endpoint(slot).address for slot in site.table.listed.tolist()]
    assert (heard[-1].hosts["pool"] if heard else []) == listed


@given(STEPS, st.lists(LISTS, max_size=5))
def test_however_much_changes_one_response_at_most_waits_to_be_answered(
    steps: Sequence[tuple[str, ...] | str], lists: Sequence[tuple[str, ...]]
) -> None:
    site, heard = Site(), list[Told]()
    for what in ("ask", *steps):
        step(site, heard, what)
    before = len(heard)
    for what in lists:
        step(site, heard, what)
        step(site, heard, "look")
    assert len(heard) <= before + 1


class Client:
    """One stream to a real port."""

    def __init__(self, call: aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def say(self, message: bytes) -> None:
        await self._call.write(message)

    async def hear(self) -> Told:
        message = await self._call.read()
        assert isinstance(message, bytes)
        return Told(message)

    async def leave(self) -> StatusCode:
        await self._call.done_writing()
        assert await self._call.read() is aio.EOF
        code: StatusCode = await self._call.code()
        return code


@asynccontextmanager
async def serving(eds: Eds) -> AsyncIterator[Client]:
    transport = WireTransport(eds.methods(), ConnectionLimits(), asyncio.get_running_loop().time)
    port = await transport.listen("127.0.0.1", 0)
    following = asyncio.create_task(eds.run())
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(10):
            call: aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(STREAM)()
            yield Client(call)
    finally:
        following.cancel()
        await transport.stop(0.0)


@pytest.mark.anyio
async def test_changes_reach_a_client_over_the_wire_while_it_goes_on_asking() -> None:
    site = Site(A)
    site.stream.lose(0.0)
    async with serving(site.eds) as client:
        await client.say(ask("pool"))
        for listed in ([A], [A, B], [B], [B, C]):
            site.discover(*listed)
            while (told := await client.hear()).hosts != {"pool": listed}:
                await client.say(ask("pool", nonce=told.nonce))
            await client.say(ask("pool", nonce=told.nonce))
        assert await client.leave() is StatusCode.OK
    assert site.eds.streams == set()


@pytest.mark.anyio
async def test_changes_are_followed_as_long_as_one_stream_is_left() -> None:
    site = Site(A)
    site.receive(ask("pool", nonce=site.receive(ask("pool"))[0].nonce))
    site.open().lose(0.0)
    following = asyncio.create_task(site.eds.run())
    site.discover(B)
    async with asyncio.timeout(5):
        while not site.pushed:
            await asyncio.sleep(0.001)
    assert [told.hosts for told in site.take()] == [{"pool": [B]}]
    following.cancel()
