"""`epp plugins --check`: which plugins of a module are tried, and what is told of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from epp.config.check import check_module
from epp.errors import ConfigError
from epp.scheduling.quarantine import stopped

HEAD = """
import numpy as np
from epp.scheduling.plugin import NoParams, Params, scorer
from epp.scheduling.scorers import queue

"""
GOOD = """
@scorer("good-scorer", params=NoParams)
def good(request, candidates, params):
    "All the same."
    return np.ones(len(candidates))
"""
BAD = """
class Much(Params, frozen=True):
    much_too_much: float = 2.0

@scorer("bad-scorer", params=Much)
def bad(request, candidates, params):
    "All too much."
    return np.full(len(candidates), params.much_too_much)
"""
TOLD_BAD = [
    "bad-scorer: error: has a parameter without a docstring below it: muchTooMuch",
    "bad-scorer: error: returned scores from 2 to 2, not within 0..1, for a completion and one endpoint; what is "
    "outside counts as 0 or 1, so that some differences are lost",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules are imported from here, and forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("tried_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def told(name: str) -> tuple[list[str], bool]:
    lines, usable = check_module(name, stopped)
    return lines.splitlines(), usable


def test_each_plugin_of_a_module_is_told_and_built_in_ones_that_it_imports_are_not(folder: Path) -> None:
    (folder / "tried_both.py").write_text(HEAD + GOOD + BAD)
    assert told("tried_both") == (["good-scorer: ok (scorer)", *TOLD_BAD], False)


def test_a_package_is_all_of_its_modules_and_each_plugin_is_tried_once(folder: Path) -> None:
    (folder / "tried_package" / "below").mkdir(parents=True)
    (folder / "tried_package" / "__init__.py").write_text("from tried_package.below.one import good")
    (folder / "tried_package" / "below" / "__init__.py").write_text("")
    (folder / "tried_package" / "below" / "one.py").write_text(HEAD + GOOD)
    (folder / "tried_package" / "two.py").write_text(HEAD + GOOD.replace("good-", "other-"))
    assert told("tried_package") == (["good-scorer: ok (scorer)", "other-scorer: ok (scorer)"], True)


def test_a_warning_is_no_error(folder: Path) -> None:
    (folder / "tried_reader.py").write_text(
        HEAD + GOOD.replace("np.ones(len(candidates))", 'np.where(candidates.column("waiting")[1], 0.5, 0.5)')
    )
    (line,), usable = told("tried_reader")
    assert line.startswith("good-scorer: warning: reads waiting, not named in its needs")
    assert usable


def test_a_type_that_there_is_already_is_an_error(folder: Path) -> None:
    (folder / "tried_twice.py").write_text(HEAD + GOOD.replace("good-scorer", "queue-scorer"))
    assert told("tried_twice") == (
        ["queue-scorer: error: has the type of a built-in plugin: choose another"],
        False,
    )
    (folder / "tried_again.py").write_text(HEAD + GOOD + GOOD.replace("def good", "def again"))
    line = "good-scorer: error: has the type of another plugin of this module: choose another"
    assert told("tried_again") == ([line, line], False)


def test_ours_can_be_checked_like_any_other() -> None:
    lines, usable = told("epp.scheduling.scorers")
    assert "queue-scorer: ok (scorer)" in lines
    assert usable


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tried_none", HEAD, "module tried_none has no plugin: decorate a function"),
        ("tried_broken", "1 / 0", "module tried_broken cannot be imported: ZeroDivisionError: division by zero"),
        ("tried_nowhere", None, "module tried_nowhere cannot be imported: ModuleNotFoundError"),
        ("tried_file.py", HEAD, "tried_file.py is a file: name the module as it is imported"),
        ("tried_mute", HEAD + GOOD.replace('"All the same."', "pass"), "needs a docstring"),
    ],
)
def test_what_cannot_be_checked_is_said(folder: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (folder / f"{name.removesuffix('.py')}.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        check_module(name, stopped)


def test_the_command_finds_what_lies_in_the_working_directory_and_exits_with_1_on_an_error(tmp_path: Path) -> None:
    (tmp_path / "tried_bad.py").write_text(HEAD + BAD)
    (tmp_path / "tried_good.py").write_text(HEAD + GOOD)

    def command(name: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-P", "-m", "epp", "plugins", "--check", name]  # -P: not there by itself
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    bad, good, gone = command("tried_bad"), command("tried_good"), command("tried_gone")
    assert (bad.returncode, bad.stdout.splitlines()) == (1, TOLD_BAD)
    assert (good.returncode, good.stdout) == (0, "good-scorer: ok (scorer)\n")
    assert gone.returncode == 2
    assert "module tried_gone cannot be imported" in gone.stderr
    assert "Traceback" not in gone.stderr
