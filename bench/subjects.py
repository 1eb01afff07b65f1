"""Who is measured: pickers as processes of their own, and what each has used so far.

In: names of subjects ("wire", "grpcio": `epp serve` on that transport; "bare wire", "bare grpc": the yardsticks;
"go": the reference, when EPP_GO names its binary) and the model servers. Out: running processes.
Rules here: every subject serves plaintext, logs nothing per request, and reads the same configuration, which is the
default profile; the bare ones read none. CPU is utime and stime of the whole process, all threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final

from epp.demo.child import Child, child, free_ports
from tests.e2e import serving

PROFILE: Final = {"queue-scorer": 2.0, "kv-cache-utilization-scorer": 2.0, "prefix-cache-scorer": 3.0}
"""The picker's default profile, and the reference's."""
OURS: Final = ("wire", "grpcio")
BARE: Final = {"bare wire": "bench.wire", "bare grpc": "bench.bare"}
GO: Final = "go"
PAGE: Final = Path(__file__).parents[1] / "tests" / "data" / "vllm-0.32.0" / "metrics-busy-0.txt"
FLAGS: Final = ("--secure-serving=false", "-v=0")
TICKS: Final = os.sysconf("SC_CLK_TCK")


class Subject:
    """A running picker."""

    def __init__(self, name: str, process: Child, address: str) -> None:
        self.name = name
        self.process = process
        self.address = address
        """ip:port of its ext_proc service."""


def chosen(names: str) -> list[str]:
    """Names, separated by commas, as a list; "go" only where EPP_GO is set. Raises ValueError on an unknown one."""
    listed = [name.strip() for name in names.split(",")]
    for name in listed:
        if name not in (*OURS, *BARE, GO):
            raise ValueError(f"{name!r} is no subject; there are {', '.join((*OURS, *BARE, GO))}")
    return [name for name in listed if name != GO or os.environ.get("EPP_GO")]


@contextlib.asynccontextmanager
async def subject(
    name: str, folder: Path, endpoints: Iterable[str], *flags: str, scorers: dict[str, float] = PROFILE
) -> AsyncIterator[Subject]:
    """Run one, ready when the block begins.

    Args:
        flags: for `epp serve` and the reference, which has the same ones.
    """
    addresses = list(endpoints)
    if name in OURS:
        given = (*FLAGS, f"--transport={name}", *flags)
        async with serving.picker(folder, name, addresses, *given, scorers=scorers) as picker:
            yield Subject(name, picker.process, picker.address)
    elif name in BARE:
        (port,) = free_ports(1)
        command = (sys.executable, "-m", BARE[name], f"127.0.0.1:{port}", addresses[0])
        async with child(name.replace(" ", "-"), *command, folder=folder) as process:
            await process.until(lambda: _listens(port), "port")
            yield Subject(name, process, f"127.0.0.1:{port}")
    else:
        async with _go(folder, addresses, scorers, flags) as running:
            yield running


@contextlib.asynccontextmanager
async def model_servers(count: int, folder: Path, host: str = "127.0.0.1") -> AsyncIterator[tuple[Child, list[int]]]:
    """Run `bench.servers`; the process and its ports."""
    command = (sys.executable, "-m", "bench.servers", str(count), str(PAGE), host)
    async with child("servers", *command, folder=folder) as process:

        async def listening() -> bool:
            return len(process.output().split()) == count

        await process.until(listening, "ports")
        yield process, [int(port) for port in process.output().split()]


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Others:
    """What everybody else on this machine uses meanwhile: where it is not near zero, figures are not to be trusted."""

    def __init__(self, pids: Iterable[int]) -> None:
        """
        Args:
            pids: the processes that the bench started.
        """
        self._pids = tuple(pids)
        self._began = time.monotonic()
        self._before = self._used()

    def cores(self) -> float:
        """Cores used by others since this was made."""
        return max(0.0, (self._used() - self._before) / (time.monotonic() - self._began))

    def _used(self) -> float:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]  # user nice system idle iowait irq softirq steal
        everybody = sum(map(int, fields[:3] + fields[5:])) / TICKS
        return everybody - time.process_time() - sum(map(cpu, self._pids))


def resident(pid: int) -> int:
    """Bytes of memory that a process occupies."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(pid: int) -> int:
    """Bytes that a process has occupied at most since `forget_peak`, or since it began."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


@contextlib.asynccontextmanager
async def _go(
    folder: Path, endpoints: list[str], scorers: dict[str, float], flags: Sequence[str]
) -> AsyncIterator[Subject]:
    """The reference picker over file discovery, which needs no cluster. It wants traces off, or it prints each one."""
    listing, config = folder / "go.endpoints.yaml", folder / "go.yaml"
    serving.write_listing(listing, endpoints)
    config.write_text(serving.configuration(listing, scorers))
    ports = free_ports(3)
    options = ("--grpc-port", "--grpc-health-port", "--metrics-port")
    command = (
        os.environ["EPP_GO"],
        "--pool-name=pool",
        f"--config-file={config}",
        *(f"{option}={port}" for option, port in zip(options, ports, strict=True)),
        "--tracing=false",
        *FLAGS,
        *flags,
    )
    async with child(GO, *command, folder=folder) as process:
        picker = serving.Picker(process, *ports)

        async def ready() -> bool:
            return await picker.serving() == "SERVING"

        await process.until(ready, "SERVING from its health service")
        yield Subject(GO, process, picker.address)
