"""The debug pages: why each request went where it went, and what is known of every endpoint.

In: the picker and its table. Out: JSON values, each made when it is asked for; decisions may be made between two.
The form of a decision is `protos/decision.proto` (protobuf's JSON mapping with the field names of the file).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from epp.endpoints.ejection import Ejection
from epp.endpoints.table import FACTS, GAUGES, Bools, EndpointTable, Floats
from epp.picker import Picker


def decisions(picker: Picker, n: int, wall_offset: float) -> Iterator[dict[str, Any]]:
    """The last n decisions, latest first; not those that the picker forgets while this is read.

    Args:
        wall_offset: what makes seconds since the Unix epoch of the picker's `now`.
    """
    for record in list(islice(reversed(picker.records), n)):
        if not len(record.decision.slots):
            return  # let go, and so are all before it
        yield {
            "request_id": record.request_id,
            "time": record.at + wall_offset,
            "model": record.model,
            "target_model": record.target_model,
            "priority": record.priority,
            "objective": record.objective,
            "rule": "" if record.rule is None else record.rule.source,
            **({} if record.saturation is None else {"saturation": msgspec.structs.asdict(record.saturation)}),
            **record.decision.render(),
        }


def endpoints(table: EndpointTable, ejection: Ejection, now: float) -> Iterator[dict[str, Any]]:
    """Every listed endpoint: unknown values are null, never zero."""
    slots = table.listed
    columns = {name: table.column(name, slots, now) for name in (*GAUGES, *FACTS, "inflight", "inflight_tokens")}
    attributes = {name: table.column(name, slots, now) for name in table.attributes}
    ejected = ejection.out(slots, now)
    listed = [(slot, table.endpoint(slot), table.generation(slot)) for slot in slots.tolist()]
    ages = table.page_ages(now)[slots].tolist()
    for i, (slot, endpoint, generation) in enumerate(listed):
        yield {
            "name": endpoint.name,
            "address": endpoint.address,
            "labels": endpoint.labels,
            "page_age": None if math.isinf(ages[i]) else ages[i],
            "ejected": bool(ejected[i]),
            "adapters": table.adapter_names(slot) if table.generation(slot) == generation else (),
            **_row(columns, i),
            **({"attributes": _row(attributes, i)} if attributes else {}),
        }


def _row(columns: Mapping[str, tuple[Floats, Bools]], i: int) -> dict[str, float | None]:
    return {name: float(values[i]) if known[i] else None for name, (values, known) in columns.items()}
