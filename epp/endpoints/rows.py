"""What the table keeps of each endpoint and of each request beside its columns."""

from __future__ import annotations

from epp.endpoints.endpoint import Endpoint


class Hold:
    """One admitted request's share of one slot's counts. Made by `admit`, ended by `release`."""

    __slots__ = ("generation", "output_tokens", "released", "sequence", "slot", "tokens")

    def __init__(self, slot: int, generation: int, sequence: int, tokens: float, output_tokens: float = 0.0) -> None:
        self.slot = slot
        self.generation = generation
        self.sequence = sequence
        self.tokens = tokens
        """Tokens still counted."""
        self.output_tokens = output_tokens
        """Those among them that are the answer's, and count until its end."""
        self.released = False


class Slot:
    """Scalar facts of one row. Columns that scorers read are arrays of the table."""

    __slots__ = ("adapters", "base", "endpoint", "generation", "listed", "mark", "next_recent", "recent", "sequence")

    def __init__(self, endpoint: Endpoint, generation: int) -> None:
        self.endpoint = endpoint
        self.generation = generation
        self.listed = True
        """Discovery lists it. False: it left, and requests still run on it."""
        self.sequence = 0
        """Requests ever admitted here."""
        self.base = 0
        """Requests with at least this sequence were admitted after the current page was asked for."""
        self.mark: int | None = None
        """`base` of the page that is being fetched now; None: none is."""
        self.recent = 0
        """In-flight requests with at least `base`."""
        self.next_recent = 0
        """In-flight requests with at least `mark`."""
        self.adapters: dict[str, float] = {}
        """State of each adapter that runs (2) or waits (1) here."""
