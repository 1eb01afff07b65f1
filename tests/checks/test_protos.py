from __future__ import annotations

import shutil
from pathlib import Path

from scripts.protos import PACKAGE, SOURCES, differing

ROOT = Path(__file__).parents[2]


def test_generated_code_that_is_stale_missing_or_left_over_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / SOURCES, tmp_path / SOURCES)
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE)
    assert differing(tmp_path) == []
    with (tmp_path / SOURCES / "decision.proto").open("a") as file:
        file.write("message Another { string name = 1; }\n")
    (tmp_path / PACKAGE / "ext_proc_pb2.pyi").unlink()
    (tmp_path / PACKAGE / "gone_pb2.py").touch()
    assert differing(tmp_path) == ["decision_pb2.py", "decision_pb2.pyi", "ext_proc_pb2.pyi", "gone_pb2.py"]
