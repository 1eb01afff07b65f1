"""gRPC on sockets, through our own HTTP/2.

In: bytes of connections. Out: bytes, at most one write for all that one read made us say.
Rules here:
- A connection's protocol is `http2/`, a call's is its own; this file moves bytes and events between them.
- A peer that does not read is not read either (its replies are bounded so), and after a while it is cut off.
- One timer looks after all connections and calls, four times a second.
Rejected: BufferedProtocol, which saves a copy that does not show; a task a stream, most of what grpc.aio costs.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Final, cast

from epp.errors import ProtocolError
from epp.extproc.conversation import Connection
from epp.extproc.http2.connection import ServerConnection
from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, Event, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import Code
from epp.extproc.http2.messages import Status
from epp.extproc.transport.options import Call, Methods, Tls
from epp.extproc.transport.tls import RenewableContext

SWEEP: Final = 0.25
"""Seconds between two looks at what takes too long."""
WRITE_BUFFER: Final = 256 * 1024
"""Bytes that wait for the socket before we stop reading from it."""
BACKLOG: Final = 4096


class WireTransport:
    """A port and its connections."""

    def __init__(self, methods: Methods, limits: ConnectionLimits, now: Callable[[], float]) -> None:
        """
        Args:
            now: seconds, monotonic; the one clock of every connection and call.
        """
        self.methods = methods
        self.limits = limits
        self.now = now
        self.breaches: Counter[str] = Counter()
        self.streams_open = 0
        self.streams_total = 0
        self.peers: set[Peer] = set()
        self._server: asyncio.Server | None = None
        self._context: RenewableContext | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        """Set whenever no connection is left."""

    async def listen(self, host: str, port: int, tls: Tls | None = None) -> int:
        """Bind and serve; see `Transport.listen`."""
        context = self._context = None if tls is None else RenewableContext(tls)
        bound = _bind(host, port)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Peer(self),
            sock=bound,
            backlog=BACKLOG,
            ssl=context,
            ssl_handshake_timeout=None if context is None else self.limits.preface_timeout,
        )
        self._timer = loop.call_later(SWEEP, self._sweep)
        number: int = bound.getsockname()[1]
        return number

    def renew(self, tls: Tls) -> None:
        """New connections are served with this; see `Transport.renew`."""
        assert self._context is not None
        self._context.renew(tls)

    async def stop(self, grace: float) -> None:
        """Take no more calls, and end those under way after so many seconds."""
        if self._server is not None:
            self._server.close()
        for peer in tuple(self.peers):
            peer.drain()
        try:
            async with asyncio.timeout(grace):
                await self._all_gone()
        except TimeoutError:
            for peer in tuple(self.peers):
                peer.close()
            await asyncio.sleep(0)
            for peer in tuple(self.peers):
                peer.abort()
            await self._all_gone()
        if self._timer is not None:
            self._timer.cancel()

    def joined(self, peer: Peer) -> None:
        self.peers.add(peer)

    def left(self, peer: Peer) -> None:
        self.peers.discard(peer)
        if not self.peers:
            self._gone.set()

    async def _all_gone(self) -> None:
        while self.peers:
            self._gone.clear()
            await self._gone.wait()

    def _sweep(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SWEEP, self._sweep)
        now = self.now()
        for peer in tuple(self.peers):
            peer.tick(now)


class Peer(asyncio.Protocol):
    """One connection."""

    def __init__(self, port: WireTransport) -> None:
        self._port = port
        self._now = port.now
        self._connection = ServerConnection(port.limits, port.breaches, port.now())
        self._calls: dict[int, Call] = {}
        self._stuck_at: float | None = None
        """Since when the peer takes no bytes."""

    def __repr__(self) -> str:
        return f"<Peer {self._memory.peer}: {self._connection!r}>"

    # -- what the loop calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        self._memory = Connection(_name(transport.get_extra_info("peername")))
        self._port.joined(self)
        secured: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if secured is not None and secured.selected_alpn_protocol() != "h2":
            self._connection.close("TLS without ALPN h2: this port speaks HTTP/2", Code.INADEQUATE_SECURITY)
        self._write()

    def data_received(self, data: bytes) -> None:
        now = self._now()
        events = self._connection.receive(data, now)
        if events:
            self._handle(events, now)
        self._write()

    def pause_writing(self) -> None:
        self._stuck_at = self._now()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._stuck_at = None
        self._transport.resume_reading()

    def eof_received(self) -> bool:
        return False  # close: a client that says no more hears no more

    def connection_lost(self, _: Exception | None) -> None:
        self._handle(self._connection.lose(), self._now())
        self._port.left(self)

    # -- what the port calls -------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        if self._stuck_at is not None and now - self._stuck_at >= self._port.limits.keepalive_timeout:
            self._port.breaches["keepalive_timeout"] += 1
            self._transport.abort()
            return
        self._handle(self._connection.tick(now), now)
        for number, call in tuple(self._calls.items()):
            deadline = call.next_deadline()
            if deadline is not None and deadline <= now:
                self._reply(number, call, call.tick(now), now)
        self._write()

    def drain(self) -> None:
        self._connection.drain(self._now())
        self._write()

    def close(self) -> None:
        self._handle(self._connection.close(), self._now())
        self._write()

    def abort(self) -> None:
        self._transport.abort()

    # -- events --------------------------------------------------------------------------------------------------

    def _handle(self, events: list[Event], now: float) -> None:
        for event in events:
            number = event.stream
            match event:
                case MessageReceived():
                    call = self._calls.get(number)
                    if call is not None:
                        self._receive(number, call, event.data, now)
                case CallStarted():
                    self._open(number, event.path, now)
                case CallEnded():
                    call = self._calls.get(number)
                    if call is not None and call.ends_with_peer:
                        self._over(number, call, now)
                        self._connection.end(number)
                case CallLost():
                    call = self._calls.get(number)
                    if call is not None:
                        self._over(number, call, now)

    def _open(self, number: int, path: str, now: float) -> None:
        open_call = self._port.methods.get(path)
        if open_call is None:
            self._connection.end(number, Status.UNIMPLEMENTED, f"there is no method {path[:100]} here")
            return
        self._calls[number] = open_call(self._memory, lambda message: self._push(number, message), now)
        self._port.streams_open += 1
        self._port.streams_total += 1

    def _receive(self, number: int, call: Call, message: bytes, now: float) -> None:
        try:
            replies = call.receive(message, now)
        except ProtocolError as error:
            self._over(number, call, now)
            self._connection.end(number, Status.INVALID_ARGUMENT, str(error))
        else:
            self._reply(number, call, replies, now)

    def _reply(self, number: int, call: Call, replies: list[bytes], now: float) -> None:
        for reply in replies:
            self._connection.send(number, reply)
        if call.closed:
            self._over(number, call, now)
            self._connection.end(number)

    def _push(self, number: int, message: bytes) -> None:
        self._connection.send(number, message)
        self._write()

    def _over(self, number: int, call: Call, now: float) -> None:
        del self._calls[number]
        self._port.streams_open -= 1
        call.lose(now)

    def _write(self) -> None:
        out = self._connection.output()
        if out:
            self._transport.write(out)
        if self._connection.is_closed:
            self._transport.close()
        elif self._connection.is_drained:
            self.close()


def _bind(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    if ":" not in host:
        return socket.create_server((host, port), backlog=BACKLOG)
    both = host == "::" and socket.has_dualstack_ipv6()
    if host == "::" and not both:
        return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)
    return socket.create_server((host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=both)


def _name(address: object) -> str:
    """ "ip:port" of a peer, IPv6 in brackets."""
    if not isinstance(address, tuple):
        return "unknown"
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
