"""The endpoint table against a naive model: a list of objects, each with the list of its requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from epp.endpoints.table import COUNTS, FACTS, GAUGES, Endpoint, EndpointTable, Hold, Page

FRESHNESS = 2.0
NAMES = st.sampled_from(["default/a", "default/b", "default/c"])
ADDRESSES = st.sampled_from(["10.0.0.1:80", "10.0.0.2:80", "[fd00::1]:80"])
ENDPOINTS = st.builds(Endpoint, name=NAMES, address=ADDRESSES, labels=st.sampled_from([{}, {"role": "decode"}]))
ADAPTERS = st.none() | st.lists(st.sampled_from(["x", "y", "z"]), unique=True).map(tuple)
PAGES = st.builds(
    Page,
    waiting=st.none() | st.integers(0, 9).map(float),
    running=st.none() | st.integers(0, 3).map(float),
    kv_usage=st.none() | st.sampled_from([0.0, 0.3, 0.5]),
    block_size=st.none() | st.just(16.0),
    running_adapters=ADAPTERS,
    waiting_adapters=ADAPTERS,
)


@dataclass(eq=False)
class Run:
    """One request under way, as the model knows it."""

    order: int
    tokens: int


@dataclass(eq=False)
class Server:
    """One endpoint, as the model knows it."""

    endpoint: Endpoint
    born: int
    joined_at: float
    listed: bool = True
    runs: list[Run] = field(default_factory=list)
    page: Page | None = None
    block_size: float | None = None
    page_at: float = -1e9
    base: int = 0
    """Order of the first request that the current page cannot know."""
    asked: int | None = None

    @property
    def recent(self) -> int:
        return sum(run.order >= self.base for run in self.runs)

    def is_fresh(self, now: float) -> bool:
        return now - self.page_at <= FRESHNESS


class TableMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the table says what the model says."""

    holds: Bundle[tuple[Server, Run, Hold]] = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.orders = count()
        self.births = count()
        self.forgotten: list[int] = []
        self.table = EndpointTable(freshness=FRESHNESS, on_forget=self.forgotten.append)
        self.servers: list[Server] = []
        self.slots: dict[Server, tuple[int, int]] = {}
        self.generations: set[int] = set()
        self.live: list[tuple[Server, Run, Hold]] = []
        self.gone = 0

    # -- the model -----------------------------------------------------------------------------------------------

    def model_leave(self, server: Server) -> None:
        server.listed = False
        self.model_sweep()

    def model_sweep(self) -> None:
        kept = [server for server in self.servers if server.listed or server.runs]
        self.gone += len(self.servers) - len(kept)
        for server in set(self.servers) - set(kept):
            del self.slots[server]
        self.servers = kept

    def model_put(self, endpoint: Endpoint) -> None:
        identity = (endpoint.name, endpoint.address)
        known = [s for s in self.servers if (s.endpoint.name, s.endpoint.address) == identity]
        for other in list(self.servers):
            clashes = other.endpoint.name == endpoint.name or other.endpoint.address == endpoint.address
            if other.listed and clashes and other not in known:
                self.model_leave(other)
        if not known:
            self.servers.append(Server(endpoint, next(self.births), self.now))
            return
        (server,) = known
        if not server.listed:
            server.joined_at = self.now
        server.listed, server.endpoint = True, endpoint

    def find(self, endpoint: Endpoint) -> Server:
        (server,) = [s for s in self.servers if s.listed and s.endpoint.name == endpoint.name]
        return server

    def learn_slots(self) -> None:
        """Which slot each listed server has; once known it must never change."""
        for slot in self.table.listed.tolist():
            server = self.find(self.table.endpoint(slot))
            generation = self.table.generation(slot)
            if server not in self.slots:
                assert generation not in self.generations, "a slot used again must have another generation"
                self.generations.add(generation)
                self.slots[server] = (slot, generation)
            assert self.slots[server] == (slot, generation)

    # -- rules ---------------------------------------------------------------------------------------------------

    @rule(endpoint=ENDPOINTS)
    def put(self, endpoint: Endpoint) -> None:
        self.model_put(endpoint)
        slot = self.table.put(endpoint, self.now)
        assert self.table.endpoint(slot) == endpoint
        self.learn_slots()

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        for server in list(self.servers):
            if server.listed and server.endpoint.name == name:
                self.model_leave(server)
        self.table.drop(name)

    @rule(endpoints=st.lists(ENDPOINTS, max_size=4))
    def replace(self, endpoints: list[Endpoint]) -> None:
        named = {endpoint.name: endpoint for endpoint in endpoints}
        addressed = {endpoint.address: endpoint for endpoint in named.values()}
        wanted = {endpoint.name: endpoint for endpoint in addressed.values()}
        for server in list(self.servers):
            kept = wanted.get(server.endpoint.name)
            if server.listed and (kept is None or kept.address != server.endpoint.address):
                self.model_leave(server)
        for endpoint in wanted.values():
            self.model_put(endpoint)
        self.table.replace(endpoints, self.now)
        self.learn_slots()

    @rule()
    def replace_by_the_same(self) -> None:
        before = self.table.listed
        self.table.replace([self.table.endpoint(slot) for slot in before.tolist()], self.now)
        assert self.table.listed is before, "nothing changed, so nobody has to look again"

    @precondition(lambda self: self.servers)
    @rule(target=holds, data=st.data(), tokens=st.integers(0, 1000))
    def admit(self, data: st.DataObject, tokens: int) -> tuple[Server, Run, Hold]:
        return self.admit_to(data.draw(st.sampled_from(self.servers)), tokens)

    def admit_to(self, server: Server, tokens: int) -> tuple[Server, Run, Hold]:
        run = Run(next(self.orders), tokens)
        server.runs.append(run)
        entry = (server, run, self.table.admit(self.slots[server][0], tokens))
        self.live.append(entry)
        return entry

    @rule(hold=holds)
    def prefill_done(self, hold: tuple[Server, Run, Hold]) -> None:
        _, run, real = hold
        run.tokens = 0
        self.table.prefill_done(real)

    @rule(hold=consumes(holds), times=st.integers(1, 2))
    def release(self, hold: tuple[Server, Run, Hold], times: int) -> None:
        if hold in self.live:
            self.finish(hold)
        for _ in range(times):
            self.table.release(hold[2])

    def finish(self, hold: tuple[Server, Run, Hold]) -> None:
        server, run, _ = hold
        server.runs.remove(run)
        self.live.remove(hold)
        self.model_sweep()

    @precondition(lambda self: self.servers)
    @rule(data=st.data())
    def page_asked(self, data: st.DataObject) -> None:
        server = data.draw(st.sampled_from(self.servers))
        server.asked = next(self.orders)
        self.table.page_asked(self.slots[server][0])

    @precondition(lambda self: self.servers)
    @rule(data=st.data(), page=PAGES, took=st.sampled_from([0.0, 0.0, 0.75, 2.5]))
    def page_told(self, data: st.DataObject, page: Page, took: float) -> None:
        server = data.draw(st.sampled_from(self.servers))
        if server.asked is not None:
            server.base, server.asked = server.asked, None
        server.page, server.page_at = page, self.now - took
        if page.block_size is not None:
            server.block_size = page.block_size
        slot, generation = self.slots[server]
        self.table.page_told(slot, generation, page, self.now - took)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), waiting=st.integers(0, 9), more=st.integers(0, 2))
    def page_while_requests_come_and_go(self, data: st.DataObject, waiting: int, more: int) -> None:
        """The usual case, spelled out because it needs six steps in a row: one ends that the page still counts."""
        done = data.draw(st.sampled_from(self.live))
        server = done[0]
        if not server.listed:
            return
        slot, generation = self.slots[server]
        server.base = next(self.orders)
        self.table.page_asked(slot)
        for _ in range(more):
            run = Run(next(self.orders), 5)
            server.runs.append(run)
            self.live.append((server, run, self.table.admit(slot, 5)))
        self.finish(done)
        self.table.release(done[2])
        server.asked, server.page, server.page_at = None, Page(waiting=waiting), self.now
        self.table.page_told(slot, generation, server.page, self.now)

    @rule(page=PAGES, data=st.data())
    def page_of_an_endpoint_that_is_gone(self, page: Page, data: st.DataObject) -> None:
        old = self.generations - {generation for _, generation in self.slots.values()}
        if old and self.table.width:
            slot = data.draw(st.integers(0, self.table.width - 1))
            self.table.page_told(slot, data.draw(st.sampled_from(sorted(old))), page, self.now)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @initialize()
    def start(self) -> None:
        assert len(self.table) == 0
        assert self.table.last_join == -np.inf

    # -- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def the_list_is_the_models(self) -> None:
        listed = sorted((s for s in self.servers if s.listed), key=lambda s: s.born)
        assert [self.table.endpoint(slot) for slot in self.table.listed.tolist()] == [s.endpoint for s in listed]
        assert len(self.table) == len(listed)
        assert len(self.forgotten) == self.gone
        for server in listed:
            assert self.table.slot_at(server.endpoint.address) == self.slots[server][0]
            assert self.table.joined_at(self.slots[server][0]) == server.joined_at

    @invariant()
    def an_address_is_found_while_requests_run_there(self) -> None:
        for address in ("10.0.0.1:80", "10.0.0.2:80", "[fd00::1]:80", "10.9.9.9:80"):
            there = {self.slots[s][0] for s in self.servers if s.endpoint.address == address}
            found = self.table.slot_at(address)
            assert found in there if there else found is None

    @invariant()
    def counts_are_the_live_requests(self) -> None:
        slots = np.array([self.slots[s][0] for s in self.servers], np.int64)
        candidates = self.table.candidates(self.now, slots)
        inflight, known = candidates.column("inflight")
        tokens, _ = candidates.column("inflight_tokens")
        assert inflight.tolist() == [len(s.runs) for s in self.servers]
        assert tokens.tolist() == [sum(run.tokens for run in s.runs) for s in self.servers]
        assert known.all()

    @rule(seconds=st.sampled_from([0.5, 2.25]))
    def look_back(self, seconds: float) -> None:
        """Time never runs backwards in production; who asks for an earlier moment gets the right answer, too."""
        self.check_gauges(self.now - seconds)

    @invariant()
    def gauges_are_known_while_fresh_and_told(self) -> None:
        self.check_gauges(self.now)

    def check_gauges(self, now: float) -> None:
        slots = np.array([self.slots[s][0] for s in self.servers], np.int64)
        candidates = self.table.candidates(now, slots)
        waiting, known = candidates.column("waiting")
        for server, value, is_known in zip(self.servers, waiting.tolist(), known.tolist(), strict=True):
            page = server.page
            if page is None or page.waiting is None or not server.is_fresh(now):
                assert not is_known
                assert np.isnan(value)
            else:
                assert is_known
                assert value == page.waiting + server.recent
        size, known = candidates.column("block_size")  # a fact: it holds until another is told
        assert known.tolist() == [s.block_size is not None for s in self.servers]
        assert size[known].tolist() == [s.block_size for s in self.servers if s.block_size is not None]
        assert candidates.fresh().tolist() == [s.page is not None and s.is_fresh(now) for s in self.servers]

    @invariant()
    def what_is_shared_of_the_listed_ones_is_what_the_columns_say(self) -> None:
        listed = self.table.candidates(self.now)
        anew = self.table.candidates(self.now, self.table.listed.copy())  # slots of one's own are read from the columns
        for name in (*GAUGES, *FACTS, *COUNTS):
            for shared, read in zip(listed.column(name), anew.column(name), strict=True):
                assert np.array_equal(shared, read, equal_nan=True)
        assert listed.fresh().tolist() == anew.fresh().tolist()

    @invariant()
    def adapters_are_the_last_pages(self) -> None:
        slots = np.array([self.slots[s][0] for s in self.servers], np.int64)
        told = [s.page or Page() for s in self.servers]
        running = [set(page.running_adapters or ()) for page in told]
        waiting = [set(page.waiting_adapters or ()) for page in told]
        for name in ("x", "y", "z", "never"):
            expected = [2.0 if name in r else 1.0 if name in w else 0.0 for r, w in zip(running, waiting, strict=True)]
            assert self.table.adapter(name, slots).tolist() == expected
        assert self.table.adapters_held(slots).tolist() == [len(r | w) for r, w in zip(running, waiting, strict=True)]
        for slot, r, w in zip(slots.tolist(), running, waiting, strict=True):
            assert self.table.adapter_names(slot) == tuple(sorted(r | w))

    def teardown(self) -> None:
        """However it ended: once every request is released, every count is 0 and no slot is held for nothing."""
        for hold in list(self.live):
            self.finish(hold)
            self.table.release(hold[2])
        self.counts_are_the_live_requests()
        assert repr(self.table).endswith("Requests: 0 in flight]>")
        self.table.replace([], self.now)
        assert all(self.table.generation(slot) == 0 for slot in range(self.table.width))
        assert self.table.adapters_held(np.arange(self.table.width)).tolist() == [0.0] * self.table.width


TestTable = TableMachine.TestCase
TestTable.settings = settings(stateful_step_count=40)
