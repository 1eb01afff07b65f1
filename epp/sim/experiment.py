"""A scenario under several policies, each with the same seeds.

In: a scenario, names of policies, how many seeds. Out: one `Outcome` a policy, in the order in which they were named;
the document that `epp sim --json` prints.
Rules here:
- A policy is a configuration file, `default` (the picker without one), or a reference by its name. A file of that name
  comes first.
- Everything is read and checked before anything runs.
- Seeds are 1, 2, 3 …: the same arrivals for every policy, and the same figures on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from epp.config.load import load, load_file
from epp.config.schema import Config
from epp.errors import ConfigError
from epp.scheduling.catalogue import Catalogue
from epp.sim.figures import Figures, Run, measured, merged
from epp.sim.policies import REFERENCES, reference, routed
from epp.sim.profile import EngineProfile, load_profile
from epp.sim.scenarios import Scenario
from epp.sim.workload import Workload
from epp.sim.world import Policy, World

DEFAULT: Final = "default"
TOLD: Final = (
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "output_tok_s",
    "cached_share",
    "goodput_share",
    "failed",
    "floor_s",
)
"""Of `Figures`: what the document says."""

Make = Callable[[int], Policy]
"""A policy for a seed."""


class Named(msgspec.Struct, frozen=True, eq=False):
    """A policy that can be tried."""

    name: str
    make: Make


class Outcome(msgspec.Struct, frozen=True):
    """What became of one policy."""

    name: str
    runs: tuple[Run, ...]
    """One a seed."""

    @property
    def mean(self) -> Run:
        return merged(self.runs)


def policy(name: str, plugins: Catalogue) -> Named:
    """Find a policy by its name.

    Raises:
        ConfigError: the file cannot be used, or there is neither a file nor a reference of this name.
    """
    if not Path(name).exists() and name in REFERENCES:
        return Named(name, lambda seed: reference(name, seed))
    if not Path(name).exists() and name != DEFAULT:
        raise ConfigError(f"--config {name}: no such file; there are also {DEFAULT}, {', '.join(REFERENCES)}")
    config: Config = load("", plugins=plugins) if name == DEFAULT else load_file(name, plugins, experimental=True)
    routed(config, 0)
    return Named(name, lambda seed: routed(config, seed))


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


def tried(
    scenario: Scenario,
    profiles: Sequence[EngineProfile],
    policies: Sequence[Named],
    seeds: int,
    done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Run every policy with every seed.

    Args:
        done: called after each run.
    """
    outcomes = []
    for each in policies:
        runs = []
        for seed in range(1, seeds + 1):
            world = World(profiles, each.make(seed), scenario.source, seed)
            runs.append(measured(world.run(scenario.stages, waits=scenario.waits)))
            done()
        outcomes.append(Outcome(each.name, tuple(runs)))
    return outcomes


def document(scenario: Scenario, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over the seeds, as JSON values."""
    return {
        "workload": scenario.name,
        "policies": [
            {
                "config": outcome.name,
                **_told(outcome.mean.whole),
                "stages": [{"rate": rate, **_told(figures)} for rate, figures in outcome.mean.stages],
            }
            for outcome in outcomes
        ],
    }


def _told(figures: Figures) -> dict[str, float]:
    values = {name: getattr(figures, name) for name in TOLD}
    failed = values["failed"]
    return {**values, "failed": int(failed) if failed == int(failed) else failed}
