"""docs/configure.md: its examples load, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epp.config.load import DEPRECATED_SECTIONS, load
from tests.config.test_load import DEFAULT, entries

PAGE = (Path(__file__).parents[2] / "docs" / "configure.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_loads_without_a_warning(text: str) -> None:
    assert load(text, "docs/configure.md").warnings == ()


def test_the_first_example_is_the_default() -> None:
    assert entries(load(EXAMPLES[0])) == DEFAULT


def test_older_sections_are_named() -> None:
    assert [name for name in DEPRECATED_SECTIONS if f"`{name}`" not in PAGE] == []
