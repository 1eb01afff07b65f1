"""How fast engines are: engines whose steps take what the five terms say, learned from what they did."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.scheduling.speeds import MOST, PRIOR, TERMS, Speeds, Terms
from epp.sim.profile import load_profile

PROFILES = ("llama-70b-h100-tp4", "llama-8b-h100", "llama-8b-l40s", "qwen3-32b-h100-tp2")
LIGHT, HEAVY, LONG = (100.0, 4_000.0, 800.0, 1e6, 2e6), (60.0, 60_000.0, 2_000.0, 4e6, 6e7), (8.0, 6e4, 60.0, 5e5, 1e9)
"""What engines do in about a second: they answer eight; they compute 30 prompts of 2,000 tokens; two of 30,000."""


def constants_of(profile: str) -> list[float]:
    engine = load_profile(profile)
    return [engine.a0, engine.a1, engine.a2, engine.a3, engine.a4]


def seconds(constants: list[float], did: Terms) -> float:
    return sum(constant * term for constant, term in zip(constants, did, strict=True))


def piece(rng: Random) -> Terms:
    """A second or so of a server: steps that answer 1 to 128 requests of some context, and prompts of one length."""
    steps, batch = float(rng.randint(20, 100)), rng.choice((1, 8, 32, 128))
    prompts, length = rng.choice((0, 0, 1, 4, 16)), rng.choice((100, 2_000, 8_000, 30_000))
    context = batch * rng.choice((500.0, 2_000.0, 8_000.0))
    return steps, float(prompts * length), steps * batch, steps * context, prompts * length * (length + 1) / 2


def taught(speeds: Speeds, slot: int, constants: list[float], pieces: int = 300, seed: int = 1) -> None:
    rng = Random(seed)
    for _ in range(pieces):
        did = piece(rng)
        speeds.learn(slot, did, seconds(constants, did))


def of(speeds: Speeds, slot: int, width: int = 4) -> list[float]:
    return [*map(float, speeds.of(np.array([slot]), width)[:, 0])]


@pytest.mark.parametrize("profile", PROFILES)
def test_an_engine_whose_steps_are_the_five_terms_is_learned_within_ten_percent(profile: str) -> None:
    """300 pieces are some minutes. What an answer's token costs is a few hundredths of a step: it shows least."""
    speeds, constants = Speeds(), constants_of(profile)
    taught(speeds, 0, constants)
    found = of(speeds, 0)
    for term in (0, 1, 3, 4):
        assert found[term] == pytest.approx(constants[term], rel=0.1)
    for did in (LIGHT, HEAVY, LONG):
        assert seconds(found, did) == pytest.approx(seconds(constants, did), rel=0.05)


@pytest.mark.parametrize("profile", PROFILES)
def test_after_twenty_pieces_what_it_will_take_is_known_within_a_fifth(profile: str) -> None:
    speeds, constants = Speeds(), constants_of(profile)
    taught(speeds, 0, constants, pieces=20)
    for did in (LIGHT, HEAVY, LONG):
        assert seconds(of(speeds, 0), did) == pytest.approx(seconds(constants, did), rel=0.2)


def test_times_that_are_off_by_a_tenth_each_are_averaged() -> None:
    speeds, constants, rng = Speeds(), constants_of("llama-8b-l40s"), Random(2)
    for _ in range(300):
        did = piece(rng)
        speeds.learn(0, did, seconds(constants, did) * rng.uniform(0.9, 1.1))
    for did in (LIGHT, HEAVY, LONG):
        assert seconds(of(speeds, 0), did) == pytest.approx(seconds(constants, did), rel=0.05)


def test_pieces_in_which_the_engine_stood_still_do_little_harm() -> None:
    """One in ten took an hour longer. A piece's terms are shares of its time, so that one has next to none."""
    speeds, constants, rng = Speeds(), constants_of("qwen3-32b-h100-tp2"), Random(3)
    for number in range(300):
        did = piece(rng)
        speeds.learn(0, did, seconds(constants, did) + 3600.0 * (number % 10 == 9))
    for did in (LIGHT, HEAVY, LONG):
        assert seconds(of(speeds, 0), did) == pytest.approx(seconds(constants, did), rel=0.1)


def test_one_piece_that_seems_a_thousand_times_too_quick_does_not_carry_the_rest_away() -> None:
    speeds, constants = Speeds(), constants_of("llama-8b-h100")
    taught(speeds, 0, constants)
    speeds.learn(0, HEAVY, seconds(constants, HEAVY) / 1_000)
    assert seconds(of(speeds, 0), HEAVY) == pytest.approx(seconds(constants, HEAVY), rel=0.2)


