"""The folder of a report: what is refused before a run, and what is in it after one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from epp.cli import SimFlags, sim
from epp.errors import ConfigError
from epp.sim.outside.folder import html, report_folder, written
from tests.sim.test_plots import drawn

SHORT = SimFlags(rate=("10",), seconds=1.0, as_json=True)
FILES = ["distributions.svg", "index.html", "rates.svg", "report.json", "servers.svg", "shares.svg"]


def test_the_command_writes_a_page_with_all_that_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "report"
    flags = SimFlags(rate=("10,20",), seconds=2.0, as_json=True)
    assert sim("demo", config=("random", "oracle"), flags=flags, report=f"{folder}") == 0
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (folder / "report.json").read_text() == capsys.readouterr().out
    page = (folder / "index.html").read_text()
    for title in ("demo: ", "Between two tokens", "By stage", "Against random, seed by seed"):
        assert f"<caption>{title}" in page
    assert page.count("<svg ") == 4
    for file in folder.glob("*.svg"):
        assert file.read_text().split("<svg ", 1)[1] in page, file.name


def test_a_page_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    written(tmp_path, "t", {}, ["p"], [drawn("one", 1.0, 2.0)])
    page = (tmp_path / "index.html").read_text()
    links = re.findall(r"""(?:href|src)\s*=\s*["']([^"']*)""", page)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<script" not in page
    assert "url(http" not in page


def test_two_reports_of_one_run_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        flags = SimFlags(rate=("10",), seconds=2.0)
        assert sim("demo", config=("random",), flags=flags, servers=2, report=f"{tmp_path / name}") == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_where_no_folder_can_be_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ConfigError, match=r"--report .*: no folder can be made there: (File exists|Not a directory)"
        ):
            sim("demo", config=("random",), report=f"{path}")
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system is asked in its place."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="this folder cannot be written to"):
        report_folder(f"{tmp_path}")


def test_without_matplotlib_it_is_said_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from epp.sim.outside.folder import report_folder\n"
        "try: report_folder('nowhere')\nexcept Exception as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "--report needs matplotlib: pip install 'epp[sim]'\n"
    assert not Path("nowhere").exists()


def test_without_a_report_matplotlib_is_not_imported() -> None:
    code = (
        "import sys; from epp.cli import SimFlags, sim\n"
        "sim('demo', config=('random',), flags=SimFlags(rate=('10',), seconds=1.0))\n"
        "import epp.load.run; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_full_disk_is_named_and_the_result_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written first is written beside the file whose place it takes."""
    (tmp_path / "report.json").write_text("of an earlier run")
    (tmp_path / f".report.json.{os.getpid()}").symlink_to("/dev/full")
    assert sim("demo", config=("random",), flags=SHORT, report=f"{tmp_path}") == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["workload"] == "demo"
    assert told.err == f"epp: {tmp_path / 'report.json'} cannot be written: No space left on device\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of an earlier run"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.html").mkdir()
    assert not written(tmp_path, "t", {}, ["p"], ())
    assert capsys.readouterr().err == f"epp: {tmp_path / 'index.html'} cannot be written: Is a directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "report.json"]


def test_tables_and_texts_are_told_as_they_are() -> None:
    table = Table("policy", "x", title="a < b")
    table.columns[1].justify = "right"
    table.add_row("<script>", "1 & 2")
    told = html(Group(Text("bold", "bold"), table))
    assert told.splitlines() == [
        "<p>bold</p>",
        "<table><caption>a &lt; b</caption>",
        '<thead><tr><th>policy</th><th class="right">x</th></tr></thead>',
        "<tbody>",
        '<tr><td>&lt;script&gt;</td><td class="right">1 &amp; 2</td></tr>',
        "</tbody></table>",
    ]
