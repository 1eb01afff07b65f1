"""The debug page of endpoints."""

from __future__ import annotations

from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.telemetry.views import endpoints


def test_attributes_stand_beside_the_columns_whatever_they_are_called() -> None:
    table = EndpointTable(attributes={"name": 2.0, "Heat": 2.0})
    slot = table.put(Endpoint("prod/a", "10.0.0.1:80"), 0.0)
    table.page_told(slot, table.generation(slot), Page(waiting=3.0, attributes=(("Heat", 60.5),)), 1.0)
    (told,) = endpoints(table, Ejection(table, EjectionParams()), 1.5)
    assert (told["name"], told["waiting"], told["running"]) == ("prod/a", 3.0, None)
    assert told["attributes"] == {"name": None, "Heat": 60.5}


def test_without_attributes_the_page_is_as_it_was() -> None:
    table = EndpointTable()
    table.put(Endpoint("prod/a", "10.0.0.1:80"), 0.0)
    (told,) = endpoints(table, Ejection(table, EjectionParams()), 1.5)
    assert "attributes" not in told