def test_a_slot_begins_with_the_prior() -> None:
    assert of(Speeds(), 3) == PRIOR.tolist()


def test_a_new_slot_begins_as_the_others_are_and_so_does_one_that_was_there_but_never_worked() -> None:
    """Else a pool of quick engines would never send anything to the one of them that has done nothing yet."""
    speeds, quick = Speeds(), (PRIOR / 4).tolist()
    assert of(speeds, 3) == PRIOR.tolist()  # there from the beginning
    for slot in range(3):
        taught(speeds, slot, quick)
    for new in (of(speeds, 3), of(speeds, 7, width=8)):
        for did in (LIGHT, HEAVY, LONG):
            assert seconds(new, did) == pytest.approx(seconds(quick, did), rel=0.02)


def test_one_that_is_four_times_slower_is_told_from_the_others_soon_and_known_for_it_later() -> None:
    """Its shares of a piece's time are a fourth in units of the pool's constants, so at first these hold it back."""
    speeds = Speeds()
    quick = constants_of("qwen3-32b-h100-tp2")
    slow = [4 * constant for constant in quick]
    for number in range(100):
        for slot in range(4):
            taught(speeds, slot, slow if slot == 2 else quick, pieces=1, seed=number)
        if number == 9:
            assert all(seconds(of(speeds, 2), did) > 1.3 * seconds(of(speeds, 0), did) for did in (LIGHT, HEAVY, LONG))
    for did in (LIGHT, HEAVY):
        assert seconds(of(speeds, 2), did) / seconds(of(speeds, 0), did) == pytest.approx(4.0, rel=0.15)
    for did in (LIGHT, HEAVY, LONG):  # and none of the others is thought slow for it
        assert seconds(of(speeds, 3), did) == pytest.approx(seconds(quick, did), rel=0.05)


@pytest.mark.parametrize(("times", "pieces"), [(3.0, 1_000), (1 / 3, 300)])
def test_an_engine_that_becomes_slower_or_quicker_is_learned_anew(times: float, pieces: int) -> None:
    """0.995 ** 1,000 is 0.7 %; a quicker one's pieces weigh more, so that fewer do."""
    speeds, before = Speeds(), constants_of("llama-8b-h100")
    after = [times * constant for constant in before]
    taught(speeds, 0, before)
    taught(speeds, 0, after, pieces=pieces, seed=2)
    for did in (LIGHT, HEAVY, LONG):
        assert seconds(of(speeds, 0), did) == pytest.approx(seconds(after, did), rel=0.1)


def test_a_slot_that_is_forgotten_is_as_the_others_are() -> None:
    speeds, quick = Speeds(), constants_of("llama-8b-h100")
    for slot in (0, 1):
        taught(speeds, slot, quick)
    taught(speeds, 2, [8 * constant for constant in quick], pieces=20)
    assert seconds(of(speeds, 2), HEAVY) > 2 * seconds(of(speeds, 1), HEAVY)
    speeds.forget(2)
    assert of(speeds, 2) == of(speeds, 3)
    taught(speeds, 0, quick, pieces=20)  # and goes on as they do
    assert of(speeds, 2) == of(speeds, 3)
    taught(speeds, 2, quick, pieces=20)
    assert seconds(of(speeds, 2), HEAVY) == pytest.approx(seconds(quick, HEAVY), rel=0.2)


def test_forgetting_one_of_which_nothing_is_known_is_nothing() -> None:
    speeds = Speeds()
    speeds.forget(1_000)
    assert of(speeds, 0) == PRIOR.tolist()


COUNTS = st.floats(0, 1e12, allow_subnormal=False)


@settings(max_examples=200)
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.tuples(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
            st.floats(1e-6, 1e6, allow_subnormal=False),
        ),
        max_size=30,
    )
)
def test_whatever_is_learned_constants_stay_within_sixteen_times_of_the_prior(
    pieces: list[tuple[int, Terms, float]],
) -> None:
    speeds = Speeds()
    for slot, did, took in pieces:
        speeds.learn(slot, did, took)
    factors = speeds.of(np.arange(6), 6) / PRIOR[:, None]
    assert factors.shape == (TERMS, 6)
    assert np.isfinite(factors).all()
    assert (factors >= 1 / MOST - 1e-12).all()
    assert (factors <= MOST + 1e-9).all()


def test_nothing_done_in_some_time_teaches_nothing() -> None:
    speeds = Speeds()
    speeds.learn(0, (0.0, 0.0, 0.0, 0.0, 0.0), 5.0)
    assert of(speeds, 0) == pytest.approx(PRIOR.tolist())
    assert not math.isnan(sum(of(speeds, 0)))
