"""What many pods cost the picker: to start with them, to watch them, to follow them, to list them all anew.

`python -m bench.pods [--pods 1000] [--json FILE]`, over a real API server (`make kube` once). Nothing listens on the
pods' addresses, so each is asked for its metrics page and refuses, every second or two: that is in "idle" and, for
as long as each of them lasts, in the parts after it, where "above idle" leaves it out. No Envoy asks for endpoints.

- start: from the process's begin until its health service says SERVING, and until all pods are listed.
- idle: the watches stand, nothing changes.
- flap: each pod not ready, then ready again; two changes a pod.
- move: each pod deleted and made anew under its name with another address; three changes a pod that a watch tells
  one by one (the end comes as a change and a deletion), and the two of a new pod.
- relist: etcd forgets the past, the API server is killed and started again; every list is read anew (410 Gone). Waits
  are the back-off's; CPU is what counts.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import cyclopts
import msgspec
import uvloop

from bench import report
from bench.subjects import Others, cpu, forget_peak, peak, resident
from scripts import tools
from tests.e2e.serving import Picker, until
from tests.kube.apiserver import ApiServer, api_server
from tests.kube.client import NAMESPACES, client, definitions
from tests.kube.cluster import PORT, Cluster, address, each, listed, picker, serves

NAMESPACE: Final = "models"
IDLE: Final = 10.0
"""Seconds."""
WITHIN: Final = 120.0
"""Seconds in which the picker must have followed."""
MOVED: Final = 20_000
"""What is added to the number of a pod's address each time it moves."""


class Figures(msgspec.Struct, frozen=True):
    """One line."""

    part: str
    pods: int
    changes: int
    """Events of the watch of pods."""
    took: float
    """Seconds."""
    behind: float
    """Of these, seconds after the last change was made until the picker had followed."""
    cpu: float
    """Seconds of CPU of the picker."""
    memory: int
    """Bytes, when the part had ended."""
    peak: int
    """Bytes, at most during the part."""
    others: float
    """Cores of everybody else, API server, etcd and this bench among them."""


class Pods:
    """A picker over the pods of one cluster."""

    def __init__(self, server: ApiServer, cluster: Cluster, folder: Path, count: int) -> None:
        self.figures: list[Figures] = []
        self._server = server
        self._cluster = cluster
        self._folder = folder
        self._count = count
        self._moved = 0
        self._picker: Picker | None = None

    async def run(self) -> None:
        """All parts, in order."""
        await self._cluster.pool()
        await each(range(self._count), lambda n: self._cluster.add(f"pod-{n}", address(n)))
        began = time.monotonic()
        async with picker(self._server, NAMESPACE, self._folder, "--secure-serving=false", "-v=0") as self._picker:
            others = Others((self._pid,))
            await serves(self._picker, WITHIN)
            self._keep("ready", 0, began, 0.0, 0.0, others)
            await until(self._listed, self._expected(), within=WITHIN)
            self._keep("listed", self._count, began, 0.0, 0.0, others)
            await self._measured("idle", 0, lambda: asyncio.sleep(IDLE))
            await self._measured("flap", 2, self._flap)
            await self._measured("move", 5, self._move)
            await self._measured("relist", 0, self._forget)

    async def _flap(self) -> None:
        for ready in ("False", "True"):

            async def turn(number: int, ready: str = ready) -> None:
                await self._cluster.be_ready(f"pod-{number}", self._at(number), ready)

            await each(range(self._count), turn)

    async def _move(self) -> None:
        self._moved += 1

        async def move(number: int) -> None:
            await self._cluster.delete(f"pod-{number}")
            await self._cluster.add(f"pod-{number}", self._at(number))

        await each(range(self._count), move)

    async def _forget(self) -> None:
        """The one who changes while the server is new is found only by who has listed all again."""
        await self._server.compact()
        await self._server.kill()
        await self._server.start()
        self._moved += 1
        await self._cluster.delete("pod-0")
        await self._cluster.add("pod-0", self._at(0))
        self._moved -= 1

    async def _measured(self, part: str, changes_a_pod: int, work: Callable[[], Awaitable[None]]) -> None:
        others = Others((self._pid,))
        forget_peak(self._pid)
        before, began = cpu(self._pid), time.monotonic()
        await work()
        done = time.monotonic()
        expected = self._expected()
        if part == "relist":
            expected[f"{NAMESPACE}/pod-0-rank-0"] = f"{address(MOVED * (self._moved + 1))}:{PORT}"
        await until(self._listed, expected, within=WITHIN)
        self._keep(part, changes_a_pod * self._count, began, time.monotonic() - done, before, others)

    def _keep(self, part: str, changes: int, began: float, behind: float, cpu_before: float, others: Others) -> None:
        pid, took = self._pid, time.monotonic() - began
        used = cpu(pid) - cpu_before
        memory = resident(pid), peak(pid)
        self.figures.append(Figures(part, self._count, changes, took, behind, used, *memory, others.cores()))

    def _at(self, number: int) -> str:
        return address(number + MOVED * self._moved)

    def _expected(self) -> dict[str, str]:
        return {f"{NAMESPACE}/pod-{n}-rank-0": f"{self._at(n)}:{PORT}" for n in range(self._count)}

    async def _listed(self) -> Mapping[str, str]:
        assert self._picker is not None
        await asyncio.sleep(0.2)  # a page of 1,000 endpoints is no small thing to ask of who is measured
        return await listed(self._picker)

    @property
    def _pid(self) -> int:
        assert self._picker is not None
        return self._picker.process.pid


