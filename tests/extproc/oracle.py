"""Envoy's side of ext_proc, spoken with Envoy's own messages (xds-protos): an independent witness for our codec."""

from __future__ import annotations

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep

from epp.extproc import actions
from epp.extproc.actions import Send
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
)
from epp.headers import Headers

MODE_NAMES = {
    BodyMode.NONE: "NONE",
    BodyMode.STREAMED: "STREAMED",
    BodyMode.BUFFERED: "BUFFERED",
    BodyMode.BUFFERED_PARTIAL: "BUFFERED_PARTIAL",
    BodyMode.FULL_DUPLEX: "FULL_DUPLEX_STREAMED",
}


def message(event: RequestEvent | ResponseEvent, modes: Modes | None) -> ep.ProcessingRequest:
    """The ProcessingRequest with which Envoy says this event; `modes` on the first message of a stream only."""
    request = ep.ProcessingRequest()
    if modes is not None:
        numbers = processing_mode_pb2.ProcessingMode.BodySendMode
        request.protocol_config.request_body_mode = numbers.Value(MODE_NAMES[modes.request])
        request.protocol_config.response_body_mode = numbers.Value(MODE_NAMES[modes.response])
    match event:
        case RequestStarted():
            _headers(request.request_headers, event.headers)
            request.request_headers.end_of_stream = (
                isinstance(event, BodylessRequest) and event.modes.request is not BodyMode.NONE
            )
            _subset(request, event.subset)
        case RequestData():
            request.request_body.body = event.data
            _subset(request, event.subset)
        case RequestEnded(by=Part.BODY):
            request.request_body.body = event.data
            request.request_body.end_of_stream = True
            _subset(request, event.subset)
        case RequestEnded():
            request.request_trailers.SetInParent()
        case ResponseStarted():
            _headers(request.response_headers, event.headers)
            request.response_headers.end_of_stream = isinstance(event, BodylessResponse)
            if event.served is not None:
                served = request.metadata_context.filter_metadata["envoy.lb"]
                served["x-gateway-destination-endpoint-served"] = event.served
        case ResponseData():
            request.response_body.body = event.data
        case ResponseEnded(by=Part.BODY):
            request.response_body.body = event.data
            request.response_body.end_of_stream = True
        case ResponseEnded():
            request.response_trailers.SetInParent()
    return request


def reply(action: Send, modes: Modes) -> ep.ProcessingResponse:
    """The ProcessingResponse that Envoy must get for this action; for our own answers only the status."""
    response = ep.ProcessingResponse()
    match action:
        case actions.SendRequestHeaders(destination=None):
            response.request_headers.SetInParent()
        case actions.SendRequestHeaders():
            _route(response, response.request_headers.response, action)
        case actions.SendBufferedBody():
            _route(response, response.request_body.response, action)
            if action.body is not None:
                common = response.request_body.response
                common.body_mutation.body = action.body
                header = common.header_mutation.set_headers.add().header
                header.key, header.raw_value = "content-length", str(len(action.body)).encode()
        case actions.SendRequestBody():
            streamed = response.request_body.response.body_mutation.streamed_response
            streamed.body, streamed.end_of_stream = action.data, action.last
        case actions.SendRequestTrailers():
            response.request_trailers.SetInParent()
        case actions.SendResponseHeaders():
            response.response_headers.SetInParent()
        case actions.SendResponseBody() if modes.response is BodyMode.FULL_DUPLEX:
            streamed = response.response_body.response.body_mutation.streamed_response
            streamed.body, streamed.end_of_stream = action.data, action.last
        case actions.SendResponseBody():
            response.response_body.SetInParent()
        case actions.SendResponseTrailers():
            response.response_trailers.SetInParent()
        case actions.SendImmediateResponse():
            raise AssertionError("our own answers are compared by status")
    return response


def _headers(message: ep.HttpHeaders, headers: Headers) -> None:
    message.headers.SetInParent()
    for name, value in headers:
        message.headers.headers.add(key=name, raw_value=value)


def _subset(request: ep.ProcessingRequest, subset: tuple[str, ...] | None) -> None:
    if subset is not None:
        hint = request.metadata_context.filter_metadata["envoy.lb.subset_hint"]
        hint.get_or_create_list("x-gateway-destination-endpoint-subset").extend(subset)


def _route(
    response: ep.ProcessingResponse,
    common: ep.CommonResponse,
    action: actions.SendRequestHeaders | actions.SendBufferedBody,
) -> None:
    assert action.destination is not None
    common.clear_route_cache = True
    header = common.header_mutation.set_headers.add().header
    header.key, header.raw_value = "x-gateway-destination-endpoint", action.destination.encode()
    for name, value in action.set_headers:
        common.header_mutation.set_headers.add().header.MergeFrom(type(header)(key=name, raw_value=value))
    common.header_mutation.remove_headers.extend(action.remove_headers)
    response.dynamic_metadata.update({"envoy.lb": {"x-gateway-destination-endpoint": action.destination}})
    if action.scores:
        metadata = response.dynamic_metadata["envoy.lb"]
        metadata.update({"x-gateway-destination-endpoint-scores": dict(action.scores)})
