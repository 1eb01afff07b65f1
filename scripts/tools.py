"""Build what tests speak to the wire transport with, and PyPI does not have: h2spec, and a client on grpc-go.

In: tests/interop/go, where go.mod and go.sum pin every line that is compiled. Out: .tools/, beside it a note of what it
was built from, so that a binary of yesterday's source is not taken for today's.
Rules: this is the only step that may need the network (the Go module proxy, once); no test builds anything.
Rejected: a later h2spec. 2.2.1 is the last version that the module proxy lists.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "tests" / "interop" / "go"
OUT: Final = ROOT / ".tools"
NOTE: Final = OUT / "built-from"
PACKAGES: Final[Mapping[str, str]] = {
    "h2spec": "github.com/summerwind/h2spec/cmd/h2spec",
    "grpc-go-client": ".",
}
COMMAND: Final = "python -m scripts.tools"


def binary(name: str) -> Path | None:
    """Where a tool is; None: it is not built, or from another source than is there now."""
    path = OUT / name
    if not path.exists() or not NOTE.exists() or NOTE.read_text() != _digest():
        return None
    return path


def build() -> None:
    """Build every tool, what is current too, which Go's cache makes cheap.

    Raises:
        CalledProcessError: go has said why.
    """
    OUT.mkdir(exist_ok=True)
    NOTE.unlink(missing_ok=True)
    for name, package in PACKAGES.items():
        # -buildvcs=false: the binary is named by its source here, and git may not trust the folder's owner.
        command = ("go", "build", "-buildvcs=false", "-trimpath", "-mod=readonly", "-o", str(OUT / name), package)
        subprocess.run(command, cwd=SOURCE, env={**os.environ, "CGO_ENABLED": "0"}, check=True)  # noqa: S603 - our own words
    note()


def note() -> None:
    """Write down what the binaries were built from."""
    NOTE.write_text(_digest())


def _digest() -> str:
    whole = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        whole.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()


def main() -> int:
    if shutil.which("go") is None:
        print(
            f"Go is not installed: it builds {' and '.join(PACKAGES)} for tests/interop, which are skipped without "
            "them. Install Go 1.25 or later (https://go.dev/dl), or leave it: nothing else needs it.",
            file=sys.stderr,
        )
        return 1
    try:
        build()
    except subprocess.CalledProcessError as error:
        return error.returncode  # go has said why
    return 0


if __name__ == "__main__":
    sys.exit(main())
