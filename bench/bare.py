"""The yardstick: an ext_proc server on grpc.aio without any logic, as small as it can be.

`python -m bench.bare LISTEN DESTINATION` collects the body, names the one destination, sends the body back, and
answers every other message with an empty one. Everything that our picker does beyond this shows as a ratio over 1.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import uvloop

from epp.headers import DESTINATION
from epp.pb.ext_proc_pb2 import ProcessingRequest, ProcessingResponse


class Bare:
    """Answers every request with one destination; bench/wire.py answers by it too."""

    def __init__(self, destination: str) -> None:
        headers = ProcessingResponse()
        chosen = headers.request_headers.response
        chosen.clear_route_cache = True
        header = chosen.header_mutation.set_headers.add().header
        header.key, header.raw_value = DESTINATION, destination.encode()
        headers.dynamic_metadata.get_or_create_struct("envoy.lb")[DESTINATION] = destination
        self._headers = headers

    def replies(self, message: ProcessingRequest, body: list[bytes]) -> tuple[ProcessingResponse, ...]:
        """Answer one message; `body` keeps what came of this stream's request body."""
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            return (self._headers,) if message.request_headers.end_of_stream else ()
        if kind == "request_body":
            body.append(message.request_body.body)
            if not message.request_body.end_of_stream:
                return ()
            return self._headers, _streamed("request_body", b"".join(body), last=True)
        if kind == "response_body":
            part = message.response_body
            return (_streamed("response_body", part.body, last=part.end_of_stream),)
        if kind is None:
            return ()
        answer = ProcessingResponse()
        getattr(answer, kind).SetInParent()
        return (answer,)

    async def process(
        self, requests: AsyncIterator[ProcessingRequest], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[ProcessingResponse]:
        body: list[bytes] = []
        async for message in requests:
            for reply in self.replies(message, body):
                yield reply


def _streamed(kind: str, body: bytes, *, last: bool) -> ProcessingResponse:
    answer = ProcessingResponse()
    streamed = getattr(answer, kind).response.body_mutation.streamed_response
    streamed.body, streamed.end_of_stream = body, last
    return answer


async def main(listen: str, destination: str) -> None:
    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 100_000)])
    process = grpc.stream_stream_rpc_method_handler(
        Bare(destination).process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
    )
    service = "envoy.service.ext_proc.v3.ExternalProcessor"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Process": process}),))
    server.add_insecure_port(listen)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
