"""Certificates of a real picker process, which change under load behind a real Envoy that verifies them.

Envoy makes a new connection to the picker every few requests, so that handshakes happen before, at and after the swap.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from cryptography import x509

from tests.authority import HOST, Authority, Pair
from tests.e2e import serving
from tests.e2e.client import chat, connection, post, send
from tests.e2e.serving import until
from tests.e2e.upstream import Answer, Upstream
from tests.envoys import envoy_or_skip

if TYPE_CHECKING:
    from epp.demo.envoy import Envoy
    from tests.e2e.serving import Picker

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]
BOTH = pytest.mark.parametrize("transport", ["wire", "grpcio"])
PATH = "/v1/chat/completions"
GET = b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"
CA = Authority()
REQUESTS_PER_CONNECTION = 5


@pytest.fixture(autouse=True)
def envoy_is_here() -> None:
    envoy_or_skip()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    server = Upstream()
    await server.listen()
    yield server
    await server.close()


@asynccontextmanager
async def verifying_envoy(
    folder: Path, picker: Picker, upstream: Upstream, shown: Pair | None = None
) -> AsyncIterator[Envoy]:
    """Envoy with a gateway "g", that takes only certificates of CA for 127.0.0.1, and may show one of its own."""
    from envoy_data_plane.envoy.config.core.v3 import (
        DataSource,
        Http2ProtocolOptions,
        TransportSocket,
    )
    from envoy_data_plane.envoy.config.core.v3 import (
        HttpProtocolOptions as Common,
    )
    from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
        CertificateValidationContext,
        CommonTlsContext,
        SubjectAltNameMatcher,
        SubjectAltNameMatcherSanType,
        TlsCertificate,
        UpstreamTlsContext,
    )
    from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
        HttpProtocolOptions,
        HttpProtocolOptionsExplicitHttpConfig,
    )
    from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
    from envoy_data_plane.google.protobuf import Any

    from epp.demo import envoy

    envoy.write_endpoints(folder / "pool.json", [upstream.address])
    asked = envoy.Picker(address=picker.address, response="SEND/FULL_DUPLEX_STREAMED/SEND")
    config = envoy.bootstrap([envoy.Gateway(name="g", endpoints=folder / "pool.json", picker=asked, retries=0)])
    assert config.static_resources is not None
    (cluster,) = [each for each in config.static_resources.clusters if each.name.startswith("picker-")]
    name = SubjectAltNameMatcher(san_type=SubjectAltNameMatcherSanType.IP_ADDRESS, matcher=StringMatcher(exact=HOST))
    trusted = CertificateValidationContext(
        trusted_ca=DataSource(inline_bytes=CA.pem), match_typed_subject_alt_names=[name]
    )
    own = [
        TlsCertificate(
            certificate_chain=DataSource(inline_bytes=pair.certificate), private_key=DataSource(inline_bytes=pair.key)
        )
        for pair in (shown,)
        if pair is not None
    ]
    tls = CommonTlsContext(alpn_protocols=["h2"], validation_context=trusted, tls_certificates=own)
    cluster.transport_socket = TransportSocket(
        name="tls", typed_config=Any.pack(UpstreamTlsContext(common_tls_context=tls))
    )
    options = HttpProtocolOptions(
        common_http_protocol_options=Common(max_requests_per_connection=REQUESTS_PER_CONNECTION),
        explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=Http2ProtocolOptions()),
    )
    cluster.typed_extension_protocol_options = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": Any.pack(options)
    }
    async with envoy.running(config, folder) as running:
        yield running


async def counters(envoy: Envoy) -> Counter[str]:
    """Of Envoy's TLS with the picker."""
    found = await envoy.counters("cluster.picker-.*ssl")
    return Counter({name.partition(".ssl.")[2]: value for name, value in found.items()})


