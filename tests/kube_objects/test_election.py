"""Who leads, by a Lease: the pure part, with several candidates and a store that refuses stale writes."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epp.discovery.kube.election import Candidate, Election, Timing, lease_name

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
    return Election(Candidate("models", "epp-pool", identity, TIMING))


def step(election: Election, store: Store, now: float) -> None:
    lease = election.next_lease(store.read(), f"t{now}", now)
    if lease is not None:
        written = store.write(lease)
        if written is not None:
            election.wrote(written, now)


def test_the_lease_has_the_name_that_the_reference_gives_it() -> None:
    assert lease_name("models", "llama") == "epp-models-llama.llm-d.ai"


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


def test_a_slow_answer_makes_no_lease_older_than_it_is() -> None:
    """Read at 5, written at 4 for all we know, and taken over 15 s after we saw it, not after we asked."""
    store, first, second = Store(), candidate("a"), candidate("b")
    step(first, store, 4.0)
    seen = store.read()
    assert second.next_lease(seen, "t", 5.0) is None
    assert second.next_lease(seen, "t", 19.9) is None
    assert second.next_lease(seen, "t", 20.0) is not None


def test_a_lease_of_the_references_is_respected_and_taken_over_with_its_count() -> None:
    """As client-go writes it. Its times are of another clock, and say nothing."""
    spec = {
        "holderIdentity": "epp-7d9f_0f8fad5b-d9cb-469f-a165-70867728950e",
        "leaseDurationSeconds": 15,
        "acquireTime": "2020-01-01T00:00:00.000000Z",
        "renewTime": "2020-01-01T00:00:00.000000Z",
        "leaseTransitions": 7,
    }
    lease = {"metadata": {"name": "epp-pool", "resourceVersion": "9"}, "spec": spec}
    ours = candidate("a")
    assert ours.next_lease(lease, "t", 100.0) is None
    assert ours.leader == spec["holderIdentity"]
    taken = ours.next_lease(lease, "t2", 115.0)
    assert taken is not None
    assert taken["metadata"]["resourceVersion"] == "9"
    assert (taken["spec"]["leaseTransitions"], taken["spec"]["acquireTime"]) == (8, "t2")


def test_a_lease_that_the_reference_released_is_taken_at_once() -> None:
    """client-go leaves the holder out, and a second's duration."""
    spec = {"leaseDurationSeconds": 1, "leaseTransitions": 3, "renewTime": "t"}
    assert candidate("a").next_lease({"metadata": {"resourceVersion": "9"}, "spec": spec}, "t", 0.0) is not None


def test_a_leader_who_finds_another_in_his_place_stops_at_once() -> None:
    store, first, second = Store(), candidate("a"), candidate("b")
    step(first, store, 0.0)
    store.lease = None  # somebody deletes it
    step(second, store, 1.0)
    step(first, store, 2.0)
    assert not first.leads(2.0)
    assert second.leads(2.0)


def test_whoever_leaves_sees_who_comes() -> None:
    store, first, second = Store(), candidate("a"), candidate("b")
    step(first, store, 0.0)
    lease = first.released(store.read() or {}, "t1")
    assert lease is not None
    store.write(lease)
    assert not first.has_successor(store.read())
    step(second, store, 1.0)
    assert first.has_successor(store.read())
    assert first.leader == "b"
    assert not first.has_successor(None)


class Node:
    """A candidate on a machine with a clock of its own: it begins anywhere, and is up to a tenth too fast or slow."""

    def __init__(self, identity: str, begins: float, rate: float) -> None:
        self.election = candidate(identity)
        self._begins = begins
        self._rate = rate
        self.reading: tuple[Json | None] | None = None
        """What the store answered, and has not arrived yet."""
        self.sent: tuple[Json, float] | None = None
        """A write that has not reached the store yet, and when it was sent."""
        self.answer: tuple[Json, float] | None = None
        """What came of a write, likewise."""

    @property
    def is_idle(self) -> bool:
        return (self.reading, self.sent, self.answer) == (None, None, None)

    def clock(self, now: float) -> float:
        return self._begins + self._rate * now


class Elections(RuleBasedStateMachine):
    """Three candidates whose reads, writes and answers take any time, cross each other, and get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.nodes: list[Node] = []
        self.strays: list[Json] = []
        self.now = 0.0

    @initialize(clocks=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.9, 1.1)), min_size=3, max_size=3))
    def start(self, clocks: list[tuple[float, float]]) -> None:
        self.nodes = [Node(name, begins, rate) for name, (begins, rate) in zip("abc", clocks, strict=True)]

    @rule(seconds=st.one_of(st.floats(0.01, 3.0), st.floats(5.0, 20.0)))
    def passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(who=st.integers(0, 2))
    def read(self, who: int) -> None:
        node = self.nodes[who]
        if node.is_idle:
            node.reading = (self.store.read(),)

    @rule(who=st.integers(0, 2))
    def judge(self, who: int) -> None:
        node = self.nodes[who]
        if node.reading is not None:
            (lease,), node.reading = node.reading, None
            sent_at = node.clock(self.now)
            made = node.election.next_lease(lease, f"t{self.now}", sent_at)
            node.sent = None if made is None else (made, sent_at)

    @rule(who=st.integers(0, 2))
    def arrive(self, who: int) -> None:
        node = self.nodes[who]
        if node.sent is not None:
            (lease, sent_at), node.sent = node.sent, None
            stored = self.store.write(lease)
            node.answer = None if stored is None else (stored, sent_at)

    @rule(who=st.integers(0, 2))
    def learn(self, who: int) -> None:
        node = self.nodes[who]
        if node.answer is not None:
            node.election.wrote(*node.answer)
            node.answer = None

    @rule(who=st.integers(0, 2))
    def act(self, who: int) -> None:
        """All four at once, as usual."""
        for each in (self.read, self.judge, self.arrive, self.learn):
            each(who)

    @rule(who=st.integers(0, 2))
    def lose(self, who: int) -> None:
        """A time-out: nobody waits for what was under way any more. A write may reach the store all the same."""
        node = self.nodes[who]
        if node.sent is not None:
            self.strays.append(node.sent[0])
        node.reading = node.sent = node.answer = None

    @rule()
    def stray(self) -> None:
        if self.strays:
            self.store.write(self.strays.pop())

    @precondition(lambda self: self.store.lease is not None)
    @rule(who=st.integers(0, 2))
    def release(self, who: int) -> None:
        node = self.nodes[who]
        if node.is_idle:
            lease = node.election.released(self.store.read() or {}, f"t{self.now}")
            if lease is not None:
                self.store.write(lease)

    @invariant()
    def at_most_one_leads(self) -> None:
        assert sum(node.election.leads(node.clock(self.now)) for node in self.nodes) <= 1


TestElections = Elections.TestCase
