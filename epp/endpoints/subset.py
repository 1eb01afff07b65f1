"""The gateway's subset hint: which of our endpoints it allows.

Source: endpoint picker protocol (proposal 004): "ip:port" entries. A bare address means all its ports; IPv6 may come
with or without brackets and in any spelling. An entry that is no address matches nothing.
"""

from __future__ import annotations

import numpy as np

from epp.endpoints.table import Bools, Candidates, host_text


def in_subset(candidates: Candidates, subset: tuple[str, ...]) -> Bools:
    """Which candidates the hint allows, shape (N,)."""
    allowed = {spelled for entry in subset if (spelled := _spelled(entry))}
    return np.array(
        [e.address in allowed or e.address.rpartition(":")[0] in allowed for e in candidates.endpoints()], np.bool_
    )


def _spelled(entry: str) -> str:
    """The entry as `Endpoint.address` spells it, or its host part alone; empty: no address."""
    host, colon, port = entry.rpartition(":")
    if not colon or (host.count(":") and not host.endswith("]")):
        host, port = entry, ""  # no port: "10.0.0.1" or "fd00::1"
    if entry.endswith("]"):
        host, port = entry, ""
    try:
        text = host_text(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return ""
    return f"{text}:{port}" if port else text
