"""The Job for a cluster says what the command understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from epp.cli import app
from epp.load.run import Run, chosen

JOB = Path(__file__).parents[2] / "config" / "load" / "job.yaml"


def container() -> dict[str, Any]:
    job = yaml.safe_load(JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert (job["spec"]["backoffLimit"], job["spec"]["template"]["spec"]["restartPolicy"]) == (0, "Never")
    (found,) = job["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_its_arguments_are_a_run_that_can_begin() -> None:
    words: list[str] = container()["command"] + container()["args"]
    assert words[0] == "epp"
    command, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    assert command.__name__ == "load"
    given = bound.arguments
    assert given["json"] is True
    asked = chosen(given["workload"], "", given["rate"], given["seconds"], given["model"])
    assert asked.source.model == "Qwen/Qwen3-32B"
    run = Run(asked.source, asked.stages, (given["target"],), turn=30.0)
    assert [stage.rate for stage in run.stages if not stage.warm_up] == [10.0]


def test_it_runs_as_the_picker_does_without_rights() -> None:
    limits = container()["securityContext"]
    assert limits["readOnlyRootFilesystem"] is True
    assert limits["allowPrivilegeEscalation"] is False
    assert container()["resources"]["requests"]["cpu"] == "1"
