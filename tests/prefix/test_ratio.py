"""Real tokens for each estimated one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.prefix.ratio import ENOUGH, LEAST, MOST, MOST_MODELS, PRIOR, WINDOW, TokenRatios


def test_a_model_that_nobody_knows_counts_as_estimated() -> None:
    assert TokenRatios().of("m") == 1.0


def test_one_prompt_weighs_against_the_prior_and_many_outweigh_it() -> None:
    ratios = TokenRatios()
    ratios.learn("m", 2000, 4000)
    assert ratios.of("m") == (2000 + 4000) / (2000 + 2000)
    for _ in range(20):
        ratios.learn("m", 2000, 4000)
    assert ratios.of("m") == pytest.approx(2.0, abs=0.05)
    assert ratios.of("other") == 1.0


def test_a_long_prompt_says_more_than_a_short_one() -> None:
    ratios = TokenRatios()
    ratios.learn("m", 10, 40)  # a template of 30 tokens around a word
    ratios.learn("m", 98_000, 49_000)
    assert ratios.of("m") == (PRIOR + 40 + 49_000) / (PRIOR + 10 + 98_000)


def test_what_is_asked_changes_and_so_does_the_ratio() -> None:
    ratios = TokenRatios()
    for _ in range(1000):
        ratios.learn("m", 10_000, 10_000)
    for _ in range(300):
        ratios.learn("m", 10_000, 20_000)
    assert ratios.of("m") == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(("estimated", "real"), [(0, 50), (-1, 5), (1000, 124), (1000, 8001), (1000, 0)])
def test_what_is_out_of_all_proportion_teaches_nothing(estimated: float, real: float) -> None:
    ratios = TokenRatios()
    ratios.learn("m", estimated, real)
    assert ratios.of("m") == 1.0
    assert not ratios._sums


def test_the_model_that_was_taught_least_recently_gives_way() -> None:
    ratios = TokenRatios()
    for i in range(MOST_MODELS):
        ratios.learn(f"m{i}", 2000, 4000)
    ratios.learn("m0", 2000, 4000)
    ratios.learn("one more", 2000, 4000)
    assert len(ratios._sums) == MOST_MODELS
    assert (ratios.of("m1"), ratios.of("m2")) == (1.0, 1.5)
    assert ratios.of("m0") == (2000 + 4000 * 2) / 6000


@given(st.lists(st.tuples(st.floats(-10, 1e7), st.floats(-10, 1e7)), max_size=60))
def test_it_stays_within_its_bounds_and_its_window(taught: list[tuple[float, float]]) -> None:
    ratios = TokenRatios()
    for estimated, real in taught:
        ratios.learn("m", estimated, real)
        assert LEAST <= ratios.of("m") <= MOST
        assert ratios._sums.get("m", (0.0, 0.0))[1] <= WINDOW + 2e7


# -- from engines' counters --------------------------------------------------------------------------------------------


def ran(ratios: TokenRatios, prompts: int, model: str = "m", estimated: float = 1000, exact: float = 0) -> None:
    for _ in range(prompts):
        ratios.ran(0, model, estimated, exact)


def test_counters_of_an_engine_teach_every_model_that_was_asked_for() -> None:
    ratios = TokenRatios()
    ratios.counted(0, 500_000, 100)
    ran(ratios, ENOUGH, "base")
    ran(ratios, ENOUGH, "adapter")
    ratios.counted(0, 500_000 + 2 * ENOUGH * 1500, 100 + 2 * ENOUGH)
    learned = (PRIOR + ENOUGH * 1500) / (PRIOR + ENOUGH * 1000)
    assert ratios.of("base") == ratios.of("adapter") == pytest.approx(learned)


def test_prompts_that_others_send_do_not_count_twice() -> None:
    ratios = TokenRatios()
    ratios.counted(0, 0, 0)
    ran(ratios, ENOUGH)
    ratios.counted(0, 3 * ENOUGH * 1500, 3 * ENOUGH)  # two more pickers send as many as this one
    assert ratios.of("m") == pytest.approx((PRIOR + ENOUGH * 1500) / (PRIOR + ENOUGH * 1000))


def test_prompts_of_ids_are_taken_out_of_the_mean() -> None:
    ratios = TokenRatios()
    ratios.counted(0, 0, 0)
    ran(ratios, ENOUGH)
    ran(ratios, ENOUGH, estimated=0, exact=3000)
    ratios.counted(0, ENOUGH * (3000 + 1500), 2 * ENOUGH)
    assert ratios.of("m") == pytest.approx((PRIOR + ENOUGH * 1500) / (PRIOR + ENOUGH * 1000))


def test_too_few_prompts_of_either_side_are_waited_for() -> None:
    ratios = TokenRatios()
    ratios.counted(0, 0, 0)
    ran(ratios, ENOUGH - 1)
    ratios.counted(0, 1e6, 1000)
    assert ratios.of("m") == 1.0
    ran(ratios, 1)
    ratios.counted(0, 1500 * 1000, 1000)
    assert ratios.of("m") > 1.2


def test_an_engine_that_starts_anew_is_read_anew() -> None:
    ratios = TokenRatios()
    ratios.counted(0, 1e6, 1000)
    ran(ratios, ENOUGH)
    ratios.counted(0, 10, 1)  # lower than before
    ran(ratios, ENOUGH)
    ratios.counted(0, 10 + ENOUGH * 1500, 1 + ENOUGH)
    assert ratios.of("m") == pytest.approx((PRIOR + ENOUGH * 1500) / (PRIOR + ENOUGH * 1000))


def test_a_slot_whose_counters_were_never_read_keeps_nothing() -> None:
    ratios = TokenRatios()
    ran(ratios, 10)
    assert not ratios._since
    ratios.counted(0, 1, 1)
    ratios.forget(0)
    ratios.forget(0)
    assert not ratios._since


def test_names_of_models_are_bounded_while_counters_are_waited_for() -> None:
    ratios = TokenRatios()
    ratios.counted(0, 0, 0)
    for i in range(2 * MOST_MODELS):
        ratios.ran(0, f"m{i}", 1000)
    assert len(ratios._since[0].estimates) == MOST_MODELS
