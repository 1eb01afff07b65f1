"""Who leads, by a Lease: the pure part, with several candidates and a store that refuses stale writes."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from epp.discovery.kube.election import Election, Timing

TIMING = Timing(lease=15.0, renew_deadline=10.0, retry=2.0)
Json = dict[str, Any]


class Store:
    """One Lease as an API server keeps it."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0

    def read(self) -> Json | None:
        return copy.deepcopy(self.lease)

    def write(self, lease: Json) -> Json | None:
        """The lease as stored; None: a conflict."""
        version = lease["metadata"].get("resourceVersion")
        if version != (None if self.lease is None else str(self.version)):
            return None
        self.version += 1
        metadata = {**lease["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**lease, "metadata": metadata, "spec": dict(lease["spec"])}
        return self.read()


def candidate(identity: str) -> Election:
    return Election("epp-pool", "models", identity, TIMING)


def step(election: Election, store: Store, now: float) -> None:
    lease = election.next_lease(store.read(), f"t{now}", now)
    if lease is not None:
        written = store.write(lease)
        if written is not None:
            election.wrote(written, now)


def test_the_first_candidate_creates_the_lease_and_leads() -> None:
    store, first = Store(), candidate("a")
    assert not first.leads(0.0)
    step(first, store, 0.0)
    assert first.leads(0.0)
    assert store.lease is not None
    assert store.lease["metadata"]["name"] == "epp-pool"
    assert store.lease["spec"] == {
        "holderIdentity": "a",
        "leaseDurationSeconds": 15,
        "acquireTime": "t0.0",
        "renewTime": "t0.0",
        "leaseTransitions": 0,
    }


def test_a_leader_renews_and_keeps_the_time_since_which_it_leads() -> None:
    store, first = Store(), candidate("a")
    step(first, store, 0.0)
    step(first, store, 9.0)
    assert first.leads(18.9)
    assert not first.leads(19.0)
    assert store.lease is not None
    assert (store.lease["spec"]["acquireTime"], store.lease["spec"]["renewTime"]) == ("t0.0", "t9.0")


def test_a_lease_that_does_not_change_for_its_duration_is_taken_over() -> None:
    store, first, second = Store(), candidate("a"), candidate("b")
    step(first, store, 0.0)
    step(second, store, 5.0)
    assert second.leader == "a"
    step(second, store, 19.9)  # 14.9 s after it was seen
    assert not second.leads(19.9)
    step(second, store, 20.0)
    assert second.leads(20.0)
    assert not first.leads(20.0)
    assert store.lease is not None
    assert store.lease["spec"]["leaseTransitions"] == 1


def test_a_lease_that_was_released_is_taken_at_once() -> None:
    store, first, second = Store(), candidate("a"), candidate("b")
    step(first, store, 0.0)
    step(second, store, 0.5)
    lease = first.released(store.read() or {}, "t1")
    assert lease is not None
    store.write(lease)
    assert not first.leads(1.0)
    step(second, store, 1.0)
    assert second.leads(1.0)


def test_what_is_not_ours_is_not_released() -> None:
    store, first, second = Store(), candidate("a"), candidate("b")
    step(first, store, 0.0)
    assert second.released(store.read() or {}, "t1") is None


def test_of_two_who_take_over_at_once_one_gets_a_conflict() -> None:
    store, first, second = Store(), candidate("a"), candidate("b")
    seen = store.read()
    one, other = first.next_lease(seen, "t", 0.0), second.next_lease(seen, "t", 0.0)
    assert one is not None
    assert other is not None
    assert store.write(one) is not None
    assert store.write(other) is None


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0.01, 6.0), st.sampled_from(("step", "silent", "release"))),
        max_size=60,
    )
)
def test_there_is_never_more_than_one_leader(moves: list[tuple[int, float, str]]) -> None:
    store, candidates, now = Store(), [candidate(name) for name in "abc"], 0.0
    for who, after, what in moves:
        now += after
        election = candidates[who]
        if what == "step":
            step(election, store, now)
        elif what == "release" and store.lease is not None:
            lease = election.released(store.read() or {}, f"t{now}")
            if lease is not None:
                store.write(lease)
        assert sum(each.leads(now) for each in candidates) <= 1
