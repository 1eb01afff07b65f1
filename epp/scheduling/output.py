"""How many tokens an answer is taken to have, before there is any of it.

In: a request. Out: tokens, to be counted at its destination until its end, beside the prompt's.
Rules here: only where the operator asks for it; never more than the client allows.
Source: llm-d router, inflight-load-producer (addEstimatedOutputTokens).
"""

from __future__ import annotations

from typing import Final

import msgspec

from epp.dialects.request import Request

MOST: Final = 10_000_000
"""Tokens of one request, whatever a client asks for: so sums of whole numbers stay exact."""


class OutputEstimate(msgspec.Struct, frozen=True):
    ratio: float
    """Tokens of an answer for each of its prompt, 0 or more."""
    most: int = 0
    """No more than so many; 0: no limit."""

    def tokens(self, request: Request) -> float:
        """Of all of a request's answers together (`n`), each at most as long as the client allows."""
        each = request.tokens * self.ratio
        for limit in (request.max_tokens, self.most or None):
            if limit is not None:
                each = min(each, limit)
        return float(min(max(0.0, each) * request.n, MOST))
