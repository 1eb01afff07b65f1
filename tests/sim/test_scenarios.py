"""Built-in workloads: the published parameters, and what flags make of them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, takewhile
from pathlib import Path
from random import Random
from statistics import median

import pytest

from epp.cli import SimFlags, sim
from epp.errors import ConfigError
from epp.scheduling.catalogue import catalogue
from epp.sim import text
from epp.sim.experiment import answers_of, document, fleet, policy, tried
from epp.sim.policies import reference
from epp.sim.profile import load_profile
from epp.sim.scenarios import AGENTIC, BUILT_IN, BURSTY, CAPACITY_37, CAPACITY_73, LORA_MIX, at_rates, scenario
from epp.sim.workload import Agents, Prompts, Workload
from epp.sim.world import World

KEYS = [
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "output_tok_s",
    "cached_share",
    "goodput_share",
    "failed",
    "floor_s",
    "ttft_p99_s",
    "itl_p50_s",
    "itl_p90_s",
    "itl_p99_s",
    "e2e_p50_s",
    "e2e_p90_s",
    "e2e_p99_s",
    "balance",
    "requests",
    "gpu_hours",
]


def test_73_capacity_fills_73_percent_of_eight_servers() -> None:
    """llm-d: 150 groups x 12,000 tokens of 8 x 307,328."""
    (users,) = CAPACITY_73.source.tenants if isinstance(CAPACITY_73.source, Workload) else ()
    assert isinstance(users, Prompts)
    resident = users.groups * (users.shared_tokens + users.questions * users.question_tokens)
    assert resident / (8 * load_profile(CAPACITY_73.engine).kv_tokens) == pytest.approx(0.732, abs=0.001)


def test_the_published_ladders_have_as_many_requests_as_published() -> None:
    """The warm-up of 73-capacity is one full set of 750 prompts; its last stage is 60 a second for 25 s."""
    first, *_, last = CAPACITY_73.stages
    assert (first.rate * first.seconds, first.warm_up) == (750, True)
    assert (last.rate, last.seconds) == (60, 25)
    assert sum(stage.rate * stage.seconds for stage in CAPACITY_73.stages) == 17_084
    assert sum(stage.rate * stage.seconds for stage in CAPACITY_37.stages) == 6_830


def test_prompts_in_turn_are_all_asked_before_any_is_asked_again() -> None:
    asked = [arrival.messages for arrival in CAPACITY_73.source.arrivals(1, 30.0)]
    assert len(set(asked[:750])) == 750
    assert asked[750:1500] == asked[:750]
    assert len({messages[0] for messages in asked}) == 150


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_request_of_a_workload_can_be_run_by_its_engine(name: str) -> None:
    tried_with = BUILT_IN[name]
    room = load_profile(tried_with.engine).kv_tokens
    for _, arrival in zip(range(50), tried_with.source.arrivals(1), strict=False):
        assert text.count_tokens(text.chat_prompt(arrival.messages)) + arrival.max_tokens <= room


@pytest.mark.parametrize(("variation", "expected"), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)])
def test_arrivals_are_as_bursty_as_they_are_asked_to_be(variation: float, expected: float) -> None:
    tenant = Prompts("p", 1.0, 1, 1, 0, 20, 1, variation=variation)
    times = [arrival.at for arrival in tenant.arrivals(Random(1), 10.0, 2000.0, "m", "t")]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.1, rel=0.05)
    assert deviation / mean == pytest.approx(expected, abs=0.1)


def test_agentic_is_what_was_published_of_coding_agents_at_a_tenth_of_the_tokens() -> None:
    """llm-d, 219 sessions: 195,000 tokens in (median), 317 out, at least 90 % used again in 96 % of turns."""
    before: dict[str, tuple[tuple[str, str], ...]] = {}
    lengths, reused = [], []
    for arrival in AGENTIC.source.arrivals(1, 1200.0):
        lengths.append(text.count_tokens(text.chat_prompt(arrival.messages)))
        if arrival.session in before or arrival.turn == 0:
            pairs = zip(before.get(arrival.session, ()), arrival.messages, strict=False)
            same = takewhile(lambda pair: pair[0] == pair[1], pairs)
            reused.append(sum(len(said) for (_, said), _ in same) / 4 / lengths[-1])
        before[arrival.session] = arrival.messages
        assert arrival.max_tokens == 317
    assert median(lengths) == pytest.approx(19_500, rel=0.05)
    assert sum(share >= 0.9 for share in reused) / len(reused) == pytest.approx(0.96, abs=0.01)
    (agents,) = AGENTIC.source.tenants if isinstance(AGENTIC.source, Workload) else ()
    assert isinstance(agents, Agents)
    assert (agents.turns, agents.gap_p50, agents.gap_p99) == (107, 2.0, 11.4 * 60)


def test_sessions_that_are_under_way_in_agentic_fit_the_caches_of_its_servers() -> None:
    (agents,) = AGENTIC.source.tenants if isinstance(AGENTIC.source, Workload) else ()
    assert isinstance(agents, Agents)
    under_way = AGENTIC.source.rate / agents.turns * agents.life
    assert under_way * 19_500 / (AGENTIC.servers * load_profile(AGENTIC.engine).kv_tokens) == pytest.approx(
        0.86, abs=0.02
    )


def test_bursty_shares_94_percent_and_goes_from_one_to_five() -> None:
    """The published bursts are 1 to 5 requests a second, and 94 % of prompt tokens come from a cache."""
    (groups,) = BURSTY.source.tenants if isinstance(BURSTY.source, Workload) else ()
    assert isinstance(groups, Prompts)
    assert groups.shared_tokens / (groups.shared_tokens + groups.question_tokens) == pytest.approx(0.94, abs=0.003)
    steps = [stage for stage in BURSTY.stages if not stage.warm_up]
    assert [stage.rate for stage in steps] == [5, 25] * 4
    assert (
        sum(stage.rate * stage.seconds for stage in steps) / sum(stage.seconds for stage in steps) == BURSTY.source.rate
    )


def test_bursts_begin_when_their_time_has_come_and_not_when_all_is_answered() -> None:
    stages = at_rates(BURSTY, ("30",), 16.0).stages[1:5]
    world = World(fleet((BURSTY.engine,), 2), reference("random", 1), BURSTY.source, 1)
    world.run(stages, waits=BURSTY.waits)
    assert [begin for begin, _ in world.spans] == [pytest.approx(2.0 * at) for at in range(4)]
    assert world.spans[0][1] > 2.0  # answers of 360 tokens take 5 s at least


def test_another_rate_of_steps_is_their_mean_and_the_steps_keep_their_proportions() -> None:
    stages = at_rates(BURSTY, ("2x",), 80.0).stages
    assert stages[0].warm_up
    assert [(stage.rate, stage.seconds) for stage in stages[1:]] == [(10.0, 10.0), (50.0, 10.0)] * 4


def test_the_first_adapters_of_lora_mix_are_the_most_asked_for_and_more_than_a_server_runs() -> None:
    models = Counter(arrival.model for arrival in LORA_MIX.source.arrivals(1, 300.0))
    assert len(models) == 17
    assert models["qwen3-32b"] / models.total() == pytest.approx(0.4, abs=0.02)
    assert models["lora-00"] / models["lora-03"] == pytest.approx(4.0, rel=0.25)
    assert len(models) - 1 == LORA_MIX.servers * load_profile(LORA_MIX.engine).max_lora


def test_rates_replace_the_stages_and_keep_the_warm_up() -> None:
    stages = at_rates(CAPACITY_73, ("10", "0.5x,1.5x"), 30.0).stages
    assert [(stage.rate, stage.seconds, stage.warm_up) for stage in stages] == [
        (15, 50, True),
        (10.0, 30.0, False),
        (30.0, 30.0, False),
        (90.0, 30.0, False),
    ]


def test_answers_have_another_length_when_that_is_asked_for() -> None:
    assert next(answers_of(CAPACITY_37, 1000).source.arrivals(1)).max_tokens == 1000


def test_what_cannot_be_simulated_is_told(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n")
    with pytest.raises(ConfigError, match="no workload 'x': there are 73-capacity"):
        scenario("x")
    with pytest.raises(ConfigError, match="needs --trace"):
        scenario("mooncake-conversation")
    with pytest.raises(ConfigError, match="not with 73-capacity"):
        scenario("73-capacity", str(trace))
    with pytest.raises(ConfigError, match="--rate -1"):
        at_rates(CAPACITY_73, ("-1",), 60.0)
    with pytest.raises(ConfigError, match="at one rate"):
        at_rates(scenario("trace", str(trace)), ("1", "2"), 60.0)
    with pytest.raises(ConfigError, match="how long its answers are"):
        answers_of(scenario("trace", str(trace)), 10)
    with pytest.raises(ConfigError, match="no such file; there are also default, lmetric, round-robin"):
        policy("x", catalogue())
    with pytest.raises(ConfigError, match="--servers 0"):
        fleet(("demo",), 0)


def test_a_file_comes_before_a_reference_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("random").write_text("plugins: 7")
    with pytest.raises(ConfigError, match="random"):
        policy("random", catalogue())


def test_servers_take_engines_in_turn() -> None:
    assert [profile.name for profile in fleet(("demo", "llama-8b-l40s"), 3)] == ["demo", "llama-8b-l40s", "demo"]


def test_the_document_has_the_policies_in_order_and_every_stage() -> None:
    tried_with = at_rates(scenario("demo"), ("10", "20"), 5.0)
    policies = [policy(name, catalogue()) for name in ("default", "round-robin")]
    outcomes = tried(tried_with, fleet((tried_with.engine,), 2), policies, 2)
    told = document(tried_with, outcomes)
    assert told["workload"] == "demo"
    assert [each["config"] for each in told["policies"]] == ["default", "round-robin"]
    for each, more in zip(told["policies"], ([], ["versus_first"]), strict=True):
        assert list(each) == ["config", *KEYS, "interval", *more, "stages"]
        assert [list(stage) for stage in each["stages"]] == [["rate", *KEYS, "interval"]] * 2
        assert list(each["interval"]) == KEYS
        assert [stage["rate"] for stage in each["stages"]] == [10.0, 20.0]
    again = document(tried_with, tried(tried_with, fleet((tried_with.engine,), 2), policies, 2))
    assert json.dumps(told) == json.dumps(again)


def test_the_command_prints_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = SimFlags(rate=("10",), seconds=2.0, as_json=True)
    assert sim("demo", config=("random",), flags=flags, servers=2) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["policies"][0]["stages"][0]["rate"] == 10.0


def test_the_command_prints_tables_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    flags = SimFlags(rate=("10,20",), seconds=2.0)
    assert sim("demo", config=("random", "default"), flags=flags, seeds=2) == 0
    told = capsys.readouterr().out
    for title in ("demo: ", "Between two tokens", "By stage", "Against random, seed by seed", "without what no router"):
        assert title in told


def test_the_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim(list_=True) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in (*BUILT_IN, "mooncake"))
