"""The document of an experiment: worked out by hand from figures that are given."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from epp.errors import ConfigError
from epp.scheduling.catalogue import catalogue
from epp.sim.experiment import Outcome, answers_of, document, fleet, policy, tried
from epp.sim.figures import Figures, Run, measured
from epp.sim.report import labels, shown, tables
from epp.sim.samples import Busy, samples
from epp.sim.scenarios import at_rates, disaggregated, scenario
from epp.sim.world import Stage, World
from tests.sim.worlds import ROUND, Given, To

DEMO = scenario("demo")
TIMES = Figures.__struct_fields__[:10]


def figures(ttft: float, requests: int = 10) -> Figures:
    """All times are this one."""
    values: dict[str, Any] = dict.fromkeys(TIMES, ttft)
    shares = {"output_tok_s": 100.0, "cached_share": 0.5, "goodput_share": 0.9, "balance": 1.2}
    return Figures(**values, **shares, failed=0, requests=requests, floor_s=0.3)


NOTHING = msgspec.structs.replace(
    figures(1.0, 7),
    **dict.fromkeys(TIMES),
    output_tok_s=0.0,
    cached_share=None,
    goodput_share=None,
    balance=None,
    failed=7,
    floor_s=0.0,
)
"""Seven requests, none of which was answered."""


def run(*stages: tuple[float, Figures]) -> Run:
    busy = Busy(np.zeros(1), np.zeros((1, 1), np.int32))
    return Run(stages[0][1], stages, samples([[(0.1, None, 0.2)]] * len(stages)), busy)


def outcome(name: str, *whole: Figures) -> Outcome:
    return Outcome(name, tuple(run((10.0, each)) for each in whole))


def told(*outcomes: Outcome) -> list[dict[str, Any]]:
    document_ = document(DEMO, outcomes)
    assert json.loads(json.dumps(document_)) == document_
    policies: list[dict[str, Any]] = document_["policies"]
    return policies


def test_with_several_seeds_every_figure_has_half_the_width_of_its_interval() -> None:
    """1, 2, 3: mean 2 and 4.303 standard errors."""
    (each,) = told(outcome("a", figures(1.0), figures(2.0), figures(3.0, 13)))
    assert (each["ttft_p99_s"], each["itl_p50_s"], each["e2e_p99_s"]) == (2.0, 2.0, 2.0)
    assert each["interval"]["ttft_p99_s"] == pytest.approx(4.303 / math.sqrt(3))
    assert each["interval"]["output_tok_s"] == 0.0
    assert each["stages"][0]["interval"] == each["interval"]
    assert (each["requests"], each["balance"]) == (11, 1.2)


def test_of_one_seed_nothing_is_known_of_intervals() -> None:
    first, second = told(outcome("a", figures(1.0)), outcome("b", figures(2.0)))
    assert "interval" not in first
    assert "versus_first" not in first
    assert second["versus_first"]["ttft_mean_s"] == {"ratio": 2.0, "interval": None}


def test_later_policies_are_compared_with_the_first_seed_by_seed() -> None:
    base = outcome("a", figures(1.0), figures(10.0))
    _, half, same = told(base, outcome("b", figures(0.5), figures(5.0)), outcome("c", figures(1.0), figures(10.0)))
    assert half["versus_first"]["ttft_p90_s"] == {"ratio": 0.5, "interval": 0.0}
    assert same["versus_first"]["ttft_p90_s"] == {"ratio": 1.0, "interval": 0.0}
    assert half["versus_first"]["output_tok_s"] == {"ratio": 1.0, "interval": 0.0}


def test_what_nobody_answered_is_null_and_not_quick() -> None:
    first, second = told(outcome("a", NOTHING, NOTHING), outcome("b", figures(1.0), NOTHING))
    assert (first["ttft_mean_s"], first["e2e_p99_s"], first["cached_share"], first["failed"]) == (None, None, None, 7)
    assert first["interval"]["ttft_mean_s"] is None
    assert second["ttft_mean_s"] == 1.0  # of the seed that has it
    assert second["interval"]["ttft_mean_s"] is None
    assert second["versus_first"]["ttft_mean_s"] is None


def test_what_nobody_answered_is_a_dash_in_tables() -> None:
    outcomes = [
        Outcome("a", (run((10.0, NOTHING), (20.0, NOTHING)),)),
        Outcome("b", (run((10.0, figures(1.0)), (20.0, NOTHING)),)),
    ]
    out = io.StringIO()
    Console(width=160, file=out).print(*tables(DEMO, 4, outcomes))
    text = out.getvalue()
    row = next(line.replace("│", " ").split() for line in text.splitlines() if line.startswith("│ a"))
    assert row == ["a", *["-"] * 4, "0", "-", "-", "-", "7", "-"]
    assert "no answer" in text


def test_why_requests_got_no_answer_is_told_of_all_seeds() -> None:
    runs = [msgspec.structs.replace(run((10.0, NOTHING)), refusals=(("BadRequest", 7),)) for _ in range(2)]
    outcomes = [outcome("a", figures(1.0), figures(1.0)), Outcome("[b].yaml", tuple(runs))]
    parts = [f"{part}" for part in tables(DEMO, 4, outcomes)]
    (told,) = (part for part in parts if part.startswith("Without an answer"))
    assert told == (
        "Without an answer from [b].yaml, in all seeds: 14 BadRequest (more tokens than an engine's KV cache holds)"
    )


def test_a_policy_that_uses_no_prefill_servers_is_named() -> None:
    """Else what was measured is taken for what prefill servers are worth."""
    runs = (msgspec.structs.replace(run((10.0, figures(1.0))), apart=3),)
    outcomes = [outcome("random", figures(1.0)), Outcome("pd.yaml", runs)]
    parts = [f"{part}" for part in tables(disaggregated(DEMO, 2, 4), 4, outcomes)]
    assert [part[:28] for part in parts if "prefill profile" in part] == ["random has no prefill profile"[:28]]
    assert not [part for part in map(str, tables(DEMO, 4, outcomes)) if "prefill profile" in part]


def test_a_scenario_without_a_seed_or_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="--seeds 0: at least 1"):
        tried(DEMO, fleet(("demo",), 1), [], 0)
    for rate, seconds in (("1e9", 60.0), ("1", 1e7)):
        with pytest.raises(ConfigError, match=r"are too much for a simulation.*: lower the rates"):
            tried(at_rates(DEMO, (rate,), seconds), fleet(("demo",), 1), [], 1)


def test_a_trace_whose_times_have_another_unit_is_refused(tmp_path: Path) -> None:
    """Microseconds that are read as milliseconds: an hour is 41 days."""
    line = '{{"timestamp": {}, "input_length": 5, "output_length": 5, "hash_ids": [1]}}\n'
    (tmp_path / "us.jsonl").write_text(line.format(0) + line.format(3_600_000_000))
    slow = scenario("trace", f"{tmp_path / 'us.jsonl'}")
    with pytest.raises(ConfigError, match="look whether its times have the right unit"):
        tried(slow, fleet(("demo",), 1), [], 1)
    assert tried(at_rates(slow, ("1000x",), 0.0), fleet(("demo",), 1), [], 1) == []


@pytest.mark.parametrize("tokens", [0, -5, 10**9])
def test_answers_of_a_length_that_cannot_be_are_refused(tokens: int) -> None:
    with pytest.raises(ConfigError, match="--output-tokens"):
        answers_of(DEMO, tokens)


@pytest.mark.parametrize("name", ["", "x" * 300, "."])
def test_what_can_be_no_file_is_no_policy(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--config .*: no such file; there are also default,"):
        policy(name, catalogue())


def test_a_folder_of_the_name_of_a_policy_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default").mkdir()
    (tmp_path / "random").mkdir()
    monkeypatch.chdir(tmp_path)
    assert policy("random", catalogue()).config is None
    assert policy("default", catalogue()).config is not None


def test_a_stage_in_which_nobody_asked_is_a_stage() -> None:
    """Else the stages of two seeds could not be laid side by side."""
    stages = (Stage(1.0, 1.0), Stage(1.0, 1.0))
    told = measured(World([ROUND], To(0), Given((1.5,)), 1).run(stages))
    assert [figures.requests for _, figures in told.stages] == [0, 1]
    assert (told.stages[0][1].ttft_mean_s, told.stages[0][1].goodput_share) == (None, None)


def test_plots_are_told_by_short_names_where_these_differ() -> None:
    assert labels(["/x/a.yaml", "b.yaml", "random"]) == ["a.yaml", "b.yaml", "random"]
    assert labels(["/x/a.yaml", "/y/a.yaml"]) == ["/x/a.yaml", "/y/a.yaml"]


def test_plots_are_drawn_of_every_seed_and_stage() -> None:
    tried_with = at_rates(DEMO, ("10", "20"), 2.0)
    outcomes = tried(tried_with, fleet(("demo",), 2), [policy("random", catalogue())], 2)
    (drawn,) = shown(outcomes)
    assert [point.rate for point in drawn.points] == [10.0, 20.0]
    means = outcomes[0].mean.stages[1][1]
    assert drawn.points[1].values["ttft_mean_s"][0] == means.ttft_mean_s
    assert sum(int(each.asked.sum()) for each in drawn.samples) == 2 * outcomes[0].mean.whole.requests
    assert drawn.busy == outcomes[0].runs[0].busy
    (alone,) = shown([msgspec.structs.replace(outcomes[0], runs=(run((10.0, NOTHING)),))])
    assert set(alone.points[0].values) == {"output_tok_s", "failed", "requests", "floor_s"}
