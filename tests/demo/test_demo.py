"""The demo itself, as a person or a script runs it: with Envoy, both fleets and the picker as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from epp.demo.envoy import envoy_binary
from epp.errors import ConfigError

pytestmark = [pytest.mark.anyio, pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def envoy() -> None:
    try:
        envoy_binary()
    except ConfigError as error:
        pytest.skip(str(error))


async def start(*options: str, folder: Path) -> asyncio.subprocess.Process:
    """Run the demo with its temporary files below `folder`, so that its processes can be told from others."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "epp", "demo", *options),
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def processes(folder: Path) -> list[str]:
    """Command lines of all processes that were given a file below `folder`, or descend from such a demo."""
    found = []
    for each in Path("/proc").iterdir():
        try:
            words = (each / "cmdline").read_bytes().split(b"\0")
            environment = (each / "environ").read_bytes()
        except OSError:
            continue  # not a process, or gone
        if each.name.isdigit() and f"TMPDIR={folder}".encode() in environment.split(b"\0"):
            found.append(b" ".join(words).decode())
    return found


async def test_a_short_run_ends_with_one_line_of_json_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = await start("--seconds=3", "--seed=1", "--json", folder=tmp_path)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    told = json.loads(out)
    assert told["errors"] == 0
    assert told["requests"] > 100  # 3 s of 28 and of 10 requests a second, on two sides
    assert set(told) == {"requests", "errors", "picker", "round_robin", "no_sharing"}
    assert set(told["no_sharing"]) == {"picker", "round_robin"}
    for side in (told["picker"], told["round_robin"], *told["no_sharing"].values()):
        assert set(side) == {"ttft_p50_s", "ttft_p90_s", "cached_share"}
        assert 0 < side["ttft_p50_s"] <= side["ttft_p90_s"]
    assert told["no_sharing"]["picker"]["cached_share"] == 0
    assert told["picker"]["cached_share"] > told["round_robin"]["cached_share"] > 0
    assert processes(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


async def running(process: asyncio.subprocess.Process) -> bytes:
    """Wait until the first phase has begun; returns what was printed by then."""
    assert process.stdout is not None
    printed = b""
    async with asyncio.timeout(60):
        while b"phase demo" not in printed:
            line = await process.stdout.readline()
            assert line, printed
            printed += line
    return printed


async def as_curl_would(printed: str) -> Any:
    """Do what the printed line says: `curl -s URL -d BODY` posts a body with a form's content type."""
    (line,) = (line for line in printed.splitlines() if line.startswith("try it: "))
    curl, silent, url, data, body = shlex.split(line.removeprefix("try it: "))
    assert (curl, silent, data) == ("curl", "-s", "-d")
    headers = {"content-type": "application/x-www-form-urlencoded"}
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
        assert response.status == 200
        return json.loads(await response.read())


async def test_ctrl_c_ends_an_endless_run_in_good_order(tmp_path: Path) -> None:
    process = await start(folder=tmp_path)
    printed = await running(process)
    assert b"gateway with the picker: http://127.0.0.1:" in printed
    assert (await as_curl_would(printed.decode()))["object"] == "chat.completion"
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"0 failed" in out
    assert processes(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


async def test_a_demo_that_is_killed_takes_its_parts_with_it(tmp_path: Path) -> None:
    process = await start(folder=tmp_path)
    await running(process)
    process.kill()
    await process.communicate()
    async with asyncio.timeout(10):
        while processes(tmp_path):
            await asyncio.sleep(0.02)


async def take(port: int) -> socket.socket | None:
    """Listen on a port, waiting for whoever is just leaving it; None: somebody else keeps it, which is just as well."""
    deadline = asyncio.get_running_loop().time() + 5
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            if asyncio.get_running_loop().time() > deadline:
                return None
            await asyncio.sleep(0.02)


async def test_a_taken_port_is_named_and_another_one_is_used(tmp_path: Path) -> None:
    with await take(8080) or contextlib.nullcontext():
        process = await start("--seconds=1", "--json", folder=tmp_path)
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"port 8080 is taken: the picker gateway is on" in err
    assert json.loads(out)["errors"] == 0
