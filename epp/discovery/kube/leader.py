"""Keeps a Lease, or waits for it.

In: an API server. Out: `on_change`, told whenever we begin or cease to lead.
Rules here:
- A lease is released when we stop, so that the next leader need not wait for it to run out.
- An API server that does not answer is asked again; nothing else happens until the renew deadline passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random

from epp.discovery.kube.api import UNREACHABLE, Api, ApiError, Json
from epp.discovery.kube.election import Election, Timing

LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"


class Leader:
    """This picker's candidature."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        *,
        now: Callable[[], float],
        rng: Random,
        on_change: Callable[[bool], None],
        failed: Callable[[str, Exception], None],
        timing: Timing | None = None,
    ) -> None:
        """
        Args:
            now: seconds, monotonic.
            failed: told of each attempt that failed.
        """
        self._timing = timing or Timing()
        self._election = Election(name, namespace, identity, self._timing)
        self._api = api
        self._leases = LEASES.format(namespace)
        self._path = f"{self._leases}/{name}"
        self._now = now
        self._rng = rng
        self._on_change = on_change
        self._failed = failed
        self._led = False

    async def run(self) -> None:
        """Until it is cancelled; then `release`."""
        while True:
            try:
                async with asyncio.timeout(self._timing.renew_deadline / 2):
                    await self._step()
            except ApiError as error:
                if error.status != 409:  # a conflict: another candidate was faster
                    self._failed(self._path, error)
            except UNREACHABLE as error:
                self._failed(self._path, error)
            self._tell()
            await asyncio.sleep(self._timing.retry * (1 + 0.2 * self._rng.random()))

    async def release(self) -> None:
        """Let go of the lease, if it is ours. Raises nothing: it runs out by itself."""
        try:
            async with asyncio.timeout(self._timing.retry):
                lease = self._election.released(await self._api.get(self._path), _stamp())
                if lease is not None:
                    await self._api.send("PUT", self._path, lease)
        except (ApiError, *UNREACHABLE) as error:
            self._failed(self._path, error)
        self._tell()

    async def _step(self) -> None:
        asked_at = self._now()
        lease = self._election.next_lease(await self._read(), _stamp(), asked_at)
        if lease is None:
            return
        if "resourceVersion" in lease["metadata"]:
            answer = await self._api.send("PUT", self._path, lease)
        else:
            answer = await self._api.send("POST", self._leases, lease)
        self._election.wrote(answer, asked_at)

    async def _read(self) -> Json | None:
        try:
            return await self._api.get(self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _tell(self) -> None:
        leads = self._election.leads(self._now())
        if leads != self._led:
            self._led = leads
            self._on_change(leads)


def _stamp() -> str:
    """MicroTime, in UTC: the official client's asyncio election writes local time under this name."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
