"""What is wrong with configuration files, for whoever reads it: a person, a pipeline, GitHub.

In: files. Out: problems, each with its place; the same as text.
Rules here: a file is read and built as `epp serve` does it, so that what passes here starts there; warnings are no
errors.
Source: GitHub Actions, workflow commands, for the escapes of its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import msgspec

from epp.config.build import build
from epp.config.document import ConfigErrors
from epp.config.load import load_file
from epp.errors import ConfigError
from epp.scheduling.catalogue import Catalogue

Form = Literal["text", "json", "github"]


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with a file, or that has no effect there."""

    severity: Literal["error", "warning"]
    file: str
    line: int
    """From 1; 0: the whole file."""
    column: int
    path: str
    """Where in the document, as `plugins[2].parameters.unknown`; empty: the whole document."""
    message: str


def problems_of(file: str, plugins: Catalogue, *, experimental: bool = False) -> list[Problem]:
    """Everything that is wrong with a file, in the order of its lines; or, if nothing is, what has no effect."""
    try:
        config = load_file(file, plugins, experimental=experimental)
        build(config, Random(0))
    except ConfigErrors as errors:
        return [_problem(error, file) for error in errors.errors]
    except ConfigError as error:
        return [_problem(error, file)]
    return [Problem("warning", file, 0, 0, "", warning) for warning in config.warnings]


def rendered(problems: Sequence[Problem], form: Form = "text") -> str:
    """The problems as lines of text, as one JSON document, or as GitHub's workflow commands."""
    if form == "json":
        return msgspec.json.format(msgspec.json.encode(problems), indent=2).decode()
    return "\n".join(map(_command if form == "github" else _sentence, problems))


def _problem(error: ConfigError, file: str) -> Problem:
    return Problem("error", error.file or file, error.line, error.column, error.path, error.message)


def _sentence(problem: Problem) -> str:
    where = ":".join(str(part) for part in (problem.file, problem.line, problem.column) if part)
    kind = "warning" if problem.severity == "warning" else ""
    return ": ".join(part for part in (where, kind, problem.path, problem.message) if part)


def _command(problem: Problem) -> str:
    where = {"file": problem.file, "line": problem.line, "col": problem.column, "title": problem.path}
    told = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in where.items() if value)
    return f"::{problem.severity} {told}::{_escaped(problem.message)}"


def _escaped(text: str, more: str = "") -> str:
    return "".join(f"%{ord(letter):02X}" if letter in f"%\r\n{more}" else letter for letter in text)
