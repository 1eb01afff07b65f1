"""Draw docs/demo.svg: the demo's live view, as it is after some seconds of its first phase.

`python -m scripts.picture [SECONDS]`
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
import tempfile
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console

from epp.demo.phases import Phase
from epp.demo.site import running
from epp.demo.view import View
from epp.sim.workload import DEMO

PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"
WIDTH = 132


async def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "eds").mkdir()
        async with running(Path(folder), DEMO, seed=1) as site, aiohttp.ClientSession() as session:
            view = View(site)
            view.phase = phase = Phase(DEMO, seconds + 40, seed=1)
            load = asyncio.create_task(phase.run(site))
            await asyncio.sleep(seconds)
            await view.look(session)
            console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
            console.print(view.draw())
            load.cancel()
            await asyncio.wait([load])
    svg = console.export_svg(title="epp demo")
    # Fonts come from the reader's machine, not from a CDN; generated ids would change with every run.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"terminal-\d+", "terminal", svg)
    PICTURE.write_text("\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n")


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0))
