"""The commands.

Rules here: imports of a command's own room stand in the command, so that `epp serve` never loads the simulator and
`epp --help` is quick; nothing but this file imports `epp.server`.
Exit codes: 0 done, 1 it failed, 2 it was asked wrongly (flags or configuration).
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from errno import ENOSPC
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from cyclopts import App, Parameter

from epp.errors import ConfigError
from epp.flags import ServeFlags, normalised

if TYPE_CHECKING:
    from epp.scheduling.catalogue import Catalogue
    from epp.sim.scenarios import Scenario

app = App(
    name="epp",
    help="An endpoint picker for LLM inference: Envoy asks, the best model server answers.",
    version=lambda: version("epp"),
)


@app.command
def serve(flags: ServeFlags = ServeFlags()) -> int:  # noqa: B008 - frozen
    """Serve Envoy's ext_proc protocol and pick an endpoint for each request."""
    from epp.server import serve

    return _run(serve(flags))


@app.command
def model_server(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    count: int = 1,
    engine: str = "qwen3-32b-h100-tp2",
    model: str = "demo",
    adapters: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    faults: str = "",
    seed: int = 0,
) -> int:
    """Serve simulated vLLM servers over HTTP, in real time.

    Parameters
    ----------
    host
        Address to listen on.
    port
        First port; servers after the first take the ports after it. 0: any free ones.
    count
        Number of servers.
    engine
        Engine profile: a name in the package, or a file.
    model
        Name of the model served.
    adapters
        Names of LoRA adapters served beside it.
    faults
        Misbehaviour, as shares of requests: "stall=0.02,reset=0.02,error=0.05".
    seed
        Seed of everything random.
    """
    from epp.sim.serve import run_model_servers

    return _run(run_model_servers(host, port, count, engine, model, adapters, faults, seed))


@app.command
def demo(*, seconds: float | None = None, seed: int = 0, json: bool = False) -> int:
    """Watch a real Envoy send traffic to simulated model servers: through the picker, and round robin beside it.

    Parameters
    ----------
    seconds
        Length of each of the two phases; not given: until Ctrl-C.
    seed
        Seed of the workload.
    json
        End with one line of JSON.
    """
    from epp.demo.run import run_demo

    return _run(run_demo(seconds=seconds, seed=seed, as_json=json))


@app.command
def load(
    workload: str,
    *,
    target: str,
    versus: str = "",
    rate: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    seconds: float | None = None,
    trace: str = "",
    model: str = "",
    seed: int = 0,
    slo: str = "",
    block: float = 30.0,
    served_by: str = "x-served-by",
    header: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    report: str = "",
    json: bool = False,
) -> int:
    """Send a workload to a gateway or a server, whatever has been answered, and print how it did.

    Parameters
    ----------
    workload
        A workload of `epp sim --list`, or a configuration file of inference-perf (.yaml).
    target
        URL of a gateway or a server that speaks OpenAI's API.
    versus
        A second one, which takes turns with the first.
    rate
        Requests a second, or 1.5x for so many times the workload's own; each one given is a stage.
    seconds
        Length of each stage; not given: 60, or the workload's own stages where no rate is given either.
    trace
        File of recorded requests, for the workloads that are one.
    model
        What the target calls the base model; not given: as the workload does.
    seed
        Seed of the workload. Servers remember prompts: take another one for each run.
    slo
        What a good answer keeps, "ttft=2s,itl=25ms".
    block
        Seconds after which two targets take turns.
    served_by
        Header of an answer that names the server which gave it.
    header
        Sent with every request, "authorization: Bearer TOKEN".
    report
        Folder to write a page with plots to.
    json
        Print one line of JSON, and nothing else.
    """
    from epp.load.client import Client, parse_header
    from epp.load.figures import parse_answer_goal
    from epp.load.run import PATIENCE, Run, chosen, run_and_report
    from epp.sim.outside.folder import report_folder

    asked = chosen(workload, trace, rate, seconds, model)
    client = Client(answer_within=PATIENCE, served_by=served_by, headers=tuple(map(parse_header, header)))
    targets = (target, versus) if versus else (target,)
    goal = parse_answer_goal(slo)
    run = Run(asked.source, asked.stages, targets, block, asked.waits, seed, goal, client)
    folder = report_folder(report) if report else None
    return _run(run_and_report(run, as_json=json, folder=folder))


