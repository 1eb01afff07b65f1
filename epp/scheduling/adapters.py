"""Which models are LoRA adapters, as far as pages have told."""

from __future__ import annotations

from typing import Final

from epp.endpoints.table import Candidates


class AdapterNames:
    """Which target models are adapters: those that any page of the pool has named.

    Names are remembered, because pages name adapters only while requests use them.
    """

    MOST: Final = 10_000
    """Names remembered; they come from pages, never from clients."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def has(self, name: str, candidates: Candidates) -> bool:
        if candidates.table.adapter(name, candidates.table.listed).any():
            self._names[name] = None
            if len(self._names) > self.MOST:
                del self._names[next(iter(self._names))]
        return name in self._names
