"""How many servers does a workload need, what do they cost, and what is at risk: a search over the simulator.

In: a scenario, an engine, policies, a goal. Out: a `Plan`: for each policy the smallest fleet that meets the goal, what
becomes of it when a server fails, and the same workload on a fleet that an autoscaler sizes.
Rules here:
- A goal is met when every stage meets it with every seed.
- Stages follow each other without a pause, whatever is unanswered: load that rises does not wait for servers. Warm-up
  asks as much as ever, but no faster than the first stage: it must not leave a queue behind.
- An autoscaled fleet begins as the first stage would have it, had it gone on for a while.
- More servers need not be better (caches are cut differently, prompts fall otherwise), so what bisection found is
  checked against its neighbours, and everything that was tried is told.
- One run is a function of data (`run`), so that somebody else may make it.
Rejected: a formula for the fleet's size (requests in flight by what a server carries): what a server carries depends on
what its cache holds, which depends on who routes. Ending a run as soon as it cannot meet the goal: then nobody could
say by how much it missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import Final

import msgspec

from epp.errors import ConfigError
from epp.sim.experiment import Named, R, Search, Through, Trial, in_turn, searched
from epp.sim.fleet import COLD_START, STEADY, Autoscale, Changes, Failure
from epp.sim.goal import Goal
from epp.sim.profile import EngineProfile
from epp.sim.scenarios import Scenario, bounded
from epp.sim.world import Asked, Stage, World

WINDOW: Final = 10.0
"""Seconds of arrivals that are looked at together to say for how long the goal was missed."""
MOST: Final = 64
"""Servers that are tried at most."""
SHARES: Final = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Targets that are tried of an autoscaler, as parts of what the fixed fleet's servers have in flight in its fullest
stage."""


# -- one run -----------------------------------------------------------------------------------------------------------


class Seen(msgspec.Struct, frozen=True):
    """What became of one run, or of several with different seeds. Warm-up is not in it, but for `busy_share`."""

    met: bool
    """Each stage met the goal, with each seed."""
    reached: dict[str, float]
    """By limit: the worst of all stages and seeds; seconds, infinite where too many failed."""
    requests: float
    failed_share: float
    """Got no whole answer."""
    missed_share: float
    """Of all requests, those over a limit; failed ones are."""
    longest_over_s: float
    """The longest time in which each `WINDOW` missed the goal."""
    seconds: float
    """From the begin of the first stage to the last answer."""
    server_seconds: float
    """Paid for in that time: from the begin of a cold start to a stopped server's last answer."""
    most_servers: float
    """Servers that there were at the same time."""
    output_tokens: float
    """Of answers that were not lost."""
    in_flight: float
    """Mean requests in flight in the fullest stage."""
    in_flight_first: float
    """The same in the first stage."""
    busy_share: float
    """Part of the paid time in which a server computed anything, warm-up included."""


def seen(world: World, goal: Goal) -> Seen:
    """Look at a world that is over. Raises ConfigError: nothing was asked."""
    stages = [at for at, stage in enumerate(world.stages[: len(world.spans)]) if not stage.warm_up]
    by_stage = {at: [asked for asked in world.asked if asked.stage == at] for at in stages}
    by_stage = {at: requests for at, requests in by_stage.items() if requests}
    requests = [asked for each in by_stage.values() for asked in each]
    if not requests:
        raise ConfigError("nothing was asked in the stages that count: make them longer, or their rate higher")
    begin, end = world.spans[stages[0]][0], max(asked.ended_at for asked in requests)
    paid = lives(world)
    in_flight = {at: sum(each.e2e for each in by_stage[at]) / world.stages[at].seconds for at in by_stage}
    return Seen(
        met=all(map(goal.met, by_stage.values())),
        reached={limit.name: max(map(limit.reached, by_stage.values())) for limit in goal.limits},
        requests=len(requests),
        failed_share=fmean(bool(asked.refusal) for asked in requests),
        missed_share=fmean(map(goal.missed, requests)),
        longest_over_s=longest_over(requests, goal, begin),
        seconds=end - begin,
        server_seconds=sum(max(0.0, min(until, end) - max(since, begin)) for since, until in paid),
        most_servers=_most([(max(since, begin), until) for since, until in paid if until > begin]),
        output_tokens=sum(asked.output_tokens for asked in requests if not asked.refusal),
        in_flight=max(in_flight.values()),
        in_flight_first=in_flight.get(stages[0], 0.0),
        busy_share=sum(world.worked) / sum(min(until, end) - since for since, until in paid if since < end),
    )


