"""TLS versions and ciphers, which the wire transport lets an operator choose; certificates that change and clients'
certificates, on both transports and on the metrics port; seen from Python's own client."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from cryptography import x509

from epp.errors import ConfigError
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import PREFACE
from epp.extproc.transport.grpcio import GrpcioTransport
from epp.extproc.transport.options import Tls, Transport
from epp.extproc.transport.tls import RenewableContext
from epp.extproc.transport.wire import WireTransport
from epp.telemetry.health import Health
from epp.telemetry.http import MetricsServer, Views
from tests.authority import HOST, Authority, Pair
from tests.interop.serving import own_certificate, wire

pytestmark = pytest.mark.anyio
CHOSEN = "ECDHE-ECDSA-AES256-GCM-SHA384"
OTHER = "ECDHE-ECDSA-AES128-GCM-SHA256"
REFUSED = (ssl.SSLError, ConnectionResetError)
"""What a handshake that fails looks like: asyncio's server closes the socket before OpenSSL's alert is written."""


def client(newest: ssl.TLSVersion, ciphers: str = "", alpn: str = "h2") -> ssl.SSLContext:
    """Takes any certificate, and no version later than this one."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = newest
    context.set_alpn_protocols([alpn])
    if ciphers:
        context.set_ciphers(ciphers)
    return context


async def agreed(port: int, context: ssl.SSLContext) -> tuple[str | None, str, str | None]:
    """Version, cipher and protocol of a connection that lives. Raises OSError: there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(PREFACE)
        async with asyncio.timeout(5):
            assert len(await reader.readexactly(9)) == 9  # the head of the server's SETTINGS
        secured: ssl.SSLObject = writer.get_extra_info("ssl_object")
        cipher = secured.cipher()
        assert cipher is not None
        return secured.version(), cipher[0], secured.selected_alpn_protocol()
    finally:
        writer.transport.abort()


async def test_versions_from_1_2_on_are_served_unless_told_otherwise() -> None:
    async with wire(tls=own_certificate()) as served:
        assert (await agreed(served.port, client(ssl.TLSVersion.TLSv1_3)))[::2] == ("TLSv1.3", "h2")
        assert (await agreed(served.port, client(ssl.TLSVersion.TLSv1_2)))[::2] == ("TLSv1.2", "h2")


async def test_a_client_of_an_older_version_than_the_least_is_refused() -> None:
    tls = msgspec.structs.replace(own_certificate(), min_version=ssl.TLSVersion.TLSv1_3)
    async with wire(tls=tls) as served:
        with pytest.raises(REFUSED):
            await agreed(served.port, client(ssl.TLSVersion.TLSv1_2))
        version, _, protocol = await agreed(served.port, client(ssl.TLSVersion.TLSv1_3))
        assert (version, protocol) == ("TLSv1.3", "h2")
        assert len(served.transport.peers) <= 1


async def test_a_chosen_cipher_is_the_only_one_of_tls_1_2_and_leaves_1_3_alone() -> None:
    tls = msgspec.structs.replace(own_certificate(), ciphers=(CHOSEN,))
    async with wire(tls=tls) as served:
        _, cipher, _ = await agreed(served.port, client(ssl.TLSVersion.TLSv1_2))
        assert cipher == CHOSEN
        with pytest.raises(REFUSED):
            await agreed(served.port, client(ssl.TLSVersion.TLSv1_2, OTHER))
        version, cipher, _ = await agreed(served.port, client(ssl.TLSVersion.TLSv1_3, OTHER))
        assert (version, cipher[:4]) == ("TLSv1.3", "TLS_")


async def test_the_first_of_several_ciphers_that_both_have_is_taken() -> None:
    tls = msgspec.structs.replace(own_certificate(), ciphers=(CHOSEN, OTHER))
    async with wire(tls=tls) as served:
        for offered in (CHOSEN, OTHER):
            _, cipher, _ = await agreed(served.port, client(ssl.TLSVersion.TLSv1_2, offered))
            assert cipher == offered


def test_the_key_lies_on_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("no memfd_create here: it is Linux's")

    def refuse(*_: object) -> None:
        raise AssertionError("a file was made")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    RenewableContext(own_certificate())
    links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert not [each for each in links if "epp-tls" in os.readlink(each)]  # nor in memory any longer


# -- certificates that change, and clients' certificates -----------------------------------------------------------

CA = Authority()
BOTH = pytest.mark.parametrize("carrier", ["wire", "grpcio"])
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""An empty frame of it."""


def offered(pair: Pair, client_ca: bytes = b"") -> Tls:
    return Tls(pair.key, pair.certificate, client_ca=client_ca)


