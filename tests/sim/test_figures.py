"""What a run comes to: every number from requests given by hand."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.errors import Saturated
from epp.sim.figures import interval, mean, measured, merged, paired, ranked
from epp.sim.world import Asked, Stage, World
from tests.sim.worlds import ROUND, Given, To


def test_figures_of_two_requests_by_hand() -> None:
    """Steps of 1 s. Sent at 0 and 0.5 to one engine, two tokens each: first tokens at 1 and 2, last ones at 2 and 3.
    So times to first token are 1 and 1.5, between tokens 1, to the end 2 and 2.5; four tokens in 3 s. Nobody is as
    fast as 25 ms a token. Prompts have 23 tokens."""
    whole = measured(World([ROUND], To(0), Given((0.0, 0.5)), 1).run((Stage(1.0, 1.0),))).whole
    assert (whole.ttft_mean_s, whole.ttft_p50_s, whole.ttft_p90_s, whole.ttft_p99_s) == (1.25, 1.0, 1.5, 1.5)
    assert (whole.itl_p50_s, whole.itl_p90_s) == (1.0, 1.0)
    assert (whole.e2e_p50_s, whole.e2e_p90_s, whole.e2e_p99_s) == (2.0, 2.5, 2.5)
    assert whole.output_tok_s == pytest.approx(4 / 3)
    assert (whole.goodput_share, whole.cached_share, whole.failed, whole.requests) == (0.0, 0.0, 0, 2)
    assert whole.floor_s == pytest.approx(0.015 + 23 * 46e-6)
    assert whole.gpu_hours is None


def test_gpu_hours_are_those_of_all_servers_for_a_million_tokens() -> None:
    """Two requests of two tokens in 3 s on two servers of four GPUs: 24 GPU-seconds for 4 tokens."""
    profile = msgspec.structs.replace(ROUND, gpu="h100", gpus=4)
    whole = measured(World([profile, profile], To(0), Given((0.0, 0.5)), 1).run((Stage(1.0, 1.0),))).whole
    assert whole.gpu_hours == pytest.approx(24 / 3600 / 4 * 1e6)


def test_steps_that_overlap_are_no_longer_than_they_take_together() -> None:
    """Answers from 0.5 to 2.5 s, and from 1.5 to 4.5 s for it waits for a step: 4 tokens in 4.5 s, not in 2.5 + 3.5."""
    steps = (Stage(1.0, 1.0), Stage(1.0, 1.0))
    engine = msgspec.structs.replace(ROUND, gpu="h100", gpus=2)
    run = measured(World([engine], To(0), Given((0.5, 1.5)), 1).run(steps, waits=False))
    assert run.whole.output_tok_s == pytest.approx(4 / 4.5)
    assert run.whole.gpu_hours == pytest.approx(2 * 4.5 / 3600 / 4 * 1e6)
    assert [figures.output_tok_s for _, figures in run.stages] == pytest.approx([2 / 2.5, 2 / 3.5])


def test_between_the_tokens_of_an_answer_that_has_one_is_nothing() -> None:
    run = measured(World([ROUND], To(0), Given((0.0,), output_tokens=1), 1).run((Stage(1.0, 1.0),)))
    assert (run.whole.itl_p50_s, run.whole.itl_p99_s, run.whole.goodput_share) == (None, None, 1.0)
    assert math.isnan(run.samples.itl[0])


def test_what_was_in_the_cache_counts_by_tokens() -> None:
    """The second of two equal prompts of 23 tokens finds one block of 16: 16 of 46 tokens."""
    whole = measured(World([ROUND], To(0), Given((0.0, 5.0), same=True), 1).run((Stage(1.0, 6.0),))).whole
    assert whole.cached_share == pytest.approx(16 / 46)


def test_warm_up_is_in_no_figure() -> None:
    stages = (Stage(1.0, 2.0, warm_up=True), Stage(1.0, 2.0), Stage(1.0, 2.0))
    run = measured(World([ROUND], To(0), Given((0.5, 1.5, 2.5, 4.5)), 1).run(stages))
    assert [(rate, figures.requests) for rate, figures in run.stages] == [(1.0, 1), (1.0, 1)]
    assert run.whole.requests == 2


def test_goodput_counts_refused_requests_as_bad() -> None:
    """Steps of 10 ms are fast enough; the second of two requests is refused."""

    class RefusesTheSecond(To):
        def choose(self, asked: Asked, now: float) -> int:
            if asked.number == 1:
                raise Saturated("full")
            return 0

    fast = msgspec.structs.replace(ROUND, a0=0.01)
    run = measured(World([fast], RefusesTheSecond(), Given((0.0, 0.1)), 1).run((Stage(1.0, 1.0),)))
    assert (run.whole.goodput_share, run.whole.failed, run.whole.requests) == (0.5, 1, 2)
    assert run.refusals == (("ResourceExhausted", 1),)


def test_an_answer_that_comes_soon_but_slowly_is_not_good() -> None:
    """First tokens within 2 s; 25 ms between two tokens are good and 26 are not."""
    shares = []
    for step in (0.025, 0.026):
        engine = msgspec.structs.replace(ROUND, a0=step)
        shares.append(measured(World([engine], To(0), Given((0.0,)), 1).run((Stage(1.0, 1.0),))).whole.goodput_share)
    assert shares == [1.0, 0.0]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_rank_is_the_smallest_value_that_enough_are_not_over(values: list[float], share: float) -> None:
    ordered = sorted(values)
    value = ranked(ordered, share)
    assert value is not None
    assert sum(each <= value for each in ordered) >= share * len(ordered)
    assert all(sum(each <= less for each in ordered) < share * len(ordered) for less in ordered if less < value)


def test_interval_is_students() -> None:
    """Of 1, 2, 3: standard deviation 1, 4.303 standard errors with two degrees of freedom."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert interval([5.0]) == 0.0
    assert interval([7.0, 7.0]) == 0.0
    assert interval([float(at % 2) for at in range(100)]) == pytest.approx(1.985 * 0.5025 / 10, rel=0.01)


def test_policies_are_compared_seed_by_seed() -> None:
    """10 % more with each seed is certain, however much seeds differ."""
    assert paired([1.0, 10.0, 100.0], [1.1, 11.0, 110.0]) == pytest.approx((0.1, 0.0))


def test_means_are_over_seeds_stage_by_stage() -> None:
    stages = (Stage(1.0, 2.0), Stage(1.0, 2.0))
    one, two = (
        measured(World([ROUND], To(0), Given(times), 1).run(stages)) for times in ((0.5, 2.5), (0.5, 0.75, 2.5))
    )
    assert mean([one.whole, two.whole]).requests == 2.5
    assert [figures.requests for _, figures in merged([one, two]).stages] == [1.5, 1.0]
