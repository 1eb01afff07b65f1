"""What each routing policy makes of the same traffic, and whether the goals are met.

`python -m bench.routing [--trace FILE] [--seeds 3] [--jobs 0] [--only 73-capacity,...] [--json FILE]`, or
`make bench-routing TRACE=FILE`. FILE is Mooncake's conversation trace; without it those two columns are left out.

Everything runs in virtual time, with the parameters of docs/simulator.md and without the floor that no router changes:
the same figures on any machine. A trace is the same for every seed; what a seed changes there is how equals are spread.

- 73-capacity, 37-capacity: the published ladders, warm-up and all; figures of the last stage, throughput of the whole.
- no sharing: prompts that are all new, at 20 and 30 requests a second, below what saturates the fleet.
- mooncake: an hour of conversations on eight servers, at its own speed and at one and a half times that.
- two kinds: every other server is an L40S beside H100s, prompts all new, 12 requests a second.
- burst: 100 prompts of 2,000 tokens at one moment; requests on the fullest server, where 12.5 would be even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

import cyclopts
import msgspec

from bench import report
from epp.scheduling.catalogue import catalogue
from epp.sim.experiment import Named, Outcome, fleet, policy, tried
from epp.sim.figures import Figures
from epp.sim.outside.sweep import spread
from epp.sim.report import progress
from epp.sim.scenarios import LLAMA, QWEN, Scenario, at_rates, scenario
from epp.sim.traces import Trace, Traced
from epp.sim.world import Stage, World

OURS: Final = "config/picker/cost.yaml"
STICKY: Final = "config/picker/sticky.yaml"
POLICIES: Final = (OURS, "default", STICKY, "lmetric", "least-request", "round-robin", "random", "oracle")
AT_ONCE: Final = 100


class Try(msgspec.Struct, frozen=True):
    """One column, or several: what is sent to what."""

    name: str
    scenario: Scenario
    engines: tuple[str, ...]
    servers: int
    told: tuple[tuple[str, Callable[[Outcome], float]], ...]
    """Title and value."""


class Row(msgspec.Struct, frozen=True):
    """What became of one policy."""

    policy: str
    seeds: int
    values: dict[str, float]
    """By column."""


class Goal(msgspec.Struct, frozen=True):
    """What ours has to reach."""

    name: str
    column: str
    most: float
    """Of the value, or of the value over that of `than`."""
    than: str = ""
    least: bool = False
    """The bound is a lower one, of the other policy's value over ours where there is one."""


GOALS: Final = (
    Goal("73-capacity, 60/s: TTFT p90 at most 0.6 s", "73 p90", 0.6),
    Goal("73-capacity: at least 1.7 x random's throughput", "73 tok/s", 1 / 1.7, "random", least=True),
    Goal("37-capacity, 20/s: TTFT p90 at most 0.3 s", "37 p90", 0.3),
    Goal("mooncake: mean TTFT at least 2.3 x better than round robin", "moon 1x", 1 / 2.3, "round-robin"),
    Goal("mooncake at 1.5 x: at least 12 x better than round robin", "moon 1.5x", 1 / 12, "round-robin"),
    Goal("mooncake: at least 1.7 x better than least-request", "moon 1x", 1 / 1.7, "least-request"),
    Goal("no sharing: at most 3 % worse than least-request", "new 20/s", 1.03, "least-request"),
    Goal("no sharing: the same at 30/s", "new 30/s", 1.03, "least-request"),
    Goal("73-capacity: mean TTFT within 10 % of the oracle", "73 mean", 1.1, "oracle"),
    Goal("37-capacity: within 10 % of the oracle", "37 mean", 1.1, "oracle"),
    Goal("mooncake: within 10 % of the oracle", "moon 1x", 1.1, "oracle"),
    Goal("mooncake at 1.5 x: within 10 % of the oracle", "moon 1.5x", 1.1, "oracle"),
    Goal("a burst of 100 is spread: at most 14 on one of eight servers", "burst", 14),
)


def last(name: str) -> Callable[[Outcome], float]:
    """A figure of the last stage, the mean over seeds."""
    return lambda outcome: _mean(outcome, -1, name)


def stage(at: int, name: str) -> Callable[[Outcome], float]:
    return lambda outcome: _mean(outcome, at, name)


