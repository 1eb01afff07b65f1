"""Build what tests run and PyPI does not have: programs in Go, from modules that pin every line that is compiled.

In: the folders of `SETS`, each with a go.mod and a go.sum. Out: .tools/, beside the binaries of a set a note of what
they were built from, so that a binary of yesterday's source is not taken for today's.
Rules: this is the only step that may need the network (the Go module proxy, once); no test builds anything.
Rejected: one module for all (h2spec, Kubernetes and Helm would have to agree on every version); a later h2spec (2.2.1
is the last that the module proxy lists); a cluster in containers instead of kube-apiserver (needs a container engine, a
kubelet and minutes, and no test here runs a pod); binaries from release pages, which nothing here pins.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
OUT: Final = ROOT / ".tools"
NO_GO: Final = (
    "Go is not installed: it builds {programs} for {tests}, which are skipped without. "
    "Install Go 1.25 or later (https://go.dev/dl), or leave it: nothing else needs it."
)


@dataclass(frozen=True)
class ToolSet:
    """Programs of one Go module."""

    source: Path
    """The module's folder; its parent has the tests that run them."""
    packages: Mapping[str, str]
    """The package of each program."""
    versioned: str = ""
    """The module whose version, as go.mod has it, the programs report as Kubernetes' own; "": they report none."""
    system: Mapping[str, str] = field(default_factory=dict)
    """Programs that the same tests take from the system, and how to get them."""


SETS: Final[Mapping[str, ToolSet]] = {
    "interop": ToolSet(
        ROOT / "tests" / "interop" / "go",
        {"h2spec": "github.com/summerwind/h2spec/cmd/h2spec", "grpc-go-client": "."},
    ),
    "kube": ToolSet(
        ROOT / "tests" / "kube" / "go",
        {"kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver", "kubectl": "k8s.io/kubernetes/cmd/kubectl"},
        versioned="k8s.io/kubernetes",
        system={"etcd": "Debian: apt-get install etcd-server"},
    ),
    "deploy": ToolSet(ROOT / "tests" / "deploy" / "go", {"helm": "helm.sh/helm/v3/cmd/helm"}),
}


def binary(name: str) -> Path | None:
    """Where a program is; None: it is not built, or from another source than is there now."""
    of = _set_of(name)
    path, note = OUT / name, _note(of)
    if not path.exists() or not note.exists() or note.read_text() != _digest(SETS[of].source):
        return None
    return path


def system(name: str) -> Path | None:
    """Where a program of the system is; None: it has none."""
    found = shutil.which(name)
    return None if found is None else Path(found)


def missing(name: str) -> str:
    """What to tell whoever wants this program when there is none."""
    for tools in SETS.values():
        if name in tools.system:
            return f"{name} is not installed: {_tests(tools)} need it. {tools.system[name]}"
    return f"{name} is not built, or not from this source: python -m scripts.tools {_set_of(name)}"


def version(name: str) -> str:
    """The version of a set's module that its go.mod asks for: 1.35.4.

    Raises:
        AssertionError: it asks for none.
    """
    tools = SETS[name]
    file = tools.source / "go.mod"
    found = re.search(rf"^require {re.escape(tools.versioned)} v(\S+)$", file.read_text(), re.MULTILINE)
    assert found is not None, f"no line `require {tools.versioned} v1.x.y` in {file}"
    return found[1]


def build(name: str) -> None:
    """Build a set's programs, what is current too, which Go's cache makes cheap.

    Raises:
        CalledProcessError: go has said why.
    """
    tools = SETS[name]
    OUT.mkdir(exist_ok=True)
    _note(name).unlink(missing_ok=True)
    # -buildvcs=false: a binary is named by its source here, and git may not trust the folder's owner.
    flags = ("-buildvcs=false", "-trimpath", "-mod=readonly", "-ldflags", _told(name))
    for program, package in tools.packages.items():
        command = ("go", "build", *flags, "-o", str(OUT / program), package)
        subprocess.run(command, cwd=tools.source, env={**os.environ, "CGO_ENABLED": "0"}, check=True)  # noqa: S603 - our own words
    note(name)


def note(name: str) -> None:
    """Write down what a set's binaries were built from."""
    _note(name).write_text(_digest(SETS[name].source))


def _note(name: str) -> Path:
    return OUT / f"{name}.built-from"


def _set_of(program: str) -> str:
    return next(name for name, tools in SETS.items() if program in tools.packages)


def _tests(tools: ToolSet) -> str:
    return str(tools.source.parent.relative_to(ROOT))


def _told(name: str) -> str:
    """The linker's flags: no symbols, a third smaller; and the version of Kubernetes, as `/version` reports it."""
    flags = ["-s -w"]
    if SETS[name].versioned:
        number = version(name)
        major, minor, _ = number.split(".", 2)
        told = {"gitVersion": f"v{number}", "gitMajor": major, "gitMinor": minor}
        flags += (f"-X k8s.io/component-base/version.{key}={value}" for key, value in told.items())
    return " ".join(flags)


def _digest(source: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(source.iterdir()):
        whole.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()


def main(names: Sequence[str]) -> int:
    """Build these sets; without any, all."""
    if unknown := [name for name in names if name not in SETS]:
        print(f"no tools are called {', '.join(unknown)}: {', '.join(SETS)} are there", file=sys.stderr)
        return 1
    chosen = {name: SETS[name] for name in names or SETS}
    for tools in chosen.values():
        for program in tools.system:
            if system(program) is None:
                print(missing(program), file=sys.stderr)  # and go on: it may come later
    if system("go") is None:
        programs = ", ".join(program for tools in chosen.values() for program in tools.packages)
        print(NO_GO.format(programs=programs, tests=", ".join(map(_tests, chosen.values()))), file=sys.stderr)
        return 1
    try:
        for name in chosen:
            build(name)
    except subprocess.CalledProcessError as error:
        return error.returncode  # go has said why
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
