"""What a run comes to in a few numbers, and what several runs say together.

In: a world that is over. Out: `Figures` of all of it and of each stage, and what to draw them from; means over seeds,
how sure they are.
Rules here:
- Warm-up is not measured. Refused requests have no times, and count against goodput. What nobody measured is None,
  never 0: a fleet that answers nothing is not quick.
- Nothing here contains `FLOOR`: what the network, the proxy and the tokenizer take, which no router can change. It
  stands beside the times as `floor_s`.
- A percentile is the nearest rank, as in the load client's results.
- Means over seeds come with half the width of a 95 % interval (Student's t). Two policies are compared seed by seed:
  the same seed is the same arrivals, so most of what varies is the same in both.
Source: floor: BLIS' fitted 15 ms + 46 us a prompt token; goodput: 2 s and 25 ms as in NVIDIA Dynamo's Mooncake guide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Final

import msgspec

from epp.sim.samples import Busy, Samples, Times, busy, samples
from epp.sim.world import Asked, World

FLOOR: Final = 0.015
"""Seconds a request takes besides, whoever routes it."""
FLOOR_A_TOKEN: Final = 46e-6
"""Seconds a prompt token, for HTTP and the tokenizer."""
GOOD_TTFT: Final = 2.0
GOOD_ITL: Final = 0.025
"""Seconds; a request is good when its first token came and its others followed within these."""

# 97.5 % quantiles of Student's t by degrees of freedom, from 1.
_T: Final = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Figures(msgspec.Struct, frozen=True):
    """Some requests of one run, or the mean over several runs. Seconds; None where nothing was measured."""

    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    """Of each request's mean between two tokens, of those that have two."""
    itl_p90_s: float | None
    itl_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p90_s: float | None
    e2e_p99_s: float | None
    output_tok_s: float
    """Output tokens a second, from the begin of each stage to its last answer; where that is later than the begin of
    the next one, the time of both counts once."""
    cached_share: float | None
    """Prompt tokens that were in the engine's cache, of all that were answered."""
    goodput_share: float | None
    """Of all requests, refused ones among them: those with a first token within 2 s and 25 ms between two tokens."""
    balance: float | None
    """Requests on the fullest server by the mean of all servers, averaged over time; 1: even."""
    failed: float
    """Requests that got no answer."""
    requests: float
    floor_s: float
    """What comes on top of every time to first token, on average; 0: there is none."""
    gpu_hours: float | None = None
    """Of all servers there were, busy or not, for a million output tokens; None: a profile names no GPU."""


class Run(msgspec.Struct, frozen=True):
    """One policy, one seed."""

    whole: Figures
    stages: tuple[tuple[float, Figures], ...]
    """Rate and figures of each stage that is measured."""
    samples: Samples
    busy: Busy
    """From the begin of the first stage that is measured to the last answer."""
    refusals: tuple[tuple[str, int], ...] = ()
    """Why requests got no answer, and how many each; the most frequent first."""
    apart: int = 0
    """Requests whose prompt was computed by another server than the one that answered, or was to be."""


class Means(msgspec.Struct, frozen=True):
    """One policy, over all seeds."""

    whole: Figures
    stages: tuple[tuple[float, Figures], ...]


def measured(world: World) -> Run:
    """Everything of a run but its warm-up."""
    stages = [at for at, stage in enumerate(world.stages[: len(world.spans)]) if not stage.warm_up]
    by_stage: dict[int, list[Asked]] = {at: [] for at in stages}
    for asked in world.asked:
        if asked.stage in by_stage:
            by_stage[asked.stage].append(asked)
    refusals = Counter(asked.refusal for at in stages for asked in by_stage[at] if asked.refusal)
    return Run(
        _figures(world, [asked for at in stages for asked in by_stage[at]], stages),
        tuple((world.stages[at].rate, _figures(world, by_stage[at], [at])) for at in stages),
        samples([[_times(each) for each in by_stage[at]] for at in stages]),
        _busy(world, stages),
        tuple(refusals.most_common()),
        sum(asked.prefill >= 0 for asked in world.asked),
    )


def _times(asked: Asked) -> Times | None:
    """None: it was refused."""
    return None if asked.refusal else (asked.ttft, asked.itl if asked.output_tokens > 1 else None, asked.e2e)


