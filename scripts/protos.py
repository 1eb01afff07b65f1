"""Generate epp/pb from protos/, or with --check see that what is there is what would be generated.

protoc sees protos/ under the name epp/pb, so that generated modules know their own package.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

PACKAGE: Final = Path("epp/pb")
SOURCES: Final = Path("protos")


def generate(root: Path, out: Path) -> None:
    """Write PACKAGE below `out`. Raises CalledProcessError; protoc has said why."""
    names = [str(PACKAGE / file.name) for file in sorted((root / SOURCES).glob("*.proto"))]
    options = [f"-I{PACKAGE}={SOURCES}", f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, *names], check=True, cwd=root)  # noqa: S603 - our own words


def differing(root: Path) -> list[str]:
    """What is missing, left over or not current in PACKAGE."""
    with tempfile.TemporaryDirectory() as folder:
        generate(root, Path(folder))
        wanted = {file.name: file.read_bytes() for file in (Path(folder) / PACKAGE).iterdir()}
    present = {file.name: file.read_bytes() for file in (root / PACKAGE).glob("*_pb2.py*")}
    return sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))


def main(argv: list[str]) -> int:
    root = Path(__file__).parent.parent
    if argv != ["--check"]:
        generate(root, root)
        return 0
    stale = differing(root)
    for name in stale:
        print(f"{PACKAGE / name} is not what {SOURCES} generates: run `make protos`", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
