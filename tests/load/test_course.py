"""The order of stages and turns, and what each block asks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from epp.load.course import Block, blocks, streams
from epp.sim.traces import Trace, Traced
from epp.sim.workload import Arrival, Prompts, Workload
from epp.sim.world import Stage

NEW = Workload("new", "tiny", 50.0, (Prompts("team", 1.0, 1, 0, 0, 40, output_tokens=5),))


SLOW, QUICK = Stage(50.0, 50.0), Stage(200.0, 50.0)


def part(stage: Stage, seconds: float, at: int = 0) -> Block:
    return Block(at, stage, 0, seconds)


def test_one_target_gets_each_stage_in_one_piece() -> None:
    assert list(blocks((SLOW, QUICK), 1, 7.0)) == [Block(0, SLOW, 0, 50.0), Block(1, QUICK, 0, 50.0)]


def test_two_targets_take_turns_and_neither_is_always_first() -> None:
    told = list(blocks((Stage(9.0, 60.0, warm_up=True), SLOW, QUICK), 2, 20.0))
    assert [(block.at, block.target, block.seconds) for block in told] == [
        *((0, 0, 60.0), (0, 1, 60.0)),
        *((1, 0, 20.0), (1, 1, 20.0), (1, 1, 20.0), (1, 0, 20.0), (1, 0, 10.0), (1, 1, 10.0)),
        *((2, 0, 20.0), (2, 1, 20.0), (2, 1, 20.0), (2, 0, 20.0), (2, 0, 10.0), (2, 1, 10.0)),
    ]


def test_steps_of_one_load_wait_for_nothing_but_where_the_other_target_has_its_turn() -> None:
    stages = (Stage(9.0, 60.0, warm_up=True), SLOW, QUICK)
    assert [each.waits for each in blocks(stages, 1, 20.0, waits=False)] == [True, False, False]
    assert all(each.waits for each in blocks(stages, 2, 20.0, waits=False))
    assert all(each.waits for each in blocks(stages, 1, 20.0))


def test_blocks_of_one_rate_together_are_the_workload() -> None:
    (source,) = streams(NEW, 1, 1)
    taken = [list(source.take(part(SLOW, seconds))) for seconds in (1.0, 2.5, 0.5)]
    begins = (0.0, 1.0, 3.5)
    again = [at + each.at for at, block in zip(begins, taken, strict=True) for each in block]
    whole = list(NEW.arrivals(1, 4.0))
    assert again == pytest.approx([each.at for each in whole])
    assert [each.messages for block in taken for each in block] == [each.messages for each in whole]


def test_a_stage_at_another_rate_is_the_stream_played_faster_and_goes_on() -> None:
    (source,) = streams(NEW, 1, 1)
    first = list(source.take(part(SLOW, 2.0)))
    second = list(source.take(part(QUICK, 2.0)))  # eight seconds of the stream
    whole = list(NEW.arrivals(1, 10.0))
    assert len(first) + len(second) == len(whole)
    assert [each.messages for each in (*first, *second)] == [each.messages for each in whole]
    assert [each.at for each in second] == pytest.approx([(each.at - 2.0) / 4 for each in whole[len(first) :]])
    assert all(0 <= each.at < 2.0 for each in second)


def test_two_targets_are_asked_the_same_in_words_that_share_no_beginning() -> None:
    one, other = (list(each.take(part(SLOW, 1.0))) for each in streams(NEW, 1, 2))
    alone = list(NEW.arrivals(1, 1.0))
    assert [each.at for each in one] == [each.at for each in other] == [each.at for each in alone]
    for a, b, whole in zip(one, other, alone, strict=True):
        assert (said(a), said(b)) == ("A" + said(whole)[:-1], "B" + said(whole)[:-1])


def test_prompts_that_differ_in_their_first_letter_still_do() -> None:
    trace = Trace("t", tuple(Traced(float(at), 40, 5) for at in range(3)))
    taken = list(streams(trace, 1, 2)[0].take(Block(0, Stage(trace.rate, 4.0), 0, 4.0)))
    assert len({said(each) for each in taken}) == 3


def test_arrivals_of_a_block_are_in_the_order_of_time() -> None:
    (source,) = streams(NEW, 3, 1)
    taken = list(source.take(part(SLOW, 9.0)))
    assert all(a.at <= b.at for a, b in pairwise(taken))


def test_a_trace_that_is_over_has_nothing_more() -> None:
    trace = Trace("t", (Traced(0.0, 40, 5), Traced(1.0, 40, 5)))
    (source,) = streams(trace, 1, 1)
    stage = Stage(trace.rate, 5.0)
    assert [each.at for each in source.take(part(stage, 5.0))] == [0.0, 1.0]
    assert list(source.take(part(stage, 5.0))) == []


def said(arrival: Arrival) -> str:
    return arrival.messages[0][1]
