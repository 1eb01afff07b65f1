"""The reference's well-known configurations serve real requests through Envoy: one gateway and one picker each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from epp.demo.child import child, free_ports
from tests.e2e import serving
from tests.e2e.client import chat, post, send
from tests.e2e.serving import until
from tests.e2e.upstream import Upstream
from tests.envoys import envoy_or_skip

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

FILES = sorted((Path(__file__).parents[2] / "config" / "picker" / "well-known").glob("*.yaml"))
PATH = "/v1/chat/completions"
DISAGGREGATED = ("pd-disaggregation", "wide-ep-lws")
"""Those that hand every prompt over."""


@pytest.fixture
def envoy_is_here() -> None:
    envoy_or_skip()


@contextlib.asynccontextmanager
async def picker(folder: Path, file: Path, listing: Path) -> AsyncIterator[serving.Picker]:
    """`epp serve` with this configuration, over endpoints from a file."""
    document = yaml.safe_load(file.read_text())
    document["plugins"].append({"type": "file-discovery", "parameters": {"path": str(listing)}})
    document["dataLayer"] = {"discovery": {"pluginRef": "file-discovery"}}
    config = folder / file.name
    config.write_text(yaml.safe_dump(document))
    port, health, metrics = free_ports(3)
    ports = (f"--grpc-port={port}", f"--grpc-health-port={health}", f"--metrics-port={metrics}")
    flags = (
        f"--config-file={config}",
        "--secure-serving=false",
        "--allow-experimental-plugins",
        "--drain-timeout=100ms",
    )
    async with child(file.stem, sys.executable, "-m", "epp", "serve", *ports, *flags, folder=folder) as process:
        running = serving.Picker(process, port, health, metrics)

        async def ready() -> bool:
            return await running.serving() == "SERVING"

        await process.until(ready, "SERVING from its health service")
        yield running
        assert "Traceback" not in process.output(lines=1000)


@pytest.mark.usefixtures("envoy_is_here")
@pytest.mark.timeout(120)
async def test_each_serves_requests_through_envoy(tmp_path: Path) -> None:
    from epp.demo import envoy

    async with contextlib.AsyncExitStack() as stack:
        decode, prefill = Upstream(), Upstream()
        for upstream in (decode, prefill):
            await upstream.listen()
            stack.push_async_callback(upstream.close)
        listing = tmp_path / "endpoints.yaml"
        servers = (("decode", decode), ("prefill", prefill))
        entries = [
            {"name": role, "address": "127.0.0.1", "port": each.address.rpartition(":")[2]}
            | {"labels": {"llm-d.ai/role": role}}
            for role, each in servers
        ]
        listing.write_text(yaml.safe_dump({"endpoints": entries}))
        pool = tmp_path / "pool.json"
        envoy.write_endpoints(pool, [each.address for _, each in servers])
        pickers = [await stack.enter_async_context(picker(tmp_path, file, listing)) for file in FILES]
        gateways = [
            envoy.Gateway(name=file.stem, endpoints=pool, picker=envoy.Picker(address=each.address))
            for file, each in zip(FILES, pickers, strict=True)
        ]
        gateway = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), tmp_path))
        for file, each in zip(FILES, pickers, strict=True):
            decode.seen.clear()
            prefill.seen.clear()
            for at in range(3):
                got = await send(gateway.ports[file.stem], post(PATH, chat(user=f"{at}" * 2000)))
                assert (got.status, got.body) == (200, b'{"ok":true}'), file.stem
            seen = [*decode.seen, *prefill.seen]
            assert len(seen) == 3, file.stem
            if file.stem in DISAGGREGATED:
                assert [one.all("x-prefiller-host-port") for one in decode.seen] == [[prefill.address.encode()]] * 3
            await until(each.in_flight, {})
