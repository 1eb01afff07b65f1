"""The way into the room: one call, one decision.

In: a request, candidates, what guards left out. Out: a `Decision`; plugins that keep something have been told.
Rules here:
- One profile decides alone, or a handler runs some of several and says what they come to.
- What fails is named in the decision and harms nothing else; where a handler fails, its first profile decides alone.
  As long as nothing has failed lately, that costs nothing: only then do plugins run that `quarantine.py` watches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Slots
from epp.errors import Refusal
from epp.scheduling.decision import Decision, Exclusion, Failure, Plan, Pool, Stage
from epp.scheduling.lineup import Lineup, Told
from epp.scheduling.peers import hooked
from epp.scheduling.plugin import Handler, RunProfile
from epp.scheduling.preparation import prepare, screened
from epp.scheduling.profile import Profile
from epp.scheduling.quarantine import SLOW, Quarantine, stopped


class Scheduler:
    """Where should each request run?"""

    def __init__(self, lineup: Lineup, rng: Random) -> None:
        self.lineup = lineup
        self._rng = rng
        self._quarantine = Quarantine()
        self._under_watch: Scheduler | None = None
        self._listed: Slots | None = None
        self._pool: Pool = ()

    def schedule(
        self,
        request: Request,
        candidates: Candidates,
        exclusions: Sequence[Exclusion] = (),
        stopwatch: Callable[[], float] = stopped,
    ) -> Decision:
        """Decide where the request runs, and tell the plugins that keep something.

        Args:
            stopwatch: seconds; tells only which plugins are too slow.

        Raises:
            NoEndpoint: nothing is left. Says what left the last ones out.
            Refusal: what a plugin refuses with, or the request's body when it is read for the first time.
        """
        alert, began = self._quarantine.alert, stopwatch()
        deciding = self._watched(candidates.now, stopwatch) if alert else self
        decision = deciding._decide(request, candidates, exclusions)
        took = stopwatch() - began
        if alert or took > SLOW or (decision.failures if self.lineup.handler is None else decision.every_failure()):
            self._quarantine.settle(decision, took, candidates.now)
        return decision

    def forget(self, slot: int) -> None:
        """A slot is about to mean another endpoint: `EndpointTable(on_forget=...)`."""
        for name, forget in self.lineup.forget:
            try:
                forget(slot)
            except Exception as error:
                self._quarantine.remember(Failure.of(name, error))

    def computed(self, table: EndpointTable, slot: int, tokens: float) -> None:
        """A slot has computed so many tokens beyond those of the prompts that went there; below 0: fewer than those."""
        for each in self.lineup.producers:
            try:
                if each.computed is not None:
                    each.computed(table, slot, tokens)
            except Exception as error:
                self._quarantine.remember(Failure.of(each.name, error))

    def prefix_blocks(self) -> int:
        """Blocks of prompts that are remembered in all."""
        return sum(each.blocks() for each in self.lineup.producers)

    # -- inside --------------------------------------------------------------------------------------------------

    def _watched(self, now: float, stopwatch: Callable[[], float]) -> Scheduler:
        """One that is this one but for its plugins, which are watched."""
        if self._under_watch is None:
            self._under_watch = Scheduler(self.lineup.watched(self._quarantine), self._rng)
        self._quarantine.begin(now, stopwatch)
        return self._under_watch

    def _decide(self, request: Request, candidates: Candidates, exclusions: Sequence[Exclusion]) -> Decision:
        lineup, pool = self.lineup, self._pool_of(candidates.table)
        failures: Sequence[Failure] = ()
        if lineup.processors or lineup.admitters:
            failures = prepare(lineup.processors, lineup.admitters, request, candidates)
        if lineup.screeners:
            candidates, exclusions, failed = screened(lineup.screeners, request, candidates, exclusions)
            failures = (*failures, *failed)
        if lineup.handler is None:
            plan = Plan(self._run(lineup.first, request, candidates, exclusions, pool))
        else:
            profiles = lineup.profiles
            plan = self._planned(
                lineup.handler, request, lambda name: self._run(profiles[name], request, candidates, exclusions, pool)
            )
        decision = plan.primary.decision
        if failures or plan.failures:
            decision.failures = (*failures, *plan.failures, *decision.failures)
        headers, failed = hooked(lineup.hooks, request, candidates, plan) if lineup.hooks else ((), ())
        self._tell(request, plan)
        if headers or failed:
            decision.set_headers, decision.failures = decision.set_headers + headers, (*decision.failures, *failed)
        return decision

    def _planned(self, handler: Handler, request: Request, run: RunProfile) -> Plan:
        try:
            return handler.plan(request, run)
        except Refusal:
            raise
        except Exception as error:
            name = handler.profiles[0] if handler.profiles else self.lineup.first.name
            return Plan(run(name), failures=(Failure.of(handler.name, error),))

    def _run(
        self, profile: Profile, request: Request, candidates: Candidates, exclusions: Sequence[Exclusion], pool: Pool
    ) -> Stage:
        stage = profile.decide(request, candidates, exclusions, pool, self._rng)
        if self.lineup.reads_prompt:
            self._weigh(request, stage)
        return stage

    def _pool_of(self, table: EndpointTable) -> Pool:
        """Every endpoint by slot, built anew only when the table lists others than before."""
        if self._listed is not table.listed:
            self._listed = table.listed
            slots = range(table.width)
            self._pool = tuple(table.endpoint(slot) if table.generation(slot) else None for slot in slots)
        return self._pool

    def _weigh(self, request: Request, stage: Stage) -> None:
        """Say how long the prompt is, and how much of it the chosen endpoint is believed to hold."""
        decision = stage.decision
        decision.prompt_tokens = float(request.tokens)
        for each in self.lineup.producers:
            try:
                match = each.match(request, stage.scored)
                held = float(match.blocks.item(stage.position) * match.block_tokens)
            except Exception as error:
                decision.failures = (*decision.failures, Failure.of(each.name, error))
            else:
                decision.matched_tokens = max(decision.matched_tokens, min(held, decision.prompt_tokens))

    def _tell(self, request: Request, plan: Plan) -> None:
        """Put the stages together, and let plugins learn from them."""
        primary, prefill, encode = plan.primary, plan.prefill, plan.encode
        decision, holders = primary.decision, primary.decision.order[:1]
        if plan.name or plan.set_headers:
            decision.plan, decision.set_headers = plan.name, plan.set_headers
            if (handler := self.lineup.handler) is not None:
                decision.handler = handler.name, handler.type
        if prefill is not None:
            decision.prefill = prefill.decision
            holders = np.append(prefill.decision.order[:1], holders)
        if encode is not None:
            decision.encode = encode.decision
        if self.lineup.output is not None:
            decision.output_tokens = self.lineup.output.tokens(request)
        _call(self.lineup.learn, request, primary.scored, holders, decision)
        for stage in (encode, prefill, primary):
            if stage is not None:
                _call(self.lineup.told[stage.decision.profile], request, stage.scored, stage.decision.order, decision)


def _call(hooks: Told, request: Request, scored: Candidates, slots: Slots, decision: Decision) -> None:
    for name, chosen in hooks:
        try:
            chosen(request, scored, slots)
        except Exception as error:
            decision.failures = (*decision.failures, Failure.of(name, error))
