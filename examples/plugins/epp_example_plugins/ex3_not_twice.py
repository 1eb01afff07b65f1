from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Slots
from epp.scheduling.plugin import Context, NoParams, Scores, scorer


class NotTwice:
    """Prefer whoever did not get the previous request: that endpoint scores 0, any other 1."""

    def __init__(self, params: NoParams, context: Context) -> None:
        self._latest = -1

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Scores:
        return (candidates.slots != self._latest).astype(float)

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        self._latest = int(slots[0])

    def forget(self, slot: int) -> None:
        self._latest = -1 if slot == self._latest else self._latest


not_twice = scorer("not-twice-scorer", params=NoParams)(NotTwice)
