"""The picker as a process: TLS, an empty pool, a pool that changes, a gateway that pings, a stop that loses nothing;
and the configurations that operators are given."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import anthropic
import openai
import pytest
import yaml

from epp.errors import ConfigError
from tests.e2e import serving
from tests.e2e.client import chat, connection, post, send
from tests.e2e.serving import until
from tests.e2e.upstream import Answer, Upstream

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

PATH = "/v1/chat/completions"
CONFIGURATIONS = Path(__file__).parents[2] / "config" / "envoy"


@pytest.mark.parametrize("name", ["exact-accounting", "full-duplex"])
async def test_configurations_for_operators_work_over_tls(site: Site, name: str, tmp_path: Path) -> None:
    """The file as it is, but for addresses and paths, with a picker that makes its own certificate."""
    from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap

    from epp.demo import envoy

    addresses = [site.a.address, site.b.address]
    envoy.write_endpoints(tmp_path / "pool.yaml", addresses)
    async with serving.picker(tmp_path, "picker", addresses, site.transport) as picker:
        text = (CONFIGURATIONS / f"{name}.yaml").read_text()
        port = picker.address.rpartition(":")[2]
        here = {"/etc/envoy/eds": str(tmp_path), "port_value: 9002": f"port_value: {port}"}
        for written, used in {**here, "port_value: 8081": "port_value: 0", "19000": "0"}.items():
            assert written in text
            text = text.replace(written, used)
        config = Bootstrap.from_dict(yaml.safe_load(text))
        async with envoy.running(config, tmp_path) as gateway:
            body = chat(user="x" * 100_000)
            got = await send(gateway.ports["gateway"], post(PATH, body))
            assert (got.status, got.body) == (200, b'{"ok":true}')
            assert [seen.body for seen in site.seen] == [body]
            await until(picker.in_flight, {})


async def test_an_empty_pool_answers_503_in_every_shape(site: Site, tmp_path: Path) -> None:
    from epp.demo import envoy

    envoy.write_endpoints(tmp_path / "pool.json", [])
    plaintext = ("--secure-serving=false", site.transport)
    async with serving.picker(tmp_path, "picker", [], *plaintext) as picker:
        asked = envoy.Picker(address=picker.address)
        config = envoy.bootstrap([envoy.Gateway(name="g", endpoints=tmp_path / "pool.json", picker=asked)])
        async with envoy.running(config, tmp_path) as gateway:
            for raw in (post(PATH, chat()), b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"):
                got = await send(gateway.ports["g"], raw)
                assert (got.status, got.all("retry-after")) == (503, [b"1"])
                assert got.all("x-llm-d-request-dropped-reason") == [b"rejected-no-endpoints"]
            async with openai.AsyncOpenAI(base_url=gateway.url("g"), api_key="k", max_retries=0) as client:
                with pytest.raises(openai.InternalServerError, match="no endpoints"):
                    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            async with anthropic.AsyncAnthropic(base_url=gateway.url("g"), api_key="k", max_retries=0) as other:
                with pytest.raises(anthropic.APIStatusError) as refused:
                    await other.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
                assert (refused.value.status_code, refused.value.type) == (503, "overloaded_error")

            # The pool gets its first server while everything runs.
            listing = tmp_path / "picker.endpoints.yaml"
            serving.write_listing(listing, [site.a.address])
            envoy.write_endpoints(tmp_path / "pool.json", [site.a.address])

            async def status() -> int:
                return (await send(gateway.ports["g"], post(PATH, chat()))).status

            await until(status, 200)


async def test_a_gateways_subset_is_obeyed(site: Site, tmp_path: Path) -> None:
    """The gateway names endpoints in metadata: a list, one string, nobody."""
    from envoy_data_plane.envoy.extensions.filters.http.set_metadata.v3 import Config, Metadata
    from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
        HttpConnectionManager,
        HttpFilter,
    )
    from envoy_data_plane.google.protobuf import Any, Struct

    from epp.demo import envoy

    key = "x-gateway-destination-endpoint-subset"
    hints: dict[str, object] = {"list": [site.b.address, "127.0.0.9:1"], "text": f"{site.b.address},x:1", "nobody": []}
    asked = envoy.Picker(address=site.picker.address)
    config = envoy.bootstrap(
        [envoy.Gateway(name=name, endpoints=site.folder / "pool.json", picker=asked) for name in hints]
    )
    assert config.static_resources is not None
    for listener in config.static_resources.listeners:
        network = listener.filter_chains[0].filters[0]
        assert network.typed_config is not None
        manager = network.typed_config.unpack()
        assert isinstance(manager, HttpConnectionManager)
        hint = Metadata(metadata_namespace="envoy.lb.subset_hint", value=Struct.from_dict({key: hints[listener.name]}))
        sets = HttpFilter(name="hint", typed_config=Any.pack(Config(metadata=[hint])))
        manager.http_filters = [sets, *manager.http_filters]
        network.typed_config = Any.pack(manager)
    await site.prefer(site.a)
    async with envoy.running(config, tmp_path) as gateway:
        for name in ("list", "text"):
            for raw in (post(PATH, chat()), b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"):
                assert (await send(gateway.ports[name], raw)).status == 200
        assert (len(site.a.seen), len(site.b.seen)) == (0, 4)
        assert (await send(gateway.ports["nobody"], post(PATH, chat()))).status == 503


@pytest.mark.parametrize("graceful", [False, True])
async def test_a_gateway_that_pings_and_closes_gracefully(site: Site, graceful: bool, tmp_path: Path) -> None:
    """Gateways set connection_keepalive; gRPC servers take frequent pings for abuse unless told otherwise. And with
    Envoy's graceful close every stream ends by END_STREAM, and Envoy waits for our trailers."""
    from envoy_data_plane.envoy.config.core.v3 import Http2ProtocolOptions, KeepaliveSettings
    from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
        HttpProtocolOptions,
        HttpProtocolOptionsExplicitHttpConfig,
    )
    from envoy_data_plane.google.protobuf import Any

    from epp.demo import envoy

    pings = KeepaliveSettings(interval=timedelta(seconds=0.05), timeout=timedelta(seconds=1))
    explicit = HttpProtocolOptionsExplicitHttpConfig(
        http2_protocol_options=Http2ProtocolOptions(connection_keepalive=pings)
    )
    asked = envoy.Picker(address=site.picker.address)
    gateways = [envoy.Gateway(name="g", endpoints=site.folder / "pool.json", picker=asked)]
    config = envoy.bootstrap(gateways, runtime={"envoy.reloadable_features.ext_proc_graceful_grpc_close": graceful})
    assert config.static_resources is not None
    options = Any.pack(HttpProtocolOptions(explicit_http_config=explicit))
    cluster = next(each for each in config.static_resources.clusters if each.name.startswith("picker-"))
    cluster.typed_extension_protocol_options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
    await site.prefer(site.a)
    end = asyncio.Event()
    site.a.answer = site.b.answer = lambda seen: Answer(steps=(b"one", end, b"two"))
    async with envoy.running(config, tmp_path) as gateway, connection(gateway.ports["g"]) as link:
        link.writer.write(post(PATH, chat()))
        head = await link.head()
        pages = site.a.scrapes

        async def a_second_of_pages() -> bool:  # 20 pings
            return site.a.scrapes > pages + 20

        await until(a_second_of_pages, True)
        assert await site.picker.in_flight() == {"e0": 1}
        end.set()
        assert (await link.rest(head)).body == b"onetwo"
        await until(site.picker.in_flight, {}, within=0.5)
        destroyed = await gateway.counters(f"cluster.{cluster.name.replace(':', '_')}.upstream_cx_destroy")
        assert set(destroyed.values()) == {0}  # not one of its connections was closed


