"""The ext_proc service on grpcio's asyncio server.

In: raw message bytes of each stream. Out: raw reply bytes. grpcio sees no message type: the codec decodes.
Rules here:
- A stream's end is never an error: Envoy resets nearly every healthy one, and grpcio shows that by chance as EOF or
  as a cancelled read.
- However a stream ends, its conversation is told so; telling it twice does no harm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import grpc
import msgspec
from grpc import aio

from epp.errors import ProtocolError
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.exchange import Limits
from epp.extproc.transport.deadlines import Deadlines
from epp.picker import Picker

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
PEERS_REMEMBERED: Final = 1024


class TransportOptions(msgspec.Struct, frozen=True):
    """How the port behaves."""

    max_receive_bytes: int | None = None
    """Largest ext_proc message; None: enough for a buffered body that `--max-body` refuses with a 413."""
    max_send_bytes: int | None = None


class GrpcioTransport:
    """Serves ExternalProcessor/Process. `server` may carry other services on the same port."""

    def __init__(self, picker: Picker, limits: Limits, now: Callable[[], float], options: TransportOptions) -> None:
        """
        Args:
            now: seconds, monotonic; the one clock of every exchange.
        """
        self._picker = picker
        self._limits = limits
        self._now = now
        self._deadlines = Deadlines(now)
        self._peers: OrderedDict[str, Connection] = OrderedDict()
        self.streams_open = 0
        self.streams_total = 0
        receive = options.max_receive_bytes
        self.server = aio.server(
            options=[
                # Thousands of streams may open at once: grpc's default is to drop those over 1000 that wait.
                ("grpc.server.max_pending_requests", 1_000_000),
                ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
                ("grpc.max_concurrent_streams", 1_000_000),
                ("grpc.max_receive_message_length", 2 * limits.max_body + (1 << 20) if receive is None else receive),
                ("grpc.max_send_message_length", -1 if options.max_send_bytes is None else options.max_send_bytes),
                # Gateways ping every few seconds; gRPC's default takes the third for abuse and cuts every stream.
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),
            ]
        )
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._process)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),))

    def listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Bind "host:port"; returns the port. Raises RuntimeError when it is taken."""
        if credentials is None:
            return self.server.add_insecure_port(address)
        return self.server.add_secure_port(address, credentials)

    async def _process(self, _: object, context: aio.ServicerContext[bytes, bytes]) -> None:
        conversation = Conversation(self._picker, self._limits, self._connection(context.peer()), self._now())
        self.streams_open += 1
        self.streams_total += 1
        try:
            while not conversation.closed and await self._turn(conversation, context):
                pass
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self.streams_open -= 1
            conversation.lose(self._now())

    async def _turn(self, conversation: Conversation, context: aio.ServicerContext[bytes, bytes]) -> bool:
        """One message and its replies; False: there will be no more. A method of its own, so that a large body is not
        kept alive by a variable while the model server thinks."""
        try:
            message = await self._read(context, conversation.next_deadline())
        except TimeoutError:
            replies = conversation.tick(self._now())
        else:
            if message is None:
                return False
            replies = conversation.receive(message, self._now())
        for reply in replies:
            await context.write(reply)
        return True

    async def _read(self, context: aio.ServicerContext[bytes, bytes], deadline: float | None) -> bytes | None:
        """The next message; None: there will be none. Raises TimeoutError at the deadline."""
        message: object
        if deadline is None:
            message = await context.read()
        else:
            message = await self._deadlines.before(deadline, context.read())
        return message if isinstance(message, bytes) else None  # aio.EOF

    def _connection(self, peer: str) -> Connection:
        connection = self._peers.get(peer)
        if connection is None:
            connection = self._peers[peer] = Connection(peer)
            if len(self._peers) > PEERS_REMEMBERED:
                self._peers.popitem(last=False)
        return connection
