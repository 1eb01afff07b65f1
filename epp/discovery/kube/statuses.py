"""Writes what policies should know of themselves into their status: conditions, as `ClusterView.statuses` has them.

In: conditions that objects should have and have not, and whether to write them is ours. Out: patches of their status.
Rules here:
- A condition is written onto the object as it was just read, and only if nobody wrote meanwhile (409: read again), so
  that other writers' conditions are kept, and the time of a transition is that of the transition.
- What was concluded from an older spec is not written: the watch brings the newer one, and with it the next conclusion.
- One write at a time, with a pause between two; after a failure longer and longer pauses, with jitter.
- A role that may not write (the reference's may not) is usual: one line, and then nothing for that kind for a while.
- A pool's status belongs to gateways: nothing here is ever given one.
Rejected: server-side apply, which needs no reading, but leaves the time of a transition to what was watched, and puts
back what somebody has just corrected. A merge patch without resourceVersion would drop a condition written meanwhile.
Source: Kubernetes API conventions (conditions; `observedGeneration`, `lastTransitionTime`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from random import Random
from typing import Final

from epp.discovery.kube.api import UNREACHABLE, Api, ApiError, Json
from epp.discovery.kube.objects import Condition, Kind
from epp.discovery.kube.view import Status

logger = logging.getLogger("epp.discovery")

MERGE_PATCH: Final = "application/merge-patch+json"
PAUSE: Final = 0.1
"""Seconds between two writes, so that 1,000 objects take two minutes; client-go's queues have the same ten a second."""
FIRST_WAIT: Final = 1.0
LONGEST_WAIT: Final = 60.0
FORBIDDEN_FOR: Final = 600.0
"""Seconds until a kind that we may not write is tried again."""

Target = tuple[Kind, str, str]
"""Kind, namespace, name."""


class StatusWriter:
    """The conditions that are still to be written."""

    def __init__(
        self, api: Api, rng: Random, failed: Callable[[str, Exception], None], *, is_ours: bool = True
    ) -> None:
        """
        Args:
            is_ours: whether we are the one who writes, until `set_ours`.
            failed: told of each attempt that failed, with the path.
        """
        self._api = api
        self._rng = rng
        self._failed = failed
        self._wanted: dict[Target, Status] = {}
        self._forbidden: set[Kind] = set()
        self._is_ours = is_ours
        self._wait = FIRST_WAIT
        self._wake = asyncio.Event()

    def want(self, statuses: Iterable[Status]) -> None:
        """These are all that are to be written now."""
        self._wanted = {(status.kind, status.namespace, status.name): status for status in statuses}
        self._wake.set()

    def set_ours(self, ours: bool) -> None:
        """Whether we are the one who writes."""
        self._is_ours = ours
        self._wake.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            status = self._take()
            if status is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                await asyncio.sleep(await self._write(status))

    def _take(self) -> Status | None:
        if not self._is_ours:
            return None
        target = next((target for target in self._wanted if target[0] not in self._forbidden), None)
        return None if target is None else self._wanted.pop(target)

    async def _write(self, status: Status) -> float:
        """Returns the seconds to wait before the next."""
        try:
            await self._patch(status)
        except ApiError as error:
            return self._refused(status, error)
        except UNREACHABLE as error:
            return self._later(status, error)
        self._wait = FIRST_WAIT
        return PAUSE

    async def _patch(self, status: Status) -> None:
        """Raises as `Api.send`. Nothing is done where the object is gone, or has the condition."""
        for version in status.kind.versions:
            path = path_of(status, version)
            try:
                found = await self._api.get(path)
            except ApiError as error:
                if error.status == 404:
                    continue
                raise
            patch = patch_of(found, status.condition, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
            if patch is not None:
                await self._api.send("PATCH", f"{path}/status", patch, MERGE_PATCH)
            return

    def _refused(self, status: Status, error: ApiError) -> float:
        match error.status:
            case 404:  # deleted meanwhile, or a kind without a status
                pass
            case 409:
                self._again(status)
            case 403:
                self._again(status)
                self._forbid(status.kind, error)
            case 429 | 500 | 502 | 503 | 504:
                return self._later(status, error)
            case _:  # the same again would be refused again
                self._failed(path_of(status, status.kind.versions[0]), error)
        return PAUSE

    def _later(self, status: Status, error: Exception) -> float:
        self._failed(path_of(status, status.kind.versions[0]), error)
        self._again(status)
        wait, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)
        return wait * (1 + self._rng.random())

    def _again(self, status: Status) -> None:
        """Put it back, unless something newer is wanted there."""
        self._wanted.setdefault((status.kind, status.namespace, status.name), status)

    def _forbid(self, kind: Kind, error: ApiError) -> None:
        """Leave a kind alone for a while."""
        if kind not in self._forbidden:
            self._forbidden.add(kind)
            asyncio.get_running_loop().call_later(FORBIDDEN_FOR, self._forgive, kind)
            resource = f"{kind.plural}.{kind.group}"
            logger.info(
                "no conditions are written to %s, which harms no routing (%s); for them a role needs get of %s and "
                "patch of %s/status",
                *(resource, error, kind.plural, kind.plural),
            )

    def _forgive(self, kind: Kind) -> None:
        self._forbidden.discard(kind)
        self._wake.set()


def path_of(status: Status, version: str) -> str:
    kind = status.kind
    return f"/apis/{kind.group}/{version}/namespaces/{status.namespace}/{kind.plural}/{status.name}"


def patch_of(found: Json, condition: Condition, stamp: str) -> Json | None:
    """A merge patch that gives an object a condition and leaves its other conditions as they are.

    Args:
        found: the object as it was just read; the patch is refused once it is another.
        stamp: now, RFC 3339 to the second in UTC.

    Returns:
        None: it has the condition, or the condition was concluded from another generation of it.
    """
    metadata = found["metadata"]
    if metadata.get("generation") != condition.observed_generation:
        return None
    conditions: list[Json] = (found.get("status") or {}).get("conditions") or []
    had = next((each for each in conditions if each.get("type") == condition.type), {})
    since = had.get("lastTransitionTime", stamp) if had.get("status") == condition.status else stamp
    made = {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message,
        "observedGeneration": condition.observed_generation,
        "lastTransitionTime": since,
    }
    if had == made:
        return None
    changed = [made if each is had else each for each in conditions] if had else [*conditions, made]
    return {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": {"conditions": changed}}
