"""Protobuf <-> events and actions: the only place that knows ext_proc's messages.

In: the bytes of one ProcessingRequest. Out: one event; and from one action, the bytes of one ProcessingResponse.
Rules here:
- Flags end here: which event a message becomes says how the request or the response goes on.
- Header values are read from `raw_value`, then `value`, and written to `raw_value` alone (Envoy reads no other).
- What Envoy never sends (no header map, no kind, bytes that are no message) is a ProtocolError.
- Only what changes is mutated: no header of the client's is set again, so order and duplicates stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from epp.errors import ProtocolError
from epp.extproc.actions import (
    Send,
    SendBufferedBody,
    SendImmediateResponse,
    SendRequestBody,
    SendRequestHeaders,
    SendRequestTrailers,
    SendResponseBody,
    SendResponseHeaders,
    SendResponseTrailers,
)
from epp.extproc.events import (
    BodylessRequest,
    BodylessResponse,
    BodyMode,
    Modes,
    Part,
    RequestData,
    RequestEnded,
    RequestEvent,
    RequestStarted,
    ResponseData,
    ResponseEnded,
    ResponseEvent,
    ResponseStarted,
    TunnelRequested,
)
from epp.headers import DESTINATION, SCORES, SERVED, SUBSET, Headers, first
from epp.pb import ext_proc_pb2 as pb

NAMESPACE: Final = "envoy.lb"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"

RESPONSE_HEADERS: Final = pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString()
RESPONSE_TRAILERS: Final = pb.ProcessingResponse(response_trailers=pb.TrailersResponse()).SerializeToString()
REQUEST_TRAILERS: Final = pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString()
CONTINUE_REQUEST: Final = pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString()
CONTINUE_RESPONSE: Final = pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString()


class Codec:
    """One stream's translation. It remembers the body modes, which only the first message tells."""

    __slots__ = ("_modes",)

    def __init__(self) -> None:
        self._modes: Modes | None = None

    def decode(self, data: bytes) -> RequestEvent | ResponseEvent:
        """Turn one message into one event.

        Raises:
            ProtocolError: bytes that are no ProcessingRequest, a message without a kind or without its header map.
        """
        try:
            message = pb.ProcessingRequest.FromString(data)
        except DecodeError as error:
            raise ProtocolError(f"not a ProcessingRequest: {error}") from None
        if self._modes is None:
            self._modes = _modes(message)
        match message.WhichOneof("request"):
            case "request_headers":
                return self._request_headers(message)
            case "request_body":
                return self._request_body(message)
            case "request_trailers":
                return RequestEnded(Part.TRAILERS, subset=_subset(message))
            case "response_headers":
                return self._response_headers(message)
            case "response_body":
                body = message.response_body
                return ResponseEnded(Part.BODY, body.body) if body.end_of_stream else ResponseData(body.body)
            case "response_trailers":
                return ResponseEnded(Part.TRAILERS)
            case _:
                raise ProtocolError("a ProcessingRequest of no known kind")

    def encode(self, action: Send) -> bytes:
        """Turn one action into the bytes of one ProcessingResponse."""
        return ENCODERS[type(action)](self, action)

    # -- what Envoy says -----------------------------------------------------------------------------------------

    def _request_headers(self, message: pb.ProcessingRequest) -> RequestStarted:
        assert self._modes is not None
        headers = _headers(message.request_headers)
        kind = RequestStarted
        if message.request_headers.end_of_stream or self._modes.request is BodyMode.NONE:
            kind = BodylessRequest
        elif _is_tunnel(headers):
            kind = TunnelRequested
        return kind(headers, self._modes, _subset(message))

    def _request_body(self, message: pb.ProcessingRequest) -> RequestData | RequestEnded:
        assert self._modes is not None
        body = message.request_body
        # A buffered body is whole whatever its flag says: Envoy clears the flag when trailers follow.
        if body.end_of_stream or self._modes.request is BodyMode.BUFFERED:
            return RequestEnded(Part.BODY, body.body, _subset(message))
        return RequestData(body.body, _subset(message))

    def _response_headers(self, message: pb.ProcessingRequest) -> ResponseStarted:
        assert self._modes is not None
        headers = _headers(message.response_headers)
        kind = BodylessResponse if message.response_headers.end_of_stream else ResponseStarted
        served = _metadata(message, NAMESPACE)
        value = served.fields[SERVED].string_value if served is not None and SERVED in served.fields else ""
        return kind(headers, self._modes, value or None)

    # -- what we answer ------------------------------------------------------------------------------------------

    def _send_request_headers(self, action: SendRequestHeaders) -> bytes:
        if action.destination is None:
            return CONTINUE_REQUEST
        response = pb.ProcessingResponse()
        common = response.request_headers.response
        _route(response, common, action.destination, action)
        return response.SerializeToString()

    def _send_buffered_body(self, action: SendBufferedBody) -> bytes:
        response = pb.ProcessingResponse()
        common = response.request_body.response
        _route(response, common, action.destination, action)
        if action.body is not None:
            common.body_mutation.body = action.body
            _set(common.header_mutation, "content-length", str(len(action.body)).encode())
        return response.SerializeToString()

    def _send_request_body(self, action: SendRequestBody) -> bytes:
        response = pb.ProcessingResponse()
        streamed = response.request_body.response.body_mutation.streamed_response
        streamed.body, streamed.end_of_stream = action.data, action.last
        return response.SerializeToString()

    def _send_response_body(self, action: SendResponseBody) -> bytes:
        if self._modes is None or self._modes.response is not BodyMode.FULL_DUPLEX:
            return CONTINUE_RESPONSE
        response = pb.ProcessingResponse()
        streamed = response.response_body.response.body_mutation.streamed_response
        streamed.body, streamed.end_of_stream = action.data, action.last
        return response.SerializeToString()

    def _send_immediate_response(self, action: SendImmediateResponse) -> bytes:
        response = pb.ProcessingResponse()
        immediate = response.immediate_response
        immediate.status.code = action.status
        immediate.body = action.body
        for name, value in action.headers:
            _set(immediate.headers, name, value)
        return response.SerializeToString()


