"""What open requests cost in memory: thousands of streams that wait for their model server, short and long prompts.

`python -m bench.memory [--streams 5000] [--subjects wire,...] [--json FILE]`. A client of our own (bench/client.py)
opens the streams over a few connections, each with a prompt of its own, and waits until each is decided and has its
body back. Memory is what the picker process occupies (RSS), read after a second of rest: before, while all are open,
and after all have ended, where what stays is what the allocator keeps for the next ones, and the prefix index. Each
line is a process of its own, since freed memory of an earlier load would hide a later one's. The queue scorer alone
keeps nothing of a prompt; the default profile remembers prefixes, up to the index's own limit. A few short prompts
come and go before the first reading, so that what is set up once is not counted. One 4 MB prompt is a line too: there
the peak counts, which is the most that the process occupied at any time.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Final

import cyclopts
import msgspec
import uvloop

from bench import report
from bench.client import Client
from bench.subjects import GO, OURS, PROFILE, chosen, forget_peak, model_servers, peak, resident, subject

CONNECTIONS: Final = 4
AT_ONCE: Final = 8
"""Streams that are being decided at any time; few, or their bodies would be measured too."""
REST: Final = 1.0
SERVERS: Final = 4
SHORT, LONG, HUGE = 100, 100_000, 4_000_000
WARM_UP: Final = 2 * AT_ONCE
PROFILES: Final = {"queue scorer": {"queue-scorer": 1.0}, "default": PROFILE}


class Figures(msgspec.Struct, frozen=True):
    """One line; bytes."""

    subject: str
    profile: str
    prompt: int
    streams: int
    before: int
    opened: int
    """While all streams are open."""
    after: int
    """After all have ended."""
    peak: int


class Streams:
    """Open streams of one picker."""

    def __init__(self, pid: int, clients: Sequence[Client]) -> None:
        self._pid = pid
        self._clients = clients
        self._numbers = count()

    async def hold(self, prompt: int, streams: int) -> tuple[int, int, int, int]:
        """Open so many, let go of them; RSS before, meanwhile, after, and at most."""
        before = await self._resident()
        forget_peak(self._pid)
        places = cycle(self._clients)
        opened: list[tuple[Client, int]] = []

        async def some(many: int) -> None:
            for _ in range(many):
                client = next(places)
                opened.append((client, await client.decided(self._prompt(prompt))))

        await asyncio.gather(*(some(len(range(at, streams, AT_ONCE))) for at in range(AT_ONCE)))
        meanwhile = await self._resident()
        for client, number in opened:
            client.reset(number)
        return before, meanwhile, await self._resident(), peak(self._pid)

    async def _resident(self) -> int:
        await asyncio.sleep(REST)
        return resident(self._pid)

    def _prompt(self, size: int) -> bytes:
        unique = b"%d, " % next(self._numbers)
        return (unique * (size // len(unique) + 1))[:size]


async def connect(address: str, streams: int) -> list[Client]:
    """As many connections as the picker wants for so many streams, and no fewer than a few."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, host, int(port)))[1] for _ in range(CONNECTIONS)]
    while sum([await client.capacity() for client in clients]) < streams:
        clients.append((await loop.create_connection(Client, host, int(port)))[1])
    return clients


async def measure(name: str, profile: str, prompt: int, streams: int) -> Figures:
    """One line, on a new picker."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            model_servers(SERVERS, Path(folder)) as (_, ports),
            subject(name, Path(folder), [f"127.0.0.1:{port}" for port in ports], scorers=PROFILES[profile]) as picker,
        ):
            clients = await connect(picker.address, streams)
            held = Streams(picker.process.pid, clients)
            await held.hold(SHORT, WARM_UP)
            figures = Figures(name, profile, prompt, streams, *await held.hold(prompt, streams))
            for client in clients:
                client.close()
            return figures


async def run(names: Sequence[str], streams: int, json: Path | None) -> None:
    figures = [
        await measure(name, profile, prompt, many)
        for name in names
        for profile in PROFILES
        for prompt, many in ((SHORT, streams), (LONG, streams), (HUGE, 1))
    ]
    report.write(json, "memory", figures)
    columns = ("before MiB", "open MiB", "after MiB", "peak MiB", "KiB a stream", "KiB stay")
    table = report.table("Streams that wait for their model server", "who", "profile", "what", *columns, texts=3)
    for each in figures:
        sizes = (f"{size / 2**20:.1f}" for size in (each.before, each.opened, each.after, each.peak))
        per_stream = (f"{(size - each.before) / 1024 / each.streams:.1f}" for size in (each.opened, each.after))
        table.add_row(each.subject, each.profile, f"{each.streams:,} of {each.prompt:,} B", *sizes, *per_stream)
    report.show(table)


def main(*, subjects: str = ",".join((*OURS, GO)), streams: int = 5000, json: Path | None = None) -> None:
    """Measure what open requests cost in memory.

    Parameters
    ----------
    subjects
        Whom, separated by commas; "go" needs EPP_GO, the path of the reference picker's binary.
    streams
        How many are open at once.
    json
        File for the raw figures.
    """
    uvloop.run(run(chosen(subjects), streams, json))


if __name__ == "__main__":
    cyclopts.run(main)
