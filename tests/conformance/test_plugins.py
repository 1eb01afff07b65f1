"""The plugins that the conformance suite steers by, and the hooks that they are made of, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from hypothesis import given
from hypothesis import strategies as st

from epp import dialects
from epp.config.build import build
from epp.config.load import load
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Bools, Candidates, Endpoint, EndpointTable
from epp.errors import NoEndpoint
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.events import (
    BODY,
    BodylessResponse,
    BodyMode,
    Modes,
    RequestEnded,
    RequestStarted,
    ResponseStarted,
)
from epp.extproc.exchange import Limits
from epp.headers import Headers
from epp.picker import Picker, PickerOptions
from epp.scheduling.catalogue import catalogue
from epp.scheduling.plugin import Answer, Context, Filter, NoParams, Plugin, filter_
from epp.ticket import Outcome
from tests.extproc import oracle
from tests.watching import Watch

A1, A2, B1, B2, C = "10.0.0.1:8000", "10.0.0.1:8001", "10.0.0.2:8000", "10.0.0.2:8001", "[fd00::3]:8000"
ALL = (A1, A2, B1, B2, C)
POST: Headers = ((":method", b"POST"), (":path", b"/v1/completions"))
OK: Headers = ((":status", b"200"), ("content-type", b"application/json"))
HEADER, VERIFIER = "header-based-testing-filter", "destination-endpoint-served-verifier"
SERVED = "x-conformance-test-served-endpoint"


class Told(Watch):
    """And remembers what broke."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: list[str] = []

    def broke(self, what: str, error: Exception) -> None:
        super().broke(what, error)
        self.broken.append(what)


def configured(*filters: str) -> str:
    """The verifier works because it is declared; filters are listed in the profile."""
    declared = "".join(f"- type: {name}\n" for name in filters)
    in_profile = (name for name in (*filters, "queue-scorer", "max-score-picker") if name != VERIFIER)
    listed = "".join(f"  - pluginRef: {name}\n" for name in in_profile)
    return (
        "apiVersion: inference.networking.x-k8s.io/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n"
        f"{declared}- type: queue-scorer\n- type: max-score-picker\n  parameters: {{maxNumOfEndpoints: 8}}\n"
        f"schedulingProfiles:\n- name: conformance-profile\n  plugins:\n{listed}"
    )


def picker(watch: Watch, *filters: str, added: Sequence[Plugin[Filter]] = ()) -> Picker:
    scheduler = build(load(configured(*filters), plugins=catalogue(added)), Random(1))
    table = EndpointTable(on_forget=scheduler.forget)
    table.replace([Endpoint(f"default/pod-{number}", address) for number, address in enumerate(ALL)], now=0.0)
    ejection = Ejection(table, EjectionParams())
    return Picker(table, scheduler, ejection, watch, lambda: 0.0, PickerOptions())


def chosen(asked: Picker, *selections: str, subset: tuple[str, ...] | None = None, now: float = 100.0) -> set[str]:
    """All that a request with these headers may go to."""
    named = tuple(("test-epp-endpoint-selection", selection.encode()) for selection in selections)
    request = dialects.read((*POST, *named), b'{"model":"m","prompt":"hello"}')
    return set(asked.decide(request, subset, started_at=now, now=now)[0].decision.endpoints)


# -- where a request wants to go -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("10.0.0.1", {A1, A2}),
        ("10.0.0.2:8001", {B2}),
        ("10.0.0.2:8001,10.0.0.1", {A1, A2, B2}),
        (" 10.0.0.1:8000 ,, 10.0.0.1:8000 ", {A1}),
        ("[fd00::3]", {C}),
        ("[fd00:0::3]:8000", {C}),
        ("fd00::3", {C}),
        ("10.0.0.9, 10.0.0.1:8001, nonsense", {A2}),
    ],
)
def test_a_header_names_endpoints(selection: str, expected: set[str]) -> None:
    assert chosen(picker(Watch(), HEADER), selection) == expected


def test_every_header_of_the_name_counts() -> None:
    assert chosen(picker(Watch(), HEADER), "10.0.0.1:8000", "10.0.0.2:8000") == {A1, B1}


@pytest.mark.parametrize("selections", [(), ("",), (" , ",)])
def test_without_a_header_or_with_a_blank_one_everybody_may_serve(selections: tuple[str, ...]) -> None:
    """Unlike upstream's filter, which then leaves nobody."""
    assert chosen(picker(Watch(), HEADER), *selections) == set(ALL)


@pytest.mark.parametrize("selection", ["10.0.0.9", "10.0.0.1:9", "nonsense", "localhost:8000"])
def test_a_header_that_names_nobody_of_the_pool_is_a_503_that_says_why(selection: str) -> None:
    with pytest.raises(NoEndpoint, match="header-based-testing-filter left out 5"):
        chosen(picker(Watch(), HEADER), selection)


