"""A thousand pods that come, flap, move and go in a real API server, in front of a real `epp serve`.

What it costs is printed by `python -m bench.pods`; here the picker's list has to be exactly right at the end, and what
runs must be counted throughout.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import pytest

from bench.client import Client as Asker
from tests.e2e.serving import Picker, until
from tests.kube.apiserver import ApiServer
from tests.kube.client import Client
from tests.kube.cluster import PORT, Cluster, address, each, listed, picker, running_on

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

MANY: Final = 1000
OPEN: Final = 200
"""Requests that run while the pods flap."""
MOVED: Final = 20_000
"""What a pod's address moves by."""


def endpoints(namespace: str, places: dict[int, str]) -> dict[str, str]:
    """What the picker should list: address by name, for pod numbers and their IP addresses."""
    return {f"{namespace}/pod-{number}-rank-0": f"{ip}:{PORT}" for number, ip in places.items()}


async def follows(asked: Picker, expected: dict[str, str]) -> None:
    await until(lambda: listed(asked), expected, within=30.0)


async def opened(asked: Picker, count: int) -> tuple[Asker, list[int]]:
    """So many requests that wait for their model servers, on one connection as Envoy would open them."""
    host, _, port = asked.address.rpartition(":")
    _, asker = await asyncio.get_running_loop().create_connection(Asker, host, int(port))
    return asker, [await asker.decided(b"%d" % number) for number in range(count)]


@pytest.mark.parametrize("pods", [60, pytest.param(MANY, marks=pytest.mark.slow)])
async def test_the_list_follows_every_pod_and_what_runs_on_them_stays_counted(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path, pods: int
) -> None:
    cluster = Cluster(admin, namespace)
    await cluster.pool()
    places = {number: address(number) for number in range(pods)}
    await each(places, lambda number: cluster.add(f"pod-{number}", places[number]))
    async with picker(apiserver, namespace, tmp_path, "--secure-serving=false") as asked:
        await follows(asked, endpoints(namespace, places))
        assert await asked.serving() == "SERVING"
        asker, streams = await opened(asked, OPEN)
        counted, told = await running_on(asked), await asked.in_flight()
        assert sum(counted.values()) == sum(told.values()) == OPEN

        await each(places, lambda number: cluster.be_ready(f"pod-{number}", places[number], "False"))
        await follows(asked, {})
        assert await asked.in_flight() == told
        await each(places, lambda number: cluster.be_ready(f"pod-{number}", places[number], "True"))
        await follows(asked, endpoints(namespace, places))
        assert await running_on(asked) == counted
        assert await asked.in_flight() == told

        async def flap(number: int) -> None:
            """Some leave, some come back elsewhere under their name, some as another pod at the same address."""
            name = f"pod-{number}"
            await cluster.delete(name)
            if number % 3 == 0:
                del places[number]
            elif number % 3 == 1:
                places[number] = address(MOVED + number)
                await cluster.add(name, places[number])
            else:
                places[MOVED + number] = places.pop(number)
                await cluster.add(f"pod-{MOVED + number}", places[MOVED + number])

        await each(list(places), flap)
        await follows(asked, endpoints(namespace, places))
        assert sum((await asked.in_flight()).values()) == OPEN
        for number in streams:
            asker.reset(number)
        await until(asked.in_flight, {})
        asker.close()
        assert "Traceback" not in asked.process.output(10_000)
