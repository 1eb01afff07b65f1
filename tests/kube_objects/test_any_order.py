"""Whatever the order of events: a view says what a new view says that is given the objects as they are in the end.

And a table that follows the view, event by event, lists what that new view says, and no request is lost or invented on
the way.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from epp.discovery.kube.objects import ACTIVE_PORTS, Key, Kind, Pool, key_of
from epp.discovery.kube.view import ClusterView, NamedPool, SelectedPods
from epp.endpoints.selector import parse_selector
from epp.endpoints.table import EndpointTable, Hold
from tests.kube_objects import builders
from tests.kube_objects.builders import Json, legacy_pool, model, objective, pod, pool, rewrite

CREATED = st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])
NAMES = st.sampled_from(["a", "b", "c"])
POOLS = st.sampled_from(["pool", "pool", "pool", "other"])
MODELS = st.sampled_from(["m", "n"])
PORTS = st.lists(st.sampled_from([8000, 8001, 8002]), min_size=1, max_size=3)  # now and then one twice: unreadable
LABELS = st.sampled_from([{"app": "vllm"}, {"app": "vllm", "tier": "x"}, {"app": "sglang"}])
RULES = st.builds(
    lambda models, targets: builders.rule(models, **targets),
    st.lists(MODELS, max_size=2),
    st.dictionaries(st.sampled_from(["x", "y"]), st.none() | st.integers(0, 3), max_size=2),  # none at all: unreadable
)
PODS = st.builds(
    pod,
    NAMES,
    st.sampled_from([None, "10.0.0.1", "10.0.0.2", "fd00::1", "10.0.0.300"]),
    labels=LABELS,
    ready=st.sampled_from(["True", "True", "False"]),
    declared=st.sampled_from([(), (8000,), (9090,)]),
    created=CREATED,
    annotations=st.sampled_from(
        [{}, {}, {ACTIVE_PORTS[0]: "8001"}, {ACTIVE_PORTS[1]: "8000,9"}, {ACTIVE_PORTS[0]: ""}]
    ),
    deletionTimestamp=st.sampled_from([None, None, None, "2026-01-03T00:00:00Z"]),
)
OBJECTIVES = st.builds(objective, NAMES, st.none() | st.integers(-2, 2), POOLS)
REWRITES = st.builds(
    lambda name, rules, pool, created: rewrite(name, *rules, pool=pool, created=created),
    NAMES, st.lists(RULES, max_size=2), POOLS, CREATED,
)  # fmt: skip
OBJECTS: dict[Kind, st.SearchStrategy[Json]] = {
    Kind.POD: PODS,
    Kind.POOL: st.builds(pool, POOLS, PORTS, LABELS),
    Kind.LEGACY_POOL: st.builds(legacy_pool, POOLS, st.sampled_from([8000, 8001, 0]), LABELS),
    Kind.OBJECTIVE: OBJECTIVES,
    Kind.LEGACY_OBJECTIVE: OBJECTIVES,
    Kind.REWRITE: REWRITES,
    Kind.LEGACY_REWRITE: REWRITES,
    Kind.MODEL: st.builds(
        model,
        NAMES,
        MODELS,
        st.sampled_from([None, "Critical", "Standard", "Sheddable", "Vital"]),
        POOLS,
        CREATED,
        st.none() | st.dictionaries(st.sampled_from(["x", "y"]), st.none() | st.integers(0, 3), max_size=2),
    ),
}
EVENTS = st.one_of([st.tuples(st.just(kind), objects) for kind, objects in OBJECTS.items()])
LISTS = st.one_of([st.tuples(st.just(kind), st.lists(objects, max_size=3)) for kind, objects in OBJECTS.items()])
PRESENT = st.sets(st.sampled_from(list(Kind)), min_size=4)
SCOPES: tuple[NamedPool | SelectedPods, ...] = (
    NamedPool("prod", "pool"),
    NamedPool("prod", "pool", (Kind.POOL, Kind.LEGACY_POOL)),
    SelectedPods("prod", "pool", Pool(parse_selector("app in (vllm),tier!=x"), (8001, 8000))),
)


class Cluster(RuleBasedStateMachine):
    """The objects that there are, three views that follow them event by event, and a table that follows each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.present: set[Kind] = set(Kind)
        self.objects: dict[Kind, dict[Key, Json]] = {kind: {} for kind in Kind}
        self.views = [ClusterView(scope) for scope in SCOPES]
        self.tables = [EndpointTable() for _ in SCOPES]
        self.holds: list[list[tuple[Hold, str, str]]] = [[] for _ in SCOPES]
        for view in self.views:
            view.set_present(self.present)

    @rule(event=EVENTS)
    def put(self, event: tuple[Kind, Json]) -> None:
        kind, raw = event
        if kind in self.present:
            self.objects[kind][key_of(raw)] = raw
        for view in self.views:
            view.put(kind, raw)

    @rule(kind=st.sampled_from(list(Kind)), name=NAMES | POOLS)
    def drop(self, kind: Kind, name: str) -> None:
        self.objects[kind].pop(("prod", name), None)
        for view in self.views:
            view.drop(kind, {"metadata": {"namespace": "prod", "name": name}})

    @rule(event=LISTS)
    def replace(self, event: tuple[Kind, list[Json]]) -> None:
        kind, objects = event
        if kind in self.present:
            self.objects[kind] = {key_of(raw): raw for raw in objects}
        for view in self.views:
            view.replace(kind, objects)

    @rule(present=PRESENT)
    def set_present(self, present: set[Kind]) -> None:
        self.present = present | {Kind.POD}
        for kind in set(Kind) - self.present:
            self.objects[kind] = {}
        for view in self.views:
            view.set_present(present)

    @precondition(lambda self: any(len(table) for table in self.tables))
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        for table, holds in zip(self.tables, self.holds, strict=True):
            if len(table):
                slot = data.draw(st.sampled_from(table.listed.tolist()))
                endpoint = table.endpoint(slot)
                holds.append((table.admit(slot), endpoint.name, endpoint.address))

    @precondition(lambda self: any(self.holds))
    @rule()
    def release(self) -> None:
        for table, holds in zip(self.tables, self.holds, strict=True):
            if holds:
                table.release(holds.pop(0)[0])

    @rule()
    def follow(self) -> None:
        """The tables follow now; otherwise they see several events as one."""
        self.now += 1.0
        for view, table in zip(self.views, self.tables, strict=True):
            table.replace(view.endpoints(), self.now)

    @invariant()
    def views_say_what_new_ones_say(self) -> None:
        for scope, view in zip(SCOPES, self.views, strict=True):
            fresh = self.fresh(scope)
            assert view.endpoints() == fresh.endpoints()
            assert view.policies() == fresh.policies()
            assert view.statuses() == fresh.statuses()
            assert view.notes() == fresh.notes()
            assert view.pool == fresh.pool
            names = [endpoint.name for endpoint in view.endpoints()]
            assert names == sorted(set(names))
            assert len({endpoint.address for endpoint in view.endpoints()}) == len(names)

    @invariant()
    def requests_stay_counted_on_the_endpoint_that_they_were_sent_to(self) -> None:
        for table, holds in zip(self.tables, self.holds, strict=True):
            sent: dict[tuple[str, str], int] = {}
            for _, name, address in holds:
                sent[name, address] = sent.get((name, address), 0) + 1
            slots = {slot for slot in range(table.width) if table.generation(slot)}
            where = {(table.endpoint(slot).name, table.endpoint(slot).address): slot for slot in slots}
            assert len(where) == len(slots)
            assert sent.keys() <= where.keys()
            for at, slot in where.items():
                assert table.fact("inflight", slot) == sent.get(at, 0)

    def teardown(self) -> None:
        self.follow()
        self.requests_stay_counted_on_the_endpoint_that_they_were_sent_to()
        for scope, table in zip(SCOPES, self.tables, strict=True):
            final = EndpointTable()
            final.replace(self.fresh(scope).endpoints(), 0.0)
            assert sorted(listed(table)) == sorted(listed(final))

    def fresh(self, scope: NamedPool | SelectedPods) -> ClusterView:
        """A new view that is given the objects as they are, in another order than they came in."""
        view = ClusterView(scope)
        view.set_present(self.present)
        for kind in sorted(self.present, key=lambda kind: kind.name):
            view.replace(kind, [self.objects[kind][key] for key in sorted(self.objects[kind])])
        return view


def listed(table: EndpointTable) -> list[tuple[Any, ...]]:
    endpoints = [table.endpoint(slot) for slot in table.listed.tolist()]
    return [(endpoint.name, endpoint.address, sorted(endpoint.labels.items())) for endpoint in endpoints]


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
