"""What a run comes to in a few numbers, and what several runs say together.

In: a world that is over. Out: `Figures` of all of it and of each stage; means over seeds, how sure they are.
Rules here:
- Warm-up is not measured. Refused requests have no times, and count against goodput.
- Nothing here contains `FLOOR`: what the network, the proxy and the tokenizer take, which no router can change. It
  stands beside the times as `floor_s`.
- A percentile is the nearest rank, as in the load client's results.
- Means over seeds come with half the width of a 95 % interval (Student's t). Two policies are compared seed by seed:
  the same seed is the same arrivals, so most of what varies is the same in both.
Source: floor: BLIS' fitted 15 ms + 46 us a prompt token; goodput: 2 s and 25 ms as in NVIDIA Dynamo's Mooncake guide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Final

import msgspec

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
    """Some requests of one run, or the mean over several runs. Seconds; 0 where nothing was answered."""

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_p50_s: float
    """Of each request's mean between two tokens."""
    itl_p90_s: float
    itl_p99_s: float
    e2e_p50_s: float
    e2e_p90_s: float
    e2e_p99_s: float
    output_tok_s: float
    """Output tokens a second, from the begin of each stage to its last answer."""
    cached_share: float
    """Prompt tokens that were in the engine's cache, of all that were answered."""
    goodput_share: float
    """Of all requests, refused ones among them: those with a first token within 2 s and 25 ms between two tokens."""
    balance: float
    """Requests on the fullest server by the mean of all servers, averaged over time; 1: even."""
    failed: float
    """Requests that got no answer."""
    requests: float
    floor_s: float
    """What comes on top of every time to first token, on average."""


class Run(msgspec.Struct, frozen=True):
    """One policy, one seed."""

    whole: Figures
    stages: tuple[tuple[float, Figures], ...]
    """Rate and figures of each stage that is measured."""


def measured(world: World) -> Run:
    """Everything of a run but its warm-up."""
    stages = [at for at, stage in enumerate(world.stages[: len(world.spans)]) if not stage.warm_up]
    by_stage: dict[int, list[Asked]] = {at: [] for at in stages}
    for asked in world.asked:
        if asked.stage in by_stage:
            by_stage[asked.stage].append(asked)
    return Run(
        _figures(world, [asked for at in stages for asked in by_stage[at]], stages),
        tuple((world.stages[at].rate, _figures(world, by_stage[at], [at])) for at in stages if by_stage[at]),
    )


def _figures(world: World, asked: Sequence[Asked], stages: Sequence[int]) -> Figures:
    answered = [each for each in asked if not each.refusal]
    ttft, itl = sorted(each.ttft for each in answered), sorted(each.itl for each in answered)
    e2e = sorted(each.e2e for each in answered)
    prompts = sum(each.prompt_tokens for each in answered)
    seconds = sum(world.spans[at][1] - world.spans[at][0] for at in stages)
    spread = [value for at, value in world.spread if at in stages]
    good = sum(each.ttft <= GOOD_TTFT and each.itl <= GOOD_ITL for each in answered)
    return Figures(
        ttft_mean_s=fmean(ttft) if ttft else 0.0,
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
        cached_share=sum(each.cached_tokens for each in answered) / prompts if prompts else 0.0,
        goodput_share=good / len(asked) if asked else 0.0,
        balance=fmean(spread) if spread else 1.0,
        failed=len(asked) - len(answered),
        requests=len(asked),
        floor_s=FLOOR + FLOOR_A_TOKEN * (prompts / len(answered)) if answered else 0.0,
    )


def ranked(values: Sequence[float], share: float) -> float:
    """Nearest rank of sorted values: the smallest that at least `share` of all are not over; 0: no values."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


def mean(figures: Sequence[Figures]) -> Figures:
    """Over seeds, at least one."""
    return Figures(**{name: fmean(getattr(each, name) for each in figures) for name in Figures.__struct_fields__})


def merged(runs: Sequence[Run]) -> Run:
    """Means over the seeds of one policy."""
    stages = zip(*(run.stages for run in runs), strict=True)
    return Run(
        mean([run.whole for run in runs]),
        tuple((stage[0][0], mean([figures for _, figures in stage])) for stage in stages),
    )


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of these; 0 for a single one, of which nothing is known."""
    if len(values) < 2:
        return 0.0
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96 + 2.5 / (len(values) - 1)
    return t * stdev(values) / math.sqrt(len(values))


def paired(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """How much more the other has of each seed's base, as a share, and half the width of its 95 % interval."""
    shares = [b / a - 1.0 for a, b in zip(base, other, strict=True) if a]
    return (fmean(shares), interval(shares)) if shares else (0.0, 0.0)
