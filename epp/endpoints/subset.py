"""The gateway's subset hint: which of our endpoints it allows.

Source: endpoint picker protocol (proposal 004): "ip:port" entries. A bare address means all its ports; IPv6 may come
with or without brackets and in any spelling. An entry that is no address matches nothing.
"""

from __future__ import annotations

import ipaddress

import numpy as np

from epp.endpoints.table import Bools, Candidates


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
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return ""
    text = f"[{ip.compressed}]" if ip.version == 6 else str(ip)
    return f"{text}:{port}" if port else text
