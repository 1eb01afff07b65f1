"""Candidates for one Lease of a real API server: in this process with short times, and as `epp serve` with the usual
ones, behind a real Envoy that asks only who says that he serves."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

import pytest

from epp.demo.child import child, free_ports
from epp.discovery.kube.election import Candidate, Timing
from epp.discovery.kube.leader import Leader
from epp.discovery.kube.objects import Pool
from epp.discovery.kube.view import NamedPool, SelectedPods
from epp.endpoints.selector import parse_selector
from epp.flags import ServeFlags
from epp.settings import read_candidate
from tests.e2e import client as http
from tests.e2e.serving import Picker
from tests.e2e.serving import until as until_seen
from tests.e2e.upstream import Upstream
from tests.kube.apiserver import ADMIN, EPP, ApiServer, api_server
from tests.kube.client import LEASES, NAMESPACES, POOLS, ROLE_BINDINGS, ROLES, Client, client
from tests.kube.test_discovery import pod, pool, until
from tests.kube.test_statuses import WatchedApi

if TYPE_CHECKING:
    from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap

pytestmark = pytest.mark.anyio

LEASE: Final = "epp-test-pool.llm-d.ai"
QUICK: Final = Timing(lease=2.0, renew_deadline=1.4, retry=0.1)
USUAL: Final = Timing()
STEPS: Final = 1.2 * USUAL.retry
"""The longest pause between two looks of a candidate."""


class Candidacy:
    """A candidate, and what it has said."""

    def __init__(self, leader: Leader, api: WatchedApi, told: list[bool], failures: list[Exception]) -> None:
        self.leader = leader
        self.api = api
        self.told = told
        """Each change."""
        self.failures = failures

    @property
    def leads(self) -> bool:
        return self.told[-1:] == [True]


@asynccontextmanager
async def standing(
    server: ApiServer, namespace: str, identity: str, user: str = ADMIN, timing: Timing = QUICK
) -> AsyncIterator[Candidacy]:
    api = await WatchedApi.connect(str(server.kubeconfig(user)))
    assert isinstance(api, WatchedApi)
    told: list[bool] = []
    failures: list[Exception] = []
    leader = Leader(
        api,
        Candidate(namespace, LEASE, identity, timing),
        now=time.monotonic,
        rng=Random(1),
        on_change=told.append,
        failed=lambda path, error: failures.append(error),
    )
    running = asyncio.create_task(leader.run())
    try:
        yield Candidacy(leader, api, told, failures)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await api.close()


async def holder(admin: Client, namespace: str, name: str = LEASE) -> str:
    spec = (await admin.get(LEASES, name, namespace))["spec"]
    return str(spec.get("holderIdentity", ""))


async def test_of_three_candidates_one_leads_and_when_it_goes_another_does(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    async with AsyncExitStack() as stack:
        names = ("a", "b", "c")
        all_of_them = [await stack.enter_async_context(standing(apiserver, namespace, name)) for name in names]
        gone: set[int] = set()
        for turn in count(1):
            await until(lambda: any(each.leads for each in all_of_them))
            (at,) = (at for at, each in enumerate(all_of_them) if each.leads)
            assert await holder(admin, namespace) == names[at]
            lease = await admin.get(LEASES, LEASE, namespace)
            assert lease["spec"]["leaseTransitions"] == turn - 1
            began = time.monotonic()
            successor = await all_of_them[at].leader.hand_over(within=1.0 if turn == 3 else 10.0)
            assert not all_of_them[at].leads
            gone.add(at)
            assert successor == (turn < 3)
            if turn == 3:
                break
            assert time.monotonic() - began < QUICK.lease  # released, not run out
        assert gone == {0, 1, 2}
        assert await holder(admin, namespace) == ""
        await asyncio.sleep(0)
        assert [each.told for each in all_of_them] == [[True, False]] * 3  # who has left stands no more
        assert [each.failures for each in all_of_them] == [[], [], []]


async def test_a_candidate_that_does_not_lead_leaves_at_once(apiserver: ApiServer, namespace: str) -> None:
    async with standing(apiserver, namespace, "a") as first:
        await until(lambda: first.leads)
        async with standing(apiserver, namespace, "b") as second:
            assert not await second.leader.hand_over(within=10.0)
            assert second.told == []
        assert first.leads


async def test_a_conflict_is_no_failure_and_a_lease_is_released_all_the_same(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """Somebody writes to the Lease whenever it was read, three times."""
    async with standing(apiserver, namespace, "a") as candidate:
        await until(lambda: candidate.leads)
        numbers = count(1)

        async def annotate(_: str) -> None:
            if (number := next(numbers)) <= 3:
                await admin.patch(LEASES, LEASE, {"metadata": {"annotations": {"n": str(number)}}}, namespace)

        candidate.api.answered = annotate
        await candidate.leader.hand_over(within=2.0)
        assert next(numbers) > 4
        assert candidate.failures == []
    lease = await admin.get(LEASES, LEASE, namespace)
    assert (lease["spec"].get("holderIdentity"), lease["metadata"]["annotations"]) == ("", {"n": "3"})


async def test_a_lease_of_the_references_is_respected_until_it_runs_out(
    apiserver: ApiServer, admin: Client, namespace: str
) -> None:
    """As client-go writes it for a picker of the reference, which is then killed."""
    now = "2026-01-01T00:00:00.123456Z"
    theirs = "epp-6d4cf56db6-x2x4z_5b0c3a3e-1f0e-4d5a-9f6b-0d6f8a8f2a11"
    spec = {
        "holderIdentity": theirs,
        "leaseDurationSeconds": 2,
        "acquireTime": now,
        "renewTime": now,
        "leaseTransitions": 4,
    }
    await admin.create(LEASES, {"metadata": {"namespace": namespace, "name": LEASE}, "spec": spec})
    began = time.monotonic()
    async with standing(apiserver, namespace, "ours") as candidate:
        await until(lambda: candidate.leads)
        assert time.monotonic() - began >= 2.0
        lease = await admin.get(LEASES, LEASE, namespace)
        assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("ours", 5)
        assert candidate.failures == []


async def test_a_lease_that_is_deleted_is_made_again(apiserver: ApiServer, admin: Client, namespace: str) -> None:
    async with standing(apiserver, namespace, "a") as candidate:
        await until(lambda: candidate.leads)
        await admin.delete(LEASES, LEASE, namespace)

        async def who() -> str:
            found, _ = await admin.list(LEASES, namespace)
            return str(found[0]["spec"]["holderIdentity"]) if found else ""

        await until_seen(who, "a")
        assert candidate.told == [True]


async def grant(admin: Client, namespace: str, *verbs: str) -> None:
    """What the service account `epp` may do to leases."""
    rules = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": list(verbs)}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "epp"}
    subject = {"kind": "ServiceAccount", "name": "epp", "namespace": "default"}
    metadata = {"namespace": namespace, "name": "epp"}
    await admin.create(ROLES, {"metadata": metadata, "rules": rules})
    await admin.create(ROLE_BINDINGS, {"metadata": metadata, "roleRef": role, "subjects": [subject]})


async def test_get_create_and_update_of_leases_are_enough(apiserver: ApiServer, admin: Client, namespace: str) -> None:
    await grant(admin, namespace, "get", "create", "update")
    async with standing(apiserver, namespace, "a", EPP) as candidate:
        await until(lambda: candidate.leads)
        candidate.failures.clear()  # from before the role was known everywhere
        renewed = (await admin.get(LEASES, LEASE, namespace))["spec"]["renewTime"]

        async def is_renewed() -> bool:
            found = await admin.get(LEASES, LEASE, namespace)
            return bool(found["spec"]["renewTime"] > renewed)

        await until_seen(is_renewed, True)
        await candidate.leader.hand_over(within=0.5)
        assert await holder(admin, namespace) == ""
        assert candidate.failures == []


@pytest.mark.parametrize("missing", ["get", "create", "update"])
async def test_a_verb_that_is_missing_is_named(
    apiserver: ApiServer, admin: Client, namespace: str, missing: str
) -> None:
    await grant(admin, namespace, *({"get", "create", "update"} - {missing}))
    async with standing(apiserver, namespace, "a", EPP) as candidate:
        words = f'cannot {missing} resource "leases" in API group "coordination.k8s.io"'
        await until(lambda: any(words in str(error) for error in candidate.failures))


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
async def test_a_leader_without_an_api_server_stops_in_time_and_leads_again_after(tmp_path: Path, silent: bool) -> None:
    """An API server that is killed, and one that takes connections and says nothing: then an attempt takes 1.5 s, and
    the next would be over 5 s after the last renewal."""
    timing = Timing(lease=4.0, renew_deadline=3.0, retry=1.0)
    async with api_server(tmp_path) as server, client(server.access()) as admin:
        await admin.create(NAMESPACES, {"metadata": {"name": "models"}})
        async with standing(server, "models", "a", timing=timing) as candidate:
            await until(lambda: candidate.leads)
            began = time.monotonic()
            if silent:
                os.kill(server.pid, signal.SIGSTOP)
            else:
                await server.kill()
            await until(lambda: not candidate.leads)
            assert 1.0 < time.monotonic() - began < timing.renew_deadline + 0.5
            if silent:
                os.kill(server.pid, signal.SIGCONT)
            else:
                await server.start()
            await until(lambda: candidate.leads)
        assert candidate.told == [True, False, True]
        assert candidate.failures


def test_who_stands_is_named_by_the_pod_and_like_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = NamedPool("models", "llama")
    assert read_candidate(ServeFlags(), scope) is None
    monkeypatch.setenv("POD_NAME", "epp-7d9f-x2x4z")
    asked = ServeFlags(ha_enable_leader_election=True)
    one, other = read_candidate(asked, scope), read_candidate(asked, scope)
    assert one is not None
    assert other is not None
    assert (one.namespace, one.lease, one.timing) == ("models", "epp-models-llama.llm-d.ai", Timing(15.0, 10.0, 2.0))
    assert one.identity.startswith("epp-7d9f-x2x4z_")
    assert one.identity != other.identity
    pods = SelectedPods("models", "epp", Pool(parse_selector("app=llm"), (8000,)))
    selected = read_candidate(asked, pods)
    assert selected is not None
    assert selected.lease == "epp-models-epp.llm-d.ai"


# -- processes --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def picker(server: ApiServer, namespace: str, name: str, folder: Path) -> AsyncIterator[Picker]:
    """A replica as the chart starts it, with the health service on the ext_proc port too."""
    ports = free_ports(3)
    flags = ["--pool-name=pool", f"--pool-namespace={namespace}", "--ha-enable-leader-election", "--health-checking"]
    flags += ["--secure-serving=false", "--drain-timeout=10s", "--zap-encoder=console"]
    options = ("--grpc-port", "--grpc-health-port", "--metrics-port")
    flags += [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
    environment = {"KUBECONFIG": str(server.kubeconfig(namespace=namespace)), "POD_NAME": name}
    command = (sys.executable, "-m", "epp", "serve", *flags)
    async with child(name, *command, folder=folder, env=environment) as process:
        yield Picker(process, *ports)


@asynccontextmanager
async def replicas(
    server: ApiServer, admin: Client, namespace: str, folder: Path
) -> AsyncIterator[tuple[Picker, Picker, Upstream]]:
    """A leader and a warm standby over one model server."""
    upstream = Upstream("127.0.0.2")
    await upstream.listen()
    made = pool(namespace)
    made["spec"]["targetPorts"] = [{"number": int(upstream.address.rpartition(":")[2])}]
    await admin.create(POOLS, made)
    await pod(admin, namespace, "model-server", "127.0.0.2")
    try:
        async with picker(server, namespace, "first", folder) as first:

            async def leads() -> bool:
                return await first.serving("readiness") == "SERVING"

            await first.process.until(leads, "leader")
            async with picker(server, namespace, "second", folder) as second:

                async def stands_by() -> bool:
                    return "is held by first_" in second.process.output()

                await second.process.until(stands_by, "look at who leads")
                assert await second.serving("liveness") == "SERVING"
                assert await second.serving("readiness") == "NOT_SERVING"
                yield first, second, upstream
    finally:
        await upstream.close()


def gateway(folder: Path, pickers: tuple[Picker, Picker], upstream: Upstream) -> Bootstrap:
    """An Envoy that asks the health service on the ext_proc port of each picker, and then only who serves: without
    Envoy's panic mode, which would ask anybody when nobody serves."""
    from envoy_data_plane.envoy.config.cluster.v3 import ClusterCommonLbConfig
    from envoy_data_plane.envoy.config.core.v3 import HealthCheck, HealthCheckGrpcHealthCheck
    from envoy_data_plane.envoy.type.v3 import Percent

    from epp.demo import envoy

    envoy.write_endpoints(folder / "pool.json", [upstream.address])
    gateways = [
        envoy.Gateway(name=each.process.name, endpoints=folder / "pool.json", picker=envoy.Picker(address=each.address))
        for each in pickers
    ]
    config = envoy.bootstrap(gateways)
    assert config.static_resources is not None
    found = [each for each in config.static_resources.clusters if each.name.startswith("picker-")]
    both = [place for cluster in found if cluster.load_assignment for place in cluster.load_assignment.endpoints]
    for cluster in found:
        assert cluster.load_assignment is not None
        cluster.load_assignment.endpoints = both
        cluster.common_lb_config = ClusterCommonLbConfig(healthy_panic_threshold=Percent(value=0.0))
        cluster.health_checks = [
            HealthCheck(
                timeout=timedelta(seconds=1),
                interval=timedelta(seconds=1),
                no_traffic_interval=timedelta(seconds=1),
                unhealthy_threshold=2,
                healthy_threshold=1,
                grpc_health_check=HealthCheckGrpcHealthCheck(
                    service_name="envoy.service.ext_proc.v3.ExternalProcessor"
                ),
            )
        ]
    return config