def test_the_header_comes_before_the_gateways_subset() -> None:
    asked = picker(Watch(), HEADER)
    assert chosen(asked, "10.0.0.1:8000", subset=(B1,)) == {A1}
    assert chosen(asked, "10.0.0.1:8000", subset=()) == {A1}
    assert chosen(asked, subset=(B1,)) == {B1}
    assert chosen(asked, " ", subset=(B1,)) == {B1}


def test_the_header_comes_before_slow_start() -> None:
    """A new endpoint that has its share would be left out; here it is named."""
    asked = picker(Watch(), HEADER)
    asked.table.put(Endpoint("default/new", "10.0.0.4:8000"), now=99.0)
    for _ in range(10):
        assert chosen(asked, "10.0.0.4") == {"10.0.0.4:8000"}


def test_the_header_comes_before_ejection() -> None:
    asked = picker(Watch(), HEADER)
    for _ in range(5):
        request = dialects.read((*POST, ("test-epp-endpoint-selection", A1.encode())), b'{"model":"m","prompt":"p"}')
        ticket, _ = asked.decide(request, None, started_at=100.0, now=100.0)
        asked.response_started(ticket, ((":status", b"500"),), A1, 100.0, bodies_seen=False)
        asked.finish(ticket, Outcome.COMPLETE, 100.0)
    assert chosen(asked, now=101.0) == set(ALL) - {A1}
    assert chosen(asked, "10.0.0.1:8000", now=101.0) == {A1}


def test_without_the_plugin_the_header_steers_nothing() -> None:
    asked = picker(Watch())
    assert chosen(asked, "10.0.0.1:8000") == set(ALL)
    assert chosen(asked, "10.0.0.1:8000", subset=(B1,)) == {B1}


# -- what a plugin sets on a response --------------------------------------------------------------------------------

Answered = Callable[[Request, Answer], Headers]


def says(name: str, answered: Answered) -> Plugin[Filter]:
    """A plugin that does nothing but answer."""

    class Saying:
        """Keep everybody."""

        def __init__(self, params: NoParams, context: Context) -> None:
            pass

        def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
            mask: Bools = candidates.slots >= 0
            return mask

        def answered(self, request: Request, answer: Answer) -> Headers:
            return answered(request, answer)

    return filter_(name, params=NoParams)(Saying)


def reply_to(
    asked: Picker, response: ResponseStarted, modes: Modes | None = None, *, of: Headers = POST
) -> ep.ProcessingResponse:
    """One exchange up to the response's headers, and how they are answered."""
    conversation = Conversation(asked, Limits(), Connection("a test"), 0.0)
    request = RequestStarted(of), RequestEnded(BODY, b'{"model":"m","prompt":"hello"}')
    said = oracle.message(request[0], modes or Modes()), oracle.message(request[1], None)
    for message in said:
        assert conversation.receive(message.SerializeToString(), 0.0)[-1:] or message is said[0]
    (reply,) = conversation.receive(oracle.message(response, None).SerializeToString(), 0.0)
    conversation.lose(0.0)
    assert not asked.table.column("inflight", asked.table.listed, 0.0)[0].any()
    return ep.ProcessingResponse.FromString(reply)


def set_by(reply: ep.ProcessingResponse) -> list[tuple[str, bytes]]:
    assert reply.WhichOneof("response") == "response_headers"
    mutation = reply.response_headers.response.header_mutation
    assert not mutation.remove_headers
    return [(each.header.key, each.header.raw_value) for each in mutation.set_headers]


@pytest.mark.parametrize("response", [ResponseStarted(OK, served=B2), BodylessResponse(OK, served=B2)])
@pytest.mark.parametrize("mode", [BodyMode.NONE, BodyMode.BUFFERED, BodyMode.FULL_DUPLEX])
def test_the_verifier_tells_which_endpoint_served(response: ResponseStarted, mode: BodyMode) -> None:
    asked = picker(Watch(), VERIFIER)
    assert set_by(reply_to(asked, response, Modes(BodyMode.FULL_DUPLEX, mode))) == [(SERVED, B2.encode())]


def test_the_verifier_tells_an_endpoint_outside_the_pool_as_it_is() -> None:
    asked = picker(Watch(), VERIFIER)
    assert set_by(reply_to(asked, ResponseStarted(OK, served="192.0.2.1:80"))) == [(SERVED, b"192.0.2.1:80")]


