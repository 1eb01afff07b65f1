"""What one request costs: CPU of our picker on each transport, beside bare servers and the Go picker, in the same run.

`python -m bench.request [--rows light,duplex] [--seconds 3] [--subjects wire,grpcio,...] [--json FILE]`. All subjects
run behind one Envoy, and each row is measured in turns (ours, bare, ours, bare) of SECONDS each, with connections in a
closed loop and a prompt of its own for each request. CPU is utime and stime of the whole process, so ours includes
reading its servers' metrics pages every 50 ms: nearly nothing at thousands of requests a second, most of the figure in
the "stream" row, where the servers' pace leaves less than a hundred. The line below the table says how much it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, Literal

import cyclopts
import msgspec
import uvloop

from bench import report
from bench.load import Ask, closed_loop
from bench.subjects import BARE, GO, OURS, Others, Subject, chosen, cpu, model_servers, subject
from epp.demo import envoy
from epp.demo.child import Child
from epp.demo.envoy import Gateway, Picker, Response

SERVERS: Final = 4
TURNS: Final = 2
WARM_UP: Final = 1.0
"""Seconds for each subject before the turns of a row: connections open, caches fill."""
Mode = Literal["light", "duplex"]
RESPONSES: Final[dict[Mode, Response]] = {"light": "SEND/NONE/SEND", "duplex": "SEND/FULL_DUPLEX_STREAMED/SEND"}


class Row(msgspec.Struct, frozen=True):
    """One line of the table."""

    what: str
    mode: Mode
    ask: Ask = Ask()
    connections: int = 16


ROWS: Final = {
    "light": Row("100 B", "light"),
    "duplex": Row("100 B", "duplex"),
    "stream": Row("100 B, 100 chunks", "light", Ask(stream=True)),
    "duplex-stream": Row("100 B, 100 chunks", "duplex", Ask(stream=True)),
    "100k": Row("100 KB", "light", Ask(prompt_bytes=100_000)),
    "4m": Row("4 MB", "light", Ask(prompt_bytes=4_000_000), connections=4),
}


class Cost(msgspec.Struct):
    """What some requests to one subject cost; CPU in seconds."""

    row: str
    subject: str
    requests: int = 0
    seconds: float = 0.0
    picker: float = 0.0
    envoy: float = 0.0

    @property
    def picker_us(self) -> float:
        return 1e6 * self.picker / self.requests

    @property
    def envoy_us(self) -> float:
        return 1e6 * self.envoy / self.requests


class Bench:
    """All subjects behind one Envoy."""

    def __init__(self, subjects: Sequence[Subject], gateway: envoy.Envoy, servers: Child) -> None:
        self._subjects = subjects
        self._gateway = gateway
        self.others = Others([gateway.child.pid, servers.pid, *(each.process.pid for each in subjects)])

    async def measure(self, name: str, seconds: float) -> list[Cost]:
        """What a row costs, for each subject."""
        row = ROWS[name]
        costs = [Cost(name, each.name) for each in self._subjects]
        for each in self._subjects:
            await self._turn(row, each, Cost(name, each.name), WARM_UP)
        for _ in range(TURNS):
            for each, cost in zip(self._subjects, costs, strict=True):
                await self._turn(row, each, cost, seconds)
        return costs

    async def idle(self, seconds: float) -> dict[str, float]:
        """Cores that each of ours uses while nobody asks."""
        ours = {each.name: each.process.pid for each in self._subjects if each.name in OURS}
        before = {name: cpu(pid) for name, pid in ours.items()}
        await asyncio.sleep(seconds)
        return {name: (cpu(pid) - before[name]) / seconds for name, pid in ours.items()}

    async def _turn(self, row: Row, measured: Subject, cost: Cost, seconds: float) -> None:
        port = self._gateway.ports[f"{measured.name}-{row.mode}"]
        picker, gateway = measured.process.pid, self._gateway.child.pid
        before = cpu(picker), cpu(gateway)
        answers = await closed_loop(port, row.ask, seconds, row.connections)
        cost.picker += cpu(picker) - before[0]
        cost.envoy += cpu(gateway) - before[1]
        cost.requests += answers.answered
        cost.seconds += answers.seconds


@contextlib.asynccontextmanager
async def bench(names: Sequence[str], folder: Path) -> AsyncIterator[Bench]:
    """Start model servers, all subjects and Envoy."""
    async with contextlib.AsyncExitStack() as stack:
        servers, ports = await stack.enter_async_context(model_servers(SERVERS, folder))
        addresses = [f"127.0.0.1:{port}" for port in ports]
        subjects = [await stack.enter_async_context(subject(name, folder, addresses)) for name in names]
        envoy.write_endpoints(folder / "pool.json", addresses)
        gateways = [
            Gateway(
                name=f"{each.name}-{mode}",
                endpoints=folder / "pool.json",
                picker=Picker(address=each.address, response=response),
            )
            for each in subjects
            for mode, response in RESPONSES.items()
        ]
        gateway = await stack.enter_async_context(envoy.running(envoy.bootstrap(gateways), folder))
        yield Bench(subjects, gateway, servers)


async def run(rows: Sequence[str], names: Sequence[str], seconds: float, json: Path | None) -> None:
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as folder:
        async with bench(names, Path(folder)) as running:
            idle = await running.idle(seconds)
            for row in rows:
                costs += await running.measure(row, seconds)
            others = running.others.cores()
    report.write(json, "request", costs)
    to = [name for name in (*BARE, GO) if name in names]
    columns = ("prompt", "response", "who", "us/request", *(f"/ {name}" for name in to), "Envoy us", "requests/s")
    table = report.table("CPU of the picker process per request", *columns, texts=3)
    for row in rows:
        of_row = {cost.subject: cost for cost in costs if cost.row == row}
        for cost in of_row.values():
            table.add_row(*line(cost, of_row, to), end_section=cost is list(of_row.values())[-1])
    scraping = "".join(f" While nobody asks, {name} uses {used:.3f} cores." for name, used in idle.items())
    report.show(table, f"{SERVERS} model servers.{scraping} Others used {others:.2f} cores meanwhile.")


def line(cost: Cost, of_row: dict[str, Cost], to: Sequence[str]) -> tuple[str, ...]:
    row = ROWS[cost.row]
    ratios = (f"{cost.picker_us / of_row[name].picker_us:.2f}" for name in to)
    figures = (f"{cost.envoy_us:.0f}", f"{cost.requests / cost.seconds:.0f}")
    return (row.what, row.mode, cost.subject, f"{cost.picker_us:.0f}", *ratios, *figures)


def main(
    *,
    rows: str = ",".join(ROWS),
    subjects: str = ",".join((*OURS, *BARE, GO)),
    seconds: float = 3.0,
    json: Path | None = None,
) -> None:
    """Measure what one request costs.

    Parameters
    ----------
    rows
        Which, separated by commas.
    subjects
        Whom, separated by commas; "go" needs EPP_GO, the path of the reference picker's binary.
    seconds
        Of each turn.
    json
        File for the raw figures.
    """
    listed = rows.split(",")
    if unknown := [row for row in listed if row not in ROWS]:
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    uvloop.run(run(listed, chosen(subjects), seconds, json))


if __name__ == "__main__":
    cyclopts.run(main)