def _busy(world: World, stages: Sequence[int]) -> Busy:
    spans = [world.spans[at] for at in stages]
    begin, end = min((span[0] for span in spans), default=0.0), max((span[1] for span in spans), default=0.0)
    came = [(asked.server, asked.came_at, asked.ended_at) for asked in world.asked]
    return busy(came, len(world.engines), begin, end)


def _figures(world: World, asked: Sequence[Asked], stages: Sequence[int]) -> Figures:
    answered = [each for each in asked if not each.refusal]
    ttft, e2e = sorted(each.ttft for each in answered), sorted(each.e2e for each in answered)
    itl = sorted(each.itl for each in answered if each.output_tokens > 1)
    prompts = sum(each.prompt_tokens for each in answered)
    seconds = _together([world.spans[at] for at in stages])
    spread = [value for at, value in world.spread if at in stages]
    good = sum(each.ttft <= GOOD_TTFT and each.itl <= GOOD_ITL for each in answered)
    return Figures(
        ttft_mean_s=fmean(ttft) if ttft else None,
        ttft_p50_s=ranked(ttft, 0.5),
        ttft_p90_s=ranked(ttft, 0.9),
        ttft_p99_s=ranked(ttft, 0.99),
        itl_p50_s=ranked(itl, 0.5),
        itl_p90_s=ranked(itl, 0.9),
        itl_p99_s=ranked(itl, 0.99),
        e2e_p50_s=ranked(e2e, 0.5),
        e2e_p90_s=ranked(e2e, 0.9),
        e2e_p99_s=ranked(e2e, 0.99),
        output_tok_s=sum(each.output_tokens for each in answered) / seconds if seconds else 0.0,
        cached_share=sum(each.cached_tokens for each in answered) / prompts if prompts else None,
        goodput_share=good / len(asked) if asked else None,
        balance=fmean(spread) if spread else None,
        failed=len(asked) - len(answered),
        requests=len(asked),
        floor_s=FLOOR + FLOOR_A_TOKEN * (prompts / len(answered)) if answered else 0.0,
        gpu_hours=_gpu_hours(world, seconds, sum(each.output_tokens for each in answered)),
    )


def _together(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds of all of these, in the order of their begins; what is in several counts once."""
    seconds = done = 0.0
    for begin, end in spans:
        seconds += max(0.0, end - max(begin, done))
        done = max(done, end)
    return seconds


def _gpu_hours(world: World, seconds: float, tokens: int) -> float | None:
    if not tokens or not all(profile.gpu for profile in world.profiles):
        return None
    return sum(profile.gpus for profile in world.profiles) * seconds / 3600 / tokens * 1e6


def ranked(values: Sequence[float], share: float) -> float | None:
    """Nearest rank of sorted values: the smallest that at least `share` of all are not over; None: no values."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def known(figures: Sequence[Figures], name: str) -> list[float]:
    """One figure of each of these that has it."""
    return [value for each in figures if (value := getattr(each, name)) is not None]


def mean(figures: Sequence[Figures]) -> Figures:
    """Over seeds, at least one. A seed that has nothing of a figure is not in its mean."""
    values = {name: known(figures, name) for name in Figures.__struct_fields__}
    means: dict[str, Any] = {name: fmean(those) if those else None for name, those in values.items()}
    return Figures(**means)


def merged(runs: Sequence[Run]) -> Means:
    """Means over the seeds of one policy."""
    stages = zip(*(run.stages for run in runs), strict=True)
    return Means(
        mean([run.whole for run in runs]),
        tuple((stage[0][0], mean([figures for _, figures in stage])) for stage in stages),
    )


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of these; 0 for a single one, of which nothing is known."""
    if len(values) < 2:
        return 0.0
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96 + 2.5 / (len(values) - 1)
    return t * stdev(values) / math.sqrt(len(values))


def paired(base: Sequence[float | None], other: Sequence[float | None]) -> tuple[float, float | None] | None:
    """How much more the other has of each seed's base, as a share, and half the width of its 95 % interval.

    Returns:
        None where there is nothing to compare: in no seed have both something, and the base more than nothing. The
        width is None where that is so in one seed only.
    """
    shares = [b / a - 1.0 for a, b in zip(base, other, strict=True) if a and b is not None]
    return (fmean(shares), interval(shares) if len(shares) > 1 else None) if shares else None
