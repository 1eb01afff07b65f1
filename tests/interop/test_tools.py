"""The step that builds the tools: it says when it cannot, and an old binary is not taken for a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import tools


def test_without_go_it_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tools"],
        cwd=tools.ROOT,
        env={**os.environ, "PATH": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Go is not installed")


def test_a_binary_counts_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "go", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    monkeypatch.setattr(tools, "SOURCE", source)
    monkeypatch.setattr(tools, "OUT", out)
    monkeypatch.setattr(tools, "NOTE", out / "built-from")
    (source / "main.go").write_text("package main\n")
    assert tools.binary("h2spec") is None
    (out / "h2spec").touch()
    assert tools.binary("h2spec") is None  # by whom, from what?
    tools.note()
    assert tools.binary("h2spec") == out / "h2spec"
    (source / "main.go").write_text("package main // and more\n")
    assert tools.binary("h2spec") is None
