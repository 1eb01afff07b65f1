"""The certificates of the ports, and those of clients that they take.

In: the folders and files that flags name, or nothing. Out: PEM bytes, read at start and again whenever they change.
Rules here:
- A key that is made here never touches the disk, and no key is ever logged.
- What cannot work is a ConfigError at start, not a handshake that fails later. Later the last good pair stays in use,
  whatever became of the files, and they are tried again until they are good.
Rejected: RSA-4096 as the reference makes it, 0.1 to 1 s of CPU at each start where P-256 takes 0.2 ms; Envoy does not
verify the picker by default, so the certificate is there for encryption.
Source: llm-d router, docs on TLS: `tls.crt` and `tls.key` in a folder, as a Kubernetes secret is mounted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from epp.errors import ConfigError
from epp.telemetry.log import Problems
from epp.watch import FileWatch

logger = logging.getLogger("epp.tls")

NAME: Final = "epp"
VALIDITY: Final = timedelta(days=3650)
"""As the reference's: a picker may run for long, and nobody renews what lives in its memory."""
LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at the files."""


class Credentials(msgspec.Struct, frozen=True):
    """What a port shows, and whom it lets in."""

    key: bytes
    """PEM."""
    certificate: bytes
    """PEM, intermediates behind it."""
    client_ca: bytes = b""
    """PEM of the authorities whose clients are let in; empty: everybody, without a certificate."""


class CredentialFiles(msgspec.Struct, frozen=True):
    """Where the credentials of a port lie, and which flags said so."""

    folder: str
    """With tls.crt and tls.key; empty: a certificate made at each reading."""
    client_ca: str = ""
    """File of authorities; empty: no client is asked for a certificate."""
    folder_flag: str = "--cert-path"
    client_ca_flag: str = "--client-ca-file"

    @property
    def paths(self) -> tuple[Path, ...]:
        pair = (Path(self.folder, "tls.key"), Path(self.folder, "tls.crt")) if self.folder else ()
        return (*pair, Path(self.client_ca)) if self.client_ca else pair

    def read(self) -> Credentials:
        """Read all of them.

        Raises:
            ConfigError: a file is missing or unreadable, is not PEM, or the key is not the certificate's.
        """
        key, certificate = self._pair() if self.folder else self_signed()
        return Credentials(key, certificate, self._authorities() if self.client_ca else b"")

    def _pair(self) -> tuple[bytes, bytes]:
        key_file, file = self.paths[:2]
        wanted = f"{self.folder_flag} names a folder with tls.crt and tls.key that the picker's user may read"
        pem, chain = _read(key_file, wanted), _read(file, wanted)
        try:
            # Proving that RSA's primes are prime takes 0.3 s for 4096 bits; who wrote the file is trusted to know.
            key = load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError("not a PEM private key without a password", file=str(key_file)) from None
        certificate = _certificates(chain, file)[0]
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        try:
            belongs = key.public_key().public_bytes(*form) == certificate.public_key().public_bytes(*form)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"its first certificate cannot be used: {error}", file=str(file)) from None
        if not belongs:
            raise ConfigError("its first certificate does not belong to tls.key beside it", file=str(file))
        return pem, chain

    def _authorities(self) -> bytes:
        file = Path(self.client_ca)
        pem = _read(file, f"{self.client_ca_flag} names a PEM file that the picker's user may read")
        _certificates(pem, file)
        return pem


class Renewal:
    """Follows the files of one port."""

    def __init__(self, files: CredentialFiles, renew: Callable[[Credentials], None], problems: Problems) -> None:
        """Whoever reads the files for the first time does it afterwards, so that no change is missed between.

        Args:
            renew: has the port use what was read; called in a thread. Raises ConfigError: it cannot.
        """
        self._files = files
        self._renew = renew
        self._problems = problems
        self._watch = FileWatch(*files.paths)
        self.failures = 0
        """Times that changed files were not taken."""

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            await self.look()

    async def look(self) -> None:
        """Take the files if they have changed. In a thread, for they may lie on a slow disk."""
        if not self._watch.has_changed():
            return
        where = self._files.folder
        try:
            read = await asyncio.to_thread(self._take)
        except ConfigError as error:
            self.failures += 1
            self._watch.refuse()
            self._problems.tell(f"tls {where}", "a changed certificate is not taken, the last one stays: %s", error)
            return
        shown = x509.load_pem_x509_certificate(read.certificate)
        until = f"{shown.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        logger.info("%s changed: new connections get certificate %x, valid until %s", where, shown.serial_number, until)

    def _take(self) -> Credentials:
        read = self._files.read()
        self._renew(read)
        return read


def self_signed(names: tuple[str, ...] = (NAME, "localhost")) -> tuple[bytes, bytes]:
    """Key and certificate: one that signs itself, made now, valid from an hour ago for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)


def _certificates(pem: bytes, file: Path) -> list[x509.Certificate]:
    """At least one. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError("no PEM certificate in it", file=str(file)) from None


def _read(file: Path, wanted: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); {wanted}", file=str(file)) from None