def whole(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: fmean(_known(run.whole, name) for run in outcome.runs)


def _mean(outcome: Outcome, at: int, name: str) -> float:
    return fmean(_known(run.stages[at][1], name) for run in outcome.runs)


def _known(figures: Figures, name: str) -> float:
    value: float | None = getattr(figures, name)
    return float("nan") if value is None else value


def tries(trace: str) -> list[Try]:
    """What is tried, in the order of the columns."""
    of_73 = (("73 mean", last("ttft_mean_s")), ("73 p90", last("ttft_p90_s")), ("73 tok/s", whole("output_tok_s")))
    of_37 = (("37 mean", last("ttft_mean_s")), ("37 p90", last("ttft_p90_s")))
    new = at_rates(scenario("no-sharing"), ["20", "30"], 60.0)
    two = at_rates(scenario("no-sharing"), ["12"], 60.0)
    found = [
        Try("73-capacity", scenario("73-capacity"), (QWEN,), 8, of_73),
        Try("37-capacity", scenario("37-capacity"), (LLAMA,), 4, of_37),
        Try("no sharing", new, (QWEN,), 8, (("new 20/s", stage(0, "ttft_mean_s")), ("new 30/s", last("ttft_mean_s")))),
        Try("two kinds", two, ("llama-8b-h100", "llama-8b-l40s"), 8, (("two kinds", whole("ttft_mean_s")),)),
    ]
    for speed in ("1x", "1.5x") if trace else ():
        replayed = at_rates(scenario("mooncake-conversation", trace), [speed], 0.0)
        found.append(Try(f"mooncake {speed}", replayed, (QWEN,), 8, ((f"moon {speed}", whole("ttft_mean_s")),)))
    return found


def burst(each: Named, seeds: int) -> float:
    """Requests on the fullest server, the mean over seeds."""
    calm = Traced(0.0, 200, 20)
    source = Trace("burst", (calm, *(Traced(2.0, 2_000, 100) for _ in range(AT_ONCE))))
    fullest = []
    for seed in range(1, seeds + 1):
        world = World(fleet((QWEN,), 8), each.make(seed), source, seed).run([Stage(source.rate, source.seconds + 1.0)])
        servers = [asked.server for asked in world.asked[1:]]
        fullest.append(max(map(servers.count, servers)))
    return fmean(fullest)


def main(
    *, trace: str = "", seeds: int = 3, jobs: int = 0, only: str = "", json: Path | None = None, config: str = OURS
) -> None:
    """Try every policy, and print one table, and what became of the goals."""
    plugins = catalogue()
    policies = [policy(name, plugins) for name in (config, *POLICIES[1:])]
    chosen = [each for each in tries(trace) if not only or each.name in only.split(",")]
    table: dict[str, dict[str, float]] = {each.name: {} for each in policies}
    with progress(len(chosen) * len(policies) * seeds) as done:
        for each in chosen:
            profiles = fleet(each.engines, each.servers)
            outcomes = tried(each.scenario, profiles, policies, seeds, done, spread(jobs))
            for outcome in outcomes:
                table[outcome.name] |= {title: value(outcome) for title, value in each.told}
    if not only or "burst" in only.split(","):
        for named in policies:
            table[named.name]["burst"] = burst(named, seeds)
    print(rendered(table))
    print()
    for line in judged(table, config):
        print(line)
    if json is not None:
        report.write(json, "routing", [Row(name, seeds, values) for name, values in table.items()])


def rendered(table: dict[str, dict[str, float]]) -> str:
    """A Markdown table: policies by columns; seconds but for tok/s and burst."""
    titles = list(next(iter(table.values())))
    lines = [["policy", *titles], ["---"] * (1 + len(titles))]
    for name, values in table.items():
        lines.append([Path(name).stem, *(_number(title, values[title]) for title in titles)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(title: str, value: float) -> str:
    if title.endswith("tok/s"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if title == "burst" or value >= 10 else f"{value:.3f}"


def judged(table: dict[str, dict[str, float]], ours: str) -> Sequence[str]:
    """Each goal whose columns there are: met or missed, and by what."""
    lines = []
    for goal in GOALS:
        value = table[ours].get(goal.column)
        if value is None:
            continue
        found = value
        if goal.than:
            other = table[goal.than][goal.column]
            found = other / value if goal.least else value / other
        told = f"{found:.3f} of at most {goal.most:.3f}"
        lines.append(f"{'met   ' if found <= goal.most else 'MISSED'} {goal.name}: {told}")
    return lines


if __name__ == "__main__":
    cyclopts.run(main)
