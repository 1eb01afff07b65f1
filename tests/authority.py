"""A certificate authority for tests, and folders as a Kubernetes secret is mounted."""

from __future__ import annotations

import ipaddress
import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
_swaps = itertools.count()


class Pair(msgspec.Struct, frozen=True):
    """A key and its certificate, in PEM."""

    key: bytes
    certificate: bytes

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.certificate).serial_number

    def write(self, folder: Path) -> Path:
        """As tls.key and tls.crt, which OpenSSL's clients read."""
        folder.mkdir(exist_ok=True)
        (folder / "tls.key").write_bytes(self.key)
        (folder / "tls.crt").write_bytes(self.certificate)
        return folder

    def mount(self, folder: Path) -> Path:
        """As kubelet does it: both files change in one instant, by the swap of a link to their folder."""
        folder.mkdir(exist_ok=True)
        version, fresh = self.write(folder / f"..{next(_swaps)}"), folder / "..data_tmp"
        fresh.symlink_to(version.name)
        fresh.rename(folder / "..data")
        for name in ("tls.key", "tls.crt"):
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(f"..data/{name}")
        return folder


class Authority:
    """Signs certificates of 127.0.0.1, for servers and for clients alike."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._name, self._key.public_key(), ca=True)
        self.pem = self._certificate.public_bytes(Encoding.PEM)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.pem)
        return path

    def issue(self, kind: Literal["ec", "rsa"] = "ec") -> Pair:
        """A pair that no other call returns."""
        key = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "ec"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "picker")])
        certificate = self._sign(name, key.public_key(), ca=False)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Pair(private, certificate.public_bytes(Encoding.PEM))

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, ca: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        authority = self._key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), critical=False)
        )
        if not ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())
