"""Actions to the bytes of one ProcessingResponse each.

Protobuf writes everything once; what differs between two replies of the same shape is then put into its bytes. The
headers' reply differs in the destination, a piece of a body in the piece, so both are found by lengths.
Rules here:
- Header values are written to `raw_value` alone (Envoy reads no other).
- Only what changes is mutated: no header of the client's is set again, so order and duplicates stay.
Measured: routed headers 0.3 us instead of 3.3, a piece of 100 bytes 0.25 instead of 1.15. Rejected: headers put
together from tags and lengths, 6.0 us, and 24 with the scores of eight endpoints, where protobuf takes 5.8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from epp.extproc.actions import (
    SendBufferedBody,
    SendImmediateResponse,
    SendRequestBody,
    SendRequestHeaders,
    SendRequestTrailers,
    SendResponseBody,
    SendResponseHeaders,
    SendResponseTrailers,
)
from epp.extproc.messages import NAMESPACE
from epp.headers import DESTINATION, SCORES
from epp.pb import ext_proc_pb2 as pb
from epp.scheduling.reporters import Metadata

RESPONSE_HEADERS: Final = pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString()
RESPONSE_TRAILERS: Final = pb.ProcessingResponse(response_trailers=pb.TrailersResponse()).SerializeToString()
REQUEST_TRAILERS: Final = pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString()
CONTINUE_REQUEST: Final = pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString()
CONTINUE_RESPONSE: Final = pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString()
ENDS: Final = pb.StreamedBodyResponse(end_of_stream=True).SerializeToString()

# -- pieces of a body ------------------------------------------------------------------------------------------------


def _request_body(action: SendRequestBody) -> bytes:
    data, last = action.data, action.last
    return b"".join((_before_request_body(len(data), last), data, ENDS if last else b""))


def _response_body(action: SendResponseBody) -> bytes:
    """As in full duplex, where it carries the piece on."""
    data, last = action.data, action.last
    reply = b"".join((_before_response_body(len(data), last), data, ENDS if last else b""))
    return with_metadata(reply, action.metadata) if action.metadata else reply


@lru_cache(maxsize=1024)
def _before_request_body(size: int, last: bool) -> bytes:
    response = pb.ProcessingResponse()
    return _before(response, response.request_body, size, last)


@lru_cache(maxsize=1024)
def _before_response_body(size: int, last: bool) -> bytes:
    response = pb.ProcessingResponse()
    return _before(response, response.response_body, size, last)


def _before(response: pb.ProcessingResponse, body: pb.BodyResponse, size: int, last: bool) -> bytes:
    """What precedes a piece of this size, and the flag behind it: messages inside one another, and their lengths."""
    streamed = body.response.body_mutation.streamed_response
    streamed.body, streamed.end_of_stream = bytes(size), last
    data = response.SerializeToString()
    return data[: len(data) - size - (len(ENDS) if last else 0)]


# -- where to --------------------------------------------------------------------------------------------------------


def _request_headers(action: SendRequestHeaders) -> bytes:
    if action.destination is None:
        return CONTINUE_REQUEST
    if action.set_headers or action.scores:
        response = pb.ProcessingResponse()
        _route(response, response.request_headers.response, action.destination, action)
        return response.SerializeToString()
    destination = action.destination.encode()
    before, between, after = _around(len(destination), action.remove_headers)
    return b"".join((before, destination, between, destination, after))


@lru_cache(maxsize=256)
def _around(size: int, remove_headers: tuple[str, ...]) -> list[bytes]:
    """The three parts of a reply around a destination of so many bytes, which stands in it twice."""
    blank = "\0" * size
    response = pb.ProcessingResponse()
    _route(response, response.request_headers.response, blank, SendRequestHeaders(blank, (), remove_headers))
    return response.SerializeToString().split(blank.encode())


def _buffered_body(action: SendBufferedBody) -> bytes:
    """The routing rides on the body's reply, for BUFFERED headers are answered before there is a decision."""
    response = pb.ProcessingResponse()
    common = response.request_body.response
    _route(response, common, action.destination, action)
    if action.body is not None:
        common.body_mutation.body = action.body
        _set(common.header_mutation, "content-length", b"%d" % len(action.body))
    return response.SerializeToString()


def _route(
    response: pb.ProcessingResponse,
    common: pb.CommonResponse,
    destination: str,
    action: SendRequestHeaders | SendBufferedBody,
) -> None:
    """Say where to: as a header and as dynamic metadata, equal, for a proxy may read either."""
    common.clear_route_cache = True
    _set(common.header_mutation, DESTINATION, destination.encode())
    for name, value in action.set_headers:
        _set(common.header_mutation, name, value)
    common.header_mutation.remove_headers.extend(action.remove_headers)
    metadata = response.dynamic_metadata.fields[NAMESPACE].struct_value.fields
    metadata[DESTINATION].string_value = destination
    if action.scores:
        scores = metadata[SCORES].struct_value.fields
        for address, score in action.scores:
            scores[address].number_value = score


def _set(mutation: pb.HeaderMutation, name: str, value: bytes) -> None:
    header = mutation.set_headers.add().header
    header.key, header.raw_value = name, value


def _response_headers(action: SendResponseHeaders) -> bytes:
    if not action.set_headers:
        return RESPONSE_HEADERS
    response = pb.ProcessingResponse()
    for name, value in action.set_headers:
        _set(response.response_headers.response.header_mutation, name, value)
    return response.SerializeToString()


def with_metadata(reply: bytes, told: Metadata) -> bytes:
    """A reply and dynamic metadata: a field of its own, which protobuf reads wherever it stands."""
    response = pb.ProcessingResponse()
    for namespace, key, value in told:
        response.dynamic_metadata.fields[namespace].struct_value.fields[key].number_value = value
    return reply + response.SerializeToString()


# -- our own answers -------------------------------------------------------------------------------------------------


def _immediate_response(action: SendImmediateResponse) -> bytes:
    response = pb.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = action.status
    immediate.body = action.body
    for name, value in action.headers:
        _set(immediate.headers, name, value)
    return response.SerializeToString()


WRITERS: Final[dict[type, Callable[[Any], bytes]]] = {
    SendRequestHeaders: _request_headers,
    SendBufferedBody: _buffered_body,
    SendRequestBody: _request_body,
    SendRequestTrailers: lambda action: REQUEST_TRAILERS,
    SendResponseHeaders: _response_headers,
    SendResponseBody: _response_body,
    SendResponseTrailers: lambda action: with_metadata(RESPONSE_TRAILERS, action.metadata),
    SendImmediateResponse: _immediate_response,
}
