"""The endpoint table: one row per endpoint; its numbers are in `columns.py`.

In: endpoints from discovery, pages from scraping, requests admitted and released. Out: `Candidates`, a view of some
rows at one moment, which filters and scorers read.
Rules here:
- A row is a slot with a generation: a slot used again is a different endpoint.
- In-flight requests are counted at decision time and released exactly once, by the `Hold` that counted them;
  nothing else changes those columns, so they never go negative and no reaper corrects them.
- An endpoint is its name and its address together. One that leaves while requests run on it keeps its slot until the
  last one is released; when it comes back under the same name and address it has its counts again.
- `listed` is another array whenever an endpoint came, left or changed, and the same one as long as none did, so that
  whoever follows the table compares one reference.
- Nothing reads a clock: `now` is seconds, monotonic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from epp.endpoints.columns import COUNTS, FACTS, GAUGES, Bools, Columns, Floats, Page, Slots, Totals, all_true, grown
from epp.endpoints.endpoint import Endpoint, address_text, host_text
from epp.endpoints.rows import Hold, Slot

__all__ = (
    "COUNTS",
    "FACTS",
    "GAUGES",
    "Bools",
    "Candidates",
    "Endpoint",
    "EndpointTable",
    "Floats",
    "Hold",
    "Page",
    "Slot",
    "Slots",
    "Totals",
    "address_text",
    "all_true",
    "host_text",
)


class EndpointTable:
    """Everything known of every endpoint of one pool."""

    def __init__(
        self,
        *,
        freshness: float = 2.0,
        attributes: Mapping[str, float] = {},
        on_forget: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            freshness: seconds after which a page's gauges are unknown (`--metrics-staleness-threshold`).
            attributes: further columns, each with the seconds after which what was told of it is unknown.
            on_forget: called with a slot that is about to mean something else, so that others forget it too.
        """
        self._columns = Columns(freshness, attributes)
        self._on_forget = on_forget
        self._rows: list[Slot | None] = []
        self._generation = 0
        self._by_name: dict[str, int] = {}
        self._by_address: dict[str, int] = {}
        self._leaving: dict[int, None] = {}  # off the list, requests still run; the two above know listed ones only
        self._changed = False
        self._joined_at: Floats = np.empty(0)
        self._listed_at: Floats = np.empty(0)
        self._last_join = -np.inf
        self._listed: Slots = np.empty(0, np.int64)
        self._adapters: dict[str, Floats] = {}

    def __repr__(self) -> str:
        inflight = int(self._columns.told("inflight", np.arange(len(self._rows))).sum())
        return f"<EndpointTable [Endpoints: {len(self._listed)} | Requests: {inflight} in flight]>"

    def __len__(self) -> int:
        return len(self._listed)

    # -- which endpoints there are -------------------------------------------------------------------------------

    def put(self, endpoint: Endpoint, now: float) -> int:
        """List an endpoint, or change its labels; returns its slot.

        Another endpoint that has its name or its address leaves the list: names and addresses are unique in it.
        """
        slot = self._enter(endpoint, now)
        self._relist()
        return slot

    def drop(self, name: str) -> None:
        """Take an endpoint off the list. Its requests run on; its slot is free once the last of them is released."""
        if name in self._by_name:
            self._leave(self._by_name[name])
            self._relist()

    def replace(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """List exactly these endpoints, in this order where they are new.

        Of two with one name, or with one address, the later one counts.
        """
        named = {endpoint.name: endpoint for endpoint in endpoints}
        addressed = {endpoint.address: endpoint for endpoint in named.values()}
        wanted = {endpoint.name: endpoint for endpoint in addressed.values()}
        for name, slot in list(self._by_name.items()):
            if name not in wanted or wanted[name].address != self._row(slot).endpoint.address:
                self._leave(slot)
        for endpoint in wanted.values():
            self._enter(endpoint, now)
        self._relist()

    def slot_at(self, address: str) -> int | None:
        """Slot of the endpoint with this address, listed or still running requests; None: unknown."""
        slot = self._by_address.get(address)
        if slot is None:
            return next((at for at in self._leaving if self._row(at).endpoint.address == address), None)
        return slot

    def endpoint(self, slot: int) -> Endpoint:
        return self._row(slot).endpoint

    def generation(self, slot: int) -> int:
        """Changes whenever the slot means another endpoint; 0: the slot is free."""
        row = self._rows[slot]
        return 0 if row is None else row.generation

    def is_listed(self, slot: int) -> bool:
        """Discovery lists it; False: it left, and requests still run on it."""
        return self._row(slot).listed

    def listed_at(self, slot: int) -> float:
        """When discovery listed it: the last time that it joined or came back, whatever `rejoin` said since."""
        return self._listed_at.item(slot)

    def joined_at(self, slot: int) -> float:
        """When the endpoint joined, came back, or was let in again."""
        return float(self._joined_at[slot])

    def joined(self, slots: Slots) -> Floats:
        """`joined_at` of each slot, shape (N,)."""
        return self._joined_at[slots]

    @property
    def last_join(self) -> float:
        """The latest `joined_at` there ever was: nobody is newer. -inf: nobody ever joined."""
        return self._last_join

    def rejoin(self, slot: int, at: float) -> None:
        """The endpoint begins anew at `at`, which may lie ahead: slow start counts from then."""
        self._joined_at[slot] = at
        self._last_join = max(self._last_join, at)

    @property
    def listed(self) -> Slots:
        """Slots that discovery lists, in the order in which they were first listed. Read-only."""
        return self._listed

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the columns that the configuration adds."""
        return self._columns.attributes

    @property
    def width(self) -> int:
        """Number of slots; every slot is below it."""
        return len(self._rows)

    # -- what pages say ------------------------------------------------------------------------------------------

    def page_asked(self, slot: int) -> None:
        """A page of this slot is being fetched: requests admitted from now on are not in it."""
        row = self._row(slot)
        row.mark, row.next_recent = row.sequence, 0

    def page_told(self, slot: int, generation: int, page: Page, now: float) -> None:
        """Take a page over. What it does not say becomes unknown. Ignored when the slot has changed its meaning.

        Args:
            now: when the page was asked for, so that its age is never understated.
        """
        row = self._rows[slot]
        if row is None or row.generation != generation:
            return
        if row.mark is not None:
            row.base, row.mark = row.mark, None
            row.recent = row.next_recent
        self._columns.take(slot, page, row.recent, now)
        if page.attributes:
            self._columns.tell(slot, page.attributes, now)
        self._set_adapters(slot, row, page)

    def attributes_told(self, slot: int, generation: int, values: Iterable[tuple[str, float]], now: float) -> None:
        """Take attributes over, by name; NaN: not known. Ignored when the slot has changed its meaning.

        Args:
            now: when they were asked for.
        """
        row = self._rows[slot]
        if row is not None and row.generation == generation:
            self._columns.tell(slot, values, now)

    def page_ages(self, now: float) -> Floats:
        """Seconds since each slot's last page was asked for, by slot; inf: there never was one."""
        return self._columns.page_ages(len(self._rows), now)

    def told(self, name: str, slots: Slots) -> Floats:
        """A column as the pages had it, whatever was sent since, shape (N,); NaN: not told."""
        return self._columns.told(name, slots)

    def fact(self, name: str, slot: int) -> float:
        """One of FACTS of one slot; NaN: never told."""
        return self._columns.one(name, slot)

    def totals(self, slot: int) -> Totals:
        """What the server of one slot has counted, however old its page is."""
        return self._columns.totals(slot)

    def page_at(self, slot: int) -> float:
        """When the last page was asked for; -inf: there never was one."""
        return self._columns.page_at(slot)

    def pages_at(self, slots: Slots) -> Floats:
        """`page_at` of each slot, shape (N,)."""
        return self._columns.pages_at(slots)

    # -- what runs -----------------------------------------------------------------------------------------------

    def admit(self, slot: int, prefill_tokens: float = 0.0, output_tokens: float = 0.0) -> Hold:
        """Count one request onto a slot. The hold must be released exactly once."""
        row = self._row(slot)
        tokens = float(round(prefill_tokens))  # sums of whole numbers are exact, so they return to 0
        if output_tokens:
            tokens += (output_tokens := float(round(output_tokens)))
        hold = Hold(slot, row.generation, row.sequence, tokens, output_tokens)
        row.sequence += 1
        row.next_recent += 1
        row.recent += 1
        self._columns.count(slot, 1, tokens, row.recent)
        return hold

    def prefill_done(self, hold: Hold) -> None:
        """The first token has come: its prefill tokens are no load any more."""
        if not hold.released and hold.tokens > hold.output_tokens:
            self._columns.count_tokens(hold.slot, hold.output_tokens - hold.tokens)
            hold.tokens = hold.output_tokens

    def release(self, hold: Hold) -> None:
        """Count the request out. A second call does nothing."""
        if hold.released:
            return
        hold.released = True
        row = self._row(hold.slot)  # a slot with requests in flight is never given away
        assert row.generation == hold.generation
        if hold.sequence >= row.base:
            row.recent -= 1
        if row.mark is not None and hold.sequence >= row.mark:
            row.next_recent -= 1
        self._columns.count(hold.slot, -1, -hold.tokens, row.recent)
        hold.tokens = 0.0
        if not row.listed:
            self._free_if_idle(hold.slot)

    # -- views ---------------------------------------------------------------------------------------------------

    def candidates(self, now: float, slots: Slots | None = None) -> Candidates:
        """A view of these slots, or of all that are listed, as known at `now`."""
        return Candidates(self, self._listed if slots is None else slots, now)

    def column(self, name: str, slots: Slots, now: float) -> tuple[Floats, Bools]:
        """Values and which of them are known, both of shape (N,) and read-only. Values are NaN where unknown.

        `waiting` is the page's value plus what was sent to the endpoint since that page was asked for and has not
        ended: a burst within one scrape interval sees itself.

        Raises:
            KeyError: no such column, or attribute.
        """
        return self._columns.read(name, slots, now)

    def adapter(self, name: str, slots: Slots) -> Floats:
        """State of a LoRA adapter per slot, shape (N,): 2 running, 1 waiting, 0 neither."""
        column = self._adapters.get(name)
        return np.zeros(len(slots)) if column is None else column[slots]

    def adapters_held(self, slots: Slots) -> Floats:
        """Number of adapters that run or wait per slot, shape (N,)."""
        total = np.zeros(len(slots))
        for column in self._adapters.values():
            total += column[slots] > 0
        return total

    def adapter_names(self, slot: int) -> tuple[str, ...]:
        """Adapters that run or wait on a slot, sorted."""
        return tuple(sorted(name for name, column in self._adapters.items() if column[slot] > 0))

    # -- inside --------------------------------------------------------------------------------------------------

    def _enter(self, endpoint: Endpoint, now: float) -> int:
        """List an endpoint in the slot that it has, in the one that it is about to leave, or in a new one."""
        at = self._by_name.get(endpoint.name)
        if at is not None and self._row(at).endpoint.address == endpoint.address:
            self._changed |= self._row(at).endpoint != endpoint
            self._row(at).endpoint = endpoint
            return at
        for holder in {at, self._by_address.get(endpoint.address)}:
            if holder is not None:
                self._leave(holder)
        slot = self._leaving_slot(endpoint)
        if slot is None:
            slot = self._free_slot()
            self._clear(slot, endpoint)
        row = self._row(slot)
        row.endpoint, row.listed = endpoint, True
        self._leaving.pop(slot, None)
        self._by_name[endpoint.name] = self._by_address[endpoint.address] = slot
        self._listed_at[slot] = now
        self.rejoin(slot, now)
        self._changed = True
        return slot

    def _leave(self, slot: int) -> None:
        row = self._row(slot)
        row.listed = False
        del self._by_name[row.endpoint.name], self._by_address[row.endpoint.address]
        self._leaving[slot] = None
        self._changed = True
        self._free_if_idle(slot)

    def _leaving_slot(self, endpoint: Endpoint) -> int | None:
        for slot in self._leaving:
            left = self._row(slot).endpoint
            if (left.name, left.address) == (endpoint.name, endpoint.address):
                return slot
        return None

    def _free_slot(self) -> int:
        for slot, row in enumerate(self._rows):
            if row is None:
                return slot
        slot = len(self._rows)
        self._rows.append(None)
        if slot >= self._columns.size:
            size = max(16, 2 * slot)
            self._columns.grow(size)
            self._adapters = {name: grown(column, size) for name, column in self._adapters.items()}
            self._joined_at, self._listed_at = grown(self._joined_at, size), grown(self._listed_at, size)
        return slot

    def _clear(self, slot: int, endpoint: Endpoint) -> None:
        """Give a free slot a new meaning: nothing is known of it."""
        self._generation += 1
        self._rows[slot] = Slot(endpoint, self._generation)
        self._columns.clear(slot)

    def _free_if_idle(self, slot: int) -> None:
        if self._columns.one("inflight", slot):
            return
        if self._on_forget is not None:
            self._on_forget(slot)
        self._set_adapters(slot, self._row(slot), Page())
        self._rows[slot] = None
        del self._leaving[slot]

    def _relist(self) -> None:
        if not self._changed:
            return
        self._changed = False
        self._listed = np.array(sorted(self._by_name.values(), key=self.generation), np.int64)
        self._listed.flags.writeable = False
        self._columns.show(self._listed)

    def _row(self, slot: int) -> Slot:
        row = self._rows[slot]
        assert row is not None, f"slot {slot} is free"
        return row

    def _set_adapters(self, slot: int, row: Slot, page: Page) -> None:
        states = {
            **dict.fromkeys(page.waiting_adapters or (), 1.0),
            **dict.fromkeys(page.running_adapters or (), 2.0),
        }
        if states == row.adapters:  # nearly always: 2,000 pages a second must not walk all adapters of the pool
            return
        for name in row.adapters.keys() - states.keys():
            self._adapters[name][slot] = 0.0
            if not self._adapters[name].any():
                del self._adapters[name]
        for name, state in states.items():
            if name not in self._adapters:
                self._adapters[name] = np.zeros(self._columns.size)
            self._adapters[name][slot] = state
        row.adapters = states


class Candidates:
    """Some endpoints at one moment: what filters mask and scorers score. N is `len()`. Nothing here may be changed."""

    __slots__ = ("_columns", "now", "slots", "table")

    def __init__(self, table: EndpointTable, slots: Slots, now: float) -> None:
        self.table = table
        self.slots = slots
        self.now = now
        self._columns: dict[str, tuple[Floats, Bools]] = {}

    def __len__(self) -> int:
        return len(self.slots)

    def column(self, name: str) -> tuple[Floats, Bools]:
        """Values and which are known, shape (N,) each, read-only; see `EndpointTable.column`. Raises KeyError."""
        got = self._columns.get(name)
        if got is None:
            got = self._columns[name] = self.table._columns.read(name, self.slots, self.now)
        return got

    def adapter(self, name: str) -> Floats:
        """State of a LoRA adapter, shape (N,): 2 running, 1 waiting, 0 neither."""
        return self.table.adapter(name, self.slots)

    def adapters_held(self) -> Floats:
        """Number of adapters that run or wait, shape (N,)."""
        return self.table.adapters_held(self.slots)

    def fresh(self) -> Bools:
        """Which endpoints have a page within the freshness limit, shape (N,)."""
        return self.table._columns.fresh(self.slots, self.now)

    def endpoints(self) -> list[Endpoint]:
        return [self.table.endpoint(slot) for slot in self.slots.tolist()]

    def keep(self, mask: Bools) -> Candidates:
        """The candidates where `mask`, shape (N,), is true, in the same order."""
        return Candidates(self.table, self.slots[mask], self.now)
