"""A decision depends on what is known, not on how it came to be known.

Whatever happened to a table, in whatever order, its decisions are those of a scheduler and a table that are built anew
and told only what holds now. The table's history is that of the table's own model-based test.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from epp.endpoints.table import Bools, Candidates, EndpointTable, Page
from epp.scheduling.decision import Decision
from epp.scheduling.lineup import Lineup
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import active_request, kv_cache, queue, running
from tests.endpoints.test_table_model import FRESHNESS, Server, TableMachine
from tests.scheduling.builders import ask, made, profile

SEED = 7


def some_profile() -> Profile:
    """All that reads columns; weights of which no two sums are equal by chance."""
    return profile((made(queue), 2.0), (made(kv_cache), 3.0), (made(running), 5.0), (made(active_request), 7.0))


def built_anew(servers: list[Server]) -> EndpointTable:
    """A table that knows of these servers what the model knows."""
    table = EndpointTable(freshness=FRESHNESS)
    for server in servers:
        slot = table.put(server.endpoint, server.joined_at)
        generation = table.generation(slot)
        for run in server.runs:
            if run.order < server.base:
                table.admit(slot, run.tokens)
        table.page_told(slot, generation, Page(block_size=server.block_size), -1e9)
        if server.page is not None:
            table.page_asked(slot)
            table.page_told(slot, generation, server.page, server.page_at)
        for run in server.runs:
            if run.order >= server.base:
                table.admit(slot, run.tokens)
    return table


def facts(decision: Decision, candidates: Candidates) -> list[Any]:
    """What must be equal; slots are not, and neither is the age of what was never told."""
    return [
        [candidates.table.endpoint(slot) for slot in decision.slots.tolist()],
        decision.raw.tolist(),
        decision.unknown.tolist(),
        decision.totals.tolist(),
        decision.endpoints,
    ]


class HistoryMachine(TableMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rng = Random(SEED)
        self.scheduler = Scheduler(Lineup([some_profile()]), self.rng)
        self.decisions: list[tuple[Decision, dict[str, Any]]] = []

    def decide(self, table: EndpointTable, scheduler: Scheduler, mask: Bools | None) -> list[Any]:
        candidates = table.candidates(self.now)
        if mask is not None:
            candidates = candidates.keep(mask)
        decision = scheduler.schedule(ask(), candidates)
        if scheduler is self.scheduler:
            self.decisions.append((decision, decision.render()))
        return facts(decision, candidates)

    def compare(self, mask: Bools | None = None) -> None:
        listed = sorted((server for server in self.servers if server.listed), key=lambda server: server.born)
        self.rng.seed(SEED)
        anew = Scheduler(Lineup([some_profile()]), Random(SEED))
        assert self.decide(self.table, self.scheduler, mask) == self.decide(built_anew(listed), anew, mask)

    @invariant()
    def everybody_is_chosen_among_as_by_a_scheduler_built_anew(self) -> None:
        if len(self.table):
            self.compare()

    @precondition(lambda self: len(self.table) > 1)
    @rule(data=st.data())
    def choose_among_some(self, data: st.DataObject) -> None:
        left_out = data.draw(st.integers(0, len(self.table) - 1))
        self.compare(np.arange(len(self.table)) != left_out)

    @precondition(lambda self: len(self.table) > 0)
    @rule()
    def send(self) -> None:
        """What the picker does: the decision's own request is counted before the next one is decided."""
        self.compare()
        slot = self.decisions[-1][0].first
        (server,) = [server for server in self.servers if self.slots[server][0] == slot]
        self.admit_to(server, 3)

    @invariant()
    def no_decision_ever_changes(self) -> None:
        for decision, rendered in self.decisions[-5:]:
            assert decision.render() == rendered


TestHistory = HistoryMachine.TestCase
TestHistory.settings = settings(max_examples=40, stateful_step_count=30)