class Port:
    """A port that serves health."""

    def __init__(self, transport: Transport, number: int) -> None:
        self.transport = transport
        self.number = number


@asynccontextmanager
async def port(carrier: str, tls: Tls) -> AsyncIterator[Port]:
    health = Health()
    now = asyncio.get_running_loop().time
    transport: Transport = (
        WireTransport(health.methods(), ConnectionLimits(), now)
        if carrier == "wire"
        else GrpcioTransport(health.methods(), now)
    )
    number = await transport.listen(HOST, 0, tls)
    try:
        yield Port(transport, number)
    finally:
        await transport.stop(0)


def verifying(
    folder: Path, shown: Pair | None = None, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    """A client that takes certificates of CA for 127.0.0.1 alone, and may show one of its own."""
    context = ssl.create_default_context(cadata=CA.pem.decode())
    context.maximum_version = newest
    context.set_alpn_protocols(["h2"])
    if shown is not None:
        shown.write(folder)
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return context


def serial_of(der: bytes | None) -> int:
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


async def serial(number: int, context: ssl.SSLContext) -> int:
    """Of the certificate of a connection that lives. Raises OSError: there is none."""
    reader, writer = await asyncio.open_connection(HOST, number, ssl=context)
    try:
        writer.write(PREFACE)
        async with asyncio.timeout(5):
            head = await reader.read(9)  # of the server's SETTINGS
        if not head:
            raise ConnectionResetError("closed before SETTINGS")
        secured: ssl.SSLObject = writer.get_extra_info("ssl_object")
        return serial_of(secured.getpeercert(binary_form=True))
    finally:
        writer.transport.abort()


@BOTH
async def test_new_connections_get_a_renewed_certificate_and_open_ones_go_on(carrier: str, tmp_path: Path) -> None:
    """That streams go on is shown through Envoy, in tests/e2e."""
    pairs = [CA.issue() for _ in range(4)]
    client = verifying(tmp_path)
    async with port(carrier, offered(pairs[0])) as served:
        reader, writer = await asyncio.open_connection(HOST, served.number, ssl=client)
        try:
            writer.write(PREFACE + SETTINGS)
            await answered(reader, writer, b"before..")
            for pair in pairs[1:]:
                served.transport.renew(offered(pair))
                assert await serial(served.number, client) == pair.serial
                assert await serial(served.number, client) == pair.serial
            await answered(reader, writer, b"after...")
        finally:
            writer.transport.abort()


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, words: bytes) -> None:
    """Send a PING with these eight bytes; they must come back."""
    writer.write(b"\0\0\x08\x06\0\0\0\0\0" + words)
    async with asyncio.timeout(5):
        await reader.readuntil(b"\0\0\x08\x06\x01\0\0\0\0" + words)


@BOTH
async def test_nothing_of_a_certificate_of_another_key_type_stays(carrier: str, tmp_path: Path) -> None:
    """A client that prefers ECDSA would get the old certificate if it were still there beside the new RSA one."""
    old, new = CA.issue("ec"), CA.issue("rsa")
    async with port(carrier, offered(old)) as served:
        served.transport.renew(offered(new))
        for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert await serial(served.number, verifying(tmp_path, newest=newest)) == new.serial


@BOTH
async def test_what_openssl_refuses_changes_nothing(carrier: str, tmp_path: Path) -> None:
    old, new = CA.issue(), CA.issue()
    client = verifying(tmp_path)
    mismatched = Tls(old.key, new.certificate)
    async with port(carrier, offered(old)) as served:
        with pytest.raises(ConfigError, match="OpenSSL refuses"):
            served.transport.renew(mismatched)
        assert await serial(served.number, client) == old.serial
        served.transport.renew(offered(new))
        assert await serial(served.number, client) == new.serial
        with pytest.raises(ConfigError, match="OpenSSL refuses"):
            await port(carrier, mismatched).__aenter__()