def lives(world: World) -> list[tuple[float, float]]:
    """From when to when each server is paid for; infinite: it was there at the end."""
    last = [0.0] * len(world.engines)
    for asked in world.asked:
        if asked.server >= 0:
            last[asked.server] = max(last[asked.server], asked.ended_at)
    return [(life.since, max(life.until, last[server])) for server, life in enumerate(world.fleet.lives)]


def longest_over(requests: Sequence[Asked], goal: Goal, begin: float) -> float:
    """Seconds of the longest row of windows that missed the goal, by when requests came; an empty one ends a row."""
    windows: dict[int, list[Asked]] = {}
    for asked in requests:
        windows.setdefault(int((asked.came_at - begin) // WINDOW), []).append(asked)
    over = [number in windows and not goal.met(windows[number]) for number in range(max(windows) + 1)]
    return max((WINDOW * len(list(row)) for is_over, row in groupby(over) if is_over), default=0.0)


def _most(paid: Sequence[tuple[float, float]]) -> int:
    """Servers at the fullest moment; that is when one begins."""
    return max(sum(since <= moment < until for since, until in paid) for moment, _ in paid)


def together(runs: Sequence[Seen]) -> Seen:
    """Several seeds: means, but for the goal, which each of them must meet."""
    means = {name: fmean(getattr(each, name) for each in runs) for name in Seen.__struct_fields__[2:]}
    reached = {name: max(each.reached[name] for each in runs) for name in runs[0].reached}
    return Seen(met=all(each.met for each in runs), reached=reached, **means)


# -- the search --------------------------------------------------------------------------------------------------------


class Found(msgspec.Struct, frozen=True):
    """What was tried, and the smallest that is enough."""

    servers: int | None
    """None: not even the most."""
    tried: tuple[tuple[int, bool], ...]
    """Servers and whether they met the goal, in order of size."""

    @property
    def monotone(self) -> bool:
        """Whether, of all that were tried, those above `servers` were enough and those below were not."""
        return all(met == (self.servers is not None and size >= self.servers) for size, met in self.tried)


def smallest(
    meets: Callable[[Sequence[int]], Search[R, Sequence[bool]]], most: int, guess: int = 1
) -> Search[R, Found]:
    """Find the smallest number that is enough: double until one is, or halve until one is not; bisect, then try its
    neighbours.

    Args:
        meets: which of these are enough; told numbers of 1..most, each once.
        guess: where to begin. Fleets that are far too small take longest to simulate.
    """
    tried: dict[int, bool] = {}

    def enough(*sizes: int) -> Search[R, bool]:
        """Whether the first one is."""
        unknown = [size for size in sizes if size not in tried]
        if unknown:
            tried.update(zip(unknown, (yield from meets(unknown)), strict=True))
        return tried[sizes[0]]

    low, high = 0, min(guess, most)
    while not (yield from enough(high)) and high < most:
        low, high = high, min(2 * high, most)
    while low == 0 and high > 1 and tried[high]:
        half = high // 2
        low, high = (0, half) if (yield from enough(half)) else (half, high)
    while tried[high] and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (yield from enough(middle)) else (middle, high)
    if tried[high]:
        yield from enough(high, *(size for size in (high + 1, high - 2) if 1 <= size <= most))
    return Found(min((size for size, met in tried.items() if met), default=None), tuple(sorted(tried.items())))


# -- the plan ----------------------------------------------------------------------------------------------------------


class Risk(msgspec.Struct, frozen=True):
    """What becomes of a fleet one of whose servers fails."""

    servers: int
    """The failing one included."""
    failure: Failure
    seen: Seen


class Sized(msgspec.Struct, frozen=True):
    """The smallest fleet of one policy."""

    policy: str
    found: Found
    seen: Seen | None
    """None: there is none."""
    risks: tuple[Risk, ...]
    """Of that fleet, and with one server more."""
    reached: dict[str, float]
    """As of `Seen`: of that fleet, or where there is none, of the largest that was tried."""


class Scaled(msgspec.Struct, frozen=True):
    """A fleet that an autoscaler sizes."""

    rule: Autoscale
    begin: int
    """Servers at the beginning."""
    seen: Seen


class Autoscaled(msgspec.Struct, frozen=True):
    """Autoscalers of one policy, each with another target."""

    policy: str
    tried: tuple[Scaled, ...]
    """The highest target first; at least one."""

    @property
    def best(self) -> Scaled:
        """Of those that meet the goal the cheapest; where there is none, the one that misses it with the fewest."""
        met = [each for each in self.tried if each.seen.met]
        if met:
            return min(met, key=lambda each: each.seen.server_seconds)
        return min(self.tried, key=lambda each: each.seen.missed_share)


class Plan(msgspec.Struct, frozen=True):
    """The whole answer."""

    scenario: Scenario
    engine: EngineProfile
    goal: Goal
    seeds: int
    price: float | None
    """Of a server, an hour."""
    sized: tuple[Sized, ...]
    """In the order of the policies."""
    scaled: Autoscaled | None
    """None: it was not asked for, or no fleet meets the goal, and nobody said what to steer for."""


def gentle(scenario: Scenario) -> Scenario:
    """The scenario with a warm-up of as many requests, no faster than the first stage that counts."""
    fastest = next((stage.rate for stage in scenario.stages if not stage.warm_up), math.inf)
    stages = [
        Stage(fastest, stage.rate * stage.seconds / fastest, warm_up=True)
        if stage.warm_up and stage.rate > fastest
        else stage
        for stage in scenario.stages
    ]
    return msgspec.structs.replace(scenario, stages=tuple(stages))


class Bounds(msgspec.Struct, frozen=True):
    """What fleets may be. Raises ConfigError."""

    least: int = 1
    """Servers that an autoscaler keeps."""
    most: int = 0
    """Servers that are tried, and that an autoscaler may have; 0: `MOST`, and as many as the fixed fleet has."""
    target: float = 0.0
    """Requests in flight a server that an autoscaler steers for; 0: several are tried, see `SHARES`."""
    cold_start: float = COLD_START
    """Seconds until a server that starts is there, and one that failed is back."""

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ConfigError(f"--least {self.least}: at least 1 is expected, for requests cannot wait for a server")
        if self.most < 0 or 0 < self.most < self.least:
            raise ConfigError(f"--most {self.most}: no fewer than --least are expected, or 0")
        if not 0.0 <= self.target < math.inf:
            raise ConfigError(f"--target {self.target}: requests in flight a server are expected, or 0")
        if not 0.0 <= self.cold_start < math.inf:
            raise ConfigError(f"--cold-start {self.cold_start}: seconds are expected")


class Planner(msgspec.Struct, frozen=True, eq=False):
    """What all runs of a plan have in common. Raises ConfigError."""

    scenario: Scenario
    engine: EngineProfile
    goal: Goal
    seeds: int

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds {self.seeds}: at least 1 is expected")
        bounded(self.scenario)

    def look(self, policy: Named, *fleets: tuple[int, Changes]) -> Search[Seen, list[Seen]]:
        """The scenario on each of these with every seed: servers at the beginning, and what becomes of them."""
        seeds = range(1, self.seeds + 1)
        runs = yield [self._trial(policy, *fleet, seed) for fleet in fleets for seed in seeds]
        return [together(runs[at : at + self.seeds]) for at in range(0, len(runs), self.seeds)]

    def _trial(self, policy: Named, servers: int, changes: Changes, seed: int) -> Trial[Seen]:
        scenario = msgspec.structs.replace(self.scenario, waits=False, changes=changes)
        return Trial(scenario, (self.engine,) * servers, policy, seed, partial(seen, goal=self.goal))

    def answer(
        self, policy: Named, bounds: Bounds, *, autoscale: bool
    ) -> Search[Seen, tuple[Sized, Autoscaled | None]]:
        """All there is to know of one policy."""
        sized = yield from self.size(policy, bounds.most or MOST, bounds.cold_start)
        rules = rules_for(sized, bounds) if autoscale else ()
        if not rules:
            return sized, None
        return sized, (yield from self.scale(policy, rules, sized.seen.in_flight_first if sized.seen else 0.0))

    def size(self, policy: Named, most: int = MOST, cold_start: float = COLD_START) -> Search[Seen, Sized]:
        """Search the smallest fleet that meets the goal, and let one of its servers fail."""
        looks: dict[int, Seen] = {}

        def meets(sizes: Sequence[int]) -> Search[Seen, list[bool]]:
            got = yield from self.look(policy, *((size, STEADY) for size in sizes))
            looks.update(zip(sizes, got, strict=True))
            return [each.met for each in got]

        found = yield from smallest(meets, most, self.scenario.servers)
        if found.servers is None:
            return Sized(policy.name, found, None, (), looks[max(looks)].reached)
        failure = Failure(0, self._worst(), cold_start)
        fleets = [(size, Changes(failures=(failure,))) for size in (found.servers, found.servers + 1)]
        lost = yield from self.look(policy, *fleets)
        risks = tuple(Risk(size, failure, each) for (size, _), each in zip(fleets, lost, strict=True))
        own = looks[found.servers]
        return Sized(policy.name, found, own, risks, own.reached)

    def scale(self, policy: Named, rules: Sequence[Autoscale], in_flight: float = 0.0) -> Search[Seen, Autoscaled]:
        """The scenario on a fleet that an autoscaler sizes, by each of these rules, at least one.

        Args:
            in_flight: requests that the first stage has in flight, as far as is known.
        """
        begins = [min(max(rule.least, math.ceil(in_flight / rule.target)), rule.most) for rule in rules]
        fleets = [(begin, Changes(autoscale=rule)) for begin, rule in zip(begins, rules, strict=True)]
        looks = yield from self.look(policy, *fleets)
        return Autoscaled(policy.name, tuple(map(Scaled, rules, begins, looks)))

    def _worst(self) -> float:
        """A moment at which servers are missed: a quarter into the stage with the highest rate."""
        stages = [stage for stage in self.scenario.stages if not stage.warm_up]
        highest = self.scenario.stages.index(max(stages, key=lambda stage: stage.rate))
        before = sum(stage.seconds for stage in self.scenario.stages[:highest])
        return before + self.scenario.stages[highest].seconds / 4


def rules_for(sized: Sized, bounds: Bounds) -> tuple[Autoscale, ...]:
    """Autoscalers to lay beside a fleet of fixed size, the one with the highest target first.

    Returns:
        Nothing where no fixed fleet meets the goal, and not both most and target were given.
    """
    most, targets = bounds.most, [bounds.target] if bounds.target else []
    if sized.seen is not None and sized.found.servers is not None:
        each = sized.seen.in_flight / sized.found.servers
        most = most or max(sized.found.servers, bounds.least)
        targets = targets or [max(1.0, float(int(each * share))) for share in SHARES]
    if not most:
        return ()
    return tuple(Autoscale(target, bounds.least, most, bounds.cold_start) for target in dict.fromkeys(targets))


def plan(
    planner: Planner,
    policies: Sequence[Named],
    price: float | None,
    bounds: Bounds,
    *,
    autoscale: bool = False,
    through: Through = in_turn,
    done: Callable[[], None] = lambda: None,
) -> Plan:
    """Size a fleet for every policy.

    Args:
        autoscale: let an autoscaler size one for the first policy, too.
        through: who makes the runs; see `experiment.made`, as for the next one and for errors.
        done: called after each run.
    """
    searches = [planner.answer(each, bounds, autoscale=autoscale and each is policies[0]) for each in policies]
    answers = searched(searches, through, done)
    sized = tuple(each for each, _ in answers)
    return Plan(planner.scenario, planner.engine, planner.goal, planner.seeds, price, sized, answers[0][1])
