"""TLS for our own HTTP/2, and for other ports served by asyncio.

In: PEM, a least version and cipher suites by the names that Go's flags use. Out: an SSLContext that offers one
protocol, and can be renewed while it serves.
Rules here:
- The key never lies readable on a disk.
- A suite that HTTP/2 forbids, or that does not exist, is an error at start.
- Each renewal is a context of its own, with session tickets of its own: nobody resumes what an older certificate or an
  authority that is no longer trusted let in.
Rejected: load_cert_chain on the context that serves. It replaces a pair only by one of the same key type (an old ECDSA
certificate stays beside a new RSA one), leaves half a pair when it fails, and load_verify_locations only ever adds.
Source: RFC 9113 section 9.2 and appendix A; k8s.io/component-base/cli/flag for the names.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterable
from typing import Final

from epp.errors import ConfigError
from epp.extproc.transport.options import Tls

VERSIONS: Final = {
    "VersionTLS12": ssl.TLSVersion.TLSv1_2,
    "VersionTLS13": ssl.TLSVersion.TLSv1_3,
}
"""1.0 and 1.1 are not for HTTP/2."""

SUITES: Final = {
    f"TLS_ECDHE_{auth}_WITH_{cipher}": f"ECDHE-{auth}-{openssl}"
    for auth in ("ECDSA", "RSA")
    for cipher, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
        ("CHACHA20_POLY1305", "CHACHA20-POLY1305"),
    )
}
"""What is left for TLS 1.2 when HTTP/2's list of forbidden suites is taken away, by IANA's and by Go's older names."""

NO_CHOICE: Final = frozenset(("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"))
"""TLS 1.3's: always offered, as in Go."""


def least_version(name: str) -> ssl.TLSVersion:
    """Of `--tls-min-version`. Raises ConfigError."""
    try:
        return VERSIONS[name or "VersionTLS12"]
    except KeyError:
        raise ConfigError(f"--tls-min-version {name!r}: {' or '.join(VERSIONS)} is expected") from None


def cipher_suites(names: Iterable[str]) -> tuple[str, ...]:
    """OpenSSL's names of what `--tls-cipher-suites` lists, for TLS 1.2. Raises ConfigError."""
    chosen = []
    for name in (name.strip() for each in names for name in each.split(",") if name.strip()):
        if name in SUITES:
            chosen.append(SUITES[name])
        elif name not in NO_CHOICE:
            raise ConfigError(f"--tls-cipher-suites {name!r}: HTTP/2 takes {', '.join((*SUITES, *sorted(NO_CHOICE)))}")
    return tuple(chosen)


class RenewableContext(ssl.SSLContext):
    """Stands for the latest context: loops are given this one for good, and each handshake begins with `wrap_bio`."""

    def __new__(cls, tls: Tls, protocol: str = "h2") -> RenewableContext:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, tls: Tls, protocol: str = "h2") -> None:
        """
        Args:
            protocol: the only one offered, by its ALPN name.

        Raises:
            ConfigError: see `server_context`.
        """
        self._protocol = protocol
        self.renew(tls)

    def renew(self, tls: Tls) -> None:
        """Handshakes that begin from now on are made with this. Any thread. Raises ConfigError: all is as it was."""
        self._latest = server_context(tls, self._protocol)

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """What asyncio and uvloop begin a handshake with."""
        return self._latest.wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def server_context(tls: Tls, protocol: str = "h2") -> ssl.SSLContext:
    """Raises ConfigError: OpenSSL does not take the certificate, its key or the authorities."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = tls.min_version
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if tls.ciphers:
        context.set_ciphers(":".join(tls.ciphers))
    context.set_alpn_protocols([protocol])
    try:
        _load(context, tls)
        if tls.client_ca:
            context.load_verify_locations(cadata=tls.client_ca.decode("ascii", "ignore"))  # remarks are in any language
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ConfigError(f"OpenSSL refuses the certificate, its key or the client CA: {error}") from None
    return context


def _load(context: ssl.SSLContext, tls: Tls) -> None:
    """`ssl` takes a key from a file alone: it gets one that lies in memory or, where there is none, one that only we
    may read and that is gone a moment later."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("epp-tls", os.MFD_CLOEXEC)
        with os.fdopen(memory, "wb") as file:
            file.write(tls.key + b"\n" + tls.certificate)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{memory}")
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(tls.key + b"\n" + tls.certificate)
            named.flush()
            context.load_cert_chain(named.name)
