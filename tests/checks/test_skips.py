"""A skip is a skip on a laptop and a failure in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    "test_in_a_test.py": "import pytest\ndef test_one():\n    pytest.skip('no Envoy')\n",
    "test_by_a_mark.py": "import pytest\n@pytest.mark.skipif(True, reason='no Envoy')\ndef test_one(): pass\n",
    "test_in_a_fixture.py": (
        "import pytest\n@pytest.fixture\ndef envoy():\n    pytest.skip('no Envoy')\ndef test_one(envoy): pass\n"
    ),
    "test_of_a_module.py": "import pytest\npytest.skip('no Envoy', allow_module_level=True)\n",
    "test_expected_failure.py": "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_one(): assert False\n",
}


def run(folder: Path, require_all: str) -> tuple[int, str]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    options = ["-q", "-rs", "--continue-on-collection-errors", "-c", os.devnull, "-p", "tests.conftest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=ROOT,
        env={**os.environ, "EPP_REQUIRE_ALL": require_all},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_skip_says_what_is_missing_where_it_is_allowed(tmp_path: Path) -> None:
    code, told = run(tmp_path, "")
    assert code == 0, told
    assert "4 skipped, 1 xfailed" in told
    assert told.count("no Envoy") == 4


def test_every_kind_of_skip_is_a_failure_where_all_is_required(tmp_path: Path) -> None:
    code, told = run(tmp_path, "1")
    assert code == 1, told
    assert "1 failed, 1 xfailed, 3 errors" in told
    assert told.count("skipped although EPP_REQUIRE_ALL is set: Skipped: no Envoy") == 4
