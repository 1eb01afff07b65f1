"""What a person, and a program, reads of a plan.

In: a `Plan`. Out: tables; the document of `epp plan --json`, whose keys docs/plan.md explains.
Rules here: what is not known is "-" and null; prices are of the paid time of servers, idle or not; share of misses and
money stand beside each other, for that is the question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from epp.sim.plan import WINDOW, Autoscaled, Plan, Scaled, Seen, Sized
from epp.sim.report import short

NOTE: Final = (
    "Times are a client's, HTTP and the tokenizer included. missed: of all requests, those over a limit, failed ones "
    "among them.\nover: the longest time in which every {window:g} s of requests missed the goal. One run of a "
    "simulator, whose steps are formulas: plan with a margin."
)


@contextmanager
def working() -> Iterator[Callable[[], None]]:
    """A bar on the terminal, where there is one; nobody knows how many runs a search takes."""
    console = Console(stderr=True)
    columns = TextColumn("simulating, run {task.completed}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda: bar.advance(task)


# -- money -------------------------------------------------------------------------------------------------------------


def per_hour(seen: Seen, price: float | None) -> float | None:
    """What the fleet costs an hour, on average over the run."""
    return None if price is None else price * seen.server_seconds / seen.seconds


def per_million(seen: Seen, price: float | None) -> float | None:
    """What a million output tokens cost at this load; None: no price, or no tokens."""
    if price is None or not seen.output_tokens:
        return None
    return price * seen.server_seconds / 3600 / seen.output_tokens * 1e6


# -- the document ------------------------------------------------------------------------------------------------------


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "workload": plan.scenario.name,
        "stages": [
            {"rate": stage.rate, "seconds": stage.seconds} for stage in plan.scenario.stages if not stage.warm_up
        ],
        "seeds": plan.seeds,
        "engine": plan.engine.name,
        "gpu": plan.engine.gpu or None,
        "gpus_per_server": plan.engine.gpus,
        "price_per_server_hour": plan.price,
        "goal": {limit.name: limit.seconds for limit in plan.goal.limits},
        "policies": [_sized(plan, each) for each in plan.sized],
        "autoscale": _scaled(plan, plan.scaled) if plan.scaled else None,
    }


def _sized(plan: Plan, sized: Sized) -> dict[str, Any]:
    servers = sized.found.servers
    return {
        "config": sized.policy,
        "servers": servers,
        "gpus": None if servers is None else servers * plan.engine.gpus,
        "reached": _reached(sized.reached),
        "tried": [{"servers": size, "met": met} for size, met in sized.found.tried],
        "monotone": sized.found.monotone,
        **(_seen(plan, sized.seen) if sized.seen else {}),
        "one_server_fails": [
            {"servers": risk.servers, "at_s": risk.failure.at, "down_s": risk.failure.down, **_seen(plan, risk.seen)}
            for risk in sized.risks
        ],
    }


def _scaled(plan: Plan, scaled: Autoscaled) -> dict[str, Any]:
    best, rule = scaled.best, scaled.best.rule
    servers = {"begin": best.begin, "least": rule.least, "most": rule.most}
    asked = {"target": rule.target, "cold_start_s": rule.cold_start}
    tried = [
        {
            "target": each.rule.target,
            "met": each.seen.met,
            "missed_share": each.seen.missed_share,
            "longest_over_s": each.seen.longest_over_s,
            "server_hours": each.seen.server_seconds / 3600,
        }
        for each in scaled.tried
    ]
    return {"config": scaled.policy, **servers, **asked, "tried": tried, **_seen(plan, best.seen)}


def _reached(reached: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in reached.items()}


def _seen(plan: Plan, seen: Seen) -> dict[str, Any]:
    return {
        "met": seen.met,
        "reached": _reached(seen.reached),
        "requests": seen.requests,
        "goodput_share": 1.0 - seen.missed_share,
        "missed_share": seen.missed_share,
        "failed_share": seen.failed_share,
        "longest_over_s": seen.longest_over_s,
        "server_hours": seen.server_seconds / 3600,
        "most_servers": seen.most_servers,
        "price": None if plan.price is None else plan.price * seen.server_seconds / 3600,
        "price_per_hour": per_hour(seen, plan.price),
        "price_per_million_output_tokens": per_million(seen, plan.price),
        "output_tok_s": seen.output_tokens / seen.seconds,
        "busy_share": seen.busy_share,
        "in_flight": seen.in_flight,
    }


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(plan: Plan) -> Iterator[Table | str]:
    """All there is to read, in order."""
    yield _sizes(plan)
    if any(sized.seen for sized in plan.sized) or plan.scaled:
        yield _outcomes(plan)
    if plan.scaled and len(plan.scaled.tried) > 1:
        yield _targets(plan, plan.scaled)
    for sized in plan.sized:
        yield from _doubts(sized)
    if plan.scaled:
        yield _verdict(plan.sized[0], plan.scaled.best)
    yield NOTE.format(window=WINDOW)


def _sizes(plan: Plan) -> Table:
    goal = ", ".join(f"{limit.name} {limit.seconds:g} s" for limit in plan.goal.limits)
    rates = ", ".join(f"{stage.rate:g}" for stage in plan.scenario.stages if not stage.warm_up)
    title = f"{plan.scenario.name} at {rates}/s on {plan.engine.name}: the fewest servers for {goal}"
    table = Table("policy", title=title, title_justify="left")
    names = [limit.name for limit in plan.goal.limits]
    for column in ("servers", "GPUs", *names, "busy", "in flight each", "price/h", "per M tokens"):
        table.add_column(column, justify="right")
    for each in plan.sized:
        seen, servers = each.seen, each.found.servers
        if seen is None or servers is None:
            table.add_row(short(each.policy), f"over {each.found.tried[-1][0]}", "", *map(_time, each.reached.values()))
            continue
        table.add_row(
            short(each.policy),
            f"{servers}",
            f"{servers * plan.engine.gpus}",
            *map(_time, each.reached.values()),
            f"{seen.busy_share:.0%}",
            f"{seen.in_flight / servers:.1f}",
            _money(per_hour(seen, plan.price)),
            _money(per_million(seen, plan.price)),
        )
    return table


OUTCOME: Final = ("goal", "servers", "server hours", "price", "per M tokens", "missed", "failed", "over")
"""Columns of `_outcome`."""


def _outcomes(plan: Plan) -> Table:
    table = Table("fleet", title="What it costs, and what is at risk", title_justify="left")
    for column in OUTCOME:
        table.add_column(column, justify="right")
    for each in plan.sized:
        if each.seen is not None:
            table.add_row(f"{short(each.policy)}, fixed", *_outcome(plan, each.seen))
        for risk in each.risks:
            what = f"{short(each.policy)}, one fails at {risk.failure.at:g} s for {risk.failure.down:g} s"
            table.add_row(what, *_outcome(plan, risk.seen))
    if plan.scaled is not None:
        best, rule = plan.scaled.best, plan.scaled.best.rule
        what = (
            f"{short(plan.scaled.policy)}, autoscaled {rule.least} to {rule.most} at {rule.target:g} in flight each, "
            f"{rule.cold_start:g} s to start"
        )
        table.add_row(what, *_outcome(plan, best.seen))
    return table


def _targets(plan: Plan, scaled: Autoscaled) -> Table:
    """All autoscalers that were tried."""
    table = Table("in flight each", title="The autoscaler, by what it steers for", title_justify="left")
    for column in OUTCOME:
        table.add_column(column, justify="right")
    for each in scaled.tried:
        table.add_row(f"{each.rule.target:g}", *_outcome(plan, each.seen))
    return table


def _outcome(plan: Plan, seen: Seen) -> tuple[str, ...]:
    price = None if plan.price is None else plan.price * seen.server_seconds / 3600
    return (
        "met" if seen.met else "missed",
        f"{seen.most_servers:g}",
        f"{seen.server_seconds / 3600:.2f}",
        _money(price),
        _money(per_million(seen, plan.price)),
        f"{seen.missed_share:.1%}",
        f"{seen.failed_share:.1%}",
        f"{seen.longest_over_s:g} s",
    )


def _doubts(sized: Sized) -> Iterator[str]:
    """What a reader of the first table should know."""
    if not sized.found.monotone:
        tried = ", ".join(f"{size} {'yes' if met else 'no'}" for size, met in sized.found.tried)
        yield f"{short(sized.policy)}: more servers are not always better here; met by {tried}. Take a margin."
    if sized.found.servers is None:
        largest = sized.found.tried[-1][0]
        yield (
            f"{short(sized.policy)}: not met by {largest} servers, and above is what they come to. --most allows more; "
            "--autoscale needs --most and --target then."
        )


def _verdict(sized: Sized, best: Scaled) -> str:
    """Pre-provision or autoscale?"""
    target, fixed = f"{best.rule.target:g} requests in flight a server", sized.seen
    if not best.seen.met:
        return f"Autoscaled, the goal is missed. Steering for {target} misses it with {best.seen.missed_share:.1%}."
    saved = 1.0 - best.seen.server_seconds / fixed.server_seconds if fixed else 0.0
    if fixed and saved < 0.005:
        return f"An autoscaler that meets the goal saves nothing: {sized.found.servers} servers all the time."
    over = f", {saved:.0%} cheaper than {sized.found.servers} servers all the time" if fixed else ""
    return f"Autoscaled, the goal is met by steering for {target}{over}."


def _time(seconds: float) -> str:
    return f"{seconds:.3f}" if math.isfinite(seconds) else "-"


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
