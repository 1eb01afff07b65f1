"""The commands.

Rules here: imports of a command's own room stand in the command, so that `epp serve` never loads the simulator and
`epp --help` is quick; nothing but this file imports `epp.server`.
Exit codes: 0 done, 1 it failed, 2 it was asked wrongly (flags or configuration).
"""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

from cyclopts import App, Parameter

from epp.errors import ConfigError
from epp.flags import ServeFlags, normalised

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
    except KeyboardInterrupt:
        sys.exit(130)