async def serial(address: str, client: ssl.SSLContext) -> int:
    """Of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection(*address.split(":"), ssl=client)
    try:
        secured: ssl.SSLObject = writer.get_extra_info("ssl_object")
        der = secured.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number
    finally:
        writer.transport.abort()


@BOTH
async def test_a_certificate_that_changes_under_load_costs_no_request(
    transport: str, upstream: Upstream, tmp_path: Path
) -> None:
    pairs = [CA.issue(), CA.issue("rsa"), CA.issue()]
    secret = pairs[0].mount(tmp_path / "secret")
    client = ssl.create_default_context(cadata=CA.pem.decode())
    client.set_alpn_protocols(["h2"])
    end = asyncio.Event()
    upstream.answer = lambda seen: Answer(steps=(b"one", end, b"two")) if seen.path == PATH else Answer()
    flags = (f"--cert-path={secret}", "--enable-cert-reload", f"--transport={transport}")
    got: Counter[int] = Counter()
    done = asyncio.Event()

    async def ask(port: int) -> None:
        while not done.is_set():
            got[(await send(port, GET)).status] += 1

    async with (
        serving.picker(tmp_path, "picker", [upstream.address], *flags) as picker,
        verifying_envoy(tmp_path, picker, upstream) as envoy,
        connection(envoy.ports["g"]) as link,
        asyncio.timeout(60),
    ):
        link.writer.write(post(PATH, chat()))
        head = await link.head()
        assert await link.data() == b"one"
        asking = [asyncio.create_task(ask(envoy.ports["g"])) for _ in range(8)]

        async def shown() -> int:
            return await serial(picker.address, client)

        for pair in pairs:
            if pair is not pairs[0]:
                pair.mount(secret)
            await until(shown, pair.serial, within=15)
            handshakes, before = (await counters(envoy))["handshake"], got.total()

            async def more(handshakes: int = handshakes, before: int = before) -> bool:
                fresh = (await counters(envoy))["handshake"] - handshakes
                return fresh >= 5 and got.total() - before >= 5 * REQUESTS_PER_CONNECTION

            await until(more, True, within=15)
        # Half a pair: what is served stays.
        (secret / "..data" / "tls.crt").write_bytes(CA.issue().certificate)
        await until(lambda: said(picker, "does not belong to tls.key"), True, within=15)
        assert await shown() == pairs[-1].serial
        assert (await picker.in_flight())["e0"] >= 1  # the stream from before the first change
        end.set()
        assert (await link.rest(head)).body == b"two"
        done.set()
        await asyncio.gather(*asking)
        assert set(got) == {200}
        failed = {name: count for name, count in (await counters(envoy)).items() if "fail" in name or "error" in name}
        assert set(failed.values()) <= {0}
        assert "fail_verify_error" in failed
        log = picker.process.output(lines=10_000)
        assert log.count("new connections get certificate") == 2
        assert log.count("is not taken") == 1
        assert "PRIVATE" not in log


async def said(picker: Picker, words: str) -> bool:
    return words in picker.process.output(lines=10_000)


@BOTH
async def test_with_a_client_ca_only_an_envoy_that_shows_a_certificate_is_served(
    transport: str, upstream: Upstream, tmp_path: Path
) -> None:
    clients, strangers = Authority("clients"), Authority("strangers")
    secret = CA.issue().mount(tmp_path / "secret")
    client_ca = f"--client-ca-file={clients.write(tmp_path / 'ca.crt')}"
    flags = (f"--cert-path={secret}", client_ca, f"--transport={transport}", "--enable-cert-reload")
    async with serving.picker(tmp_path, "picker", [upstream.address], *flags) as picker:
        for shown, status in ((clients.issue(), 200), (None, 500), (strangers.issue(), 500)):
            async with verifying_envoy(tmp_path, picker, upstream, shown) as envoy:
                statuses = [(await send(envoy.ports["g"], GET)).status for _ in range(3)]
                assert statuses == [status] * 3
        # The strangers' authority takes the other's place while the picker runs.
        strangers.write(tmp_path / "ca.crt")
        async with verifying_envoy(tmp_path, picker, upstream, strangers.issue()) as envoy:

            async def status_now() -> int:
                return (await send(envoy.ports["g"], GET)).status

            await until(status_now, 200, within=15)


async def test_metrics_are_served_over_tls_and_follow_their_certificate(tmp_path: Path) -> None:
    clients = Authority("clients")
    old, new, own = CA.issue(), CA.issue(), clients.issue().write(tmp_path / "own")
    secret = old.mount(tmp_path / "secret")
    flags = (f"--metrics-cert-dir={secret}", f"--metrics-client-ca-file={clients.write(tmp_path / 'ca.crt')}")
    anybody = ssl.create_default_context(cadata=CA.pem.decode())
    client = ssl.create_default_context(cadata=CA.pem.decode())
    client.load_cert_chain(own / "tls.crt", own / "tls.key")
    async with serving.picker(tmp_path, "picker", [], *flags) as picker, aiohttp.ClientSession() as session:
        address = picker.pages.removeprefix("http://")
        async with session.get(f"https://{address}/metrics", ssl=client) as response:
            assert response.status == 200
            assert "# TYPE llm_d_epp_ready_endpoints gauge" in await response.text()
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"https://{address}/metrics", ssl=anybody)
        assert await serial(address, client) == old.serial
        new.mount(secret)

        async def shown() -> int:
            return await serial(address, client)

        await until(shown, new.serial, within=15)
        async with session.get(f"https://{address}/debug/endpoints", ssl=client) as response:
            assert await response.json() == []
