"""The JSON Schema: a real validator takes what loads, and refuses what no schema could take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from epp.config.jsonschema import json_schema
from epp.config.known import KNOWN
from epp.scheduling.catalogue import BUILT_IN, catalogue

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "config" / "picker").rglob("*.yaml"))
BROKEN = sorted((Path(__file__).parent / "broken").glob("*.yaml"))
BEYOND = {
    # Names, and which of them there may be twice.
    "plugin-name-twice", "plugin-named-as-a-default", "profile-name-twice", "entry-dangling", "entry-twice",
    "two-pickers", "two-pickers-without-profiles", "two-handlers", "single-handler-of-two", "two-profiles-no-handler",
    "parsers", "detector-wrong-kind", "source-and-extractor", "prefix-cache-scorer-producer",
    "flow-control-bands-twice", "disagg-prefill-first-with-decider",
    # What a flag allows.
    "experimental-without-flag",
    # Fields that hang on each other, which a plugin's own check says.
    "session-id-producer", "token-producer-without-model",
    # No YAML, or what YAML readers make of it.
    "no-yaml", "section-twice",
}  # fmt: skip
"""Broken files that a schema cannot refuse."""


@pytest.fixture(scope="module")
def validator() -> Any:
    """`Any`: the library is not typed, and only tests use it."""
    library = pytest.importorskip("jsonschema", reason="the library jsonschema is not installed")
    schema = json_schema(catalogue())
    library.Draft202012Validator.check_schema(schema)
    return library.Draft202012Validator(schema)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_what_loads_is_valid(validator: Any, sample: Path) -> None:
    assert [error.message for error in validator.iter_errors(yaml.safe_load(sample.read_text()))] == []


@pytest.mark.parametrize("file", [file for file in BROKEN if file.stem not in BEYOND], ids=lambda path: path.stem)
def test_a_broken_file_is_invalid(validator: Any, file: Path) -> None:
    assert not validator.is_valid(yaml.safe_load(file.read_text()))


def test_what_is_beyond_a_schema_is_among_the_broken_files() -> None:
    assert {file.stem for file in BROKEN} >= BEYOND


def test_every_type_is_in_the_schema_with_its_parameters_described() -> None:
    schema = json_schema(catalogue())
    entry = schema["properties"]["plugins"]["items"]
    types = list(dict.fromkeys((*(plugin.name for plugin in BUILT_IN), *KNOWN)))
    assert entry["properties"]["type"]["enum"] == types
    assert [rule["if"]["properties"]["type"]["const"] for rule in entry["allOf"]] == types
    assert schema["$defs"]["PickerParams"]["properties"]["maxNumOfEndpoints"] == {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "Endpoints sent to the proxy: the destination, and then fallbacks, best first.",
    }


def test_the_schema_is_always_the_same() -> None:
    assert json_schema(catalogue()) == json_schema(catalogue())
