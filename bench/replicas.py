"""What several active pickers without election cost: each sees only its own requests in flight, and its own prefixes.

`python -m bench.replicas [--pickers 1,2,4] [--seeds 1,2,3] [--json FILE]`. One workload over one fleet, beside round
robin. The gateway shares requests out to k pickers in turn; every picker scrapes every model server by itself.

All of it runs in virtual time: real pickers (configuration, reading, hashing, scorers, table) over the simulator's
engines, which are those of `epp demo`. Rejected: the demo's processes in real time. k pickers, Envoy, model servers and
load on two cores measure the cores first, and runs of one seed differ by more than what one picker more costs; here a
seed gives the same figures on any machine, and fleets of GPUs fit.

- demo: the demo's workload and four engines at its rate; and at one and a half times that, where queues grow.
- nothing shared: every prompt is new, at twice the demo's rate for such: what is left is in-flight work unseen.
- published: the shared-prefix workload of llm-d at 73 % of the fleet's cache, over eight servers with the constants of
  a 32B model on two H100 (150 groups x 5 prompts, 6,000 + 1,200 tokens, 500 out), at 40 and at 60 requests a second.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

import cyclopts
import msgspec

from bench import report
from epp.config.load import load
from epp.sim import world as sim
from epp.sim.figures import measured
from epp.sim.policies import RoundRobin, Routed
from epp.sim.profile import load_profile
from epp.sim.workload import DEMO, NO_SHARING, Prompts, Workload
from epp.sim.world import Asked, Stage
from tests.watching import Watch

CONFIG: Final = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: lora-affinity-scorer
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: lora-affinity-scorer, weight: 1}
"""
"""The default weights, and the demo's for adapters."""
WARM: Final = 20.0
"""Seconds of arrivals that are not measured, for caches and indexes are empty at first."""
SLOWLY: Final = 3.0
"""How much longer these take: at full rate a fleet without caches falls behind, and the rest would be catching up."""


class Case(msgspec.Struct, frozen=True):
    """A workload at a rate over a fleet."""

    name: str
    workload: Workload
    rate: float
    profile: str
    servers: int


PUBLISHED: Final = Workload(
    "published",
    model="qwen3-32b",
    rate=60.0,
    tenants=(
        Prompts("search", 1.0, groups=150, questions=5, shared_tokens=6000, question_tokens=1200, output_tokens=500),
    ),
)
CASES: Final = {
    case.name: case
    for case in (
        Case("demo", DEMO, DEMO.rate, "demo", 4),
        Case("demo x 1.5", DEMO, 1.5 * DEMO.rate, "demo", 4),
        Case("nothing shared", NO_SHARING, 2 * NO_SHARING.rate, "demo", 4),
        Case("published 40/s", PUBLISHED, 40.0, "qwen3-32b-h100-tp2", 8),
        Case("published 60/s", PUBLISHED, PUBLISHED.rate, "qwen3-32b-h100-tp2", 8),
    )
}


class Figures(msgspec.Struct, frozen=True):
    """One run."""

    case: str
    pickers: int
    """0: round robin."""
    seed: int
    requests: int
    ttft_p50: float
    """Seconds."""
    ttft_p90: float
    cached_share: float
    """Prompt tokens that were in the server's cache, of all."""
    imbalance: float
    """Requests on the fullest server, of the mean of all; averaged over time. 1: spread evenly."""


class Several:
    """Pickers to which requests go in turn; none knows of the others."""

    def __init__(self, pickers: Sequence[Routed]) -> None:
        self.pickers = pickers

    def begin(self, world: sim.World) -> None:
        for picker in self.pickers:
            picker.begin(world)

    def choose(self, asked: Asked, now: float) -> int:
        return self._picker(asked).choose(asked, now)

    def answered(self, asked: Asked, now: float) -> None:
        self._picker(asked).answered(asked, now)

    def ended(self, asked: Asked, now: float) -> None:
        self._picker(asked).ended(asked, now)

    def _picker(self, asked: Asked) -> Routed:
        return self.pickers[asked.number % len(self.pickers)]


class World:
    """A case under so many pickers."""

    def __init__(self, case: Case, pickers: int, seed: int) -> None:
        """
        Args:
            pickers: 0: round robin.
        """
        self.watches = [Watch() for _ in range(pickers)]
        pages = random.Random(seed)
        routed = [
            Routed(load(CONFIG), random.Random(f"{seed}/{at}"), pages, lag=0.0, observer=watch)
            for at, watch in enumerate(self.watches)
        ]
        self.pickers = [each.picker for each in routed]
        self._case = case
        self._pickers = pickers
        self._seed = seed
        policy = Several(routed) if routed else RoundRobin(random.Random(seed))
        self._world = sim.World([load_profile(case.profile)] * case.servers, policy, case.workload, seed)

    def run(self, seconds: float) -> World:
        """Send what comes within so many seconds, after what comes before that slowly; wait for every answer."""
        warm = Stage(self._case.rate / SLOWLY, WARM * SLOWLY, warm_up=True)
        self._world.run((warm, Stage(self._case.rate, seconds)), waits=False)
        return self

    @property
    def requests(self) -> Sequence[Asked]:
        return self._world.asked

    def figures(self) -> Figures:
        """Of the requests that came when caches were warm."""
        whole = measured(self._world).whole
        return Figures(
            self._case.name,
            self._pickers,
            self._seed,
            int(whole.requests),
            whole.ttft_p50_s or 0.0,  # None where nothing was answered, which no case here is
            whole.ttft_p90_s or 0.0,
            whole.cached_share or 0.0,
            whole.balance or 1.0,
        )


def row(runs: Sequence[Figures]) -> tuple[str, ...]:
    """Runs of one case and number of pickers, one a seed."""
    first = runs[0]
    who = f"{first.pickers} picker{'s' if first.pickers > 1 else ''}" if first.pickers else "round robin"
    p90s = [1000 * run.ttft_p90 for run in runs]
    return (
        first.case,
        who,
        f"{1000 * fmean(run.ttft_p50 for run in runs):.0f}",
        f"{fmean(p90s):.0f}",
        f"{min(p90s):.0f} to {max(p90s):.0f}",
        f"{fmean(run.cached_share for run in runs):.1%}",
        f"{fmean(run.imbalance for run in runs):.2f}",
    )


def main(
    *,
    cases: str = ",".join(CASES),
    pickers: str = "0,1,2,4",
    seeds: str = "1,2,3",
    seconds: float = 60.0,
    json: Path | None = None,
) -> None:
    """Measure what several active pickers cost.

    Parameters
    ----------
    cases
        Which workloads, separated by commas.
    pickers
        How many pickers, separated by commas; 0 is round robin.
    seeds
        Of arrivals and everything random, separated by commas: each is a run.
    seconds
        Virtual seconds of arrivals that are measured.
    json
        File for the raw figures.
    """
    columns = ("TTFT p50", "p90", "over the seeds", "cached", "fullest / mean")
    table = report.table("Several pickers, none of which knows of the others", "workload", "who", *columns, texts=2)
    figures: list[Figures] = []
    for case in (CASES[name] for name in cases.split(",")):
        for count in map(int, pickers.split(",")):
            runs = [World(case, count, int(seed)).run(seconds).figures() for seed in seeds.split(",")]
            table.add_row(*row(runs))
            figures += runs
    report.write(json, "replicas", figures)
    report.show(
        table,
        "TTFT: ms of virtual time, means of the seeds. cached: prompt tokens found in the server's cache.",
        "fullest / mean: requests on the fullest server by the mean of all, averaged over time.",
    )


if __name__ == "__main__":
    cyclopts.run(main)
