"""The folder of `--report`: a page with tables and plots, the same plots as files, and the document for programs.

In: a path, and when the run is over its document, its tables and what to draw. Out: files.
Rules here:
- Whatever can be known to be wrong (no matplotlib, no such folder, no right to write there) is told before a run.
- What a run prints is printed before anything is written here: a full disk loses no result. The document is written
  first.
- The page holds all that it shows, and needs neither a network nor the files beside it.
- A file is whole, or what it was: it is written beside itself and put in its place, so neither a full disk, nor a
  kill, nor another run with the same folder leaves half of one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epp.errors import ConfigError
from epp.sim.samples import Shown

PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff }}
table {{ border-collapse: collapse; margin: .3rem 0 1.2rem; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto }}
caption {{ text-align: left; font-weight: 600; white-space: nowrap; padding: .4rem 0 }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: pre }}
.right {{ text-align: right }}
figure {{ margin: 2rem 0 }}
figure svg {{ width: 100%; height: auto }}
figcaption strong {{ display: block }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def report_folder(path: str) -> Path:
    """A folder to write to, made where there is none.

    Raises:
        ConfigError: it cannot be made or written to; or there is no matplotlib to draw with.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--report needs matplotlib: pip install 'epp[sim]'") from error
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report {path}: no folder can be made there: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--report {path}: this folder cannot be written to")
    return folder


def written(
    folder: Path, title: str, told: Mapping[str, Any], parts: Iterable[RenderableType], shown: Sequence[Shown]
) -> bool:
    """Write a report.

    Args:
        told: the document.
        parts: what a person reads of it.
        shown: what plots are drawn of; empty: there are none.

    Returns:
        Whether all of it was written; what could not be is named on standard error.
    """
    try:
        for name, content in _files(title, told, parts, shown):
            _write(folder / name, content)
    except OSError as error:
        print(f"epp: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # a disk that is full says so without
        raise
    finally:
        beside.unlink(missing_ok=True)


def _files(
    title: str, told: Mapping[str, Any], parts: Iterable[RenderableType], shown: Sequence[Shown]
) -> Iterator[tuple[str, bytes]]:
    yield "report.json", json.dumps(told).encode() + b"\n"
    body = [html(part) for part in parts]
    if shown:
        from epp.sim.outside.plots import plots

        for plot in plots(shown):
            yield plot.file, plot.svg
            body.append(_figure(plot.title, plot.says, plot.svg.decode()))
    yield "index.html", PAGE.format(title=escape(title), body="\n".join(body)).encode()


def _figure(title: str, says: str, svg: str) -> str:
    picture = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<figure>\n{picture}<figcaption><strong>{escape(title)}</strong>{escape(says)}</figcaption>\n</figure>"


def html(part: RenderableType) -> str:
    """What is printed on a terminal, for a page."""
    if isinstance(part, Group):
        return "\n".join(html(each) for each in part.renderables)
    if isinstance(part, Table):
        return _table(part)
    return f"<p>{_text(part)}</p>".replace("\n", " ")


def _table(table: Table) -> str:
    columns = list(table.columns)
    sides = ['<{0} class="right">' if column.justify == "right" else "<{0}>" for column in columns]

    def row(cells: Iterable[RenderableType], tag: str) -> str:
        told = (f"{side.format(tag)}{_text(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{''.join(told)}</tr>"

    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    head = row((column.header for column in columns), "th")
    rows = (row(cells, "td") for cells in zip(*(column.cells for column in columns), strict=True))
    return "\n".join((f"<table>{caption}", f"<thead>{head}</thead>", "<tbody>", *rows, "</tbody></table>"))


def _text(part: RenderableType | None) -> str:
    return escape(part.plain if isinstance(part, Text) else f"{part}")
