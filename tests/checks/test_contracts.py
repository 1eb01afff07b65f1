"""The lists in .importlinter name every module that they should."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def listed(contract: str, key: str) -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    return set(parser[f"importlinter:contract:{contract}"][key].split())


@pytest.mark.parametrize(
    ("room", "edges", "contract"), [("extproc", ("transport",), "transport"), ("sim", ("serve", "outside"), "serve")]
)
def test_every_module_of_a_room_beside_its_edges_is_listed_as_pure(
    room: str, edges: tuple[str, ...], contract: str
) -> None:
    folder = ROOT / "epp" / room
    files = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    packages = [path.parent for path in folder.glob("*/__init__.py") if path.parent.name not in edges]
    modules = {f"epp.{room}.{path.stem}" for path in (*files, *packages)}
    assert modules <= listed("pure", "source_modules")
    assert modules == listed(contract, "source_modules")


def test_no_contract_names_a_module_that_is_gone() -> None:
    for contract in ("pure", "transport", "serve"):
        for module in listed(contract, "source_modules"):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").exists() or path.is_dir(), module
