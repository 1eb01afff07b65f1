"""Our subset of ext_proc against Envoy's own messages."""

from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from hypothesis import given
from hypothesis import strategies as st

from epp.errors import InternalError, ProtocolError
from epp.extproc import events
from epp.extproc.actions import SendBufferedBody, SendImmediateResponse, SendRequestHeaders
from epp.extproc.codec import Codec
from epp.extproc.events import (
    BodylessRequest,
    BodyMode,
    Modes,
    Part,
    RequestData,
    RequestEnded,
    RequestStarted,
    ResponseStarted,
    TunnelRequested,
)
from tests.extproc import oracle
from tests.extproc.transcripts import ALL, WORDS, Immediate, Inside, Transcript

INTERNAL = (events.Decided, events.Refused, events.Lost, events.Expired)


@pytest.mark.parametrize("transcript", ALL, ids=lambda transcript: transcript.name)
def test_what_envoy_says_and_what_it_hears_is_what_the_transcript_says(transcript: Transcript) -> None:
    codec = Codec()
    modes: Modes | None = None
    for step in transcript.steps:
        if not isinstance(step.event, INTERNAL):
            first = modes is None
            if modes is None:
                modes = getattr(step.event, "modes", Modes())
            data = oracle.message(step.event, modes if first else None).SerializeToString()
            assert codec.decode(data) == step.event, f"{transcript.name}.txt:{step.line}"
        for action in step.expected:
            if not isinstance(action, Inside | Immediate):
                assert modes is not None
                got = ep.ProcessingResponse.FromString(codec.encode(action))
                assert got == oracle.reply(action, modes), f"{transcript.name}.txt:{step.line}"


def test_without_protocol_config_bodies_are_full_duplex() -> None:
    event = Codec().decode(oracle.message(RequestStarted(WORDS["POST"]), None).SerializeToString())
    assert event == RequestStarted(WORDS["POST"], Modes(BodyMode.FULL_DUPLEX, BodyMode.FULL_DUPLEX))


def test_a_buffered_body_is_whole_though_trailers_follow_and_its_flag_is_clear() -> None:
    codec = Codec()
    codec.decode(oracle.message(RequestStarted(WORDS["POST"]), Modes(BodyMode.BUFFERED)).SerializeToString())
    data = oracle.message(RequestData(b"whole"), None).SerializeToString()
    assert codec.decode(data) == RequestEnded(Part.BODY, b"whole")


def test_header_values_are_read_from_raw_value_then_value() -> None:
    request = ep.ProcessingRequest()
    request.request_headers.headers.headers.add(key=":method", value="POST")
    request.request_headers.headers.headers.add(key="X-Mixed-Case", value="text", raw_value=b"\xff raw")
    event = Codec().decode(request.SerializeToString())
    assert event == RequestStarted(((":method", b"POST"), ("x-mixed-case", b"\xff raw")))


def test_a_value_that_is_not_utf8_is_read_all_the_same() -> None:
    # HeaderValue {key: "a", value: <ff>}: Envoy's own message type refuses this as a string field.
    header = b"\x0a\x01a\x12\x01\xff"
    headers = b"\x0a" + bytes([len(header)]) + header
    request = b"\x12" + bytes([len(headers) + 2]) + b"\x0a" + bytes([len(headers)]) + headers
    assert Codec().decode(request) == RequestStarted((("a", b"\xff"),))


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        (((":method", b"CONNECT"), (":authority", b"a")), TunnelRequested),
        (((":method", b"GET"), ("upgrade", b"WebSocket")), TunnelRequested),
        (((":method", b"GET"), ("upgrade", b"h2c")), RequestStarted),
        (((":method", b"POST"),), RequestStarted),
    ],
)
def test_a_tunnel_is_known_by_its_headers(headers: tuple[tuple[str, bytes], ...], kind: type) -> None:
    assert type(Codec().decode(oracle.message(RequestStarted(headers), Modes()).SerializeToString())) is kind


def test_a_tunnel_that_ends_with_its_headers_is_none() -> None:
    headers = ((":method", b"GET"), ("upgrade", b"websocket"))
    data = oracle.message(BodylessRequest(headers), Modes()).SerializeToString()
    assert Codec().decode(data) == BodylessRequest(headers)


@pytest.mark.parametrize(
    ("hint", "subset"),
    [
        (["10.0.0.1, 10.0.0.2:80", "10.0.0.3"], ("10.0.0.1", "10.0.0.2:80", "10.0.0.3")),
        (["10.0.0.1:8000", " 10.0.0.2:8000 "], ("10.0.0.1:8000", "10.0.0.2:8000")),
        ("10.0.0.1:8000, [fd00::1]:8000", ("10.0.0.1:8000", "[fd00::1]:8000")),
        ([], ()),
        ("", ()),
        (3, None),
        (None, None),
    ],
)
def test_subset_hints_may_be_a_list_or_one_string(hint: object, subset: tuple[str, ...] | None) -> None:
    request = oracle.message(RequestData(b"x"), None)
    struct = request.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    struct.update({"x-gateway-destination-endpoint-subset": hint})
    assert Codec().decode(request.SerializeToString()) == RequestData(b"x", subset)


@pytest.mark.parametrize(("value", "served"), [("10.0.0.1:8000", "10.0.0.1:8000"), ("", None), (3, None)])
def test_the_served_endpoint_is_a_text_or_not_told(value: object, served: str | None) -> None:
    request = oracle.message(ResponseStarted(WORDS["OK"]), None)
    request.metadata_context.filter_metadata["envoy.lb"].update({"x-gateway-destination-endpoint-served": value})
    event = Codec().decode(request.SerializeToString())
    assert event == ResponseStarted(WORDS["OK"], Modes(), served)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no known kind"),
        (b"\xff\xff", "not a ProcessingRequest"),
        (ep.ProcessingRequest(request_headers=ep.HttpHeaders(end_of_stream=True)).SerializeToString(), "header map"),
        (ep.ProcessingRequest(response_headers=ep.HttpHeaders()).SerializeToString(), "header map"),
        (
            b"\x5a\x02\x08\x09" + ep.ProcessingRequest(request_body=ep.HttpBody()).SerializeToString(),
            "unknown body mod",
        ),
    ],
)
def test_what_envoy_never_sends_is_a_protocol_error(data: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        Codec().decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_protocol_error(data: bytes) -> None:
    codec = Codec()
    try:
        codec.decode(data)
    except ProtocolError:
        return


def test_scores_ride_beside_the_destination() -> None:
    action = SendRequestHeaders("10.0.0.1:8000", scores=(("10.0.0.1:8000", 6.5), ("10.0.0.2:8000", 1.0)))
    assert ep.ProcessingResponse.FromString(Codec().encode(action)) == oracle.reply(action, Modes())


def test_an_edited_buffered_body_has_its_content_length_set() -> None:
    action = SendBufferedBody("10.0.0.1:8000", body=b"12345")
    assert ep.ProcessingResponse.FromString(Codec().encode(action)) == oracle.reply(action, Modes())


def test_our_own_answer_carries_status_headers_and_body() -> None:
    action = SendImmediateResponse(429, (("retry-after", b"1"),), b"{}", InternalError(""))
    got = ep.ProcessingResponse.FromString(Codec().encode(action)).immediate_response
    assert got.status.code == 429
    assert got.body == b"{}"
    (header,) = got.headers.set_headers
    assert (header.header.key, header.header.raw_value) == ("retry-after", b"1")
