"""What a load run leaves: one result a request, and what all of them say in a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from epp.sim.figures import ranked


class Result(msgspec.Struct, frozen=True):
    """What became of one request. Times are seconds from the start of the run."""

    tenant: str
    model: str
    session: str
    turn: int
    scheduled_at: float
    sent_at: float
    ended_at: float
    error: str
    """Kind of error; empty: none. `http_<status>`, `connect`, `certificate`, `no_socket` (this machine has no more
    of them), `reset`, `timeout`, `truncated` (the answer ended before its end), `stream_error` (the server told one in
    the stream), `malformed` (it is no stream of events), `cancelled` (the run was stopped)."""
    status: int
    """HTTP status; 0: no answer."""
    ttft: float | None
    """From `scheduled_at` to the first event with a token; None: there was none."""
    itl_mean: float | None
    """From the first token to the last, a token after the first; None: fewer than two."""
    itl_max: float | None
    """Between two pieces of the answer with tokens."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that the server had in its cache."""
    served_by: str
    """Who gave the answer, as a header of it says; empty: none does."""

    @property
    def e2e(self) -> float:
        """Seconds from when it was due to its end."""
        return self.ended_at - self.scheduled_at


class Summary(msgspec.Struct, frozen=True):
    """Seconds; None where nothing was measured."""

    requests: int
    errors: dict[str, int]
    """By kind."""
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    e2e_p50_s: float | None
    """Of those without error."""
    cached_share: float | None
    """Prompt tokens that were in a cache, of all prompt tokens."""
    by_server: dict[str, int]
    """Answers by `x-served-by`, sorted."""


def summarize(results: Sequence[Result]) -> Summary:
    """All of a run, or of any part of it."""
    ttfts = [result.ttft for result in results if result.ttft is not None]
    prompt_tokens = sum(result.prompt_tokens for result in results)
    servers = Counter(result.served_by for result in results if result.served_by)
    return Summary(
        requests=len(results),
        errors=dict(Counter(result.error for result in results if result.error)),
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p90_s=percentile(ttfts, 0.9),
        ttft_p99_s=percentile(ttfts, 0.99),
        e2e_p50_s=percentile([result.e2e for result in results if not result.error], 0.5),
        cached_share=sum(result.cached_tokens for result in results) / prompt_tokens if prompt_tokens else None,
        by_server=dict(sorted(servers.items())),
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank: the smallest value that at least `share` of all are not over; None: no values."""
    return ranked(sorted(values), share)
