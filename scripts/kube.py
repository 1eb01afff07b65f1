"""Build a real API server of Kubernetes, which tests/kube talk to.

In: tests/kube/go, where go.mod names the version and go.sum pins every line that is compiled. Out: kube-apiserver in
.tools/, beside it a note of what it was built from. etcd, which it stores in, is the system's.
Rules: this is the only step that may need the network (the Go module proxy, once); no test builds anything.
Rejected: a cluster in containers (needs a container engine, a kubelet and minutes, and no test here runs a pod);
envtest's ready-made binaries (an archive from one more place, which nothing pins).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "tests" / "kube" / "go"
BINARY: Final = ROOT / ".tools" / "kube-apiserver"
NOTE: Final = BINARY.with_suffix(".built-from")
PACKAGE: Final = "k8s.io/kubernetes/cmd/kube-apiserver"
COMMAND: Final = "python -m scripts.kube"
NO_GO: Final = (
    "Go is not installed: it builds kube-apiserver for tests/kube, which are skipped without it. "
    "Install Go 1.25 or later (https://go.dev/dl), or leave it: nothing else needs it."
)
NO_ETCD: Final = "etcd is not installed: the API server of tests/kube stores in it. Debian: apt-get install etcd-server"


def binary() -> Path | None:
    """Where kube-apiserver is; None: it is not built, or from another source than is there now."""
    if not BINARY.exists() or not NOTE.exists() or NOTE.read_text() != _digest():
        return None
    return BINARY


def etcd() -> Path | None:
    """Where etcd is; None: the system has none."""
    found = shutil.which("etcd")
    return None if found is None else Path(found)


def version() -> str:
    """The version of Kubernetes that go.mod asks for: 1.35.4.

    Raises:
        AssertionError: it asks for none.
    """
    found = re.search(r"^require k8s\.io/kubernetes v(\S+)$", (SOURCE / "go.mod").read_text(), re.MULTILINE)
    assert found is not None, f"no line `require k8s.io/kubernetes v1.x.y` in {SOURCE / 'go.mod'}"
    return found[1]


def build() -> None:
    """Build it, what is current too, which Go's cache makes cheap.

    Raises:
        CalledProcessError: go has said why.
    """
    BINARY.parent.mkdir(exist_ok=True)
    NOTE.unlink(missing_ok=True)
    flags = ("-buildvcs=false", "-trimpath", "-mod=readonly", "-ldflags", _told(version()))
    command = ("go", "build", *flags, "-o", str(BINARY), PACKAGE)
    subprocess.run(command, cwd=SOURCE, env={**os.environ, "CGO_ENABLED": "0"}, check=True)  # noqa: S603 - our own words
    note()


def note() -> None:
    """Write down what the binary was built from."""
    NOTE.write_text(_digest())


def _told(number: str) -> str:
    """The linker flags that tell the server its version, which it reports at /version; no symbols: a third smaller."""
    major, minor, _ = number.split(".", 2)
    told = {"gitVersion": f"v{number}", "gitMajor": major, "gitMinor": minor}
    return " ".join(("-s -w", *(f"-X k8s.io/component-base/version.{name}={value}" for name, value in told.items())))


def _digest() -> str:
    whole = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        whole.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()


def main() -> int:
    if etcd() is None:
        print(NO_ETCD, file=sys.stderr)  # and go on: it may come later
    if shutil.which("go") is None:
        print(NO_GO, file=sys.stderr)
        return 1
    try:
        build()
    except subprocess.CalledProcessError as error:
        return error.returncode  # go has said why
    return 0 if etcd() is not None else 1


if __name__ == "__main__":
    sys.exit(main())
