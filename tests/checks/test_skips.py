"""A skip is a skip on a laptop and a failure in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_A_TEST = "import pytest\n\ndef test_one():\n    pytest.skip('no Envoy here')\n"
BY_A_MARK = "import pytest\n\n@pytest.mark.skipif(True, reason='no Envoy here')\ndef test_one():\n    pass\n"
IN_A_FIXTURE = "import pytest\n\n@pytest.fixture\ndef envoy():\n    pytest.skip('no Envoy here')\n\ndef test_one(envoy):\n    pass\n"
OF_A_MODULE = "import pytest\n\npytest.skip('no Envoy here', allow_module_level=True)\n"
EXPECTED_FAILURE = "import pytest\n\n@pytest.mark.xfail(reason='known')\ndef test_one():\n    assert False\n"


def run(folder: Path, text: str, require_all: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "tests.conftest",
            "-c",
            os.devnull,
            str(folder / "test_it.py"),
        ],
        cwd=ROOT,
        env={**os.environ, "EPP_REQUIRE_ALL": require_all},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("text", [IN_A_TEST, BY_A_MARK, IN_A_FIXTURE, OF_A_MODULE])
def test_a_skip_says_what_is_missing_and_fails_where_all_is_required(tmp_path: Path, text: str) -> None:
    laptop, ci = run(tmp_path, text, ""), run(tmp_path, text, "1")
    assert laptop.returncode in (0, 5), laptop.stdout  # 5: nothing but a skipped module
    assert ci.returncode in (1, 2), ci.stdout  # 2: the module was not collected
    assert "no Envoy here" in laptop.stdout
    assert "skipped although EPP_REQUIRE_ALL is set" in ci.stdout
    assert "no Envoy here" in ci.stdout


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    assert run(tmp_path, EXPECTED_FAILURE, "1").returncode == 0