async def test_ipv6_endpoints_are_chosen_by_name(site: Site, tmp_path: Path) -> None:
    from epp.demo import envoy

    first, second = Upstream("::1"), Upstream("::1")
    second.load = 50
    for upstream in (first, second):
        await upstream.listen()
    try:
        addresses = [first.address, second.address]
        envoy.write_endpoints(tmp_path / "pool.json", addresses)
        plaintext = ("--secure-serving=false", site.transport)
        async with serving.picker(tmp_path, "picker", addresses, *plaintext) as picker:
            asked = envoy.Picker(address=picker.address)
            config = envoy.bootstrap([envoy.Gateway(name="g", endpoints=tmp_path / "pool.json", picker=asked)])
            async with envoy.running(config, tmp_path) as gateway:

                async def queue() -> bool:
                    return (await picker.metric("llm_d_epp_average_queue_size", "name")) == {"pool": 25}

                await until(queue, True)
                for _ in range(4):
                    assert (await send(gateway.ports["g"], post(PATH, chat()))).status == 200
        assert (len(first.seen), len(second.seen)) == (4, 0)
        assert first.seen[0].all("x-gateway-destination-endpoint") == [",".join(addresses).encode()]
    finally:
        await first.close()
        await second.close()


async def test_a_stop_loses_no_request(site: Site, tmp_path: Path) -> None:
    from epp.demo import envoy

    plaintext = ("--secure-serving=false", site.transport)
    async with serving.picker(tmp_path, "picker", [site.a.address], *plaintext, drain="20s") as picker:
        asked = envoy.Picker(address=picker.address, response="SEND/FULL_DUPLEX_STREAMED/SEND")
        gateways = [envoy.Gateway(name="g", endpoints=site.folder / "pool.json", picker=asked)]
        async with envoy.running(envoy.bootstrap(gateways), tmp_path) as gateway:
            end = asyncio.Event()
            site.a.answer = lambda seen: Answer(steps=(b"one", end, b"two")) if seen.path == PATH else Answer()
            async with asyncio.timeout(20), connection(gateway.ports["g"]) as link:
                link.writer.write(post(PATH, chat()))
                head = await link.head()
                assert await link.data() == b"one"
                picker.process.signal(signal.SIGTERM)
                await until(picker.serving, "NOT_SERVING")
                assert picker.process.running
                late = await send(gateway.ports["g"], b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n")
                assert late.status == 200  # gateways need a moment to notice: who still asks is answered
                end.set()
                assert (await link.rest(head)).body == b"two"
                assert await picker.process.process.wait() == 0


async def test_children_die_with_their_parent(tmp_path: Path) -> None:
    """Whatever ends the parent, SIGKILL included, no Envoy stays behind."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom epp.demo.child import child\n"
        "async def main():\n"
        "    async with child('sleeper', 'sleep', '600', folder=Path(sys.argv[1])) as process:\n"
        "        print(process.pid, flush=True)\n        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    await parent.wait()

    async def state() -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except FileNotFoundError:
            return "gone"

    async def dead() -> bool:
        return await state() in ("Z", "gone")

    await until(dead, True)


async def test_an_envoy_that_cannot_start_says_why(site: Site, tmp_path: Path) -> None:
    from epp.demo import envoy

    envoy.write_endpoints(tmp_path / "pool.json", [])
    taken = int(site.a.address.rpartition(":")[2])
    config = envoy.bootstrap([envoy.Gateway(name="g", endpoints=tmp_path / "pool.json", port=taken)])
    with pytest.raises(ConfigError, match="Address already in use"):
        async with envoy.running(config, tmp_path):
            pass