@Parameter(name="*")
@dataclass(frozen=True)
class SimFlags:
    """What `sim` and `plan` are both told."""

    rate: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Requests a second, or 1.5x for so many times the workload's own, in the place of its stages: one stage after the
    other, "5,20,60,20,5"."""
    seconds: float | None = None
    """Length of each stage that `--rate` asks for; not given: 60."""
    output_tokens: int = 0
    """Length of every answer; 0: the workload's own."""
    trace: str = ""
    """File of requests, for workloads that need one."""
    jobs: int = 0
    """Runs at the same time; 0: one a core, where joblib is installed; 1: in this process."""
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False
    """Print one line of JSON."""

    def scenario(self, workload: str) -> Scenario:
        """The workload as it is asked for. Raises ConfigError."""
        from epp.sim.experiment import answers_of
        from epp.sim.scenarios import at_rates, scenario

        asked = scenario(workload, self.trace)
        asked = at_rates(asked, self.rate, 60.0 if self.seconds is None else self.seconds) if self.rate else asked
        return answers_of(asked, self.output_tokens) if self.output_tokens else asked


@app.command
def sim(
    workload: str = "",
    *,
    config: Annotated[tuple[str, ...], Parameter(negative="")] = ("default",),
    servers: int = 0,
    engine: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    seeds: int = 1,
    flags: SimFlags = SimFlags(),
    report: str = "",
    fail: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    prefill: int = 0,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
) -> int:
    """Simulate a workload on a fleet of engines, under one policy or several, in virtual time.

    Parameters
    ----------
    workload
        Its name; `--list` names them all. Or a configuration file of inference-perf (.yaml).
    config
        EndpointPickerConfig file, or default, lmetric, round-robin, random, least-request or oracle; may be given
        several times.
    servers
        Number of servers; 0: the workload's own.
    engine
        Engine profile: a name in the package, or a file; several take turns. Not given: the workload's own.
    seeds
        Runs of each policy, with seeds 1, 2, 3 and so on.
    report
        Folder to write a page with plots to.
    fail
        "2@60:120": server 2 (of 0, 1, 2 and so on) fails 60 s after the beginning, warm-up included, and is back 120 s
        later with an empty cache; 180 s if that is not said. May be given several times.
    prefill
        The first so many servers only compute prompts, and send keys and values to the others: for configurations
        with a prefill profile.
    list_
        Say which workloads there are.
    """
    from json import dumps

    from rich.console import Console

    from epp.sim.experiment import document, fleet, policy, tried
    from epp.sim.fleet import parse_failures
    from epp.sim.outside.folder import report_folder, written
    from epp.sim.outside.sweep import spread
    from epp.sim.report import listed, progress, shown, tables
    from epp.sim.scenarios import disaggregated, failing

    if list_ or not workload:
        Console().print(listed())
        return 0 if list_ else 2
    if flags.seconds is not None and not flags.rate:
        raise ConfigError("--seconds is the length of the stages that --rate asks for: give both")
    tried_with = flags.scenario(workload)
    plugins = _catalogue()
    policies = [policy(name, plugins) for name in config]
    profiles = fleet(engine or (tried_with.engine,), servers or tried_with.servers)
    through = spread(flags.jobs)
    tried_with = disaggregated(tried_with, prefill, len(profiles))
    if fail:
        tried_with = failing(tried_with, parse_failures(fail, len(profiles)))
    folder = report_folder(report) if report else None
    with progress(len(policies) * seeds) as done:
        outcomes = tried(tried_with, profiles, policies, seeds, done, through)
    told, parts = document(tried_with, outcomes), list(tables(tried_with, len(profiles), outcomes))
    try:
        if flags.as_json:
            print(dumps(told), flush=True)
        else:
            console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
            for each in parts:
                console.print(each)
    finally:  # nobody may be there to read it
        whole = not folder or written(folder, f"epp sim {workload}", told, parts, shown(outcomes))
    return 0 if whole else 1


@app.command
def plan(
    workload: str,
    *,
    slo: str = "ttft_p90=2s,itl_p90=50ms",
    price: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    config: str = "default",
    engine: str = "",
    seeds: int = 1,
    flags: SimFlags = SimFlags(),
    most: int = 0,
    autoscale: Annotated[bool, Parameter(negative="")] = False,
    least: int = 1,
    target: float = 0.0,
    cold_start: float = 180.0,
) -> int:
    """Find out how many servers a workload needs and what they cost, by search over the simulator, beside round robin.

    Parameters
    ----------
    workload
        A workload of `epp sim --list`. Its stages follow each other without a pause.
    slo
        What each stage must keep, as users see it: percentiles of ttft, itl and e2e.
    price
        What a GPU costs an hour, "h100=2.5"; the engine's profile says which and how many a server has.
    config
        As for `epp sim`.
    engine
        Engine profile: a name in the package, or a file. Not given: the workload's own.
    seeds
        Runs of each fleet, with seeds 1, 2, 3 and so on; each must meet the goal.
    most
        Servers that are tried, and that the autoscaler may have. Not given: 64, and as many as the fixed fleet has.
    autoscale
        Try an autoscaler, too: what it saves, and what it risks.
    least
        Servers that it always keeps.
    target
        Requests in flight a server that it steers for. Not given: several are tried.
    cold_start
        Seconds until a server that starts is there; one that failed, too.
    """
    from json import dumps

    from rich.console import Console

    from epp.sim.experiment import policy
    from epp.sim.goal import parse_goal, parse_prices, price_of
    from epp.sim.outside.sweep import spread
    from epp.sim.plan import Bounds, Planner, gentle, plan
    from epp.sim.plan_report import document, tables, working
    from epp.sim.profile import load_profile

    tried = flags.scenario(workload)
    profile, plugins = load_profile(engine or tried.engine), _catalogue()
    policies = [policy(name, plugins) for name in dict.fromkeys((config, "round-robin"))]
    goal, cost = parse_goal(slo), price_of(profile, parse_prices(price))
    bounds = Bounds(least, most, target, cold_start)
    planner, through = Planner(gentle(tried), profile, goal, seeds), spread(flags.jobs)
    with working() as done:
        made = plan(planner, policies, cost, bounds, autoscale=autoscale, through=through, done=done)
    if flags.as_json:
        print(dumps(document(made)))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        for each in tables(made):
            console.print(each)
    return 0 if made.sized[0].seen is not None else 1


