"""The image, built step by step without a container: what its Dockerfile copies, runs and starts."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.dockerfile import ROOT, Stage, stages


def test_the_final_stage_is_small_unprivileged_and_takes_a_manifests_args() -> None:
    build, final = stages()
    assert build.image == final.image
    assert final.image.endswith("-slim")  # no compiler
    assert not final.runs
    assert final.copies == [[f"--from={build.name}", "/opt/epp", "/opt/epp"]]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final.user)  # numeric: runAsNonRoot can check it
    assert final.env["PYTHONDONTWRITEBYTECODE"] == "1"  # read-only file system
    assert final.ports == [9002, 9003, 9090]
    assert final.entrypoint == ["epp", "serve"]


def test_what_the_build_copies_is_not_hidden_from_the_builder() -> None:
    """.dockerignore lets through what COPY names, and nothing else of the repository."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for words in stages()[0].copies for name in words[:-1]}
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied), "a file that the Dockerfile copies is missing"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_steps_of_the_dockerfile_end_in_a_picker_that_starts(tmp_path: Path) -> None:
    """Every RUN line as it stands, with the image's folders below `tmp_path`.

    The network is what differs: pip installs `epp` alone and finds the locked packages where they are installed here.
    """
    build, final = stages()
    for words in build.copies:
        *sources, target = words
        for source in sources:
            _copy(ROOT / source, _inside(tmp_path, build.workdir) / target, many=len(sources) > 1)
    for run in build.runs:
        _run(run, build, tmp_path)
        _lend_packages(_inside(tmp_path, "/opt/epp"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: _translate(text, tmp_path) for name, text in final.env.items()}
    environment["PATH"] = environment["PATH"].replace("$PATH", os.defpath)
    started = subprocess.run(
        [*final.entrypoint, "--help"], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert started.returncode == 0, started.stderr
    assert "--grpc-port" in started.stdout
    where = subprocess.run(
        ["python", "-c", "import epp; print(epp.__file__)"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(tmp_path), "it is the wheel that starts, not the checkout"
    wrong = subprocess.run(
        [*final.entrypoint, "--no-such-flag"], cwd=elsewhere, env=environment, capture_output=True, check=False
    )
    assert wrong.returncode == 2
    installed = next((_inside(tmp_path, "/opt/epp") / "lib").glob("python*/site-packages"))
    assert (installed / "epp" / "cli.py").exists()
    assert not (installed / "tests").exists()
    assert any((installed / "epp").glob("sim/profiles/*.yaml"))
    assert any((installed / "epp" / "__pycache__").iterdir()), "compiled at build time: nothing is written later"


def _inside(image: Path, path: str) -> Path:
    return image / path.lstrip("/")


def _copy(source: Path, target: Path, *, many: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        folder = target if many else target.parent
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder)


def _translate(text: str, image: Path) -> str:
    return re.sub(r"(?<![\w.])/(opt|src)\b", rf"{image}/\1", text)


def _run(line: str, stage: Stage, image: Path) -> None:
    workdir = _inside(image, stage.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-euc", _translate(line, image)],
        cwd=workdir,
        env={**os.environ, **offline, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"RUN {line}\n{done.stdout}\n{done.stderr}"


def _lend_packages(venv: Path) -> None:
    """Let the environment see the packages that are installed here, before its own old setuptools."""
    for folder in venv.glob("lib/python*/site-packages"):
        (folder / "lent.pth").write_text(f"import sys; sys.path[0:0] = {site.getsitepackages()!r}\n")
