"""Problems of files, as text, as JSON and as GitHub's commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from epp.config.report import Problem, problems_of, rendered
from epp.dialects.request import Request
from epp.endpoints.table import Candidates
from epp.scheduling.catalogue import catalogue
from epp.scheduling.plugin import NoParams, Scores, scorer
from tests.config.test_load import HEAD

FOUND = [
    Problem("error", "a.yaml", 4, 9, "plugins[0].type", "plugin type x is not known, 100% sure\nreally"),
    Problem("error", "a,b:c.yaml", 0, 0, "", "cannot be read"),
    Problem("warning", "b.yaml", 0, 0, "", "flowControl.maxBytes has no effect yet"),
]


def test_for_people_each_problem_is_a_line_that_an_editor_can_jump_to() -> None:
    assert rendered(FOUND).split("\n") == [
        "a.yaml:4:9: plugins[0].type: plugin type x is not known, 100% sure",
        "really",
        "a,b:c.yaml: cannot be read",
        "b.yaml: warning: flowControl.maxBytes has no effect yet",
    ]


def test_for_github_each_problem_is_a_command_with_its_escapes() -> None:
    assert rendered(FOUND, "github").split("\n") == [
        "::error file=a.yaml,line=4,col=9,title=plugins[0].type::plugin type x is not known, 100%25 sure%0Areally",
        "::error file=a%2Cb%3Ac.yaml::cannot be read",
        "::warning file=b.yaml::flowControl.maxBytes has no effect yet",
    ]


def test_for_pipelines_all_problems_are_one_document() -> None:
    assert json.loads(rendered(FOUND, "json"))[0] == {
        "severity": "error",
        "file": "a.yaml",
        "line": 4,
        "column": 9,
        "path": "plugins[0].type",
        "message": "plugin type x is not known, 100% sure\nreally",
    }
    assert json.loads(rendered([], "json")) == []


@scorer("gpu-scorer", params=NoParams, needs=("gpu_use",))
def gpu(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    """Prefer idle GPUs."""
    return np.ones(len(candidates))


def test_what_only_shows_when_plugins_are_made_is_a_problem_too(tmp_path: Path) -> None:
    file = tmp_path / "picker.yaml"
    file.write_text(HEAD + "plugins:\n- type: gpu-scorer\n")
    assert problems_of(str(file), catalogue([gpu])) == [
        Problem("error", str(file), 4, 3, "plugins[0]", "gpu-scorer needs gpu_use, which nobody provides")
    ]


def test_a_file_that_is_not_there_is_a_problem_and_one_without_effect_a_warning(tmp_path: Path) -> None:
    (gone,) = problems_of(str(tmp_path / "gone.yaml"), catalogue())
    assert (gone.severity, gone.line) == ("error", 0)
    assert "No such file" in gone.message
    file = tmp_path / "picker.yaml"
    file.write_text(HEAD + "plugins: [{type: openai-parser}]")
    (idle,) = problems_of(str(file), catalogue())
    assert (idle.severity, idle.file) == ("warning", str(file))
