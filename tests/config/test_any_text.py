"""Whatever a file says, it is a configuration or a list of mistakes with places inside the file."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from epp.config.build import build
from epp.config.changes import changes
from epp.config.document import ConfigErrors
from epp.config.effective import effective
from epp.config.load import load
from epp.config.schema import Config

SAMPLES = sorted((Path(__file__).parents[2] / "config" / "picker").rglob("*.yaml"))
TEXTS = [sample.read_text() for sample in SAMPLES]
WORDS = [
    "&a", "*a", "null", "{}", "[]", "- ", ": ", "1", "-1", "1e999", ".nan", "x", "''", "true", "!!binary aGk=", "<<",
    "plugins", "type: queue-scorer", "pluginRef: queue-scorer", "parameters: 3", "\t", "\n", "#", "2024-01-01", "0x10",
]  # fmt: skip

leaves = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "x", "5s", "1Gi", "queue"])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


def loaded(text: str) -> Config | None:
    """The configuration; None: mistakes, each inside the file."""
    try:
        config = load(text, "picker.yaml", experimental=True)
        build(config, Random(0))
        return config
    except ConfigErrors as found:
        lines = text.splitlines() or [""]
        for error in found.errors:
            assert error.message
            assert error.file == "picker.yaml"
            assert 0 <= error.line <= len(lines) + 1
        return None


@given(st.sampled_from(TEXTS), st.data())
def test_a_file_with_any_words_in_any_place(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(st.sampled_from(WORDS)) + text[at + gone :]
    loaded(text)


@given(st.sampled_from(TEXTS), st.data())
def test_a_file_with_any_value_in_any_place(text: str, data: st.DataObject) -> None:
    """One value of the document is another one; what still loads comes to a text that loads to the same."""
    document = yaml.safe_load(text)
    holder, key = data.draw(st.sampled_from(list(_places(document))))
    holder[key] = data.draw(values)
    config = loaded(yaml.safe_dump(document, allow_unicode=True))
    if config is not None:
        again = load(effective(config), experimental=True)
        assert changes(config, again) == []


def _places(value: Any) -> Any:
    """Every place in a document, as what holds it and its key there. `Any`: a document may hold anything."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
