"""What the end of a request teaches: how long prompts really are, and what an endpoint has computed.

In: a ticket whose answer is over. Out: ratios that were taught, and who computed what nobody had counted.
"""

from __future__ import annotations

import math

from epp.dialects.usage import Usage
from epp.endpoints.table import EndpointTable
from epp.prefix.ratio import TokenRatios
from epp.scheduling.scheduler import Scheduler
from epp.ticket import Ticket


def learn_of_usage(ticket: Ticket, usage: Usage, ratios: TokenRatios, table: EndpointTable, told: Scheduler) -> None:
    """The answer was seen, and said what it took.

    Args:
        told: learns what the endpoint has computed beyond what was believed.
    """
    decision, computed = ticket.decision, float(usage.completion_tokens or 0)
    if usage.prompt_tokens is not None:
        ratios.learn(ticket.request.target_model, ticket.request.estimate, usage.prompt_tokens)
        if usage.cached_tokens is not None and ticket.hold.slot == decision.first and decision.prefill is None:
            computed += max(0, usage.prompt_tokens - usage.cached_tokens) - decision.uncached
    told.computed(table, ticket.hold.slot, computed)


def learn_of_counters(ticket: Ticket, ratios: TokenRatios, table: EndpointTable, told: Scheduler) -> None:
    """Nothing was seen of the answer, so what prompts really are is learned from the engine's own counters; and what
    answers took of its cache, whoever asked for them."""
    slot, estimate = ticket.hold.slot, ticket.request.estimate
    totals = table.totals(slot)
    if ticket.decision.prompt_tokens and not math.isnan(totals.prompts):
        ratios.counted(slot, totals.prompt_tokens, totals.prompts)
        exact = 0.0 if estimate else ticket.decision.prompt_tokens
        told.computed(table, slot, ratios.answered(slot, totals.generated))
        ratios.ran(slot, ticket.request.target_model, estimate, exact)