@BOTH
async def test_a_handshake_that_has_begun_ends_well_though_the_certificate_changes(
    carrier: str, tmp_path: Path
) -> None:
    """Half a ClientHello, a new certificate, the rest."""
    old, new = CA.issue(), CA.issue()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secured = verifying(tmp_path).wrap_bio(incoming, outgoing, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        secured.do_handshake()
    hello = outgoing.read()
    async with port(carrier, offered(old)) as served:
        reader, writer = await asyncio.open_connection(HOST, served.number)
        try:
            writer.write(hello[: len(hello) // 2])
            assert await serial(served.number, verifying(tmp_path)) == old.serial  # the server has read that by now
            served.transport.renew(offered(new))
            writer.write(hello[len(hello) // 2 :])
            async with asyncio.timeout(5):
                while True:
                    incoming.write(await reader.read(65536))
                    try:
                        secured.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
        finally:
            writer.transport.abort()
        assert serial_of(secured.getpeercert(binary_form=True)) == old.serial
        assert await serial(served.number, verifying(tmp_path)) == new.serial


@BOTH
async def test_only_clients_of_the_authority_are_served(carrier: str, tmp_path: Path) -> None:
    clients, strangers = Authority("clients"), Authority("strangers")
    pair = CA.issue()
    known, stranger = verifying(tmp_path, clients.issue()), verifying(tmp_path, strangers.issue())
    async with port(carrier, offered(pair, "# Authorit\u00e9s\n".encode() + clients.pem)) as served:
        assert await serial(served.number, known) == pair.serial
        for refused in (stranger, verifying(tmp_path), verifying(tmp_path, newest=ssl.TLSVersion.TLSv1_2)):
            with pytest.raises((*REFUSED, OSError)):
                await serial(served.number, refused)
        assert await serial(served.number, known) == pair.serial
        # Two authorities, while one takes the other's place; then only the new one.
        served.transport.renew(offered(pair, clients.pem + strangers.pem))
        assert {await serial(served.number, each) for each in (known, stranger)} == {pair.serial}
        served.transport.renew(offered(pair, strangers.pem))
        assert await serial(served.number, stranger) == pair.serial
        with pytest.raises((*REFUSED, OSError)):
            await serial(served.number, known)


def resume(number: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
    """Whether a session was resumed by a connection that lives, and its own. Raises OSError: there is none."""
    with (
        socket.create_connection((HOST, number), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=HOST, session=session) as secured,
    ):
        secured.sendall(PREFACE)
        if not secured.recv(9):  # TLS 1.3's tickets come before it
            raise ConnectionResetError("closed before SETTINGS")
        return bool(secured.session_reused), secured.session


@BOTH
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_is_not_resumed_after_its_authority_has_gone(
    carrier: str, newest: ssl.TLSVersion, tmp_path: Path
) -> None:
    """Resumption verifies no certificate: it would keep the door open for as long as a ticket is valid."""
    gone, trusted, pair = Authority("gone"), Authority("trusted"), CA.issue()
    client = verifying(tmp_path, gone.issue(), newest)
    async with port(carrier, offered(pair, gone.pem)) as served:
        _, session = await asyncio.to_thread(resume, served.number, client, None)
        again, _ = await asyncio.to_thread(resume, served.number, client, session)
        assert again  # else this test would show nothing
        served.transport.renew(offered(pair, trusted.pem))
        with pytest.raises((*REFUSED, OSError)):
            await asyncio.to_thread(resume, served.number, client, session)


@asynccontextmanager
async def metrics_page(context: RenewableContext) -> AsyncIterator[str]:
    server = MetricsServer(Views(lambda: iter([b"# a page\n", b"x" * 1_000_000]), lambda n: [], list))
    number = await server.start(HOST, 0, context)
    try:
        yield f"https://{HOST}:{number}/metrics"
    finally:
        await server.stop()


async def page(url: str, client: ssl.SSLContext) -> int:
    """Read it on a connection of its own; the serial of the certificate."""
    async with aiohttp.ClientSession() as session, session.get(url, ssl=client) as response:
        assert response.status == 200
        assert response.connection is not None
        assert response.connection.transport is not None
        secured: ssl.SSLObject = response.connection.transport.get_extra_info("ssl_object")
        shown = serial_of(secured.getpeercert(binary_form=True))
        assert len(await response.read()) == 1_000_009
        return shown


async def test_metrics_are_read_over_https_and_its_certificate_changes(tmp_path: Path) -> None:
    old, new = CA.issue(), CA.issue()
    context = RenewableContext(offered(old), "http/1.1")
    client = ssl.create_default_context(cadata=CA.pem.decode())
    async with metrics_page(context) as url:
        assert await page(url, client) == old.serial
        context.renew(offered(new))
        assert await page(url, client) == new.serial
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await page(url, ssl.create_default_context())
        with pytest.raises(aiohttp.ClientError):
            await page(url.replace("https", "http"), client)


async def test_metrics_are_read_by_clients_of_the_authority_alone(tmp_path: Path) -> None:
    clients = Authority("clients")
    pair = CA.issue()
    context = RenewableContext(offered(pair, clients.pem), "http/1.1")
    async with metrics_page(context) as url:
        assert await page(url, verifying(tmp_path, clients.issue())) == pair.serial
        for refused in (verifying(tmp_path), verifying(tmp_path, Authority("strangers").issue())):
            with pytest.raises(aiohttp.ClientError):
                await page(url, refused)
