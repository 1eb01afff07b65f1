"""What both transports are told, and what they carry.

A transport knows gRPC and no service: for each method it is given a function that opens a call, and drives that call
with the messages that come.
"""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from epp.extproc.conversation import Connection


class Call(Protocol):
    """One call from its first message to its end. `Conversation` is one; the health service has others."""

    @property
    def closed(self) -> bool:
        """All is answered: the call is to be ended with OK."""

    @property
    def ends_with_peer(self) -> bool:
        """The peer's half-close ends it; else it goes on for as long as the peer waits."""

    def receive(self, message: bytes, now: float) -> list[bytes]:
        """Take a message, return replies. Raises ProtocolError: end the call with INVALID_ARGUMENT."""

    def next_deadline(self) -> float | None: ...

    def tick(self, now: float) -> list[bytes]:
        """`next_deadline` has passed."""

    def lose(self, now: float) -> None:
        """It is over, for whatever reason. May be called again."""


Push = Callable[[bytes], None]
"""Sends a message that answers none."""
OpenCall = Callable[[Connection, Push, float], Call]
"""Opens a call of a connection, now."""
Methods = Mapping[str, OpenCall]
"""By "/package.Service/Method"."""


class Tls(msgspec.Struct, frozen=True):
    """What TLS is served with. `Transport.renew` takes another one with the same settings."""

    key: bytes
    """PEM."""
    certificate: bytes
    """PEM, intermediates behind it."""
    min_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    ciphers: tuple[str, ...] = ()
    """OpenSSL names for TLS 1.2, for 1.3 has no choice; none: OpenSSL's default."""
    client_ca: bytes = b""
    """PEM: only clients with a certificate of one of these authorities are served; empty: everybody is."""


class Transport(Protocol):
    """A port that serves methods."""

    streams_open: int
    streams_total: int
    breaches: Counter[str]
    """Streams and connections ended for passing a limit, by its name."""

    async def listen(self, host: str, port: int, tls: Tls | None = None) -> int:
        """Bind and serve; returns the port. Raises OSError when it is taken.

        Args:
            host: "::" is every address, IPv4 too.
            port: 0: any that is free.
        """

    def renew(self, tls: Tls) -> None:
        """New connections of a port that listens with TLS are served with this; those that are open go on. May be
        called from any thread. Raises ConfigError: it cannot be used, and nothing has changed."""

    async def stop(self, grace: float) -> None:
        """Take no more calls, and end those under way after so many seconds."""
