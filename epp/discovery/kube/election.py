"""Who leads, by a Lease: what it says, and what one candidate does about it.

In: the Lease as the API server gives it, or that there is none; what came of our own writes. Out: the Lease to write,
or nothing, and whether we lead.
Rules here:
- Clocks of other machines are never compared with ours: a lease is over when it has not changed for its duration as we
  saw it, however its times read.
- We lead only while our last write that went through is younger than the renew deadline, which is shorter than the
  lease: whoever cannot reach the API server stops leading before anybody else begins.
- A write names the version that it was made from, so that of two candidates one gets a conflict.
- Whoever deletes the Lease by hand asks for an election now; the leader of before stops when it notices.
Source: client-go, tools/leaderelection, with its defaults in controller-runtime; the same Lease, so that pickers of the
reference and ours never both lead.
"""

from __future__ import annotations

from math import inf
from typing import Any, Final

import msgspec

Json = dict[str, Any]


class Timing(msgspec.Struct, frozen=True):
    """In seconds."""

    lease: float = 15.0
    renew_deadline: float = 10.0
    retry: float = 2.0


class Candidate(msgspec.Struct, frozen=True):
    """Who stands for which election."""

    namespace: str
    lease: str
    """Name of the Lease, the same for all pickers of a pool: see `lease_name`."""
    identity: str
    """Like no other's, not even of this process's successor."""
    timing: Timing = Timing()


def lease_name(namespace: str, pool: str) -> str:
    """The reference's, in the pool's namespace."""
    return f"epp-{namespace}-{pool}.llm-d.ai"


class Election:
    """What one candidate knows of its election, and does next."""

    def __init__(self, candidate: Candidate) -> None:
        self._metadata: Final = {"name": candidate.lease, "namespace": candidate.namespace}
        self._identity = candidate.identity
        self._timing = candidate.timing
        self._seen: Json | None = None
        self._seen_at = 0.0
        self.leads_until = -inf
        """When we cease to lead unless a write goes through before."""
        self.leader = ""
        """Whoever holds the lease, as far as we know."""

    def leads(self, now: float) -> bool:
        return now < self.leads_until

    def next_lease(self, lease: Json | None, stamp: str, now: float) -> Json | None:
        """What to write, for a lease as it was just read; None: somebody else holds it.

        Args:
            lease: None: there is none, so what is returned is to be created.
            stamp: this moment, as RFC 3339 with microseconds.
            now: after it was read, so that a slow answer makes no lease older than it is.
        """
        spec: Json = (lease or {}).get("spec") or {}
        if spec != self._seen:
            self._seen, self._seen_at = spec, now
        self.leader = str(spec.get("holderIdentity") or "")
        ours = self.leader == self._identity
        over = now >= self._seen_at + float(spec.get("leaseDurationSeconds") or 0)
        if self.leader and not ours and not over:
            self.leads_until = -inf
            return None
        transitions = int(spec.get("leaseTransitions") or 0)
        return self._written(
            lease,
            holderIdentity=self._identity,
            leaseDurationSeconds=round(self._timing.lease),
            acquireTime=spec.get("acquireTime", stamp) if ours else stamp,
            renewTime=stamp,
            leaseTransitions=transitions if ours or lease is None else transitions + 1,
        )

    def wrote(self, lease: Json, asked_at: float) -> None:
        """A write went through.

        Args:
            lease: as the API server answered.
            asked_at: when it was sent, which is when the lease began at the earliest.
        """
        self._seen, self._seen_at = lease.get("spec") or {}, asked_at
        self.leader = self._identity
        self.leads_until = asked_at + self._timing.renew_deadline

    def released(self, lease: Json, stamp: str) -> Json | None:
        """What to write so that somebody else may lead at once; None: it is not ours. We lead no more."""
        self.leads_until = -inf
        spec: Json = lease.get("spec") or {}
        if spec.get("holderIdentity") != self._identity:
            return None
        self.leader = ""
        return self._written(
            lease,
            holderIdentity="",
            leaseDurationSeconds=1,
            acquireTime=stamp,
            renewTime=stamp,
            leaseTransitions=spec.get("leaseTransitions") or 0,
        )

    def has_successor(self, lease: Json | None) -> bool:
        """After `released`: somebody else holds the lease, as it was just read."""
        self.leader = str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")
        return self.leader not in ("", self._identity)

    def _written(self, lease: Json | None, **spec: object) -> Json:
        metadata = self._metadata if lease is None else lease["metadata"]
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
