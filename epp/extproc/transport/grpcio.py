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
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Final

import grpc
from grpc import aio

from epp.errors import ProtocolError
from epp.extproc.conversation import Connection
from epp.extproc.transport.deadlines import Deadlines
from epp.extproc.transport.options import Call, Methods, Tls
from epp.extproc.transport.tls import server_context

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
        self._renewed: deque[grpc.ServerCertificateConfiguration] = deque(maxlen=1)
        """The latest renewal that grpcio has not taken yet: it asks before each handshake, from threads of its own, and
        a configuration is good for one answer."""
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
                credentials = grpc.dynamic_ssl_server_credentials(
                    _configuration(tls),
                    self._fetch,  # type: ignore[arg-type]  # may return None, says grpcio; its stubs do not
                    require_client_authentication=bool(tls.client_ca),
                )
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from None
        await self._server.start()
        return bound

    def renew(self, tls: Tls) -> None:
        """New connections are served with this; see `Transport.renew`."""
        self._renewed.append(_configuration(tls))

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What grpcio is to go on with; None: what it has."""
        try:
            return self._renewed.pop()
        except IndexError:
            return None

    async def stop(self, grace: float) -> None:
        """Take no more calls, and end those under way after so many seconds."""
        await self._server.stop(grace)

    async def _serve(self, method: str, context: Context) -> None:
        outgoing = Outgoing(context)
        call = self._methods[method](self._connection(context.peer()), outgoing.push, self._now())
        self.streams_open += 1
        self.streams_total += 1
        try:
            while not call.closed and await self._turn(call, context, outgoing):
                pass
            if not call.closed and not call.ends_with_peer:
                await asyncio.get_running_loop().create_future()  # until it is cancelled
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self.streams_open -= 1
            call.lose(self._now())
            outgoing.end()

    async def _turn(self, call: Call, context: Context, outgoing: Outgoing) -> bool:
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
            await outgoing.write(reply)
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


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    """Raises ConfigError: what OpenSSL does not take is not left to grpcio, which tells nobody until a handshake."""
    server_context(tls)
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], tls.client_ca or None)


class Outgoing:
    """What one call says: replies, and what is pushed while its client may go on asking. One message at a time, for
    grpcio takes no second one before the first is gone."""

    __slots__ = ("_context", "_pushed", "_pushing", "_turn")

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = asyncio.Lock()
        self._pushed: deque[bytes] = deque()
        self._pushing: asyncio.Task[None] | None = None

    async def write(self, reply: bytes) -> None:
        """Say this, after what was pushed before it."""
        async with self._turn:
            while self._pushed:
                await self._context.write(self._pushed.popleft())
            await self._context.write(reply)

    def push(self, message: bytes) -> None:
        """Say this soon."""
        self._pushed.append(message)
        if self._pushing is None or self._pushing.done():
            self._pushing = asyncio.create_task(self._push())

    def end(self) -> None:
        """Nothing more can be said."""
        if self._pushing is not None:
            self._pushing.cancel()

    async def _push(self) -> None:
        async with self._turn:
            while self._pushed:
                await self._context.write(self._pushed.popleft())


def _handlers(method: str, serve: Callable[[str, Context], Awaitable[None]]) -> grpc.GenericRpcHandler:
    """One method, "/package.Service/Method", as grpcio wants it."""

    async def handle(_: object, context: Context) -> None:
        await serve(method, context)

    _, service, name = method.split("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(handle)
    return grpc.method_handlers_generic_handler(service, {name: handler})
