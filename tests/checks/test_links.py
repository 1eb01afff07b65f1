from __future__ import annotations

from pathlib import Path

from scripts.links import broken, slugs


def test_links_that_lead_nowhere_are_named_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# The first thing\n\n[up](../README.md) [gone](../gone.md)\n")
    (tmp_path / "README.md").write_text(
        "[a](docs/a.md) [there](docs/a.md#the-first-thing) [not there](docs/a.md#the-second-thing)\n"
        "[elsewhere](https://example.com/x) [mail](mailto:a@example.com) ![picture](docs/none.svg)\n"
        "[here](#here) [not here](#nowhere)\n\n## Here\n\n`[code](none.md)`\n\n```\n[code](none.md)\n```\n"
    )
    assert broken(tmp_path) == [
        "README.md: docs/a.md#the-second-thing (no such heading)",
        "README.md: docs/none.svg (no such file)",
        "README.md: #nowhere (no such heading)",
        "docs/a.md: ../gone.md (no such file)",
    ]


def test_headings_have_the_anchors_that_github_gives_them() -> None:
    text = "# What it's for\n\n## `epp serve`, and why\n\n## Same\n\n## Same\n\n### Déjà vu_2\n"
    assert slugs(text) == {"what-its-for", "epp-serve-and-why", "same", "same-1", "déjà-vu_2"}
