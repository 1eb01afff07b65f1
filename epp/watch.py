"""Files that may change while the picker runs.

In: paths, and a look at them from time to time. Out: they have changed, and nobody is writing them any more.
Rules here:
- A file is known by inode, size and time: that sees a rename, a write in place and the swap of a mounted volume's
  symlink alike, for a few microseconds a look.
- Two looks in a row must see the same, so that half a file that is being written is not taken for a small one.
Rejected: inotify (a library, and it needs the folder of each symlink on the way watched too).
"""

from __future__ import annotations

from pathlib import Path

Signature = tuple[tuple[int, int, int] | None, ...]
"""Of each file, None where there is none."""


class FileWatch:
    """Says when files are others than those that were taken."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self.take()

    def take(self) -> None:
        """The files are about to be read as they are now."""
        self._taken = self._last = self._look()

    def refuse(self) -> None:
        """What was read is of no use: as soon as the files rest they count as changed again."""
        self._taken = ()

    def has_changed(self) -> bool:
        """Look; True once for each change, and then the files count as taken."""
        before, self._last = self._last, self._look()
        if self._last == self._taken or self._last != before:
            return False
        self._taken = self._last
        return True

    def _look(self) -> Signature:
        return tuple(map(_signature, self._paths))


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