def test_the_verifier_says_so_when_the_proxy_tells_nothing() -> None:
    told = b"fail: missing destination endpoint served metadata"
    assert set_by(reply_to(picker(Watch(), VERIFIER), ResponseStarted(OK))) == [(SERVED, told)]


def test_a_response_without_a_decision_has_nothing_set() -> None:
    """Envoy's own answer to a request that nobody saw."""
    conversation = Conversation(picker(Watch(), VERIFIER), Limits(), Connection("a test"), 0.0)
    message = oracle.message(ResponseStarted(OK), Modes())
    (reply,) = conversation.receive(message.SerializeToString(), 0.0)
    assert set_by(ep.ProcessingResponse.FromString(reply)) == []


def test_without_a_plugin_nothing_is_set() -> None:
    reply = reply_to(picker(Watch()), ResponseStarted(OK, served=A1))
    assert reply == ep.ProcessingResponse(response_headers=ep.HeadersResponse())


def test_a_plugin_sees_the_request_and_how_its_response_begins() -> None:
    seen: list[tuple[str, Answer]] = []

    def look(request: Request, answer: Answer) -> Headers:
        seen.append((request.model, answer))
        return ()

    asked = picker(Watch(), "look", added=[says("look", look)])
    reply_to(asked, ResponseStarted(OK, served=B2))
    reply_to(asked, ResponseStarted(OK))
    reply_to(asked, ResponseStarted(OK, served="192.0.2.1:80"))
    assert [model for model, _ in seen] == ["m"] * 3
    assert [answer.served for _, answer in seen] == [B2, None, "192.0.2.1:80"]
    assert [answer.headers for _, answer in seen] == [OK] * 3
    assert seen[0][1].endpoint == Endpoint("default/pod-3", B2)
    assert {answer.endpoint.address for _, answer in seen[1:]} <= set(ALL)


def test_of_two_plugins_each_sets_its_own_and_the_later_one_wins() -> None:
    first = says("first", lambda request, answer: (("x-a", b"1"), ("x-b", b"1")))
    second = says("second", lambda request, answer: (("x-b", b"2"), ("x-c", b"")))
    asked = picker(Watch(), "first", "second", added=[first, second])
    assert set_by(reply_to(asked, ResponseStarted(OK))) == [("x-a", b"1"), ("x-b", b"2"), ("x-c", b"")]


def fails(request: Request, answer: Answer) -> Headers:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    "broken",
    [
        fails,
        lambda request, answer: (("x-a", b"1"), ("bad name", b"1")),
        lambda request, answer: (("", b"1"),),
        lambda request, answer: (("X-Upper", b"1"),),
        lambda request, answer: ((":status", b"500"),),
        lambda request, answer: (("content-length", b"0"),),
        lambda request, answer: (("transfer-encoding", b"chunked"),),
        lambda request, answer: (("x-a", b"1\r\nx-b: 2"),),
        lambda request, answer: (("x-a", b"\0"),),
        lambda request, answer: (("x-ä", b"1"),),
        lambda request, answer: (("x-a", "text"),),
        lambda request, answer: ((1, b"1"),),
        lambda request, answer: None,
    ],
)
def test_a_plugin_that_fails_or_sets_nonsense_harms_neither_the_response_nor_another_plugin(broken: Answered) -> None:
    watch = Told()
    asked = picker(watch, "broken", VERIFIER, added=[says("broken", broken)])
    assert set_by(reply_to(asked, ResponseStarted(OK, served=A1))) == [(SERVED, A1.encode())]
    assert watch.broken == ["plugin broken at a response"]


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=20).map("x-".__add__)
VALUE = st.binary(max_size=300).filter(lambda value: not set(value) & set(b"\0\r\n"))


@given(wanted=st.lists(st.tuples(TOKEN, VALUE), max_size=5, unique_by=lambda pair: pair[0]))
def test_what_a_plugin_sets_arrives_byte_for_byte_and_in_its_order(wanted: list[tuple[str, bytes]]) -> None:
    asked = picker(Watch(), "one", added=[says("one", lambda request, answer: tuple(wanted))])
    assert set_by(reply_to(asked, ResponseStarted(OK))) == wanted


def test_a_plugin_that_cannot_say_whether_a_request_is_pinned_leaves_the_guards_in_place() -> None:
    class Pinning:
        """Keep everybody."""

        def __init__(self, params: NoParams, context: Context) -> None:
            pass

        def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
            mask: Bools = candidates.slots >= 0
            return mask

        def pins(self, request: Request) -> bool:
            raise RuntimeError("no")

    watch = Told()
    asked = picker(watch, "pinning", added=[filter_("pinning", params=NoParams)(Pinning)])
    assert chosen(asked, subset=(B1,)) == {B1}
    assert watch.broken == ["plugin pinning at a request"]
