"""The load client as a process, and beside the simulator: what one says of a workload the other finds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from epp.demo import envoy
from epp.demo.child import child
from epp.errors import ConfigError
from epp.load.report import document
from epp.load.run import Run, measure
from epp.sim.figures import measured
from epp.sim.policies import reference
from epp.sim.profile import load_profile
from epp.sim.workload import Prompts, Workload
from epp.sim.world import Stage, World

pytestmark = [pytest.mark.anyio, pytest.mark.e2e, pytest.mark.timeout(120)]

SHARED: Final = Workload(
    "shared",
    "tiny",
    10.0,
    (
        Prompts("search", 0.8, groups=10, questions=3, shared_tokens=400, question_tokens=300, output_tokens=25),
        Prompts("new", 0.2, groups=1, questions=0, shared_tokens=0, question_tokens=500, output_tokens=25),
    ),
)
STAGES: Final = (Stage(4.0, 5.0, warm_up=True), Stage(5.0, 15.0))
WITHIN: Final = 0.15
TRIES: Final = 3


@contextlib.asynccontextmanager
async def servers(folder: Path, count: int) -> AsyncIterator[list[str]]:
    """Simulated servers in a process of their own; their addresses."""
    options = ("--port=0", f"--count={count}", "--engine=demo", "--model=tiny")
    async with child("servers", sys.executable, "-m", "epp", "model-server", *options, folder=folder) as process:

        async def ready() -> bool:
            return '{"addresses"' in process.output(1)

        await process.until(ready, "addresses")
        yield json.loads(process.output(1))["addresses"]


@contextlib.asynccontextmanager
async def round_robin(folder: Path, addresses: list[str]) -> AsyncIterator[str]:
    """A gateway that sends each request to the next server; its URL."""
    (folder / "eds").mkdir(exist_ok=True)
    listing = folder / "eds" / "pool.json"
    envoy.write_endpoints(listing, addresses)
    gateway = envoy.Gateway(name="pool", endpoints=listing)
    async with envoy.running(envoy.bootstrap([gateway]), folder) as running:
        yield running.url("pool")


def simulated(seed: int, count: int) -> dict[str, float]:
    world = World([load_profile("demo")] * count, reference("round-robin", seed), SHARED, seed).run(STAGES)
    whole = measured(world).whole
    return {name: getattr(whole, name) for name in ("ttft_p50_s", "ttft_p90_s", "cached_share", "requests")}


async def test_the_simulator_and_the_load_client_say_the_same_of_a_fleet(tmp_path: Path) -> None:
    """The same requests at the same times. A machine that others use is slower than it is: each try begins anew."""
    try:
        envoy.envoy_binary()
    except ConfigError as missing:
        pytest.skip(str(missing))
    differ: list[str] = []
    for seed in range(1, TRIES + 1):
        async with servers(tmp_path, 2) as addresses, round_robin(tmp_path, addresses) as url:
            run = Run(SHARED, STAGES, (url,), turn=60.0, seed=seed)
            told = document("shared", run.targets, run.goal, await measure(run, lambda *_: None))
        if "refused" in told:
            differ.append(told["refused"])
            continue
        (real,), virtual = told["targets"], simulated(seed, 2)
        assert (real["failed"], real["requests"]) == (0, virtual["requests"])
        assert [server["requests"] for server in real["servers"].values()] == pytest.approx(
            [virtual["requests"] / 2] * 2, abs=1
        )
        differ.append(", ".join(f"{name}: {real[name]:.3f}, in the simulator {virtual[name]:.3f}" for name in virtual))
        if all(real[name] == pytest.approx(virtual[name], rel=WITHIN) for name in virtual):
            return
    pytest.fail("\n".join(differ))


async def load(folder: Path, *options: str) -> tuple[int, str, str]:
    """Run `epp load` over a trace of forty requests in two seconds; its exit code and what it printed."""
    trace = folder / "trace.jsonl"
    rows = [{"timestamp": 50 * at, "input_length": 100, "output_length": 5, "hash_ids": [at % 4]} for at in range(40)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("load", "trace", f"--trace={trace}", "--model=tiny", *options)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "epp", *words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_prints_one_line_of_json(tmp_path: Path) -> None:
    async with servers(tmp_path, 2) as addresses:
        options = (f"--target=http://{addresses[0]}", f"--versus=http://{addresses[1]}/v1", "--block=1", "--json")
        code, out, err = await load(tmp_path, *options)
    told: dict[str, Any] = json.loads(out)
    if "refused" in told:
        assert code == 1
        return
    assert code == 0, err
    assert [target["requests"] for target in told["targets"]] == [40, 40]
    assert [target["failed"] for target in told["targets"]] == [0, 0]
    assert [list(target["servers"]) for target in told["targets"]] == [[address] for address in addresses]
    assert told["versus"]["blocks"] >= 2
    assert len(err.splitlines()) == 2 * told["versus"]["blocks"]  # a line a block


async def test_the_command_prints_tables_for_people_and_fails_when_nobody_answers(tmp_path: Path) -> None:
    async with servers(tmp_path, 1) as (address,):
        code, out, _ = await load(tmp_path, f"--target=http://{address}", "--rate=2x")
        assert "this client sent late by" in out
        if code == 0:
            assert f" {address} " in out
    code, out, _ = await load(tmp_path, f"--target=http://{address}", "--rate=2x")
    assert code == 1
    assert "40 connect" in out


async def test_mistakes_end_with_2_and_a_word(tmp_path: Path) -> None:
    for options, word in (
        (("--target=nonsense",), "is not a target"),
        (("--target=http://h", "--slo=ttfb=1s"), "expected as in ttft=2s"),
        (("--target=http://h", "--header=x"), "expected as in 'authorization"),
        (("--target=http://h", "--rate=fast"), "--rate fast"),
    ):
        code, out, err = await load(tmp_path, *options)
        assert (code, out) == (2, "")
        assert word in err
        assert "Traceback" not in err


async def test_ctrl_c_ends_it_without_a_report(tmp_path: Path) -> None:
    async with servers(tmp_path, 1) as (address,):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "epp", "load", "no-sharing", f"--target=http://{address}", "--model=tiny"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        assert b"warm-up" in await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130
    assert b"stopped: no report" in out
    assert b"Traceback" not in err
