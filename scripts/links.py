"""See that every relative link in the Markdown files leads somewhere, to a heading too where it names one.

Links to other hosts are not followed: a check must not depend on the internet.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

SKIPPED: Final = (".venv", ".git", "build", "dist", "out", "node_modules")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def broken(root: Path) -> list[str]:
    """ "file: link (why)", for every link below `root` that leads nowhere."""
    files = [file for file in sorted(root.rglob("*.md")) if file.relative_to(root).parts[0] not in SKIPPED]
    return [f"{file.relative_to(root)}: {link} ({why})" for file in files for link, why in _broken_in(file)]


def slugs(text: str) -> set[str]:
    """Anchors of a text's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    anchors = set()
    tokens = MarkdownIt().parse(text)
    for token, inline in pairwise(tokens):
        if token.type != "heading_open":
            continue
        words = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        anchors.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return anchors


def _broken_in(file: Path) -> Iterator[tuple[str, str]]:
    for link in _links(MarkdownIt().parse(file.read_text())):
        if _ELSEWHERE.match(link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (file.parent / path) if path else file
        if not target.exists():
            yield link, "no such file"
        elif anchor and target.suffix == ".md" and anchor not in slugs(target.read_text()):
            yield link, "no such heading"


def _links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        for name in ("href", "src"):
            value = token.attrGet(name)
            if isinstance(value, str):
                yield value
        yield from _links(token.children or [])


def main() -> int:
    found = broken(Path(__file__).parent.parent)
    for line in found:
        print(line, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
