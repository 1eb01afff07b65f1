"""The document of a run and its tables: worked out by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from epp.load.client import NO_SOCKET, Load
from epp.load.course import Block
from epp.load.figures import Goal
from epp.load.report import document, shown, tables
from epp.load.results import Result
from epp.sim.world import Stage

A, B = "http://a:1", "http://b:1"
WARM, SLOW, QUICK = Stage(1.0, 9.0, warm_up=True), Stage(2.0, 9.0), Stage(4.0, 9.0)
FIGURES = {
    *("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "itl_p50_s", "itl_p90_s", "itl_p99_s"),
    *("e2e_p50_s", "e2e_p90_s", "e2e_p99_s", "output_tok_s", "cached_share", "goodput_share", "failed", "floor_s"),
    *("requests", "errors", "balance"),
}


def answered(
    *ttfts: float, late: float = 0.0, lag: float = 0.0, error: str = "", server: str = "s", ended_at: float = 10.0
) -> Load:
    """Requests due at 0, each of 100 prompt tokens of which 50 were cached, 11 tokens, 10 ms a token."""
    load = Load()
    load.lag = [lag]
    load.results = [
        Result("t", "m", "s", 0, 0.0, late, ended_at, error, 200, ttft, 0.01, 0.01, 100, 11, 50, server)
        for ttft in ttfts
    ]
    return load


def block(target: int, stage: Stage = SLOW, at: int = 0) -> Block:
    return Block(at, stage, target, 9.0)


def told(measured: Sequence[tuple[Block, Load]], targets: Sequence[str] = (A,)) -> dict[str, Any]:
    return document("w", targets, Goal(), measured)


def printed(document: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(tables(document))
    return out.getvalue()


def test_stages_have_the_keys_of_the_whole_and_warm_up_is_in_neither() -> None:
    quick = answered(0.3, server="other", ended_at=7.0)
    quick.results += answered(3.0, server="other", ended_at=12.0).results
    says = told(
        [
            (block(0, WARM), answered(9.0, late=5.0)),
            (block(0, SLOW, 1), answered(0.1, 0.2, ended_at=10.0)),
            (block(0, QUICK, 2), quick),
        ]
    )
    assert (says["workload"], says["goal"]) == ("w", {"ttft": 2.0, "itl": 0.025})
    (target,) = says["targets"]
    assert set(target) == {"target", "servers", "stages"} | FIGURES
    assert [set(stage) for stage in target["stages"]] == [{"rate"} | FIGURES] * 2
    assert [stage["rate"] for stage in target["stages"]] == [2.0, 4.0]
    assert [stage["ttft_p50_s"] for stage in target["stages"]] == [0.1, 0.3]
    assert [stage["output_tok_s"] for stage in target["stages"]] == [2.2, round(22 / 12, 6)]
    assert [stage["goodput_share"] for stage in target["stages"]] == [1.0, 0.5]
    assert (target["target"], target["requests"], target["floor_s"]) == (A, 4, 0.0)
    assert target["ttft_mean_s"] == 0.9
    assert target["output_tok_s"] == 2.0  # 44 tokens in 10 + 12 s
    assert {name: server["requests"] for name, server in target["servers"].items()} == {"other": 2, "s": 2}
    assert says["client"] == {"late_p99_s": 0.0, "late_max_s": 0.0, "lag_p99_s": 0.0, "lag_max_s": 0.0}


def test_steps_of_one_load_overlap_by_what_was_still_being_answered() -> None:
    """Two steps of 9 s: the first one's answers end at 30 s, the second's at 9 + 12 s. 44 tokens in 30 s."""
    steps = [Block(at, SLOW, 0, 9.0, waits=False) for at in range(2)]
    measured = [(steps[0], answered(0.1, 0.2, ended_at=30.0)), (steps[1], answered(0.1, 0.2, ended_at=12.0))]
    (target,) = told(measured)["targets"]
    assert [stage["output_tok_s"] for stage in target["stages"]] == [round(22 / 30, 6), round(22 / 12, 6)]
    assert target["output_tok_s"] == round(44 / 30, 6)


def test_a_machine_that_lacked_files_or_ports_says_nothing_of_the_server() -> None:
    says = told([(block(0), answered(0.1, error=NO_SOCKET)), (block(0), answered(*[0.1] * 1000))])
    assert "targets" not in says
    assert says["refused"].startswith("this machine had no more files or ports for 1 requests")


def test_plots_show_each_target_without_its_warm_up() -> None:
    """Two blocks of a stage, of 10 s and 4 s until the last answer, are laid end to end."""
    measured = [
        (block(0, WARM), answered(9.0)),
        (block(0, SLOW, 1), answered(0.1, 0.2)),
        (block(1, SLOW, 1), answered(0.4)),
        (block(1, SLOW, 1), answered(0.4)),
        (block(0, SLOW, 1), answered(0.3, ended_at=4.0)),
        (block(1, QUICK, 2), answered(0.4)),
        (block(0, QUICK, 2), answered(7.0, error="truncated", server="")),
    ]
    a, b = shown(told(measured, (A, B)), measured)
    assert (a.name, b.name) == (A, B)
    assert [point.rate for point in a.points] == [2.0, 4.0]
    assert a.points[0].values["ttft_p50_s"] == (0.2, 0.0)
    assert "cached_share" in a.points[0].values
    (samples,) = a.samples
    assert (samples.ttft.tolist(), samples.e2e.tolist()) == ([0.1, 0.2, 0.3], [10.0, 10.0, 4.0])
    assert (samples.stage.tolist(), samples.asked.tolist()) == ([0, 0, 0], [3, 1])
    assert (len(a.busy.counts), a.busy.at[-1], b.busy.at[-1]) == (1, 24.0, 30.0)
    assert a.busy.counts[0, [0, 100, 150, 290]].tolist() == [2, 2, 1, 0]  # at 0, 8, 12 and 23.3 s


def test_of_a_client_that_was_late_nothing_is_drawn() -> None:
    measured = [(block(0), answered(0.2, late=0.03))]
    assert shown(told(measured), measured) == []


def test_two_targets_are_compared_block_by_block() -> None:
    """Medians 0.2 and 0.1, then 0.4 and 0.8: ratios of 0.5 and 2, whose geometric mean is 1."""
    says = told(
        [
            (block(0), answered(0.2)),
            (block(1), answered(0.1)),
            (block(1), answered(0.8)),
            (block(0), answered(0.4)),
        ],
        (A, B),
    )
    assert [(target["target"], target["requests"]) for target in says["targets"]] == [(A, 2), (B, 2)]
    assert says["versus"]["blocks"] == 2
    assert says["versus"]["ttft_p50_s"] == {"ratio": 1.0, "least": 0.5, "most": 2.0}
    assert "2 pairs of blocks" in printed(says)


def test_blocks_without_an_answer_are_compared_with_nothing() -> None:
    dead = Load()
    dead.results = [Result("t", "m", "s", 0, 0.0, 0.0, 0.1, "connect", 0, None, None, None, 0, 0, 0, "")]
    says = told([(block(0), answered(0.2)), (block(1), dead)], (A, B))
    assert says["versus"] == {"blocks": 1}
    assert says["targets"][1]["ttft_p50_s"] is None
    assert "failed: 1 connect" in printed(says)


@pytest.mark.parametrize(("late", "lag"), [(0.03, 0.0), (0.0, 0.03)])
def test_a_client_that_was_late_tells_no_figures(late: float, lag: float) -> None:
    """30 ms beside a median of 0.2 s is more than a twentieth of it."""
    says = told([(block(0), answered(0.2, late=late, lag=lag))])
    assert set(says) == {"workload", "goal", "client", "refused"}
    assert "Lower --rate" in says["refused"]
    assert "no report: the client itself was late" in printed(says).replace("\n", " ")
    slower = told([(block(0), answered(0.7, late=late, lag=lag))])
    assert "targets" in slower


def test_the_quicker_of_two_targets_says_how_late_the_client_may_be() -> None:
    quick, slow = answered(0.2, lag=0.03), answered(7.0)
    assert "refused" in told([(block(0), slow), (block(1), quick)], (A, B))


def test_tables_fit_a_terminal_of_80_columns() -> None:
    times = [0.1] * 50 + [12.5] * 45 + [123.45] * 5
    says = told([(block(0, SLOW, at), answered(*times, ended_at=150.0)) for at in range(2)])
    text = printed(says)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("all"))
    assert row[:5] == ["all", "0/200", "0.10", "12.50", "123.45"]
    assert row[5:] == ["10", "10", "150.00", "150.00", "7", "50%", "50%"]
