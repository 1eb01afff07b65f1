"""The way into the room: one call, one decision.

In: a request, candidates, what guards left out. Out: a `Decision`; plugins that keep something have been told.
Rules here:
- One profile. Several, and a handler that chooses between them, come with disaggregation.
- A hook that fails is named in the decision and harms nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Slots
from epp.scheduling.decision import Decision, Exclusion, Failure, Pool
from epp.scheduling.plugin import PREFIX_MATCH, Instance, Producer
from epp.scheduling.profile import Profile


class Scheduler:
    """Where should each request run?"""

    def __init__(self, profile: Profile, producers: Sequence[Producer], rng: Random) -> None:
        self.profile = profile
        self.producers = tuple(producers)
        instances: tuple[Instance, ...] = (*producers, *profile.filters, *profile.scorers, profile.picker)
        needs = {need for instance in instances for need in instance.needs}
        self._reads_prompt = not needs.isdisjoint((PREFIX_MATCH, "inflight_tokens"))
        self._chosen = tuple((instance.name, instance.chosen) for instance in instances if instance.chosen is not None)
        self._forget = tuple(instance.forget for instance in instances if instance.forget is not None)
        self._rng = rng
        self._listed: Slots | None = None
        self._pool: Pool = ()

    def schedule(self, request: Request, candidates: Candidates, exclusions: Sequence[Exclusion] = ()) -> Decision:
        """Decide where the request runs, and tell the plugins that keep something.

        Raises:
            NoEndpoint: nothing is left. Says what left the last ones out.
            Refusal: what a plugin refuses with, or the request's body when it is read for the first time.
        """
        pool = self._pool_of(candidates.table)
        decision, scored, position = self.profile.decide(request, candidates, exclusions, pool, self._rng)
        if self._reads_prompt:
            self._weigh(request, scored, position, decision)
        for name, chosen in self._chosen:
            try:
                chosen(request, scored, decision.order)
            except Exception as error:
                _failed(decision, name, error)
        return decision

    def forget(self, slot: int) -> None:
        """A slot is about to mean another endpoint: `EndpointTable(on_forget=...)`."""
        for forget in self._forget:
            forget(slot)

    def prefix_blocks(self) -> int:
        """Blocks of prompts that are remembered in all."""
        return sum(each.blocks() for each in self.producers)

    # -- inside --------------------------------------------------------------------------------------------------

    def _pool_of(self, table: EndpointTable) -> Pool:
        """Every endpoint by slot, built anew only when the table lists others than before."""
        if self._listed is not table.listed:
            self._listed = table.listed
            slots = range(table.width)
            self._pool = tuple(table.endpoint(slot) if table.generation(slot) else None for slot in slots)
        return self._pool

    def _weigh(self, request: Request, scored: Candidates, position: int, decision: Decision) -> None:
        """Say how long the prompt is, and how much of it the chosen endpoint is believed to hold."""
        decision.prompt_tokens = float(request.tokens)
        for each in self.producers:
            try:
                match = each.match(request, scored)
                held = float(match.blocks.item(position) * match.block_tokens)
            except Exception as error:
                _failed(decision, each.name, error)
            else:
                decision.matched_tokens = max(decision.matched_tokens, min(held, decision.prompt_tokens))


def _failed(decision: Decision, plugin: str, error: Exception) -> None:
    decision.failures = (*decision.failures, Failure(plugin, f"{type(error).__name__}: {error}"))
