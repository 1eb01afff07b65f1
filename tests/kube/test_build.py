"""The step that builds the API server: it says what is missing, and an old binary is not taken for a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import kube


def test_without_go_and_etcd_it_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.kube"],
        cwd=kube.ROOT,
        env={**os.environ, "PATH": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    etcd, go = done.stderr.splitlines()
    assert etcd.startswith("etcd is not installed")
    assert etcd.endswith("apt-get install etcd-server")
    assert go.startswith("Go is not installed")


def test_a_binary_counts_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, binary = tmp_path / "go", tmp_path / "kube-apiserver"
    source.mkdir()
    monkeypatch.setattr(kube, "SOURCE", source)
    monkeypatch.setattr(kube, "BINARY", binary)
    monkeypatch.setattr(kube, "NOTE", tmp_path / "note")
    (source / "go.mod").write_text("require k8s.io/kubernetes v1.35.4\n")
    assert kube.binary() is None
    binary.touch()
    assert kube.binary() is None  # by whom, from what?
    kube.note()
    assert kube.binary() == binary
    (source / "go.mod").write_text("require k8s.io/kubernetes v1.36.0\n")
    assert kube.binary() is None
    assert kube.version() == "1.36.0"


def test_a_module_without_a_version_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "SOURCE", tmp_path)
    (tmp_path / "go.mod").write_text("module kube\n")
    with pytest.raises(AssertionError, match=r"no line `require k8s.io/kubernetes"):
        kube.version()
