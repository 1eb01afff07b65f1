"""Several pickers in virtual time: every request ends, each picker sees its share alone, and a seed decides all."""

from __future__ import annotations

import pytest

from bench.replicas import CASES, Figures, World

SECONDS = 10.0


def run(pickers: int, seed: int = 1) -> World:
    return World(CASES["demo"], pickers, seed).run(SECONDS)


@pytest.fixture(scope="module")
def figures() -> dict[int, Figures]:
    return {pickers: run(pickers).figures() for pickers in (0, 1, 4)}


def test_every_request_is_answered_and_counted_out_by_the_picker_that_sent_it() -> None:
    world = run(3)
    assert all(request.ttft > 0 for request in world.requests)
    for number, picker in enumerate(world.pickers):
        watch = world.watches[number]
        watch.check()
        assert len(watch.tickets) == len(range(number, len(world.requests), 3))  # every third is its own
        in_flight, _ = picker.table.column("inflight", picker.table.listed, SECONDS)
        assert in_flight.tolist() == [0.0] * 4


def test_the_same_seed_gives_the_same_figures(figures: dict[int, Figures]) -> None:
    assert run(4).figures() == figures[4]
    assert run(4, seed=2).figures() != figures[4]


def test_what_one_picker_gains_on_round_robin_four_lose_a_part_of(figures: dict[int, Figures]) -> None:
    round_robin, one, four = (figures[pickers] for pickers in (0, 1, 4))
    assert one.cached_share > four.cached_share > round_robin.cached_share
    assert one.ttft_p90 < four.ttft_p90 < round_robin.ttft_p90
    assert {each.requests for each in figures.values()} == {one.requests}


def test_requests_in_turn_are_spread_evenly_only_by_number() -> None:
    """Round robin gives each server as many requests; how long they stay is the servers' matter."""
    world = run(0)
    counts = [sum(request.server == server for request in world.requests) for server in range(4)]
    assert max(counts) - min(counts) <= 1
    assert world.figures().imbalance >= 1.0
