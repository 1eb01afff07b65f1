"""Files that cannot be used: every mistake of each is told, at its line and column, with what to do.

Beside each `broken/NAME.yaml` stands `NAME.expected`: one line for each mistake, "line:column: path: how the message
begins", in the order of the file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from epp.config.document import ConfigErrors
from epp.config.load import load_file
from epp.errors import ConfigError

FILES = sorted((Path(__file__).parent / "broken").glob("*.yaml"))


def mistakes(file: Path) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_file(file)
    return [line(error) for error in caught.value.errors]


def line(error: ConfigError) -> str:
    return f"{error.line}:{error.column}: {error.path}: {error.message}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_broken_file_is_answered_with_every_mistake_and_its_place(file: Path) -> None:
    expected = file.with_suffix(".expected").read_text().splitlines()
    found = mistakes(file)
    assert [said[: len(wanted)] for said, wanted in zip(found, expected, strict=False)] == expected
    assert len(found) == len(expected), found[len(expected) :]


def test_there_are_many_kinds_of_broken_files() -> None:
    assert len(FILES) >= 20
