"""A configuration that changes under load: no request fails, and the next ones are decided by the new one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.e2e import serving
from tests.e2e.client import chat, post, send
from tests.e2e.serving import until

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

PATH = "/v1/chat/completions"


async def test_a_configuration_changes_under_load_and_a_broken_one_does_not_count(site: Site, tmp_path: Path) -> None:
    from epp.demo import envoy

    site.a.load, site.b.load = 0, 50
    addresses = [site.a.address, site.b.address]
    envoy.write_endpoints(tmp_path / "pool.json", addresses)
    flags = ("--secure-serving=false", site.transport)
    async with serving.picker(tmp_path, "picker", addresses, *flags) as picker:
        asked = envoy.Picker(address=picker.address)
        config = envoy.bootstrap([envoy.Gateway(name="g", endpoints=tmp_path / "pool.json", picker=asked)])
        async with envoy.running(config, tmp_path) as gateway:
            statuses: list[int] = []
            stopping = asyncio.Event()

            async def load() -> None:
                while not stopping.is_set():
                    statuses.append((await send(gateway.ports["g"], post(PATH, chat()))).status)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(load())
                file = tmp_path / "picker.yaml"
                document = yaml.safe_load(file.read_text())
                listing = document["plugins"][0]
                await until(lambda: _reloads(picker), {"taken": 0.0, "refused": 0.0})

                file.write_text("plugins: [{type: queue-scorrer}]")
                await until(lambda: _reloads(picker), {"taken": 0.0, "refused": 1.0})
                before = len(site.b.seen)

                document |= {"plugins": [listing, {"type": "random-picker"}], "schedulingProfiles": []}
                file.write_text(yaml.safe_dump(document))
                await until(lambda: _reloads(picker), {"taken": 1.0, "refused": 1.0})

                async def both_serve() -> bool:
                    return len(site.b.seen) > before + 20

                await until(both_serve, True)
                stopping.set()
            assert set(statuses) == {200}
            await until(picker.in_flight, {})


async def _reloads(picker: serving.Picker) -> dict[str, float]:
    return await picker.metric("epp_config_reloads_total", "result")
