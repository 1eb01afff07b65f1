"""Reads the Dockerfile as far as this repository uses the format: one instruction a line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]


class Stage(msgspec.Struct):
    """What follows one FROM."""

    image: str
    name: str
    copies: list[list[str]] = []
    """Words of each COPY, flags included."""
    runs: list[str] = []
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    ports: list[int] = []
    entrypoint: list[str] = []


def stages() -> list[Stage]:
    """The stages in order. Raises AssertionError on an instruction that the walk would not do."""
    found: list[Stage] = []
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        word, _, rest = line.partition(" ")
        match word:
            case "" | "#":
                pass
            case "FROM":
                image, *alias = rest.split()
                found.append(Stage(image, alias[1] if alias else ""))
            case "COPY":
                found[-1].copies.append(rest.split())
            case "RUN":
                found[-1].runs.append(rest)
            case "ENV":
                found[-1].env.update(re.findall(r"(\w+)=(\S+)", rest))
            case "WORKDIR":
                found[-1].workdir = rest
            case "USER":
                found[-1].user = rest
            case "EXPOSE":
                found[-1].ports += map(int, rest.split())
            case "ENTRYPOINT":
                found[-1].entrypoint = json.loads(rest)
            case _:
                raise AssertionError(f"the walk in tests/packaging does not know {line!r}")
    return found
