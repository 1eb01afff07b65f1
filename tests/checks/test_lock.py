from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from scripts.lock import asked_for, closure

LOCK = Path(__file__).parents[2] / "requirements.lock"


def test_the_lock_names_versions_and_no_url_host_or_option() -> None:
    lines = LOCK.read_text().splitlines()
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+!]+", line)] == []


def test_the_closure_follows_what_is_needed_and_skips_what_a_marker_rules_out() -> None:
    versions, problems = closure([Requirement("aiohttp"), Requirement("pywin32; sys_platform == 'win32'")])
    assert problems == []
    assert versions["yarl"] == version("yarl")  # aiohttp needs it
    assert "pywin32" not in versions
    assert "aiodns" not in versions  # only with aiohttp's extra `speedups`


def test_what_is_missing_or_too_old_is_named() -> None:
    _, problems = closure([Requirement("no-such-package>=1"), Requirement("aiohttp>=99")])
    assert sorted(problems) == [
        f"aiohttp>=99 is asked for, {version('aiohttp')} is installed",
        "no-such-package>=1 is not installed",
    ]


def test_everything_that_the_project_names_is_asked_for() -> None:
    project = {
        "build-system": {"requires": ["builder"]},
        "project": {"dependencies": ["a>=1"], "optional-dependencies": {"demo": ["b"]}},
        "dependency-groups": {"dev": ["c"]},
    }
    assert [str(one) for one in asked_for(project)] == ["builder", "a>=1", "b", "c"]
