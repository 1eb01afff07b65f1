"""The conformance suite's tests of the data path, by their numbers there, and a stricter one of failing open.

    3   a picker that is not there, and a gateway that fails closed        9   a gateway follows its picker
    5   GET without a body and without the header that chooses            10   with data parallelism
    6   one route, several pools                                          11   weights between two pools
    7   several gateways, a pool each                                     12   which endpoint served
    8   several gateways, one pool                                        13   HTTP/1.1 and h2c to the model servers
                                                                          14   a picker that is gone, failing open
Numbers 1, 2 and 4, and the conditions of 3, 5 and 8, are a Gateway's controller's. Our own stand-in for a gateway is an
Envoy with the routes that a controller would write. Counts of requests, tolerances and bodies are the suite's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from math import sqrt
from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import Cluster
from tests.e2e.client import Got
from tests.envoys import envoy_or_skip

if TYPE_CHECKING:
    from tests.conformance.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

SERVED = "x-conformance-test-served-endpoint"


@pytest.fixture(scope="module")
async def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    envoy_or_skip()
    from tests.conformance.site import site

    async with site(cluster, tmp_path_factory.mktemp("site")) as running:
        yield running


async def many(site: Site, gateway: str, path: str, named: Sequence[str], count: int, at_once: int) -> list[Got]:
    """So many of the suite's requests, each naming all these endpoints."""
    turn = asyncio.Semaphore(at_once)

    async def one() -> Got:
        async with turn:
            return await site.ask(gateway, path, *named)

    return list(await asyncio.gather(*(one() for _ in range(count))))


async def test_3_without_its_picker_a_gateway_that_fails_closed_answers_5xx(site: Site) -> None:
    assert (await site.ask("closed", "/invalid-epp-test", get=True)).status in range(500, 505)
    assert (await site.ask("closed", "/invalid-epp-test")).status in range(500, 505)


@pytest.mark.parametrize("path", ["/test-port-unspecified", "/test-port-matching", "/test-port-non-matching"])
async def test_5_a_get_without_a_body_and_without_a_choice_is_served(site: Site, path: str) -> None:
    from tests.conformance.site import who

    assert who(await site.ask("primary", path, get=True))[0].startswith("primary-")


@pytest.mark.parametrize("pool", ["primary", "secondary"])
async def test_6_rules_of_one_route_lead_to_different_pools(site: Site, pool: str) -> None:
    from tests.conformance.site import who

    assert who(await site.ask("rules", f"/{pool}", get=True))[0].startswith(f"{pool}-")
    named = site.deployments[pool].addresses()[1]
    assert (await site.ask("rules", f"/{pool}", named)).all(SERVED) == [named.encode()]


@pytest.mark.parametrize("pool", ["primary", "secondary"])
async def test_7_gateways_lead_to_pools_of_their_own(site: Site, pool: str) -> None:
    from tests.conformance.site import who

    assert who(await site.ask(pool, f"/test-{pool}-gateway", get=True))[0].startswith(f"{pool}-")


async def test_8_two_gateways_lead_to_one_pool(site: Site) -> None:
    from tests.conformance.site import who

    for gateway in ("primary", "also-primary"):
        for pod in range(3):
            got = await site.ask(gateway, "/primary-gateway-test", site.deployments["primary"].ip(pod))
            assert who(got)[0] == site.deployments["primary"].pod(pod)


@pytest.mark.parametrize("pods", [(2,), (0, 1), (0, 1, 2)])
async def test_9_a_gateway_follows_its_picker(site: Site, pods: tuple[int, ...]) -> None:
    from tests.conformance.site import who

    primary = site.deployments["primary"]
    for pod in range(3):
        assert who(await site.ask("primary", "/primary-gateway-test", primary.ip(pod)))[0] == primary.pod(pod)
    named = [primary.ip(pod) for pod in pods]
    answers = await many(site, "primary", "/primary-gateway-test", named, count=100, at_once=10)
    assert {who(got)[0] for got in answers} == {primary.pod(pod) for pod in pods}


