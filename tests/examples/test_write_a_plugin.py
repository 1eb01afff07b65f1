"""docs/write-a-plugin.md, followed word by word; and the three examples, installed as somebody else would.

The page has files (a name in a line of its own, then a block) and commands with what they print ("...": anything).
Ports are others here than on the page, so that nothing else on the machine is in the way; nothing else differs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from epp.demo.child import free_ports
from epp.demo.envoy import envoy_binary

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text()
EXAMPLES = ROOT / "examples" / "plugins"
STEP = re.compile(r"(?:^`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)
SERVERS = ("8000", "8001", "8002")
PORTS = ("8081", "9002", "9003", "9090", "19000")
ENDED = "-- ended --"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    """A free port for each of the page; those of the servers follow each other."""
    first = next(port for port in free_ports(20) if _all_free(range(port, port + len(SERVERS))))
    servers = {name: str(first + i) for i, name in enumerate(SERVERS)}
    return servers | dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, ports: dict[str, str]) -> dict[str, str]:
    """A fresh virtual environment that sees the packages installed here; `EPP` is this repository with other ports."""
    folder, repository = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("epp")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(f"import site; [*map(site.addsitedir, {site.getsitepackages()!r})]\n")
    bin_ = folder / "bin"
    for name in ("pip", "epp"):
        (bin_ / name).write_text(f'#!/bin/sh\nexec {bin_}/python -m {name} "$@"\n')
        (bin_ / name).chmod(0o755)
    (bin_ / "envoy").symlink_to(envoy_binary())
    there = repository / "config" / "envoy"
    there.mkdir(parents=True)
    envoy = (ROOT / "config" / "envoy" / "standalone-eds.yaml").read_text()
    (there / "standalone-eds.yaml").write_text(_elsewhere(envoy, ports))
    return {**os.environ, **OFFLINE, "PATH": f"{bin_}:{os.environ['PATH']}", "EPP": str(repository)}


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_the_page_is_followed_word_by_word(environment: dict[str, str], ports: dict[str, str], tmp_path: Path) -> None:
    flags = f"--grpc-port {ports['9002']} --grpc-health-port {ports['9003']} --metrics-port {ports['9090']}"
    steps = STEP.findall(PAGE)
    assert len(steps) == PAGE.count("```") // 2
    for name, kind, body in steps:
        if name:
            (tmp_path / name).write_text(_elsewhere(body, ports))
            continue
        assert kind == "console", f"a block that is no file and no command:\n{body}"
        commands, expected = _commands(body)
        given = [_elsewhere(each, ports).replace("epp serve", f"epp serve {flags}") for each in commands]
        for command, wanted, printed in zip(commands, expected, _printed(given, environment, tmp_path), strict=True):
            assert _fits(wanted, printed), f"$ {command}\n{printed}"


def test_the_examples_are_installed_checked_and_listed(environment: dict[str, str], tmp_path: Path) -> None:
    installed, checked, told, listed = _printed(
        [
            f"pip install --quiet --no-deps {_copied(tmp_path)}",
            "epp plugins --check epp_example_plugins",
            "epp plugins running-limit-filter",
            "epp plugins",
        ],
        environment,
        tmp_path,
    )
    assert installed == ""
    assert (
        checked == "cache-room-scorer: ok (scorer)\nrunning-limit-filter: ok (filter)\nnot-twice-scorer: ok (scorer)\n"
    )
    assert "mostRunning: whole number; default 64" in told
    lines = [line.split()[0] for line in listed.splitlines()]
    assert {"cache-room-scorer", "running-limit-filter", "not-twice-scorer"} <= set(lines)


DECIDES = """
from random import Random
from epp.config.build import build
from epp.config.load import load
from epp.endpoints.table import Page
from epp.scheduling.cases import ask, pool
from epp.scheduling.catalogue import catalogue, installed

CONFIG = '''
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: running-limit-filter, parameters: {mostRunning: 8}}
- type: cache-room-scorer
- type: not-twice-scorer
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: running-limit-filter
  - pluginRef: cache-room-scorer
  - {pluginRef: not-twice-scorer, weight: 2}
'''
small = Page(running=2, kv_usage=0.5, kv_blocks=1000)
large = Page(running=7, kv_usage=0.75, kv_blocks=4000)
full = Page(running=8, kv_usage=0.0, kv_blocks=9000)
scheduler = build(load(CONFIG, "picker.yaml", catalogue(installed())), Random(0))
for _ in range(3):
    print(scheduler.schedule(ask(), pool(small, large, full)).endpoints[0])
"""


def test_the_examples_decide_together(environment: dict[str, str], tmp_path: Path) -> None:
    """The third server runs 8 requests and is left out. 1000 blocks are free on the second and 500 on the first, so it
    scores 1 and the first 0; who had the last request loses 2: totals are 2 and 3, then 2 and 1, then 0 and 3."""
    (tmp_path / "decides.py").write_text(DECIDES)
    install, decisions = f"pip install --quiet --no-deps {_copied(tmp_path)}", "python decides.py"
    assert _printed([install, decisions], environment, tmp_path) == [
        "",
        "10.0.0.2:8000\n10.0.0.1:8000\n10.0.0.2:8000\n",
    ]


def test_each_example_has_under_15_lines_with_something_in_them() -> None:
    files = sorted(EXAMPLES.glob("epp_example_plugins/ex*.py"))
    assert [file.name[:4] for file in files] == ["ex1_", "ex2_", "ex3_"]
    assert all(sum(bool(line.strip()) for line in file.read_text().splitlines()) < 15 for file in files)


# -- inside ------------------------------------------------------------------------------------------------------------


def _copied(folder: Path) -> Path:
    """The examples, where building them leaves nothing behind."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    return shutil.copytree(EXAMPLES, folder / "plugins", ignore=ignored)


def _all_free(ports: range) -> bool:
    with contextlib.ExitStack() as stack:
        try:
            for port in ports:
                stack.enter_context(contextlib.closing(_bound(port)))
        except OSError:
            return False
    return True


def _bound(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def _elsewhere(text: str, ports: dict[str, str]) -> str:
    return re.sub(rf"\b({'|'.join(ports)})\b", lambda found: ports[found[0]], text)


def _commands(body: str) -> tuple[list[str], list[str]]:
    """Each command, and what it prints."""
    parts = [part.partition("\n") for part in re.split(r"^\$ ", body, flags=re.M)[1:]]
    return [command for command, _, _ in parts], [printed for _, _, printed in parts]


def _printed(commands: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    """What each command of one shell prints; whatever they leave running ends with it."""
    lines = (f"{command}\necho '{ENDED}'" for command in commands)
    with _shell(environment, folder) as shell:
        told, _ = shell.communicate("\n".join(lines), timeout=90)
    return told.replace(f"{ENDED}\n", ENDED).split(ENDED)[:-1]


@contextlib.contextmanager
def _shell(environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    shell = subprocess.Popen(
        ["bash"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield shell
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


def _fits(expected: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.S) is not None
