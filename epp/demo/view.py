"""The demo's live picture in a terminal.

In: the phase that runs, what the servers' metrics pages and the picker's debug pages say. Out: one rich renderable.
Rules: it only looks; what cannot be read this time is shown as it was.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from epp.demo.phases import Phase
from epp.demo.site import Site
from epp.endpoints.table import Page
from epp.load.client import Load
from epp.load.results import Result, percentile
from epp.signals.page import read_page, recognise
from epp.sim.workload import DEMO

INTERVAL = 0.5
"""Seconds between two looks."""
RECENT = 10.0
"""Seconds of answers that the shown figures are about."""
BAR = 12
DECISIONS = 6


class View:
    """Looks at the site and draws it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._pages: dict[str, Page] = {}
        self._decisions: list[dict[str, Any]] = []
        self.phase: Phase | None = None

    async def look(self, session: aiohttp.ClientSession) -> None:
        """Read every page once."""
        site = self._site
        await asyncio.gather(*(self._look_at(session, address) for address in (*site.left, *site.right)))
        try:
            async with session.get(f"{site.pages}/debug/decisions?n={DECISIONS}") as response:
                self._decisions = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return

    async def _look_at(self, session: aiohttp.ClientSession, address: str) -> None:
        try:
            async with session.get(f"http://{address}/metrics") as response:
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return
        engine = recognise(text)
        if engine is not None:
            self._pages[address] = read_page(text, engine)

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(self) -> RenderableType:
        """The whole picture."""
        if self.phase is None:
            return Text("starting…")
        return Group(self._head(self.phase), self._fleets(self.phase), self._figures(self.phase), self._why())

    def _head(self, phase: Phase) -> RenderableType:
        names = {"demo": "shared prefixes, chats, adapters", "no-sharing": "every prompt is new"}
        left = max(0.0, phase.started_at + phase.seconds - time.monotonic())
        head = Text.assemble(
            ("  epp demo  ", "bold reverse"),
            f"  {names.get(phase.workload.name, phase.workload.name)}, {phase.workload.rate:g} requests/s on each side",
            f", {left:.0f} s left in this phase\n",
            ("  try it: ", "dim"),
            try_it(self._site),
        )
        for note in self._site.notes:
            head.append(f"\n  {note}", "yellow")
        return head

    def _fleets(self, phase: Phase) -> RenderableType:
        both = Table.grid(padding=(0, 2))
        both.add_row(
            self._fleet("the picker's servers", self._site.left, phase, phase.picker, "green"),
            self._fleet("round robin's servers", self._site.right, phase, phase.round_robin, "magenta"),
        )
        return both

    def _fleet(self, title: str, addresses: tuple[str, ...], phase: Phase, load: Load, colour: str) -> RenderableType:
        table = Table(title=title, title_style=f"bold {colour}", expand=False)
        for column in ("server", "queue", "running", "KV cache", "answers"):
            table.add_column(column, justify="right" if column != "KV cache" else "left")
        answers = [result.served_by for result in _recent(load, phase)]
        for n, address in enumerate(addresses):
            page = self._pages.get(address, Page())
            queue = page.waiting or 0.0
            table.add_row(
                f"{n}",
                Text(f"{queue:.0f}", "red" if queue >= 5 else ""),
                f"{page.running or 0:.0f}",
                _bar(page.kv_usage or 0.0, colour),
                f"{answers.count(address) / RECENT:.1f}/s",
            )
        return table

    def _figures(self, phase: Phase) -> RenderableType:
        table = Table(title=f"last {RECENT:.0f} s", title_style="bold")
        for column in ("", "TTFT p50", "TTFT p90", "from cache", "in flight", "answered", "failed"):
            table.add_column(column, justify="left" if not column else "right")
        for name, load, colour in (
            ("picker", phase.picker, "green"),
            ("round robin", phase.round_robin, "magenta"),
        ):
            recent = _recent(load, phase)
            ttfts = [result.ttft for result in recent if result.ttft is not None]
            prompt = sum(result.prompt_tokens for result in recent)
            cached = sum(result.cached_tokens for result in recent)
            table.add_row(
                Text(name, f"bold {colour}"),
                _seconds(percentile(ttfts, 0.5)),
                _seconds(percentile(ttfts, 0.9)),
                f"{cached / prompt:.0%}" if prompt else "",
                f"{load.in_flight}",
                f"{len(load.results)}",
                Text(f"{load.errors}", "bold red" if load.errors else ""),
            )
        return table

    def _why(self) -> RenderableType:
        """The last decisions: where each went, and what each scorer gave the winner and the runner-up."""
        lines = Text()
        servers = {address: n for n, address in enumerate(self._site.left)}
        for decision in self._decisions:
            lines.append_text(_explained(decision, servers))
        lines.rstrip()
        return Panel(lines, title="why (latest first)", title_align="left", expand=False)


def try_it(site: Site) -> str:
    """A line for a person's own shell."""
    body = f'{{"model":"{DEMO.model}","messages":[{{"role":"user","content":"hello"}}]}}'
    return f"curl -s {site.picker_url}/v1/chat/completions -d '{body}'"


def _explained(decision: dict[str, Any], servers: dict[str, int]) -> Text:
    scored = [candidate for candidate in decision["candidates"] if "total" in candidate]
    by_total = sorted(range(len(scored)), key=lambda i: -scored[i]["total"])
    first = next(i for i in by_total if scored[i]["address"] == decision["endpoints"][0])
    line = Text(f"{decision['target_model']:>10} → server {servers.get(scored[first]['address'], '?')}  ", "bold")
    parts = [
        f"{scorer['name'].partition('-')[0]} {scorer['weight'] * scorer['scores'][first]:.1f}"
        for scorer in decision["scorers"]
        if "scores" in scorer
    ]
    line.append(f"{scored[first]['total']:.2f} = " + " + ".join(parts), "")
    if decision["prompt_tokens"]:
        line.append(f", {decision['matched_tokens'] / decision['prompt_tokens']:.0%} of the prompt held", "cyan")
    second = next((i for i in by_total if i != first), None)
    if second is not None:
        line.append(f"   next: server {servers.get(scored[second]['address'], '?')}", "dim")
        line.append(f" {scored[second]['total']:.2f}", "dim")
    line.append("\n")
    return line


def _recent(load: Load, phase: Phase) -> list[Result]:
    since = time.monotonic() - phase.started_at - RECENT
    results = load.results
    first = len(results)
    while first and results[first - 1].ended_at >= since:
        first -= 1
    return results[first:]


def _bar(share: float, colour: str) -> Text:
    full = round(share * BAR)
    return Text.assemble(("█" * full, colour), ("░" * (BAR - full), "dim"), f" {share:4.0%}")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
