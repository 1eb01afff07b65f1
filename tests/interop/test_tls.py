"""TLS versions and ciphers, which the wire transport lets an operator choose; seen from Python's own client."""

from __future__ import annotations

import asyncio
import ssl

import msgspec
import pytest

from epp.extproc.http2.frames import PREFACE
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
