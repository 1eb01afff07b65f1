"""Keeps a Lease, or waits for it.

In: an API server. Out: `on_change`, told whenever we begin or cease to lead; a log line for each new holder.
Rules here:
- An API server that does not answer is asked again; when the renew deadline passes we cease to lead, to the moment,
  and go on as a candidate. client-go's leader ends its process instead, which would throw a warm index away.
- Who stops gives the lease away, so that nobody waits for it to run out, and learns who has it next.
Rejected: watching the Lease, for a standby that notices at once: it needs another verb, and since the one who leaves
serves until another leads (`hand_over`), the two seconds until a standby looks cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from typing import Final

from epp.discovery.kube.api import UNREACHABLE, Api, ApiError, Json
from epp.discovery.kube.election import Candidate, Election

logger = logging.getLogger("epp.discovery")

LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
LOOK: Final = 0.2
"""Seconds between two looks at who has the lease that we gave away."""


class Leader:
    """This picker's candidature."""

    def __init__(
        self,
        api: Api,
        candidate: Candidate,
        *,
        now: Callable[[], float],
        rng: Random,
        on_change: Callable[[bool], None],
        failed: Callable[[str, Exception], None],
    ) -> None:
        """
        Args:
            now: seconds, monotonic.
            failed: told of each attempt that failed, with the path.
        """
        self._api = api
        self._candidate = candidate
        self._election = Election(candidate)
        self._leases = LEASES.format(candidate.namespace)
        self._path = f"{self._leases}/{candidate.lease}"
        self._now = now
        self._rng = rng
        self._on_change = on_change
        self._failed = failed
        self._led = False
        self._holder = ""
        self._turn = asyncio.Lock()
        self._leaving = False
        self._gave = False
        self._end: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Stand for election, for ever."""
        while not self._leaving:
            async with self._turn:
                await self._attempt(self._step)
            await asyncio.sleep(self._candidate.timing.retry * (1 + 0.2 * self._rng.random()))

    async def hand_over(self, within: float) -> bool:
        """Let go of the lease, if it is ours, and wait until another picker has it; we stand no more.

        Returns whether another was seen to have it. Raises nothing: a lease that is not released runs out by itself.
        """
        self._leaving = True
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                async with self._turn:  # a renewal under way would make ours a conflict
                    gave = await self._insist(self._release)
                while gave:
                    if await self._insist(self._find_successor):
                        return True
                    await asyncio.sleep(LOOK)
        return False

    # -- attempts -------------------------------------------------------------------------------------------------

    async def _insist(self, what: Callable[[], Awaitable[bool]]) -> bool:
        while True:
            said = await self._attempt(what)
            if said is not None:
                return said
            await asyncio.sleep(LOOK)

    async def _attempt(self, what: Callable[[], Awaitable[bool]]) -> bool | None:
        """None: it failed."""
        said = None
        try:
            async with asyncio.timeout(self._candidate.timing.renew_deadline / 2):
                said = await what()
        except ApiError as error:
            if error.status != 409:  # a conflict: another candidate was faster
                self._failed(self._path, error)
        except UNREACHABLE as error:
            self._failed(self._path, error)
        self._tell()
        return said

    async def _step(self) -> bool:
        found = await self._read()
        asked_at = self._now()
        lease = self._election.next_lease(found, _stamp(), asked_at)
        if lease is None:
            return False
        if found is None:
            answer = await self._api.send("POST", self._leases, lease)
        else:
            answer = await self._api.send("PUT", self._path, lease)
        self._election.wrote(answer, asked_at)
        return True

    async def _release(self) -> bool:
        lease = self._election.released(await self._read() or {}, _stamp())
        if lease is not None:
            self._gave = True  # whether or not we hear of it
            await self._api.send("PUT", self._path, lease)
        return self._gave

    async def _find_successor(self) -> bool:
        return self._election.has_successor(await self._read())

    async def _read(self) -> Json | None:
        try:
            return await self._api.get(self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    # -- what is told ---------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Say what has changed, and look again when our time as a leader is over."""
        if self._end is not None:
            self._end.cancel()
        lease, now = self._candidate.lease, self._now()
        if self._election.leader != self._holder:
            self._holder = self._election.leader
            logger.info("%s is held by %s", lease, self._holder or "nobody")
        leads = self._election.leads(now)
        if leads:
            remaining = self._election.leads_until - now
            self._end = asyncio.get_running_loop().call_later(remaining, self._tell)
        if leads != self._led:
            self._led = leads
            logger.info("%s, %s: %s", lease, self._candidate.identity, "leads" if leads else "does not lead any more")
            self._on_change(leads)


def _stamp() -> str:
    """MicroTime, in UTC: the official client's asyncio election writes local time under this name."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
