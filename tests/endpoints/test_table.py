"""The endpoint table: cases worked out by hand. The model-based test beside this one covers their combinations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import astuple

from epp.endpoints.table import Endpoint, EndpointTable, Page, Totals, address_text


def server(name: str, address: str) -> Endpoint:
    return Endpoint(f"default/{name}", address)


A, B = "10.0.0.1:8000", "10.0.0.2:8000"


def inflight(table: EndpointTable, slot: int) -> float:
    values, _ = table.candidates(0.0, np.array([slot])).column("inflight")
    return float(values[0])


def waiting(table: EndpointTable, slot: int, now: float) -> float | None:
    values, known = table.candidates(now, np.array([slot])).column("waiting")
    return float(values[0]) if known[0] else None


def test_a_burst_within_one_scrape_interval_sees_itself() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    table.page_asked(slot)
    table.page_told(slot, table.generation(slot), Page(waiting=3.0), 0.0)
    holds = [table.admit(slot) for _ in range(4)]
    assert waiting(table, slot, 0.01) == 7.0
    table.release(holds[0])
    assert waiting(table, slot, 0.02) == 6.0


def test_requests_sent_while_a_page_is_fetched_count_on_top_of_it() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    early = table.admit(slot)
    table.page_asked(slot)
    table.admit(slot)
    table.page_told(slot, table.generation(slot), Page(waiting=1.0), 0.0)  # the page counts `early`, not the second
    assert waiting(table, slot, 0.0) == 2.0
    table.release(early)
    assert waiting(table, slot, 0.0) == 2.0


def test_a_page_that_never_came_leaves_the_count_of_the_last_good_one() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    table.page_asked(slot)
    table.page_told(slot, table.generation(slot), Page(waiting=1.0), 0.0)
    table.admit(slot)
    table.page_asked(slot)  # times out
    table.admit(slot)
    assert waiting(table, slot, 0.1) == 3.0


def test_a_value_older_than_its_limit_is_unknown_not_the_last_one() -> None:
    table = EndpointTable(freshness=2.0)
    slot = table.put(server("a", A), 0.0)
    assert waiting(table, slot, 0.0) is None
    table.page_told(slot, table.generation(slot), Page(waiting=0.0), 10.0)
    assert waiting(table, slot, 12.0) == 0.0
    assert waiting(table, slot, 12.001) is None


def test_a_flapping_endpoint_has_its_counts_again() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    hold = table.admit(slot, 100)
    table.drop("default/a")
    assert len(table) == 0
    assert table.put(server("a", A), 5.0) == slot
    assert inflight(table, slot) == 1.0
    assert table.joined_at(slot) == table.listed_at(slot) == 5.0
    table.release(hold)
    assert inflight(table, slot) == 0.0


def test_one_that_begins_anew_or_has_other_labels_was_listed_when_it_was() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 1.0)
    table.rejoin(slot, 7.0)
    assert table.put(Endpoint("default/a", A, {"role": "decode"}), 8.0) == slot
    assert (table.listed_at(slot), table.joined_at(slot)) == (1.0, 7.0)


def test_a_name_that_moves_away_and_back_finds_its_requests_again() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    hold = table.admit(slot)
    assert table.put(server("a", B), 1.0) != slot
    assert table.put(server("a", A), 2.0) == slot
    assert inflight(table, slot) == 1.0
    table.release(hold)
    assert inflight(table, slot) == 0.0


def test_an_address_given_to_another_name_takes_only_its_old_holder_off_the_list() -> None:
    table = EndpointTable()
    table.admit(table.put(server("a", A), 0.0))
    moved = table.put(server("a", B), 0.0)  # the first "a" still has a request at A
    other = table.put(server("b", A), 0.0)
    assert table.listed.tolist() == [moved, other]


def test_two_names_that_swap_addresses_under_load_are_both_listed() -> None:
    table = EndpointTable()
    table.replace([server("a", A), server("b", B)], 0.0)
    for slot in table.listed.tolist():
        table.admit(slot)
    table.replace([server("a", B), server("b", A)], 1.0)
    names = {(table.endpoint(slot).name, table.endpoint(slot).address) for slot in table.listed.tolist()}
    assert names == {("default/a", B), ("default/b", A)}
    assert [inflight(table, slot) for slot in table.listed.tolist()] == [0.0, 0.0]


def test_a_list_that_has_an_address_twice_changes_nothing_the_second_time() -> None:
    table = EndpointTable()
    twice = [server("a", A), server("b", A)]
    table.replace(twice, 0.0)
    listed = table.listed
    assert table.endpoint(listed[0]).name == "default/b"
    table.replace(twice, 1.0)
    assert table.listed is listed


def test_a_slot_used_again_has_another_generation_and_ignores_the_old_page() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    old = table.generation(slot)
    table.drop("default/a")
    assert table.generation(slot) == 0
    assert table.put(server("b", B), 0.0) == slot
    assert table.generation(slot) != old
    table.page_told(slot, old, Page(waiting=0.0), 0.0)
    assert waiting(table, slot, 0.0) is None


def test_a_slot_used_again_says_nothing_of_the_endpoint_before() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    table.page_told(slot, table.generation(slot), Page(waiting=3.0, running=2.0, kv_blocks=100.0), 0.0)
    table.drop("default/a")
    assert table.put(server("b", B), 0.0) == slot
    assert np.isnan([table.told(name, table.listed)[0] for name in ("waiting", "running", "kv_blocks")]).all()
    table.admit(slot)
    assert waiting(table, slot, 0.0) is None
    assert table.page_at(slot) == -np.inf
    assert np.isnan(table.fact("kv_blocks", slot))


def test_when_pages_were_asked_for_is_told_of_any_slots_in_their_order() -> None:
    table = EndpointTable()
    for number in range(3):
        table.put(server(f"p{number}", f"10.0.0.{number + 1}:8000"), 0.0)
    table.page_told(0, table.generation(0), Page(waiting=0.0), 1.5)
    table.page_told(2, table.generation(2), Page(waiting=0.0), 2.5)
    assert table.pages_at(np.array([2, 1, 0])).tolist() == [2.5, -np.inf, 1.5]
    assert table.pages_at(np.empty(0, np.int64)).tolist() == []
    table.drop("default/p2")
    table.put(server("p3", "10.0.0.9:8000"), 3.0)
    assert table.pages_at(np.array([2])).tolist() == [-np.inf]


def test_what_an_engine_has_counted_holds_however_old_its_page_is_and_goes_with_its_slot() -> None:
    table = EndpointTable(freshness=2.0)
    slot = table.put(server("a", A), 0.0)
    assert np.isnan(astuple(table.totals(slot))).all()
    page = Page(prompts=1.0, first_tokens=2.0, steps=3.0, processed=4.0, generated=5.0)
    table.page_told(slot, table.generation(slot), page, 0.0)
    table.page_told(slot, table.generation(slot), Page(waiting=1.0, steps=6.0, prompt_tokens=7.0), 50.0)
    assert table.totals(slot) == Totals(7.0, 1.0, 2.0, 6.0, 4.0, 5.0)
    table.drop("default/a")
    assert table.put(server("b", B), 51.0) == slot
    assert np.isnan(astuple(table.totals(slot))).all()


def test_facts_of_one_slot_are_what_its_pages_told_last() -> None:
    table = EndpointTable(freshness=2.0)
    slot = table.put(server("a", A), 0.0)
    table.page_told(slot, table.generation(slot), Page(kv_blocks=100.0, block_size=16.0), 0.0)
    table.page_told(slot, table.generation(slot), Page(block_size=32.0), 50.0)
    assert (table.fact("kv_blocks", slot), table.fact("block_size", slot)) == (100.0, 32.0)


def test_what_is_shared_by_views_is_made_once_until_it_changes() -> None:
    table = EndpointTable(freshness=2.0)
    slots = [table.put(server("a", A), 0.0), table.put(server("b", B), 0.0)]
    for slot in slots:
        table.page_told(slot, table.generation(slot), Page(waiting=1.0, kv_usage=0.5), 10.0)

    def usage(now: float) -> np.ndarray[Any, Any]:
        return table.candidates(now).column("kv_usage")[0]

    first = usage(10.0)
    table.admit(slots[0])
    table.page_told(slots[0], table.generation(slots[0]), Page(waiting=7.0, kv_usage=0.5), 11.0)
    assert usage(11.0) is first, "the same value was told again"
    table.page_told(slots[0], table.generation(slots[0]), Page(waiting=7.0, kv_usage=0.75), 11.5)
    assert usage(11.5).tolist() == [0.75, 0.5]
    assert np.isnan(usage(12.5)).tolist() == [False, True]
    assert first.tolist() == [0.5, 0.5]


def test_the_list_is_the_same_array_until_an_endpoint_comes_leaves_or_changes() -> None:
    table = EndpointTable()
    table.replace([server("a", A), server("b", B)], 0.0)
    listed = table.listed
    table.replace([server("a", A), server("b", B)], 1.0)
    assert table.listed is listed
    table.put(Endpoint("default/a", A, metrics_address="10.0.0.1:9000"), 2.0)
    assert table.listed is not listed
    assert table.listed.tolist() == listed.tolist()


def test_columns_grow_with_the_pool_and_keep_what_they_hold() -> None:
    table = EndpointTable()
    first = table.put(server("first", A), 0.0)
    hold = table.admit(first, 7)
    table.page_told(first, table.generation(first), Page(waiting=2.0, running_adapters=("x",)), 0.0)
    for i in range(40):
        table.put(server(f"more{i}", f"10.0.1.{i}:80"), float(i))
    assert waiting(table, first, 1.0) == 3.0
    assert table.adapter("x", table.listed).tolist() == [2.0] + [0.0] * 40
    assert table.joined(table.listed).tolist() == [0.0, *map(float, range(40))]
    table.release(hold)
    assert inflight(table, first) == 0.0


def test_prefill_tokens_leave_with_the_first_token_and_only_once() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    first, second = table.admit(slot, 100.4), table.admit(slot, 50)
    table.prefill_done(first)
    table.prefill_done(first)
    tokens, _ = table.candidates(0.0).column("inflight_tokens")
    assert tokens.tolist() == [50.0]
    table.release(second)
    table.release(first)
    tokens, _ = table.candidates(0.0).column("inflight_tokens")
    assert tokens.tolist() == [0.0]


def test_forgetting_is_told_once_and_only_when_the_last_request_is_gone() -> None:
    forgotten: list[int] = []
    table = EndpointTable(on_forget=forgotten.append)
    slot = table.put(server("a", A), 0.0)
    hold = table.admit(slot)
    table.drop("default/a")
    assert forgotten == []
    table.release(hold)
    table.release(hold)
    assert forgotten == [slot]


def test_a_view_is_of_one_moment_and_read_only() -> None:
    table = EndpointTable()
    slot = table.put(server("a", A), 0.0)
    candidates = table.candidates(0.0)
    before, _ = candidates.column("inflight")
    table.admit(slot)
    after, _ = candidates.column("inflight")
    assert before.tolist() == after.tolist() == [0.0]
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 1.0
    with pytest.raises(KeyError):
        candidates.column("no such column")


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [
        ("10.0.0.1", 80, "10.0.0.1:80"),
        ("FD00:0:0:0:0:0:0:1", 65535, "[fd00::1]:65535"),
        ("::ffff:10.0.0.1", 1, "[::ffff:10.0.0.1]:1"),
    ],
)
def test_an_address_is_spelled_as_envoy_spells_it(host: str, port: int, text: str) -> None:
    assert address_text(host, port) == text


@pytest.mark.parametrize(("host", "port"), [("localhost", 80), ("10.0.0.1", 0), ("10.0.0.1", 65536), ("", 80)])
def test_what_is_no_address_is_refused(host: str, port: int) -> None:
    with pytest.raises(ValueError, match=r"port|address"):
        address_text(host, port)