@pytest.mark.parametrize(
    "named",
    [
        {1: (0, 1, 2)},
        {0: (0, 1, 2), 2: (1,)},
        {0: (0, 1, 2), 1: (0, 2), 2: (0, 1, 2)},
    ],
)
async def test_10_with_data_parallelism_an_ip_means_all_ranks_and_a_port_means_one(
    site: Site, named: dict[int, tuple[int, ...]]
) -> None:
    """`named`: ranks by pod."""
    from tests.conformance.site import who

    dp = site.deployments["dp"]
    header = [
        entry
        for pod, ranks in named.items()
        for entry in ([dp.ip(pod)] if len(ranks) == 3 else [f"{dp.ip(pod)}:{dp.ports[rank]}" for rank in ranks])
    ]
    answers = await many(site, "dp", "/primary-gateway-dp-test", header, count=100, at_once=10)
    expected = {(dp.pod(pod), dp.ports[rank]) for pod, ranks in named.items() for rank in ranks}
    assert {who(got)[:2] for got in answers} == expected


async def test_11_weights_between_two_pools_are_kept(site: Site) -> None:
    from tests.conformance.site import WEIGHTS, shares, who

    pools = [site.deployments[name] for name in WEIGHTS]
    ips = [pool.ip(pod) for pool in pools for pod in range(3)]
    answers = await many(site, "rules", "/weighted-two-pools-test", ips, count=200, at_once=5)
    pods = [who(got)[0] for got in answers]
    assert set(pods) == {pool.pod(pod) for pool in pools for pod in range(3)}
    share = WEIGHTS["primary"] / sum(WEIGHTS.values())
    tolerance = max(0.10, 4.5 * sqrt(share * (1 - share) / len(pods)))
    assert abs(shares(pods, site.deployments["primary"]) - share) <= tolerance


async def test_12_the_endpoint_that_served_is_told(site: Site) -> None:
    primary = site.deployments["primary"]
    for pod in range(3):
        got = await site.ask("primary", "/destination-endpoint-served-test", primary.ip(pod))
        assert (got.status, got.all(SERVED)) == (200, [f"{primary.ip(pod)}:{primary.ports[0]}".encode()])


@pytest.mark.parametrize(("gateway", "port", "version"), [("http", 0, "1.1"), ("h2c", 1, "2")])
async def test_13_model_servers_are_spoken_to_in_the_protocol_of_their_pool(
    site: Site, gateway: str, port: int, version: str
) -> None:
    from tests.conformance.site import who

    servers = site.deployments["appprotocol"]
    for pod in range(3):
        named = f"{servers.ip(pod)}:{servers.ports[port]}"
        got = await site.ask(gateway, "/", named)
        assert who(got) == (servers.pod(pod), servers.ports[port], version)
        assert got.all(SERVED) == [named.encode()]


async def test_14_a_gateway_that_fails_open_goes_on_when_its_own_picker_is_gone(site: Site) -> None:
    """Upstream takes the other pool's picker away, so that nothing fails. In full duplex Envoy goes on for a request
    without a body only; one whose body it keeps itself goes on, too."""
    from tests.conformance.site import who

    secondary = site.deployments["secondary"]
    for gateway in ("open", "open-buffered"):
        for pod in range(3):
            got = await site.ask(gateway, "/failopen-pool-test", secondary.ip(pod))
            assert who(got)[0] == secondary.pod(pod)
    site.doomed.process.kill()
    await site.doomed.process.process.wait()
    for gateway, get in (("open", True), ("open-buffered", True), ("open-buffered", False)):
        got = await site.ask(gateway, "/failopen-pool-test", secondary.ip(0), get=get)
        assert who(got)[0].startswith("secondary-")
        assert got.all(SERVED) == []
