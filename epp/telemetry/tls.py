"""The certificate of the ext_proc port.

In: `--cert-path`, or nothing. Out: PEM bytes for grpc.ssl_server_credentials.
Rules here:
- A key that is made here never touches the disk, and no key is ever logged.
- What cannot work is a ConfigError at start, not a handshake that fails later.
Rejected: RSA-4096 as the reference makes it, 0.1 to 1 s of CPU at each start where P-256 takes 0.2 ms; Envoy does not
verify the picker by default, so the certificate is there for encryption.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
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

NAME: Final = "epp"
VALIDITY: Final = timedelta(days=3650)
"""As the reference's: a picker may run for long, and nobody renews what lives in its memory."""


def key_and_certificate(cert_path: str) -> tuple[bytes, bytes]:
    """PEM of the key and of the certificate (intermediates behind it), as grpc.ssl_server_credentials wants them.

    Args:
        cert_path: `--cert-path`; empty: a certificate made now.

    Raises:
        ConfigError: see `from_directory`.
    """
    return from_directory(Path(cert_path)) if cert_path else self_signed()


def self_signed(names: tuple[str, ...] = (NAME, "localhost")) -> tuple[bytes, bytes]:
    """A certificate that signs itself, made now, valid from an hour ago for ten years."""
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


def from_directory(path: Path) -> tuple[bytes, bytes]:
    """Read tls.key and tls.crt, as a Kubernetes TLS secret is mounted.

    Raises:
        ConfigError: a file is missing or unreadable, is not PEM, or the key is not the certificate's.
    """
    pem, chain = _read(path / "tls.key"), _read(path / "tls.crt")
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise ConfigError("not a PEM private key without a password", file=str(path / "tls.key")) from None
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise ConfigError("no PEM certificate in it", file=str(path / "tls.crt")) from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise ConfigError("its first certificate does not belong to tls.key beside it", file=str(path / "tls.crt"))
    return pem, chain


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        message = f"cannot be read ({error.strerror}); --cert-path names a folder with tls.crt and tls.key"
        raise ConfigError(message, file=str(file)) from None
