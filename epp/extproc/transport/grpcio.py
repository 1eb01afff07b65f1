"""gRPC on grpcio's asyncio server.

In: raw message bytes of each call. Out: raw reply bytes. grpcio sees no message type: every method is a stream of bytes
both ways, which on the wire is what unary calls are too.
Rules here:
- A call's end is never an error: Envoy resets nearly every healthy one, and grpcio shows that by chance as EOF or
  as a cancelled read.
- However a stream ends, its call is told so; telling it twice does no harm.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

import grpc
from grpc import aio

from epp.errors import ProtocolError
from epp.extproc.conversation import Connection
from epp.extproc.transport.deadlines import Deadlines
from epp.extproc.transport.options import Call, Methods, Tls

PEERS_REMEMBERED: Final = 1024

Context = aio.ServicerContext[bytes, bytes]


class GrpcioTransport:
    """A port that serves methods; see `Transport`."""

    def __init__(
        self,
        methods: Methods,
        now: Callable[[], float],
        *,
        max_receive_bytes: int = -1,
        max_send_bytes: int = -1,
    ) -> None:
        """
        Args:
            now: seconds, monotonic; the one clock of every call.
            max_receive_bytes: largest message, as `max_send_bytes`; -1: any.
        """
        self._methods = methods
        self._now = now
        self._deadlines = Deadlines(now)
        self._peers: OrderedDict[str, Connection] = OrderedDict()
        self.streams_open = 0
        self.streams_total = 0
        self.breaches: Counter[str] = Counter()
        """Always empty: grpcio does not tell."""
        self._server = aio.server(
            options=[
                # Thousands of streams may open at once: grpc's default is to drop those over 1000 that wait.
                ("grpc.server.max_pending_requests", 1_000_000),
                ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
                ("grpc.max_concurrent_streams", 1_000_000),
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.max_send_message_length", max_send_bytes),
                # Gateways ping every few seconds; gRPC's default takes the third for abuse and cuts every stream.
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),  # else two pickers share a port without a word
            ]
        )
        self._server.add_generic_rpc_handlers([_handlers(method, self._serve) for method in methods])

    async def listen(self, host: str, port: int, tls: Tls | None = None) -> int:
        """Bind and serve; see `Transport.listen`. TLS versions and ciphers are the library's."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, grpc.ssl_server_credentials([(tls.key, tls.certificate)]))
        except RuntimeError as error:
            raise OSError(str(error)) from None
        await self._server.start()
        return bound

    async def stop(self, grace: float) -> None:
        """Take no more calls, and end those under way after so many seconds."""
        await self._server.stop(grace)

    async def _serve(self, method: str, context: Context) -> None:
        pushed: asyncio.Queue[bytes] = asyncio.Queue()
        call = self._methods[method](self._connection(context.peer()), pushed.put_nowait, self._now())
        self.streams_open += 1
        self.streams_total += 1
        try:
            while not call.closed and await self._turn(call, context):
                pass
            while not call.closed and not call.ends_with_peer:
                await context.write(await pushed.get())
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self.streams_open -= 1
            call.lose(self._now())

    async def _turn(self, call: Call, context: Context) -> bool:
        """One message and its replies; False: there will be no more. A method of its own, so that a large body is not
        kept alive by a variable while the model server thinks."""
        try:
            message = await self._read(context, call.next_deadline())
        except TimeoutError:
            replies = call.tick(self._now())
        else:
            if message is None:
                return False
            replies = call.receive(message, self._now())
        for reply in replies:
            await context.write(reply)
        return True

    async def _read(self, context: Context, deadline: float | None) -> bytes | None:
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


def _handlers(method: str, serve: Callable[[str, Context], Awaitable[None]]) -> grpc.GenericRpcHandler:
    """One method, "/package.Service/Method", as grpcio wants it."""

    async def handle(_: object, context: Context) -> None:
        await serve(method, context)

    _, service, name = method.split("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(handle)
    return grpc.method_handlers_generic_handler(service, {name: handler})
