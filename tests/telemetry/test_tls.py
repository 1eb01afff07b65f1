from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from epp.errors import ConfigError
from epp.telemetry.tls import key_and_certificate, self_signed


def write(folder: Path, key: bytes, certificate: bytes) -> str:
    (folder / "tls.key").write_bytes(key)
    (folder / "tls.crt").write_bytes(certificate)
    return str(folder)


def test_a_self_signed_certificate_is_valid_now_and_signed_by_its_own_key() -> None:
    _, pem = self_signed()
    certificate = x509.load_pem_x509_certificate(pem)
    certificate.verify_directly_issued_by(certificate)
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now - timedelta(minutes=30)
    assert certificate.not_valid_after_utc > now + timedelta(days=3600)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_no_two_certificates_share_a_key() -> None:
    assert self_signed()[0] != self_signed()[0]


def test_tls_takes_the_pair_from_a_folder(tmp_path: Path) -> None:
    pair = self_signed()
    folder = write(tmp_path, *pair)
    assert key_and_certificate(folder) == pair
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")  # OpenSSL agrees


def test_without_a_folder_a_certificate_is_made() -> None:
    key, certificate = key_and_certificate("")
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert certificate.startswith(b"-----BEGIN CERTIFICATE-----")


def test_a_missing_file_is_named_with_what_the_flag_wants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.key: cannot be read \(No such file.*--cert-path names a folder"):
        key_and_certificate(str(tmp_path))


def test_what_is_not_pem_is_named(tmp_path: Path) -> None:
    key, certificate = self_signed()
    with pytest.raises(ConfigError, match=r"tls\.key: not a PEM private key"):
        key_and_certificate(write(tmp_path, b"garbage", certificate))
    with pytest.raises(ConfigError, match=r"tls\.crt: no PEM certificate"):
        key_and_certificate(write(tmp_path, key, b"garbage"))


def test_a_key_of_another_certificate_is_an_error_that_does_not_show_the_key(tmp_path: Path) -> None:
    key, _ = self_signed()
    _, certificate = self_signed()
    with pytest.raises(ConfigError, match="does not belong to tls") as caught:
        key_and_certificate(write(tmp_path, key, certificate))
    assert "PRIVATE" not in str(caught.value)
