"""A scenario under several policies, each with the same seeds.

In: a scenario, names of policies, how many seeds. Out: one `Outcome` a policy, in the order in which they were named;
the document that `epp sim --json` prints.
Rules here:
- What is run is data (`Trial`), so that somebody else may run it, in another process or on another machine
  (`sweep.py`): figures are put together by what was asked for, never by who was done first.
- A policy is a configuration file, `default` (the picker without one), or a reference by its name. A file of that name
  comes first.
- Everything is read and checked before anything runs.
- Seeds are 1, 2, 3 …: the same arrivals for every policy, and the same figures on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from epp.config.load import load, load_file
from epp.config.schema import Config
from epp.errors import ConfigError
from epp.scheduling.catalogue import Catalogue
from epp.sim.figures import Figures, Means, Run, interval, known, measured, merged, paired
from epp.sim.lmetric import lmetric
from epp.sim.policies import REFERENCES, reference, routed
from epp.sim.profile import EngineProfile, load_profile
from epp.sim.scenarios import Scenario
from epp.sim.workload import Workload
from epp.sim.world import Policy, World

DEFAULT: Final = "default"
LMETRIC: Final = "lmetric"
TOLD: Final = (
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
)
"""Of `Figures`: what the document says, in its order."""
COUNTED: Final = ("failed", "requests")
"""Whole numbers, unless they are means over seeds that differ."""
COMPARED: Final = (
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "itl_p90_s",
    "e2e_p90_s",
    "output_tok_s",
    "cached_share",
    "goodput_share",
)
"""What the document says of each later policy over the first."""


class Named(msgspec.Struct, frozen=True, eq=False):
    """A policy that can be tried."""

    name: str
    config: Config | None
    """None: a reference."""

    def make(self, seed: int) -> Policy:
        """A new one for a run. Raises ConfigErrors."""
        return reference(self.name, seed) if self.config is None else routed(self.config, seed)


class Trial(msgspec.Struct, frozen=True, eq=False):
    """One run that is to be made."""

    scenario: Scenario
    profiles: tuple[EngineProfile, ...]
    policy: Named
    seed: int

    def run(self) -> Run:
        """Make it. The same on every machine."""
        tried = self.scenario
        world = World(self.profiles, self.policy.make(self.seed), tried.source, self.seed, tried.changes)
        return measured(world.run(tried.stages, waits=tried.waits))


Through = Callable[[Sequence[Trial]], Iterable[tuple[int, Run]]]
"""Who makes runs: takes them all, and gives each one's place and result, in any order."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one policy."""

    name: str
    runs: tuple[Run, ...]
    """One a seed."""

    @property
    def mean(self) -> Means:
        return merged(self.runs)


def policy(name: str, plugins: Catalogue) -> Named:
    """Find a policy by its name.

    Raises:
        ConfigError: the file cannot be used, or there is neither a file nor a reference of this name.
    """
    if not Path(name).exists() and name == LMETRIC:
        return Named(name, lmetric())
    if not Path(name).exists() and name in REFERENCES:
        return Named(name, None)
    if not Path(name).exists() and name != DEFAULT:
        raise ConfigError(
            f"--config {name}: no such file; there are also {DEFAULT}, {', '.join((LMETRIC, *REFERENCES))}"
        )
    config: Config = load("", plugins=plugins) if name == DEFAULT else load_file(name, plugins, experimental=True)
    routed(config, 0)
    return Named(name, config)


def fleet(engines: Sequence[str], servers: int) -> tuple[EngineProfile, ...]:
    """Profiles of so many servers; several engines take turns. Raises ConfigError."""
    if servers < 1:
        raise ConfigError(f"--servers {servers}: at least 1 is expected")
    profiles = [load_profile(name) for name in engines]
    if len({profile.block_size for profile in profiles}) > 1:
        raise ConfigError("engines of one fleet must have blocks of one size: a prompt is cut into blocks once")
    return tuple(profiles[number % len(profiles)] for number in range(servers))


def answers_of(scenario: Scenario, tokens: int) -> Scenario:
    """The scenario with answers of another length. Raises ConfigError: it is a trace."""
    if not isinstance(scenario.source, Workload):
        raise ConfigError("--output-tokens: a trace says how long its answers are")
    tenants = tuple(msgspec.structs.replace(tenant, output_tokens=tokens) for tenant in scenario.source.tenants)
    return msgspec.structs.replace(scenario, source=msgspec.structs.replace(scenario.source, tenants=tenants))


def in_turn(trials: Sequence[Trial]) -> Iterator[tuple[int, Run]]:
    """Make runs one after the other, here."""
    return ((at, trial.run()) for at, trial in enumerate(trials))


def tried(
    scenario: Scenario,
    profiles: Sequence[EngineProfile],
    policies: Sequence[Named],
    seeds: int,
    done: Callable[[], None] = lambda: None,
    through: Through = in_turn,
) -> list[Outcome]:
    """Run every policy with every seed.

    Args:
        done: called after each run.
        through: who makes the runs; `sweep.spread` gives them to all cores, or to a cluster.

    Raises:
        ConfigError: as `through`.
    """
    trials = [Trial(scenario, tuple(profiles), each, seed) for each in policies for seed in range(1, seeds + 1)]
    runs: dict[int, Run] = {}
    for at, run in through(trials):
        runs[at] = run
        done()
    return [
        Outcome(each.name, tuple(runs[at * seeds + seed] for seed in range(seeds))) for at, each in enumerate(policies)
    ]


# -- the document ------------------------------------------------------------------------------------------------------


def document(scenario: Scenario, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over the seeds, how sure they are, and each policy against the first one, as JSON values."""
    return {
        "workload": scenario.name,
        "policies": [
            {
                "config": outcome.name,
                **_told([run.whole for run in outcome.runs], outcome.mean.whole),
                **({"versus_first": _versus(outcomes[0], outcome)} if outcome is not outcomes[0] else {}),
                "stages": [
                    {"rate": rate, **_told([run.stages[at][1] for run in outcome.runs], figures)}
                    for at, (rate, figures) in enumerate(outcome.mean.stages)
                ],
            }
            for outcome in outcomes
        ],
    }


def _told(seeds: Sequence[Figures], means: Figures) -> dict[str, Any]:
    told: dict[str, Any] = {name: _number(name, getattr(means, name)) for name in TOLD}
    if len(seeds) > 1:
        told["interval"] = {name: half_width(seeds, name) for name in TOLD}
    return told


def _number(name: str, value: float | None) -> float | None:
    return int(value) if name in COUNTED and value is not None and value == int(value) else value


def half_width(seeds: Sequence[Figures], name: str) -> float | None:
    """Of a figure's 95 % interval; None: fewer than two seeds have it, and nothing is known."""
    values = known(seeds, name)
    return interval(values) if len(values) > 1 else None


def _versus(first: Outcome, other: Outcome) -> dict[str, Any]:
    compared = {name: versus(first, other, name) for name in COMPARED}
    return {name: {"ratio": 1.0 + got[0], "interval": got[1]} if got else None for name, got in compared.items()}


def versus(first: Outcome, other: Outcome, name: str) -> tuple[float, float | None] | None:
    """One figure of two policies, seed by seed: see `paired`."""
    base, more = ([getattr(run.whole, name) for run in each.runs] for each in (first, other))
    return paired(base, more)