class Load:
    """Clients who ask one request after another."""

    def __init__(self, port: int) -> None:
        self.statuses: list[int] = []
        self._port = port

    async def ask(self) -> None:
        while True:
            got = await http.send(self._port, http.post("/v1/chat/completions", http.chat()))
            self.statuses.append(got.status if got.complete else 0)
            await asyncio.sleep(0.02)

    async def goes_on(self, requests: int) -> None:
        enough = len(self.statuses) + requests
        await until(lambda: len(self.statuses) >= enough or set(self.statuses) != {200})


async def test_a_leader_stopped_by_sigterm_under_load_loses_no_request(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    from epp.demo import envoy

    async with replicas(apiserver, admin, namespace, tmp_path) as (first, second, upstream):
        config = gateway(tmp_path, (first, second), upstream)
        async with envoy.running(config, tmp_path) as running:

            async def status() -> int:
                return (await http.send(running.ports["first"], http.post("/v1/completions", b"{}"))).status

            await until_seen(status, 400, within=20.0)  # the picker's own answer: Envoy has found who serves
            load = Load(running.ports["first"])
            asking = [asyncio.create_task(load.ask()) for _ in range(4)]
            await load.goes_on(50)
            began = time.monotonic()
            first.process.signal(signal.SIGTERM)
            states: set[tuple[str, str]] = set()
            while await second.serving("readiness") != "SERVING":
                states.add((await first.serving("readiness"), await second.serving("readiness")))
                assert time.monotonic() - began < 20.0
            print(f"the standby leads {time.monotonic() - began:.1f} s after SIGTERM")
            assert states <= {("SERVING", "NOT_SERVING"), ("SERVING", "SERVING")}  # never nobody
            assert await first.process.process.wait() == 0
            print(f"the leader of before has ended after {time.monotonic() - began:.1f} s")
            await load.goes_on(50)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            assert set(load.statuses) == {200}, [status for status in load.statuses if status != 200]
            assert len(upstream.seen) >= len(load.statuses)
            print(f"{len(load.statuses)} requests, each answered 200")
            lease = f"epp-{namespace}-pool.llm-d.ai"
            assert (await holder(admin, namespace, lease)).startswith("second_")


@pytest.mark.slow
async def test_after_a_leader_is_killed_the_gap_is_bounded_by_its_lease(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    """At most: the lease from when the standby saw it renewed, which may be one look late, and one more look."""
    async with replicas(apiserver, admin, namespace, tmp_path) as (first, second, _):
        began = time.monotonic()
        first.process.kill()
        await until_seen(lambda: second.serving("readiness"), "SERVING", within=40.0)
        gap = time.monotonic() - began
        print(f"nobody led for {gap:.1f} s after kill -9")
        assert USUAL.lease - STEPS - 1.0 < gap < USUAL.lease + 2 * STEPS + 1.0


async def test_a_standby_stops_without_waiting_for_anybody(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    async with replicas(apiserver, admin, namespace, tmp_path) as (first, second, _):
        second.process.signal(signal.SIGTERM)
        assert await second.process.process.wait() == 0
        assert "draining" in second.process.output()
        assert "leads" not in second.process.output().replace("is held by", "")
        assert await first.serving("readiness") == "SERVING"
