"""TLS for our own HTTP/2.

In: PEM, a least version and cipher suites by the names that Go's flags use. Out: an SSLContext that offers h2 alone.
Rules here:
- The key never lies readable on a disk.
- A suite that HTTP/2 forbids, or that does not exist, is an error at start.
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


def server_context(tls: Tls) -> ssl.SSLContext:
    """Raises ssl.SSLError for PEM that does not belong together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = tls.min_version
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if tls.ciphers:
        context.set_ciphers(":".join(tls.ciphers))
    context.set_alpn_protocols(["h2"])
    _load(context, tls)
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