async def measure(count: int) -> list[Figures]:
    """All parts with so many pods."""
    with tempfile.TemporaryDirectory() as folder:
        async with api_server(Path(folder)) as server, client(server.access()) as admin:
            await admin.install(definitions())
            await admin.create(NAMESPACES, {"metadata": {"name": NAMESPACE}})
            pods = Pods(server, Cluster(admin, NAMESPACE), Path(folder), count)
            await pods.run()
            return pods.figures


def row(line: Figures, idle: float) -> tuple[str, ...]:
    """
    Args:
        idle: cores that watching and scraping take while nothing changes.
    """
    sizes = (f"{size / 2**20:.0f}" for size in (line.memory, line.peak))
    above = max(0.0, line.cpu - idle * line.took)
    each_change = f"{1e6 * above / line.changes:.0f}" if line.changes and line.part != "listed" else "-"
    rates = f"{line.cpu:.2f}", f"{line.cpu / line.took:.2f}", each_change
    return (line.part, f"{line.pods}", f"{line.took:.1f}", f"{line.behind:.1f}", *rates, *sizes, f"{line.others:.2f}")


async def run(counts: list[int], json: Path | None) -> None:
    for name, found in (("kube-apiserver", tools.binary("kube-apiserver")), ("etcd", tools.system("etcd"))):
        if found is None:
            raise SystemExit(tools.missing(name))
    columns = ("pods", "s", "behind s", "CPU s", "cores", "us a change", "MiB", "peak MiB", "others")
    table = report.table("Pods in a real API server", "part", *columns)
    figures: list[Figures] = []
    for count in counts:
        lines = await measure(count)
        idle = next(line.cpu / line.took for line in lines if line.part == "idle")
        for line in lines:
            table.add_row(*row(line, idle))
        figures += lines
    report.write(json, "pods", figures)
    report.show(
        table,
        "ready, listed: since the process began. us a change: above what idle takes, per event of the watch of pods.",
        "behind: from the last change made to the picker's having followed, looked at every 0.2 s.",
        "Others: cores of the API server, etcd and this bench.",
    )


def main(*, pods: str = "100,1000", json: Path | None = None) -> None:
    """Measure what many pods cost.

    Parameters
    ----------
    pods
        How many, separated by commas.
    json
        File for the raw figures.
    """
    uvloop.run(run([int(each) for each in pods.split(",")], json))


if __name__ == "__main__":
    cyclopts.run(main)
