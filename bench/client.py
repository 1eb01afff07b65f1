"""Speaks ext_proc to a picker without an Envoy: many streams over one HTTP/2 connection, as Envoy would open them.

In: prompts. Out: decided streams that stay open, as one does while its model server thinks. The HTTP/2 is h2's, so
this is slow (a millisecond a stream) and measures nothing by time.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from typing import Final, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded, StreamReset, WindowUpdated
from h2.settings import SettingCodes, Settings

from epp.pb.ext_proc_pb2 import FULL_DUPLEX_STREAMED, NONE, ProcessingRequest, ProcessingResponse

HEADERS: Final = (
    (":method", "POST"),
    (":path", "/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
    (":authority", "picker"),
    (":scheme", "http"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)
ASKED: Final = {
    ":method": "POST",
    ":path": "/v1/chat/completions",
    ":authority": "gateway.example:8080",
    ":scheme": "http",
    "user-agent": "OpenAI/Python 1.60.0",
    "content-type": "application/json",
    "accept": "application/json",
    "authorization": "Bearer sk-0123456789abcdef0123456789abcdef",
    "x-forwarded-proto": "http",
    "x-request-id": "5b8b4f3a-7f2c-4a51-9d3e-2f1f0c9d7e11",
}
PART: Final = 32_768
"""Bytes of body in one message."""
WINDOW: Final = 1 << 24
"""Bytes that may come on each stream, as Envoy says."""
INTERNAL_ERROR: Final = 2
"""The code with which Envoy ends streams."""


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._http2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._http2.local_settings = Settings(initial_values={SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
        self._to_send: dict[int, deque[bytes]] = {}
        self._undecided: dict[int, tuple[bytearray, asyncio.Future[None]]] = {}
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def capacity(self) -> int:
        """How many streams the picker takes on this connection."""
        await self._settled
        return self._http2.remote_settings.max_concurrent_streams

    async def decided(self, prompt: bytes) -> int:
        """Open a stream, ask, and wait for the decision and the body. Returns the stream. Raises ConnectionError when
        the picker ends it."""
        number = self._http2.get_next_available_stream_id()
        self._http2.send_headers(number, HEADERS)
        body = b'{"model":"tiny","messages":[{"role":"user","content":"%b"}]}' % prompt
        messages = [_headers(len(body)), *_bodies(body)]
        whole = b"".join(struct.pack(">?L", False, len(message)) + message for message in messages)
        self._to_send[number] = deque(whole[at : at + 16_384] for at in range(0, len(whole), 16_384))
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._undecided[number] = bytearray(), answer
        self._send(number)
        await answer
        return number

    def reset(self, number: int) -> None:
        """End a stream as Envoy does when a response is over."""
        self._http2.reset_stream(number, INTERNAL_ERROR)
        self._flush()

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it
        self._http2.initiate_connection()
        self._http2.increment_flow_control_window(WINDOW)
        self._flush()

    def data_received(self, data: bytes) -> None:
        for event in self._http2.receive_data(data):
            if isinstance(event, DataReceived):
                self._http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self._received(event.stream_id, event.data)
            elif isinstance(event, WindowUpdated):
                for number in [event.stream_id] if event.stream_id else list(self._to_send):
                    self._send(number)
            elif isinstance(event, StreamReset | StreamEnded) and event.stream_id in self._undecided:
                self._undecided.pop(event.stream_id)[1].set_exception(ConnectionError(repr(event)))
        if not self._settled.done():
            self._settled.set_result(None)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        for _, answer in self._undecided.values():
            answer.set_exception(ConnectionError(f"connection lost: {exc}"))
        self._undecided.clear()

    def _received(self, number: int, data: bytes) -> None:
        if number not in self._undecided:
            return
        received, answer = self._undecided[number]
        received += data
        while len(received) >= 5 and len(received) >= (end := 5 + int.from_bytes(received[1:5], "big")):
            reply = ProcessingResponse.FromString(bytes(received[5:end]))
            del received[:end]
            if reply.HasField("immediate_response"):
                self._undecided.pop(number)[1].set_exception(ConnectionError(str(reply)))
            elif reply.request_body.response.body_mutation.streamed_response.end_of_stream:
                del self._undecided[number]
                answer.set_result(None)

    def _send(self, number: int) -> None:
        """As much as the windows allow."""
        pieces = self._to_send.get(number)
        while pieces and self._http2.local_flow_control_window(number) >= len(pieces[0]):
            self._http2.send_data(number, pieces.popleft())
        if not pieces:
            self._to_send.pop(number, None)
        self._flush()

    def _flush(self) -> None:
        if data := self._http2.data_to_send():
            self._transport.write(data)


def _headers(length: int) -> bytes:
    message = ProcessingRequest()
    message.protocol_config.request_body_mode = FULL_DUPLEX_STREAMED
    message.protocol_config.response_body_mode = NONE
    for key, value in (*ASKED.items(), ("content-length", str(length))):
        message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
    return message.SerializeToString()


def _bodies(body: bytes) -> list[bytes]:
    parts = [body[at : at + PART] for at in range(0, len(body), PART)]
    messages = [ProcessingRequest() for _ in parts]
    for at, (message, part) in enumerate(zip(messages, parts, strict=True)):
        message.request_body.body = part
        message.request_body.end_of_stream = at == len(parts) - 1
    return [message.SerializeToString() for message in messages]
