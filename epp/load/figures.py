"""What a run comes to, in the words of the simulator's report, so that the two can be laid side by side.

In: results, how long they took, a goal. Out: `Figures` of a target, of one of its stages, of one of its servers.
Rules here:
- Every request that was due counts: one that was refused or failed has no time to a first token, and misses the goal.
- Times are over requests that had a first token. So a server that refuses much looks quick: read `failed` and
  `goodput_share` beside them.
- Percentiles are nearest ranks; what nobody measured is None, never 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

import msgspec
import numpy as np

from epp.errors import ConfigError
from epp.load.results import Result, percentile
from epp.sim.figures import GOOD_ITL, GOOD_TTFT
from epp.sim.samples import Floats, in_flight
from epp.sim.world import SAMPLE
from epp.units import parse_duration


class Goal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer must keep to be a good one, in seconds."""

    ttft: float = GOOD_TTFT
    itl: float = GOOD_ITL
    """Mean of one answer."""

    def met(self, result: Result) -> bool:
        if result.error or result.ttft is None:
            return False
        return result.ttft <= self.ttft and (result.itl_mean is None or result.itl_mean <= self.itl)


def parse_answer_goal(text: str) -> Goal:
    """Read "ttft=2s,itl=50ms"; what is not named has its default. Goals of many answers are `sim.goal.parse_goal`'s.

    Raises:
        ConfigError: an unknown name, or no duration.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    try:
        given = {name.strip(): parse_duration(value) for name, _, value in pairs}
        return msgspec.convert(given, Goal)
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"--slo {text!r}: {error}; expected as in ttft=2s,itl=50ms") from error


class Figures(msgspec.Struct, frozen=True):
    """Seconds; None where nothing was measured."""

    requests: int
    failed: int
    errors: dict[str, int]
    """By kind."""
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    """Of the answers' means, as the others."""
    itl_p90_s: float | None
    itl_p99_s: float | None
    e2e_p50_s: float | None
    """Of those without error, as the others."""
    e2e_p90_s: float | None
    e2e_p99_s: float | None
    output_tok_s: float | None
    """From the first second to the end of the last answer."""
    cached_share: float | None
    """Prompt tokens that were in a cache, of all prompt tokens."""
    goodput_share: float | None
    """Of all requests, those that met the goal."""


class Server(msgspec.Struct, frozen=True):
    """One server's part."""

    requests: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    cached_share: float | None


def figures(results: Sequence[Result], seconds: float, goal: Goal) -> Figures:
    """Sum up results.

    Args:
        seconds: how long all of them took, from the first second to the end of the last answer.
    """
    ttfts = _ttfts(results)
    itls = [result.itl_mean for result in results if result.itl_mean is not None]
    e2es = [result.e2e for result in results if not result.error]
    errors = Counter(result.error for result in results if result.error)
    return Figures(
        requests=len(results),
        failed=errors.total(),
        errors=dict(sorted(errors.items())),
        ttft_mean_s=fmean(ttfts) if ttfts else None,
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p90_s=percentile(ttfts, 0.9),
        ttft_p99_s=percentile(ttfts, 0.99),
        itl_p50_s=percentile(itls, 0.5),
        itl_p90_s=percentile(itls, 0.9),
        itl_p99_s=percentile(itls, 0.99),
        e2e_p50_s=percentile(e2es, 0.5),
        e2e_p90_s=percentile(e2es, 0.9),
        e2e_p99_s=percentile(e2es, 0.99),
        output_tok_s=sum(result.completion_tokens for result in results) / seconds if seconds else None,
        cached_share=_cached(results),
        goodput_share=sum(map(goal.met, results)) / len(results) if results else None,
    )


def balance(parts: Sequence[tuple[Sequence[Result], float]], servers: Sequence[str]) -> float | None:
    """Requests in flight on the fullest server by the mean of all, averaged over time; 1: even.

    Looked at as the simulator does: each `SAMPLE` seconds while requests come, and where there are any.

    Args:
        parts: results, and for how many seconds requests came.
        servers: all that there are; requests of others are not looked at.

    Returns:
        None where no server is named, or nothing was ever in flight.
    """
    ratios = [_ratios(results, seconds, servers) for results, seconds in parts if servers]
    return float(np.concatenate(ratios).mean()) if any(len(each) for each in ratios) else None


def _ratios(results: Sequence[Result], seconds: float, servers: Sequence[str]) -> Floats:
    counts = in_flight(on_servers(results, servers), len(servers), np.arange(0.0, seconds, SAMPLE))
    totals = counts.sum(axis=0)
    some = totals > 0
    ratios: Floats = counts.max(axis=0)[some] * len(servers) / totals[some]
    return ratios


def on_servers(
    results: Sequence[Result], servers: Sequence[str], begin: float = 0.0
) -> Iterator[tuple[int, float, float]]:
    """Number of the server, when it was asked and when it ended, of each request whose answer names one of these."""
    numbers = {name: at for at, name in enumerate(servers)}
    for result in results:
        if result.served_by in numbers:
            yield numbers[result.served_by], begin + result.sent_at, begin + result.ended_at


def by_server(results: Sequence[Result]) -> dict[str, Server]:
    """What each server that named itself did, sorted by its name."""
    parts: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.served_by:
            parts[result.served_by].append(result)
    return {name: _server(parts[name]) for name in sorted(parts)}


def _server(results: Sequence[Result]) -> Server:
    ttfts = _ttfts(results)
    return Server(len(results), percentile(ttfts, 0.5), percentile(ttfts, 0.9), _cached(results))


def _ttfts(results: Sequence[Result]) -> list[float]:
    return [result.ttft for result in results if result.ttft is not None]


def _cached(results: Sequence[Result]) -> float | None:
    prompt = sum(result.prompt_tokens for result in results)
    return sum(result.cached_tokens for result in results) / prompt if prompt else None
