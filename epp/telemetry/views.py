"""The debug pages: why each request went where it went, and what is known of every endpoint.

In: the picker and its table. Out: JSON values, made when somebody looks. The form of a decision is
`protos/decision.proto` (protobuf's JSON mapping with the field names of the file).
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from epp.endpoints.ejection import Ejection
from epp.endpoints.table import FACTS, GAUGES, EndpointTable
from epp.picker import Picker


def decisions(picker: Picker, n: int, wall_offset: float) -> list[dict[str, Any]]:
    """The last n decisions, latest first.

    Args:
        wall_offset: what makes seconds since the Unix epoch of the picker's `now`.
    """
    return [
        {
            "request_id": record.request_id,
            "time": record.at + wall_offset,
            "model": record.model,
            "target_model": record.target_model,
            **record.decision.render(),
        }
        for record in islice(reversed(picker.records), n)
    ]


def endpoints(table: EndpointTable, ejection: Ejection, now: float) -> list[dict[str, Any]]:
    """Every listed endpoint: unknown values are null, never zero."""
    slots = table.listed
    columns = {name: table.column(name, slots, now) for name in (*GAUGES, *FACTS, "inflight", "inflight_tokens")}
    ejected = ejection.out(slots, now)
    rows = []
    for i, slot in enumerate(slots.tolist()):
        endpoint = table.endpoint(slot)
        age = now - table.page_at(slot)
        rows.append(
            {
                "name": endpoint.name,
                "address": endpoint.address,
                "labels": endpoint.labels,
                "page_age": None if math.isinf(age) else age,
                "ejected": bool(ejected[i]),
                "adapters": table.adapter_names(slot),
                **{name: float(values[i]) if known[i] else None for name, (values, known) in columns.items()},
            }
        )
    return rows
