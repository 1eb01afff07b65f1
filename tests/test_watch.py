"""Files that change: written in place, renamed, swapped by a symlink, and half of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from epp.watch import FileWatch


def test_a_file_that_is_being_written_has_not_changed_yet(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    watch = FileWatch(path)
    assert not watch.has_changed()
    for more in ("endpoints: [{name: a, address: 10.0.0.1, port: 1}", ", {name: b, address: 10.0.0.2, port: 1}", "]"):
        with path.open("a") as stream:
            stream.write(more)
        assert not watch.has_changed()
    assert watch.has_changed()
    assert not watch.has_changed()


def test_any_of_several_files_counts_and_so_does_one_that_goes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("1")
    watch = FileWatch(first, second)
    second.write_text("22")
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]
    first.unlink()
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize("swapped", ["link", "rename"])
def test_the_swap_of_a_symlink_and_a_rename_are_changes_though_size_and_time_are_the_same(
    swapped: str, tmp_path: Path
) -> None:
    """A mounted ConfigMap or Secret: the file is a link into a folder that is itself reached by a link."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        os.utime(tmp_path / name / "file", ns=(1, 1))
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "file").symlink_to("..data/file")
    watch = FileWatch(tmp_path / "file")
    if swapped == "link":
        (tmp_path / "..tmp").symlink_to("new")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
    else:
        (tmp_path / "new" / "file").rename(tmp_path / "old" / "file")
    assert (tmp_path / "file").read_text() == "new"
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]


def test_what_was_refused_counts_as_changed_again_once_it_rests(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("good")
    watch = FileWatch(path)
    path.write_text("bad")
    assert [watch.has_changed() for _ in range(2)] == [False, True]
    watch.refuse()
    assert watch.has_changed()
    watch.refuse()
    path.write_text("still being written")
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]


def test_a_change_before_the_files_are_taken_is_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    watch = FileWatch(path)
    path.write_text("read at start")
    watch.take()
    assert [watch.has_changed() for _ in range(3)] == [False] * 3
