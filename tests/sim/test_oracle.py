"""The reference that knows everything, where what is right can be said by hand."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.sim.oracle import Oracle, common, prefill
from epp.sim.world import Stage, World
from tests.sim.worlds import ROUND, Given

COMPUTES = msgspec.structs.replace(ROUND, a0=0.0, a1=1.0, a2=0.001)
"""A second a prompt token."""


def test_prefill_takes_the_linear_and_the_quadratic_term() -> None:
    """100 tokens after 50 cached ones: each attends to all before it and itself, 51 + ... + 150 = 10,050 pairs."""
    profile = msgspec.structs.replace(ROUND, a1=2.0, a4=0.001)
    assert prefill(profile, 50, 150) == pytest.approx(2.0 * 100 + 0.001 * 10_050)


@given(shared=st.integers(0, 40), one=st.integers(0, 40), other=st.integers(0, 40))
def test_common_counts_leading_keys(shared: int, one: int, other: int) -> None:
    """Keys are chained, so after the first difference nothing is equal."""
    beginning = list(range(shared))
    keys, others = beginning + [1000 + at for at in range(one)], beginning + [2000 + at for at in range(other)]
    assert common(keys, others) == shared


def test_it_goes_where_least_waits() -> None:
    """Two different prompts at once: the second one goes to the other server."""
    world = World([COMPUTES, COMPUTES], Oracle(Random(1)), Given((0.0, 0.0)), 1).run((Stage(1.0, 1.0),))
    assert sorted(asked.server for asked in world.asked) == [0, 1]


def test_it_goes_where_the_prompt_is_when_nothing_waits() -> None:
    world = World([COMPUTES] * 4, Oracle(Random(1)), Given((0.0, 100.0), same=True), 1).run((Stage(1.0, 200.0),))
    first, second = world.asked
    assert first.server == second.server
    assert second.cached_tokens == 16


def test_it_goes_where_a_prompt_is_about_to_be() -> None:
    """The first of two equal prompts is still computed when the second one comes: to wait for it is less than to
    compute it elsewhere."""
    world = World([COMPUTES] * 4, Oracle(Random(1)), Given((0.0, 15.0), same=True), 1).run((Stage(1.0, 200.0),))
    first, second = world.asked
    assert first.server == second.server


def test_it_waits_for_memory_only_where_there_is_none() -> None:
    """Prompts of 607 tokens with 390 of answer: two do not fit into 1,024 tokens, so each gets a server."""
    source = Given((0.0, 0.5), output_tokens=390, characters=2400)
    world = World([COMPUTES] * 2, Oracle(Random(1)), source, 1).run((Stage(1.0, 1.0),))
    assert sorted(asked.server for asked in world.asked) == [0, 1]
