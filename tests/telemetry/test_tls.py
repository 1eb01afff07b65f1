from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from epp.errors import ConfigError
from epp.telemetry.log import Problems
from epp.telemetry.tls import CredentialFiles, Credentials, Renewal, self_signed
from tests.authority import Authority, Pair

CA = Authority()


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


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_tls_takes_the_pair_from_a_folder(kind: str, tmp_path: Path) -> None:
    pair = CA.issue("rsa" if kind == "rsa" else "ec")
    folder = pair.write(tmp_path)
    assert CredentialFiles(str(folder)).read() == Credentials(pair.key, pair.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")  # OpenSSL agrees


def test_without_a_folder_a_certificate_is_made() -> None:
    made = CredentialFiles("").read()
    assert made.key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert made.certificate.startswith(b"-----BEGIN CERTIFICATE-----")
    assert made.client_ca == b""


def test_a_missing_file_is_named_with_what_the_flag_wants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.key: cannot be read \(No such file.*--cert-path names a folder"):
        CredentialFiles(str(tmp_path)).read()
    with pytest.raises(ConfigError, match=r"tls\.key: .*--metrics-cert-dir names a folder"):
        CredentialFiles(str(tmp_path), folder_flag="--metrics-cert-dir").read()
    with pytest.raises(ConfigError, match=r"ca\.crt: cannot be read \(No such file.*--client-ca-file names a PEM file"):
        CredentialFiles("", str(tmp_path / "ca.crt")).read()


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's refusal is played: tests may run as root, whom no file refuses."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        ConfigError, match=r"tls\.key: cannot be read \(Permission denied\).*the picker's user may read"
    ):
        CredentialFiles(str(tmp_path)).read()


def test_what_is_not_pem_is_named(tmp_path: Path) -> None:
    key, certificate = self_signed()
    with pytest.raises(ConfigError, match=r"tls\.key: not a PEM private key"):
        CredentialFiles(str(Pair(b"garbage", certificate).write(tmp_path))).read()
    with pytest.raises(ConfigError, match=r"tls\.crt: no PEM certificate"):
        CredentialFiles(str(Pair(key, b"garbage").write(tmp_path))).read()
    (tmp_path / "ca.crt").write_bytes(key)
    with pytest.raises(ConfigError, match=r"ca\.crt: no PEM certificate") as caught:
        CredentialFiles("", str(tmp_path / "ca.crt")).read()
    assert "PRIVATE" not in str(caught.value)


def test_a_key_of_another_certificate_is_an_error_that_does_not_show_the_key(tmp_path: Path) -> None:
    folder = Pair(CA.issue().key, CA.issue().certificate).write(tmp_path)
    with pytest.raises(ConfigError, match="does not belong to tls") as caught:
        CredentialFiles(str(folder)).read()
    assert "PRIVATE" not in str(caught.value)


class Followed:
    """A folder that is followed, and what a port was given of it."""

    def __init__(self, folder: Path, client_ca: str = "") -> None:
        self.given: list[Credentials] = []
        self.threads: set[int] = set()
        self.refuse = ""
        problems = Problems(logging.getLogger("epp.tests"))
        self.renewal = Renewal(CredentialFiles(str(folder), client_ca), self.take, problems)

    def take(self, read: Credentials) -> None:
        self.threads.add(threading.get_ident())
        if self.refuse:
            raise ConfigError(self.refuse)
        self.given.append(read)

    async def looks(self, times: int) -> list[bytes]:
        """The certificates that a port was given during so many looks."""
        before = len(self.given)
        for _ in range(times):
            await self.renewal.look()
        return [each.certificate for each in self.given[before:]]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "epp"):
        yield caplog


@pytest.mark.anyio
async def test_a_mounted_secret_that_is_swapped_is_taken_once(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    old, new = CA.issue(), CA.issue()
    folder = old.mount(tmp_path / "secret")
    followed = Followed(folder)
    assert await followed.looks(3) == []
    new.mount(folder)
    assert await followed.looks(1) == []  # it may still be written to
    assert await followed.looks(3) == [new.certificate]
    assert followed.threads.isdisjoint({threading.get_ident()})
    (record,) = log.records
    assert record.getMessage().startswith(f"{folder} changed: new connections get certificate {new.serial:x}, valid")


@pytest.mark.anyio
async def test_half_a_pair_is_refused_told_once_and_taken_when_it_is_whole(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    old, new = CA.issue(), CA.issue()
    folder = old.write(tmp_path / "secret")
    followed = Followed(folder)
    (folder / "tls.crt").write_bytes(new.certificate)  # and its key is not there yet
    assert await followed.looks(4) == []
    assert followed.renewal.failures == 3
    (folder / "tls.crt").write_bytes(new.certificate[:200])
    assert await followed.looks(2) == []
    (folder / "tls.key").unlink()
    assert await followed.looks(2) == []
    new.write(folder)
    assert await followed.looks(3) == [new.certificate]
    refused, taken = (record.getMessage() for record in log.records)
    assert "not taken, the last one stays" in refused
    assert "does not belong to tls.key" in refused
    assert f"{new.serial:x}" in taken
    assert "PRIVATE" not in log.text


@pytest.mark.anyio
async def test_what_the_port_refuses_is_offered_again(tmp_path: Path) -> None:
    pair = CA.issue()
    followed = Followed(CA.issue().write(tmp_path))
    pair.write(tmp_path)
    followed.refuse = "OpenSSL refuses it"
    assert await followed.looks(3) == []
    assert followed.renewal.failures == 2
    followed.refuse = ""
    assert await followed.looks(3) == [pair.certificate]


@pytest.mark.anyio
async def test_a_client_ca_that_changes_is_taken_with_the_same_pair(tmp_path: Path) -> None:
    pair, other = CA.issue(), Authority("other")
    file = CA.write(tmp_path / "ca.crt")
    followed = Followed(pair.write(tmp_path / "secret"), str(file))
    other.write(file)
    assert await followed.looks(2) == [pair.certificate]
    assert followed.given == [Credentials(pair.key, pair.certificate, other.pem)]
