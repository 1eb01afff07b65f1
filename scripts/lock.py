"""Write requirements.lock from what is installed, or with --check see that it is what pyproject.toml asks for.

The lock holds `name==version` lines for everything that pyproject.toml names (dependencies, every extra, the dev group,
the build backend) and what those need in turn; nothing else that happens to be installed, and no URL, host or hash, so
that it works with whatever index pip is configured for.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK: Final = "requirements.lock"


def asked_for(project: dict[str, Any]) -> list[Requirement]:
    """Everything that pyproject.toml names."""
    extras = project["project"].get("optional-dependencies", {}).values()
    groups = project.get("dependency-groups", {}).values()
    lines = [project["build-system"]["requires"], project["project"]["dependencies"], *extras, *groups]
    return [Requirement(line) for group in lines for line in group]


def closure(roots: Iterable[Requirement]) -> tuple[dict[str, str], list[str]]:
    """Versions of all that is needed, by name, and what is wrong with what is installed."""
    versions: dict[str, str] = {}
    problems: list[str] = []
    done: set[tuple[str, str]] = set()
    waiting = [(root, "") for root in roots]
    while waiting:
        needed, extra = waiting.pop()
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            problems.append(f"{needed} is not installed")
            continue
        if not needed.specifier.contains(found.version, prereleases=True):
            problems.append(f"{needed} is asked for, {found.version} is installed")
        versions[name] = found.version
        for part in {"", *needed.extras}:
            if (name, part) not in done:
                done.add((name, part))
                waiting += [(Requirement(line), part) for line in found.requires or ()]
    return versions, problems


def main(argv: list[str]) -> int:
    root = Path(__file__).parent.parent
    versions, problems = closure(asked_for(tomllib.loads((root / "pyproject.toml").read_text())))
    text = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
    if not problems and argv != ["--check"]:
        (root / LOCK).write_text(text)
    elif not problems and (root / LOCK).read_text() != text:
        problems = [f"{LOCK} is not what is installed: run `make setup`, or `make lock` to take newer versions"]
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
