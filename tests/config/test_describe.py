"""The catalogue in words: everything is described, and the page is the one that is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from epp.config.describe import Parameter, described, descriptions, explained, listed, page, parameters
from epp.config.known import FURTHER, KNOWN
from epp.scheduling.catalogue import BUILT_IN, catalogue
from epp.scheduling.plugin import Params, ProfileRef, Ref
from epp.units import Duration, Quantity

ROOT = Path(__file__).parents[2]


class Inner(Params, frozen=True):
    decode: Annotated[str, ProfileRef()] = "decode"
    """A profile."""


class Outer(Params, frozen=True):
    needed: Annotated[int, msgspec.Meta(ge=1)]
    """So many."""
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """A share,
    on two lines."""
    open_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    mode: Literal["a", "b"] = "a"
    """A mode."""
    inner: Inner = Inner()
    """A section."""
    many: tuple[Inner, ...] = ()
    """Sections."""
    names: tuple[str, ...] = ()
    """Names."""
    reader: Annotated[str, Ref("producer")] = ""
    """Who reads."""
    wait: Duration = "1s"
    """How long."""
    size: Quantity = 0
    """How much."""
    on: bool = True
    """Whether."""


def test_parameters_are_described_from_their_types_and_docstrings() -> None:
    assert [(one.name, one.kind, one.default, one.doc) for one in parameters(Outer)] == [
        ("needed", "whole number, at least 1", "", "So many."),
        ("share", "number 0..1", "0.5", "A share, on two lines."),
        ("openShare", "number above 0..1", "0.5", ""),
        ("mode", "one of a, b", '"a"', "A mode."),
        ("inner", "section", "-", "A section."),
        ("inner.decode", "name of a profile", '"decode"', "A profile."),
        ("many", "list of sections", "[]", "Sections."),
        ("many[].decode", "name of a profile", '"decode"', "A profile."),
        ("names", "list of texts", "[]", "Names."),
        ("reader", "name of a plugin (producer)", '""', "Who reads."),
        ("wait", "duration", '"1s"', "How long."),
        ("size", "quantity", "0", "How much."),
        ("on", "true or false", "true", "Whether."),
    ]


@pytest.mark.parametrize("each", descriptions(catalogue()), ids=lambda each: each.type)
def test_every_type_and_every_parameter_says_what_it_is_for(each: msgspec.Struct) -> None:
    about = described(str(getattr(each, "type", "")), catalogue())
    assert about.doc
    assert about.kinds
    undocumented: list[Parameter] = [one for one in about.parameters if not one.doc]
    assert undocumented == []


def test_what_is_known_is_not_ours_and_what_has_further_kinds_is() -> None:
    ours = {plugin.name for plugin in BUILT_IN}
    assert ours.isdisjoint(KNOWN)
    assert ours | set(KNOWN) >= set(FURTHER)


def test_one_type_is_printed_in_full() -> None:
    assert explained(described("file-discovery", catalogue())) == (
        "file-discovery (discovery)\n\nEndpoints from a file instead of Kubernetes.\n\nParameters:\n"
        "  path: text; required\n      The endpoints file.\n"
        "  watchFile: true or false; default false\n      Read the file again whenever it changes."
    )
    told = explained(described("dcgm-data-source", catalogue()))
    assert "Experimental: it needs --allow-experimental-plugins.\n" in told


def test_the_list_has_a_line_for_each_type() -> None:
    lines = listed(descriptions(catalogue())).splitlines()
    assert [line.split()[0] for line in lines] == [each.type for each in descriptions(catalogue())]
    assert all(line == line.rstrip() for line in lines)


def test_the_page_of_the_documentation_is_the_generated_one() -> None:
    """Else: `epp plugins --markdown > docs/plugins.md`."""
    assert (ROOT / "docs" / "plugins.md").read_text() == page(descriptions(catalogue()))
