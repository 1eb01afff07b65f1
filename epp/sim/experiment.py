"""A scenario under several policies, each with the same seeds.

In: a scenario, names of policies, how many seeds. Out: one `Outcome` a policy, in the order in which they were named;
the document that `epp sim --json` prints.
Rules here:
- What is run is data (`Trial`), so that somebody else may run it, in another process or on another machine
  (`sweep.py`): figures are put together by what was asked for, never by who was done first.
- Who does not know in advance what is to be run (`plan.py`) says it step by step: a `Search` yields trials and is sent
  what became of them. Several go on at once, each step of all of them together, so whoever makes the runs has more to
  do at a time, and what is found does not depend on him.
- A policy is a configuration file, `default` (the picker without one), or a reference by its name. A file of that name
  comes first.
- Everything is read and checked before anything runs.
- Seeds are 1, 2, 3 …: the same arrivals for every policy, and the same figures on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from epp.config.load import load, load_file
from epp.config.schema import Config
from epp.errors import ConfigError
from epp.scheduling.catalogue import Catalogue
from epp.sim.figures import Figures, Means, Run, interval, known, measured, merged, paired
from epp.sim.lmetric import lmetric
from epp.sim.policies import REFERENCES, reference, routed
from epp.sim.profile import EngineProfile, load_profile
from epp.sim.scenarios import Scenario, bounded
from epp.sim.traces import MOST_TOKENS
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


R = TypeVar("R")
T = TypeVar("T")


class Trial(msgspec.Struct, Generic[R], frozen=True, eq=False):
    """One run that is to be made."""

    scenario: Scenario
    profiles: tuple[EngineProfile, ...]
    policy: Named
    seed: int
    seen: Callable[[World], R]
    """What is kept of it when it is over. Goes to where the run is made: a function that can be imported there."""

    def run(self) -> R:
        """Make it. The same on every machine."""
        tried = self.scenario
        world = World(self.profiles, self.policy.make(self.seed), tried.source, self.seed, tried.changes)
        return self.seen(world.run(tried.stages, waits=tried.waits))


class Through(Protocol):
    """Who makes runs."""

    def __call__(self, trials: Sequence[Trial[R]], /) -> Iterable[tuple[int, R]]:
        """Take them all, and give each one's place and result, in any order."""


Search = Generator[Sequence[Trial[R]], Sequence[R], T]
"""Yields runs that it needs next, is sent their results in the same order, and returns what it found."""


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
    there = _is_there(name)
    if not there and name == LMETRIC:
        return Named(name, lmetric())
    if not there and name in REFERENCES:
        return Named(name, None)
    if not there and name != DEFAULT:
        raise ConfigError(
            f"--config {name}: no such file; there are also {DEFAULT}, {', '.join((LMETRIC, *REFERENCES))}"
        )
    config: Config = load_file(name, plugins, experimental=True) if there else load("", plugins=plugins)
    routed(config, 0)
    return Named(name, config)


def _is_there(name: str) -> bool:
    """Is there a file of this name? A pipe is one; a folder beside one's work, called as a policy is, is none."""
    try:
        return Path(name).exists() and not Path(name).is_dir()
    except OSError:  # a name that no file can have, or in a folder that may not be looked into
        return False


def fleet(engines: Sequence[str], servers: int) -> tuple[EngineProfile, ...]:
    """Profiles of so many servers; several engines take turns. Raises ConfigError."""
    if servers < 1:
        raise ConfigError(f"--servers {servers}: at least 1 is expected")
    profiles = [load_profile(name) for name in engines]
    if len({profile.block_size for profile in profiles}) > 1:
        raise ConfigError("engines of one fleet must have blocks of one size: a prompt is cut into blocks once")
    return tuple(profiles[number % len(profiles)] for number in range(servers))


def answers_of(scenario: Scenario, tokens: int) -> Scenario:
    """The scenario with answers of another length. Raises ConfigError: it is a trace, or they have no token."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise ConfigError(f"--output-tokens {tokens}: 1 to {MOST_TOKENS} are expected")
    if not isinstance(scenario.source, Workload):
        raise ConfigError("--output-tokens: a trace says how long its answers are")
    tenants = tuple(msgspec.structs.replace(tenant, output_tokens=tokens) for tenant in scenario.source.tenants)
    return msgspec.structs.replace(scenario, source=msgspec.structs.replace(scenario.source, tenants=tenants))


def in_turn(trials: Sequence[Trial[R]]) -> Iterator[tuple[int, R]]:
    """Make runs one after the other, here."""
    return ((at, trial.run()) for at, trial in enumerate(trials))


def made(trials: Sequence[Trial[R]], through: Through = in_turn, done: Callable[[], None] = lambda: None) -> list[R]:
    """Have runs made: their results, in the order of the trials.

    Args:
        through: who makes the runs; `sweep.spread` gives them to all cores, or to a cluster.
        done: called after each run.

    Raises:
        ConfigError: as `through`.
    """
    runs: dict[int, R] = {}
    for at, run in through(trials):
        runs[at] = run
        done()
    return [runs[at] for at in range(len(trials))]


def searched(
    searches: Sequence[Search[R, T]], through: Through = in_turn, done: Callable[[], None] = lambda: None
) -> list[T]:
    """What each search finds; what all of them need next is made at once. Arguments and errors as of `made`."""
    found: dict[int, T] = {}
    results: dict[int, Sequence[R] | None] = dict.fromkeys(range(len(searches)))
    while results:
        needed: dict[int, Sequence[Trial[R]]] = {}
        for at, got in results.items():
            try:
                needed[at] = next(searches[at]) if got is None else searches[at].send(got)
            except StopIteration as end:
                found[at] = end.value
        runs = iter(made([trial for each in needed.values() for trial in each], through, done))
        results = {at: list(islice(runs, len(each))) for at, each in needed.items()}
    return [found[at] for at in range(len(searches))]


def tried(
    scenario: Scenario,
    profiles: Sequence[EngineProfile],
    policies: Sequence[Named],
    seeds: int,
    done: Callable[[], None] = lambda: None,
    through: Through = in_turn,
) -> list[Outcome]:
    """Run every policy with every seed. Arguments as of `made`.

    Raises:
        ConfigError: as `made`; there is no seed, or the scenario is too much for one machine.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least 1 is expected")
    bounded(scenario)
    fleet = tuple(profiles)
    trials = [Trial(scenario, fleet, each, seed, measured) for each in policies for seed in range(1, seeds + 1)]
    runs = iter(made(trials, through, done))
    return [Outcome(each.name, tuple(islice(runs, seeds))) for each in policies]


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