ENCODERS: Final[dict[type, Callable[[Codec, Any], bytes]]] = {
    SendRequestHeaders: Codec._send_request_headers,
    SendBufferedBody: Codec._send_buffered_body,
    SendRequestBody: Codec._send_request_body,
    SendRequestTrailers: lambda codec, action: REQUEST_TRAILERS,
    SendResponseHeaders: lambda codec, action: RESPONSE_HEADERS,
    SendResponseBody: Codec._send_response_body,
    SendResponseTrailers: lambda codec, action: RESPONSE_TRAILERS,
    SendImmediateResponse: Codec._send_immediate_response,
}


def _modes(message: pb.ProcessingRequest) -> Modes:
    if not message.HasField("protocol_config"):
        return Modes()
    config = message.protocol_config
    try:
        return MODES[config.request_body_mode, config.response_body_mode]
    except KeyError:
        raise ProtocolError(
            f"unknown body modes {config.request_body_mode}, {config.response_body_mode}: set "
            "processing_mode.request_body_mode to FULL_DUPLEX_STREAMED, response_body_mode to NONE"
        ) from None


MODES: Final = {(one.value, two.value): Modes(one, two) for one in BodyMode for two in BodyMode}


def _headers(message: pb.HttpHeaders) -> Headers:
    headers = tuple([(header.key.lower(), header.raw_value or header.value) for header in message.headers.headers])
    if not headers:
        raise ProtocolError("headers without a header map")
    return headers


def _is_tunnel(headers: Headers) -> bool:
    return first(headers, ":method") == b"CONNECT" or (first(headers, "upgrade") or b"").lower() == b"websocket"


def _metadata(message: pb.ProcessingRequest, namespace: str) -> Struct | None:
    if not message.HasField("metadata_context"):
        return None
    return message.metadata_context.filter_metadata.get(namespace)


def _subset(message: pb.ProcessingRequest) -> tuple[str, ...] | None:
    """The endpoints that the gateway allows: a list of strings, or one string with commas; anything else: no hint."""
    hint = _metadata(message, SUBSET_NAMESPACE)
    if hint is None or SUBSET not in hint.fields:
        return None
    value = hint.fields[SUBSET]
    match value.WhichOneof("kind"):
        case "list_value":
            entries = [item.string_value for item in value.list_value.values]
        case "string_value":
            entries = value.string_value.split(",")
        case _:
            return None
    return tuple(entry.strip() for entry in entries if entry.strip())


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
    for address, score in action.scores:
        metadata[SCORES].struct_value.fields[address].number_value = score


def _set(mutation: pb.HeaderMutation, name: str, value: bytes) -> None:
    header = mutation.set_headers.add().header
    header.key, header.raw_value = name, value
