"""Attributes of endpoints: columns that a configuration adds, each told by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from epp.endpoints.table import Endpoint, EndpointTable, Page


def table(*names: str, **attributes: float) -> EndpointTable:
    made = EndpointTable(freshness=2.0, attributes=attributes)
    made.replace([Endpoint(name, f"10.0.0.{i}:80") for i, name in enumerate(names)], 0.0)
    return made


def told(made: EndpointTable, slot: int, now: float, **values: float) -> None:
    made.attributes_told(slot, made.generation(slot), values.items(), now)


def known(made: EndpointTable, name: str, now: float) -> list[float | None]:
    values, mask = made.candidates(now).column(name)
    assert np.isnan(values[~mask]).all()
    return [value if there else None for value, there in zip(values.tolist(), mask.tolist(), strict=True)]


def test_what_was_never_told_is_unknown() -> None:
    made = table("a", "b", heat=2.0)
    assert known(made, "heat", 1.0) == [None, None]
    told(made, 1, 1.0, heat=-3.5)
    assert known(made, "heat", 1.0) == [None, -3.5]


def test_there_are_no_others() -> None:
    with pytest.raises(KeyError):
        table("a").candidates(0.0).column("heat")
    made = table("a", heat=2.0)
    told(made, 0, 0.0, cold=1.0)
    with pytest.raises(KeyError):
        made.candidates(0.0).column("cold")


def test_each_has_its_own_limit_of_age() -> None:
    made = table("a", heat=2.0, cost=30.0)
    told(made, 0, 10.0, heat=1.0, cost=5.0)
    assert (known(made, "heat", 12.0), known(made, "cost", 12.0)) == ([1.0], [5.0])
    assert (known(made, "heat", 12.1), known(made, "cost", 40.0)) == ([None], [5.0])
    assert known(made, "cost", 40.1) == [None]
    assert known(made, "heat", 12.0) == [1.0]


def test_a_page_tells_those_of_its_engine_and_no_others() -> None:
    made = table("a", heat=2.0, cost=2.0)
    told(made, 0, 1.0, cost=5.0)
    made.page_told(0, made.generation(0), Page(waiting=1.0, attributes=(("heat", 7.0),)), 1.0)
    assert (known(made, "heat", 1.0), known(made, "cost", 1.0)) == ([7.0], [5.0])
    made.page_told(0, made.generation(0), Page(attributes=(("heat", math.nan),)), 1.5)
    assert (known(made, "heat", 1.5), known(made, "cost", 1.5)) == ([None], [5.0])


def test_a_slot_with_another_meaning_knows_nothing() -> None:
    made = table("a", heat=2.0)
    generation = made.generation(0)
    told(made, 0, 1.0, heat=7.0)
    made.replace([Endpoint("b", "10.0.0.9:80")], 1.0)
    assert made.listed.tolist() == [0]
    assert known(made, "heat", 1.0) == [None]
    made.attributes_told(0, generation, [("heat", 8.0)], 1.0)  # of the endpoint that left
    assert known(made, "heat", 1.0) == [None]


def test_a_table_that_grows_keeps_them() -> None:
    made = table("a", heat=2.0)
    told(made, 0, 1.0, heat=7.0)
    made.replace([Endpoint("a", "10.0.0.0:80"), *(Endpoint(f"n{i}", f"10.0.1.{i}:80") for i in range(40))], 1.0)
    assert known(made, "heat", 1.0) == [7.0, *[None] * 40]
    told(made, 40, 1.0, heat=1.0)
    assert known(made, "heat", 1.0)[40] == 1.0


def test_candidates_keep_what_they_read() -> None:
    made = table("a", "b", heat=2.0)
    told(made, 1, 1.0, heat=7.0)
    few = made.candidates(1.0).keep(np.array([False, True]))
    values, mask = few.column("heat")
    told(made, 1, 1.0, heat=9.0)
    assert (values.tolist(), mask.tolist()) == ([7.0], [True])
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = False


def test_a_page_of_attributes_alone_says_something() -> None:
    assert Page().says_nothing
    assert Page(attributes=(("heat", math.nan), ("cost", math.nan))).says_nothing
    assert not Page(attributes=(("heat", math.nan), ("cost", 0.0))).says_nothing
    assert not Page(waiting=0.0, attributes=(("heat", math.nan),)).says_nothing