@app.command
def validate(
    *files: str,
    form: Annotated[Literal["text", "json", "github"], Parameter(name="--format")] = "text",
    allow_experimental_plugins: bool = False,
) -> int:
    """Check configuration files as `epp serve` would read them: exit code 1 if one of them cannot be used.

    Parameters
    ----------
    files
        EndpointPickerConfig files.
    form
        text: file:line:column: path: message; json: one document; github: annotations in a workflow.
    allow_experimental_plugins
        Plugins that may change are allowed, as for `epp serve`.
    """
    from epp.config.report import problems_of, rendered

    if not files:
        raise ConfigError("name a configuration file, or several")
    plugins = _catalogue()
    found = {file: problems_of(file, plugins, experimental=allow_experimental_plugins) for file in files}
    problems = [problem for each in found.values() for problem in each]
    if problems or form == "json":
        print(rendered(problems, form))
    broken = {problem.file for problem in problems if problem.severity == "error"}
    if form == "text":
        print("\n".join(f"{file}: ok" for file in files if file not in broken))
    return 1 if broken else 0


@app.command
def config(file: str, *, allow_experimental_plugins: bool = False) -> int:
    """Print what a configuration comes to: every default, and where each value comes from.

    Parameters
    ----------
    file
        EndpointPickerConfig file.
    allow_experimental_plugins
        Plugins that may change are allowed, as for `epp serve`.
    """
    from epp.config.effective import effective
    from epp.config.load import load_file

    print(effective(load_file(file, _catalogue(), experimental=allow_experimental_plugins), file), end="")
    return 0


@app.command
def plugins(name: str = "", *, markdown: bool = False, check: str = "") -> int:
    """List the plugins that a configuration may name, or print one of them in full.

    Parameters
    ----------
    name
        Its type.
    markdown
        Print all of them in full, as the page of the documentation.
    check
        Try the plugins of this module, "my_package.scorers", which need not be installed: exit code 1 if one of them
        breaks the contract.
    """
    if check:
        return _check(check)
    from epp.config.describe import described, descriptions, explained, listed, page
    from epp.config.document import did_you_mean

    every = descriptions(_catalogue())
    if name and name not in {each.type for each in every}:
        raise ConfigError(f"plugin type {name} is not known{did_you_mean(name, [each.type for each in every])}")
    if name:
        print(explained(described(name, _catalogue())))
    else:
        print(page(every) if markdown else listed(every), end="" if markdown else "\n")
    return 0


@app.command
def schema() -> int:
    """Print the JSON Schema of a configuration, for editors and pipelines."""
    import json

    from epp.config.jsonschema import json_schema

    print(json.dumps(json_schema(_catalogue()), indent=2))
    return 0


def _check(module: str) -> int:
    from time import perf_counter

    from epp.config.check import check_module

    sys.path.insert(0, "")  # as of `python -m`: what is being written lies here
    told, usable = check_module(module, perf_counter)
    print(told)
    return 0 if usable else 1


def _catalogue() -> Catalogue:
    """The built-in plugins, and those of installed packages."""
    from epp.scheduling.catalogue import catalogue, installed

    return catalogue(installed())


def _run(main: object) -> int:
    """Run a command's coroutine on uvloop where there is one."""
    assert asyncio.iscoroutine(main)
    try:
        import uvloop
    except ImportError:
        return int(asyncio.run(main))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return int(runner.run(main))


def main() -> NoReturn:
    """Run the command line."""
    try:
        sys.exit(app(normalised(sys.argv[1:])))
    except (ConfigError, ValueError) as error:
        print(f"epp: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who read the result has gone, `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        print(f"epp: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
