"""The endpoints and policies of a pool, as a Kubernetes API server has them.

In: objects that concern the pool, followed kind by kind. Out: the table's list of endpoints, the policies, whether we
lead (where there is an election), and conditions in the status of objects.
Rules here:
- Who does not lead follows all the same, so that it can lead at once. Only conditions are left to the leader.
- Nothing is applied before all that there is has been listed once; after that the table follows at once, and changes
  that come together are applied together.
- An API server that is away changes nothing: what was known last goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random

from epp.discovery.kube.api import Api, Json
from epp.discovery.kube.election import Candidate
from epp.discovery.kube.informer import Informer
from epp.discovery.kube.leader import Leader
from epp.discovery.kube.objects import Kind
from epp.discovery.kube.statuses import StatusWriter
from epp.discovery.kube.view import POOLS, ClusterView, NamedPool, SelectedPods, Status
from epp.endpoints.table import Endpoint, EndpointTable
from epp.flow.policies import Policies

logger = logging.getLogger("epp.discovery")


class KubeDiscovery:
    """Keeps a table's list of endpoints, and policies, as the API server says."""

    def __init__(
        self,
        scope: NamedPool | SelectedPods,
        table: EndpointTable,
        *,
        now: Callable[[], float],
        rng: Random,
        on_policies: Callable[[Policies], None],
        on_sync: Callable[[bool], None],
        failed: Callable[[str, Exception], None],
        candidate: Candidate | None = None,
        on_lead: Callable[[bool], None] = lambda leads: None,
    ) -> None:
        """
        Args:
            candidate: what we stand for; None: there is no election.
            on_lead: told whenever we begin or cease to lead; never without an election.
            on_policies: told of each change.
            on_sync: told whether the pool is known and everything was listed, at each change of that.
            failed: told of each attempt that failed, with the path.
        """
        self._view = ClusterView(scope)
        self._table = table
        self._now = now
        self._on_policies = on_policies
        self._on_sync = on_sync
        self._present: set[Kind] = set()
        self._is_synced = False
        self._is_due = False
        self._told = frozenset[str]()
        self._policies: Policies | None = None
        self._endpoints: tuple[Endpoint, ...] | None = None
        self._scope = scope
        self._rng = rng
        self._failed = failed
        self._candidate = candidate
        self._on_lead = on_lead
        self._api: Api | None = None
        self._informers: tuple[Informer, ...] = ()
        self._leader: Leader | None = None
        self._writer: StatusWriter | None = None
        self._statuses: tuple[Status, ...] = ()

    async def begin(self, kubeconfig: str = "") -> None:
        """Find the API server, which need not answer yet. Raises ConfigError: there is no way to one."""
        api = self._api = await Api.connect(kubeconfig)
        scope = self._scope
        self._informers = tuple(
            Informer(
                api, paths(kind, scope.namespace), query(kind, scope.name), Feed(self, kind), self._rng, self._failed
            )
            for kind in Kind
            if kind not in POOLS or (isinstance(scope, NamedPool) and kind in scope.kinds)
        )
        self._writer = StatusWriter(api, self._rng, self._failed, is_ours=self._candidate is None)
        if self._candidate is not None:
            self._leader = Leader(
                api, self._candidate, now=self._now, rng=self._rng, on_change=self._lead, failed=self._failed
            )

    async def run(self) -> None:
        """Follow them all, for ever; call `begin` first."""
        assert self._writer is not None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._writer.run())
            if self._leader is not None:
                tasks.create_task(self._stand(self._leader))
            for informer in self._informers:
                tasks.create_task(informer.run())

    async def hand_over(self, within: float) -> bool:
        """Give the lease away, where it is ours; returns whether another picker was seen to have it. Raises nothing."""
        return self._leader is not None and await self._leader.hand_over(within)

    async def close(self) -> None:
        """Let go of the API server, when `run` has ended."""
        if self._api is not None:
            await self._api.close()

    # -- what informers tell --------------------------------------------------------------------------------------

    def listed(self, kind: Kind, objects: list[Json]) -> None:
        self._be_present(kind, True)
        self._view.replace(kind, objects)
        self._change()

    def put(self, kind: Kind, item: Json) -> None:
        self._view.put(kind, item)
        self._change()

    def drop(self, kind: Kind, item: Json) -> None:
        self._view.drop(kind, item)
        self._change()

    def absent(self, kind: Kind) -> None:
        self._be_present(kind, False)
        self._change()

    def _be_present(self, kind: Kind, present: bool) -> None:
        if present != (kind in self._present):
            self._present ^= {kind}
            self._view.set_present(self._present)

    # -- the election ---------------------------------------------------------------------------------------------

    async def _stand(self, leader: Leader) -> None:
        """Once all is listed: who led before that would keep a standby who is ready from it."""
        for informer in self._informers:
            await informer.synced.wait()
        await leader.run()

    def _lead(self, leads: bool) -> None:
        if self._writer is not None:
            self._writer.set_ours(leads)
        self._on_lead(leads)

    # -- what comes of it -----------------------------------------------------------------------------------------

    def _change(self) -> None:
        """Something changed; what follows is worked out once a turn of the loop."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._is_due = False
        if not all(informer.synced.is_set() for informer in self._informers):
            return
        endpoints = self._view.endpoints()
        if endpoints is not self._endpoints:
            self._endpoints = endpoints
            self._table.replace(endpoints, self._now())
        policies = self._view.policies()
        if policies is not self._policies:
            self._policies = policies
            self._on_policies(policies)
        if self._view.is_synced != self._is_synced:
            self._is_synced = self._view.is_synced
            self._on_sync(self._is_synced)
        statuses = self._view.statuses()
        if statuses is not self._statuses and self._writer is not None:
            self._statuses = statuses
            self._writer.want(statuses)
        notes = frozenset(map(str, self._view.notes()))
        for note in sorted(notes - self._told):
            logger.warning("%s", note)
        self._told = notes


class Feed:
    """One kind's sink."""

    def __init__(self, discovery: KubeDiscovery, kind: Kind) -> None:
        self._discovery = discovery
        self._kind = kind

    def replace(self, objects: list[Json]) -> None:
        self._discovery.listed(self._kind, objects)

    def put(self, item: Json) -> None:
        self._discovery.put(self._kind, item)

    def drop(self, item: Json) -> None:
        self._discovery.drop(self._kind, item)

    def absent(self) -> None:
        self._discovery.absent(self._kind)


def paths(kind: Kind, namespace: str) -> list[str]:
    """Where the objects of a kind are, in each version."""
    roots = [f"/apis/{kind.group}/{version}" if kind.group else f"/api/{version}" for version in kind.versions]
    return [f"{root}/namespaces/{namespace}/{kind.plural}" for root in roots]


def query(kind: Kind, name: str) -> dict[str, str]:
    """Of pools only our own is watched, which a role may be restricted to."""
    return {"fieldSelector": f"metadata.name={name}"} if kind in POOLS else {}
