"""The step that builds the tools: it says what is missing, and an old binary is not taken for a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import tools
from scripts.tools import ToolSet


def run(*names: str) -> subprocess.CompletedProcess[str]:
    """The step, where neither Go nor anything else is installed."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.tools", *names],
        cwd=tools.ROOT,
        env={**os.environ, "PATH": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_go_it_says_what_to_install_and_for_what() -> None:
    done = run("interop", "deploy")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "Go is not installed: it builds h2spec, grpc-go-client, helm for tests/interop, tests/deploy, which are skipped"
    )


def test_a_program_of_the_system_that_is_missing_is_named_and_the_rest_goes_on() -> None:
    done = run("kube")
    etcd, go = done.stderr.splitlines()
    assert etcd.startswith("etcd is not installed: tests/kube need it")
    assert etcd.endswith("apt-get install etcd-server")
    assert go.startswith("Go is not installed: it builds kube-apiserver, kubectl for tests/kube")


def test_a_set_that_is_not_there_is_refused() -> None:
    done = run("cube")
    assert done.returncode == 1
    assert done.stderr == "no tools are called cube: interop, kube, deploy are there\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a set that has one program, `hammer`."""
    folder, out = tmp_path / "go", tmp_path / "out"
    for each in (folder, out):
        each.mkdir()
    made = ToolSet(folder, {"hammer": "."}, versioned="example.com/hammer", system={"anvil": "ask a smith"})
    monkeypatch.setattr(tools, "SETS", {"forge": made})
    monkeypatch.setattr(tools, "OUT", out)
    monkeypatch.setattr(tools, "ROOT", tmp_path.parent)
    return folder


def test_a_binary_counts_until_its_source_changes(source: Path) -> None:
    (source / "main.go").write_text("package main\n")
    assert tools.binary("hammer") is None
    (tools.OUT / "hammer").touch()
    assert tools.binary("hammer") is None  # by whom, from what?
    tools.note("forge")
    assert tools.binary("hammer") == tools.OUT / "hammer"
    (source / "main.go").write_text("package main // and more\n")
    assert tools.binary("hammer") is None


def test_who_misses_a_program_is_told_how_to_get_it(source: Path) -> None:
    assert tools.missing("hammer").endswith("python -m scripts.tools forge")
    assert tools.missing("anvil") == f"anvil is not installed: {source.parent.name} need it. ask a smith"


def test_the_version_is_the_one_that_go_mod_asks_for(source: Path) -> None:
    (source / "go.mod").write_text("module forge\n\nrequire example.com/hammer v1.36.0\n")
    assert tools.version("forge") == "1.36.0"
    (source / "go.mod").write_text("module forge\n")
    with pytest.raises(AssertionError, match=r"no line `require example.com/hammer"):
        tools.version("forge")


def test_every_set_has_the_module_that_pins_it() -> None:
    assert tools.version("kube").startswith("1.")
    for each in tools.SETS.values():
        assert (each.source / "go.mod").exists()
        assert (each.source / "go.sum").exists()
