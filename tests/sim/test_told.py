"""`epp sim` from the command line: who reads its result may have gone, and names may look like markup."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EPP = (sys.executable, "-m", "epp", "sim")
SHORT = ("demo", "--rate", "5", "--seconds", "2", "--jobs", "1", "--config", "random")
CONFIG = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
BENCH = """\
data: {type: shared_prefix, shared_prefix: {num_groups: 2, num_prompts_per_group: 2}}
load: {type: constant, stages: [{rate: 2, duration: 2}]}
api: {type: chat}
"""


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EPP, *words], capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_who_reads_no_more_gets_no_traceback_and_the_report_is_written(tmp_path: Path, form: tuple[str, ...]) -> None:
    words = [*EPP, *SHORT, *form, "--report", f"{tmp_path}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1
    assert (tmp_path / "index.html").exists()


def test_a_result_that_finds_no_room_is_told_in_a_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*EPP, *SHORT, "--json"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert (done.returncode, done.stderr) == (1, "epp: [Errno 28] No space left on device\n")


def test_a_name_that_looks_like_markup_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "[bold]a:smile:.yaml").write_text(CONFIG)
    done = run(*SHORT, "--config", "[bold]a:smile:.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[bold]a:smile:.yaml" in done.stdout


def test_what_was_not_looked_at_of_a_file_stands_above_the_table(tmp_path: Path) -> None:
    (tmp_path / "bench.yaml").write_text(BENCH)
    done = run("bench.yaml", "--config", "random", "--jobs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    above, table, _ = done.stdout.partition("requests, 8 servers, 1 seed")
    assert "not looked at: api" in above
    assert table


def test_a_length_of_stages_that_nobody_asked_for_is_refused() -> None:
    done = run("demo", "--seconds", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--seconds is the length of the stages that --rate asks for" in done.stderr
