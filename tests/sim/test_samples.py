"""Single requests as columns: worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from epp.errors import Saturated
from epp.sim.figures import measured
from epp.sim.samples import POINTS, Samples, busy, in_flight, samples
from epp.sim.world import Asked, Stage, World
from tests.sim.worlds import ROUND, Given, To


def test_samples_are_of_answered_requests_stage_by_stage_and_say_how_many_were_asked() -> None:
    told = samples([[(0.1, 0.01, 1.0), None], [], [(0.2, None, 2.0)]])
    assert told.ttft.tolist() == [0.1, 0.2]
    assert told.itl[0] == 0.01
    assert np.isnan(told.itl[1])
    assert told.e2e.tolist() == [1.0, 2.0]
    assert told.stage.tolist() == [0, 2]
    assert told.asked.tolist() == [2, 0, 1]


def test_samples_of_nothing_are_empty_columns() -> None:
    told = samples([])
    assert [len(told.ttft), len(told.itl), len(told.e2e), len(told.stage), len(told.asked)] == [0] * 5


def test_samples_are_equal_where_their_columns_are() -> None:
    one, same, other = (samples([[(ttft, None, 1.0)]]) for ttft in (0.1, 0.1, 0.2))
    assert one == same
    assert one != other
    assert one != Samples(one.ttft, one.itl, one.e2e, one.stage, np.array([2], np.int32))


def test_a_request_is_on_its_server_from_when_it_is_sent_until_it_ends() -> None:
    requests = [(0, 1.0, 3.0), (0, 2.0, 4.0), (1, 0.0, 2.0), (-1, 0.0, 9.0)]
    counts = in_flight(requests, 3, np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert counts.tolist() == [[0, 1, 2, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_what_began_before_the_shown_time_and_has_not_ended_counts() -> None:
    told = busy([(0, 0.0, 15.0)], 1, 10.0, 20.0)
    assert (told.at[0], told.at[-1], told.counts.shape) == (0.0, 10.0, (1, POINTS))
    assert told.counts[0].sum() == pytest.approx(POINTS / 2, abs=1)
    assert (told.counts[0, 0], told.counts[0, -1]) == (1, 0)


def test_a_run_has_samples_of_its_measured_stages_only() -> None:
    """Steps of 1 s; one request in the warm-up, and two after it to two engines of which one is refused."""

    class RefusesTheThird(To):
        def choose(self, asked: Asked, now: float) -> int:
            if asked.number == 2:
                raise Saturated("full")
            return super().choose(asked, now)

    stages = (Stage(1.0, 2.0, warm_up=True), Stage(1.0, 2.0))
    run = measured(World([ROUND, ROUND], RefusesTheThird(0, 1), Given((0.5, 2.5, 3.5)), 1).run(stages))
    assert (run.samples.ttft.tolist(), run.samples.e2e.tolist()) == ([1.0], [2.0])
    assert (run.samples.stage.tolist(), run.samples.asked.tolist()) == ([0], [2])
    # the stage begins a second after the warm-up's answer at 2.5: the request comes at 4 and ends at 6
    assert run.busy.at[-1] == pytest.approx(6.0 - 3.5)
    assert run.busy.counts[0].max() == 0
    shown = run.busy.at[run.busy.counts[1] == 1]
    assert (shown[0], shown[-1]) == (pytest.approx(0.5, abs=0.01), pytest.approx(2.5, abs=0.01))
