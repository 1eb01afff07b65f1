from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric

from epp.dialects.usage import Usage
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.errors import NoEndpoint
from epp.flow.policies import Rule, Target
from epp.flow.saturation import Concurrency, Counted, Utilization
from epp.telemetry.exposition import TICKETS, Sources, render
from epp.telemetry.metrics import Metrics
from epp.telemetry.series import Limits
from epp.ticket import Outcome, Ticket
from tests.telemetry.builders import decision, metrics, page_of, read, request, table, ticket, value, zero

FULL = Page(waiting=3, running=8, kv_usage=0.5)
INFLIGHT = "llm_d_epp_inflight_requests"
A, B, C = (Endpoint(f"ns/{name}-rank-0", f"10.0.0.{number}:8000") for number, name in enumerate("abc", 1))


def everything() -> tuple[Metrics, Sources]:
    """Something in every family."""
    counted = metrics()
    rule = Rule("m", (Target("m", 1),), source="InferenceModelRewrite default/r rules[0]")
    streamed = ticket(request(stream=True), first_byte_at=10.5, usage=Usage(9, 8, 7), response_bytes=5, rule=rule)
    for made in (streamed, ticket(first_byte_at=11.0, made=decision(prompt=8, failures=("x",)), status=500)):
        counted.decided(made)
        counted.finished(made, Outcome.COMPLETE, 12.0)
    for type_ in ("disagg-profile-handler", "pd-profile-handler"):
        staged = ticket(made=decision(plan="prefill-decode", handler=(type_, type_)))
        counted.decided(staged)
        counted.finished(staged, Outcome.COMPLETE, 12.0)
    assert streamed.gaps is not None
    streamed.gaps.observe(0.25)
    counted.stream_ended(2.0)
    counted.refused(request(), NoEndpoint("none"), 0.1)
    counted.broke("a decision", ValueError("no"))
    return counted, Sources(
        table([A], [FULL]),
        "pool",
        zero,
        version="1.0",
        detector=Utilization(),
        scrape_errors=lambda: (5, 6),
        streams=lambda: (2, 7),
        breaches=lambda: {"streams": 3, "header-list": 0},
        ejections=lambda: (1, 4),
        prefix_blocks=lambda: 12,
        reloads=lambda: (2, 1),
    )


def told(families: dict[str, Metric]) -> dict[str, tuple[str, frozenset[str], tuple[str, ...]]]:
    """Type, labels and bounds of every family on a page."""
    found = {}
    for name, family in families.items():
        labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
        les = dict.fromkeys(sample.labels["le"] for sample in family.samples if "le" in sample.labels)
        found[name] = (family.type, labels, tuple(le for le in les if le != "+Inf"))
    return found


def golden() -> dict[str, tuple[str, frozenset[str], tuple[str, ...]]]:
    lines = Path(__file__).with_name("families.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            head, _, bounds = line.partition(":")
            name, kind, *labels = head.split()
            found[name] = (kind, frozenset(labels), tuple(bounds.split()))
    return found


def test_names_types_labels_and_bounds_are_those_of_the_reference() -> None:
    page = told(page_of(*everything()))
    assert {name: facts for name, facts in page.items() if not name.startswith("process_")} == golden()


DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def documented(section: str) -> set[str]:
    """What stands in the first column of the section's table."""
    table = DOCS.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z0-9_*]+)", row)}


def on_the_page(name: str) -> bool:
    """Under the reference's prefix or as it is; `*` stands for anything."""
    return any(fnmatchcase(family, name) or fnmatchcase(family, f"llm_d_epp_{name}") for family in golden())


def test_the_documentation_knows_what_is_there_and_what_is_not() -> None:
    differs, missing, ours = map(documented, ("What differs, and why", "Not there", "Ours"))
    assert min(len(differs), len(missing), len(ours)) > 5
    assert [name for name in differs if not on_the_page(name)] == []
    assert [name for name in missing if on_the_page(name)] == []
    assert ours == {name for name in golden() if name.startswith("epp_")}


def test_every_series_of_a_histogram_has_all_bounds_a_sum_and_a_count() -> None:
    counted, sources = everything()
    counted.decided(ticket(request("other-model")))
    for family in page_of(counted, sources).values():
        if family.type != "histogram":
            continue
        series: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for sample in family.samples:
            key = tuple(sorted((name, text) for name, text in sample.labels.items() if name != "le"))
            series.setdefault(key, []).append(sample.labels.get("le") or sample.name.rpartition("_")[2])
        for labels, parts in series.items():
            assert parts == [*golden()[family.name][2], "+Inf", "sum", "count"], (family.name, labels)


def test_no_series_is_on_the_page_twice() -> None:
    for family in page_of(*everything()).values():
        keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(keys) == len(set(keys)), family.name


def test_what_others_count_is_read_when_somebody_scrapes() -> None:
    page = page_of(*everything())
    for prefix in ("llm_d_epp_", "llm_d_inference_scheduler_"):
        assert value(page, f"{prefix}datalayer_poll_errors_total", source_type="metrics-data-source") == 5
        extractor = {"source_type": "metrics-data-source", "extractor_type": "core-metrics-extractor"}
        assert value(page, f"{prefix}datalayer_extract_errors_total", **extractor) == 6
    assert value(page, "llm_d_epp_extproc_streams_inflight") == 2
    assert value(page, "llm_d_epp_extproc_streams_total", code="OK") == 5
    assert value(page, "llm_d_epp_extproc_stream_duration_seconds_sum") == 2.0
    assert value(page, "epp_extproc_limit_breaches_total", limit="streams") == 3
    assert value(page, "epp_extproc_limit_breaches_total", limit="header-list") == 0
    assert value(page, "epp_config_reloads_total", result="taken") == 2
    assert value(page, "epp_config_reloads_total", result="refused") == 1
    assert value(page, "epp_ejected_endpoints") == 1
    assert value(page, "epp_ejections_total") == 4
    assert value(page, "llm_d_epp_prefix_indexer_size", plugin_type="approx-prefix-cache-producer") == 12
    assert value(page, "llm_d_epp_info", build_ref="1.0", commit="") == 1


def test_an_unused_picker_has_a_page_too() -> None:
    page = page_of(metrics())
    assert value(page, "llm_d_epp_ready_endpoints", name="p") == 0
    assert value(page, "llm_d_epp_scheduler_e2e_duration_seconds_count") == 0
    assert value(page, "process_resident_memory_bytes") > 0
    assert "llm_d_epp_request_total" not in page


def test_help_and_type_come_before_the_samples_of_their_family() -> None:
    seen: set[str] = set()
    for line in b"".join(render(*everything())).decode().splitlines():
        if line.startswith("# TYPE "):
            seen.add(line.split()[2])
        elif not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            assert name in seen or any(
                name == f"{family}_{part}" for family in seen for part in ("bucket", "sum", "count")
            )


def test_what_a_transport_does_not_tell_is_absent() -> None:
    page = page_of(metrics(), Sources(table([]), "p", zero, streams=lambda: (0, 0)))
    assert "llm_d_epp_extproc_streams_total" in page
    assert "llm_d_epp_extproc_stream_duration_seconds" not in page
    assert "epp_extproc_limit_breaches_total" not in page


# -- in pieces ---------------------------------------------------------------------------------------------------


def ask(counted: Metrics, model: str, endpoint: Endpoint = A, fairness_id: str = "f") -> None:
    made = ticket(request(model, fairness_id=fairness_id), endpoint=endpoint, first_byte_at=10.5)
    counted.decided(made)
    counted.finished(made, Outcome.COMPLETE, 12.0)


def many() -> Metrics:
    """30 models, each of which ran on 30 endpoints: 900 attempts to tell, under two names."""
    counted = metrics()
    endpoints = [Endpoint(f"ns/pod-{number}-rank-0", f"10.0.1.{number}:8000") for number in range(30)]
    for model in range(30):
        for endpoint in endpoints:
            ask(counted, f"model-{model}", endpoint)
    return counted


def while_others_count(counted: Metrics, pieces: Iterator[bytes], first: int = 0) -> bytes:
    """The page, made while after each piece a known model, a new one and a new endpoint are asked for."""
    page = []
    for number, piece in enumerate(pieces, first):
        page.append(piece)
        ask(counted, "model-0")
        ask(counted, f"new-{number}", Endpoint(f"ns/new-{number}-rank-0", f"10.0.2.{number % 250}:8000"))
    return b"".join(page)


def test_no_piece_of_a_large_page_is_large() -> None:
    sizes = [piece.count(b"\n") for piece in render(many(), Sources(table([]), "p", zero))]
    assert sum(sizes) > 6_000
    # A histogram of 35 bounds has 38 lines; a piece has at most six, or 200 samples, and two lines of head.
    assert max(sizes) <= 6 * 38 + 2


def test_a_page_in_pieces_has_each_family_once_and_each_series_once_while_others_count() -> None:
    counted = many()
    page = while_others_count(counted, render(counted, Sources(table([A], [FULL]), "p", zero))).decode()
    heads = [line.split()[2] for line in page.splitlines() if line.startswith("# HELP ")]
    assert len(heads) == len(set(heads))
    families = dict(read(page.encode()))
    for name, family in families.items():
        keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(keys) == len(set(keys)), name


def test_no_counter_goes_back_from_one_page_to_the_next_while_others_count() -> None:
    counted, before = many(), dict[str, float]()
    for first in (0, 1000, 2000):
        page = while_others_count(counted, render(counted, Sources(table([]), "p", zero)), first)
        now = {
            f"{sample.name} {sorted(sample.labels.items())}": sample.value
            for name, family in read(page)
            if family.type in ("counter", "histogram") and not name.startswith("process_")
            for sample in family.samples
        }
        assert all(now[key] >= value for key, value in before.items())
        before = now


def test_each_histogram_is_consistent_in_itself_while_others_count() -> None:
    counted = many()
    page = while_others_count(counted, render(counted, Sources(table([]), "p", zero)))
    counts: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, float]] = {}
    for name, family in read(page):
        for sample in family.samples if family.type == "histogram" else ():
            key = name, tuple(sorted((label, text) for label, text in sample.labels.items() if label != "le"))
            counts.setdefault(key, {})[sample.labels.get("le") or sample.name.rpartition("_")[2]] = sample.value
    assert len(counts) > 100
    for (name, _), parts in counts.items():
        *_, infinite = buckets = [value for le, value in parts.items() if le not in ("sum", "count")]
        assert buckets == sorted(buckets)
        assert infinite == parts["count"]
        if name.endswith("request_duration_seconds"):
            assert parts["sum"] == 2.0 * parts["count"]  # each took from 10.0 to 12.0


# -- the pool ----------------------------------------------------------------------------------------------------


def pool(pages: list[Page | None], *, now: float = 1.0, asked_at: float = 0.0) -> dict[str, Metric]:
    known = table([A, B, C][: len(pages)], pages, asked_at=asked_at)
    return page_of(metrics(), Sources(known, "llama", lambda: now))


def test_pool_gauges_are_means_and_deviations_over_what_is_known() -> None:
    page = pool([Page(waiting=1, running=10, kv_usage=0.2), Page(waiting=5, running=20, kv_usage=0.6), None])
    assert value(page, "llm_d_epp_ready_endpoints", name="llama") == 2
    assert value(page, "inference_pool_ready_pods", name="llama") == 2
    for prefix in ("llm_d_epp_", "inference_pool_"):
        assert value(page, f"{prefix}average_queue_size", name="llama") == 3
        assert value(page, f"{prefix}average_running_requests", name="llama") == 15
        assert value(page, f"{prefix}average_kv_cache_utilization", name="llama") == pytest.approx(0.4)
    assert value(page, "llm_d_epp_std_dev_queue_size", name="llama") == 2
    assert value(page, "llm_d_epp_std_dev_running_requests", name="llama") == 5
    assert value(page, "llm_d_epp_std_dev_kv_cache_utilization", name="llama") == pytest.approx(0.2)
    assert value(page, "llm_d_epp_per_endpoint_queue_size", model_server_endpoint="b-rank-0") == 5
    assert value(page, "inference_pool_per_pod_queue_size", model_server_pod="a-rank-0") == 1


def test_gauges_of_a_pool_of_which_nothing_is_fresh_are_absent_and_its_size_is_zero() -> None:
    page = pool([FULL, FULL], now=2.5)
    assert value(page, "llm_d_epp_ready_endpoints") == 0
    for name in ("average_queue_size", "average_running_requests", "average_kv_cache_utilization"):
        assert f"llm_d_epp_{name}" not in page
        assert f"inference_pool_{name}" not in page
    assert "llm_d_epp_per_endpoint_queue_size" not in page


def test_a_page_that_does_not_tell_one_value_counts_for_the_others() -> None:
    page = pool([Page(waiting=4), Page(waiting=2, running=math.pi)])
    assert value(page, "llm_d_epp_average_queue_size") == 3
    assert value(page, "llm_d_epp_average_running_requests") == pytest.approx(math.pi)
    assert "llm_d_epp_average_kv_cache_utilization" not in page


def test_queues_are_the_model_servers_own_without_what_was_just_sent() -> None:
    """Scorers add what was sent since the page; an autoscaler that reads the gauge must not."""
    known = table([A], [Page(waiting=2)])
    known.admit(0)
    page = page_of(metrics(), Sources(known, "p", zero))
    assert value(page, "llm_d_epp_average_queue_size") == 2
    assert value(page, "llm_d_epp_per_endpoint_queue_size") == 2


def test_how_full_the_pool_is_is_asked_when_somebody_scrapes() -> None:
    """Half of what the cache may hold, half of the queue; nothing is known of the third, so it is full: 2.0 / 3."""
    pages = [Page(waiting=1, kv_usage=0.4), Page(waiting=2.5, kv_usage=0.0), None]
    page = page_of(metrics(), Sources(table([A, B, C], pages), "llama", zero, detector=Utilization()))
    labels = {"inference_pool": "llama", "stage": "effective"}
    for prefix in ("llm_d_epp_", "inference_extension_"):
        assert value(page, f"{prefix}flow_control_pool_saturation", **labels) == pytest.approx(2 / 3)
    assert value(page, "llm_d_epp_flow_control_stale_endpoints", detector="utilization-detector") == 1


def test_a_detector_that_counts_knows_everything() -> None:
    known = table([A, B])
    known.admit(0)
    page = page_of(metrics(), Sources(known, "p", zero, detector=Concurrency(Counted.REQUESTS, requests=4)))
    assert value(page, "llm_d_epp_flow_control_pool_saturation") == 0.125
    assert "llm_d_epp_flow_control_stale_endpoints" not in page


def test_a_pool_without_endpoints_is_full_and_one_of_which_nobody_asks_is_not_told() -> None:
    page = page_of(metrics(), Sources(table([]), "p", zero, detector=Utilization()))
    assert value(page, "llm_d_epp_flow_control_pool_saturation") == 1
    assert value(page, "llm_d_epp_flow_control_stale_endpoints") == 0
    assert "llm_d_epp_flow_control_pool_saturation" not in page_of(metrics())


# -- what runs ---------------------------------------------------------------------------------------------------------


def send(
    counted: Metrics, known: EndpointTable, slot: int, tokens: float = 0.0, *, flow: str = "f", priority: int = 0
) -> Ticket:
    """A request is decided and counted onto a slot."""
    asked = request(fairness_id=flow, priority=priority)
    made = ticket(asked, endpoint=known.endpoint(slot), hold=known.admit(slot, tokens))
    counted.decided(made)
    return made


PRODUCER = {"namespace": "ns", "producer_name": "inflight-load-producer"}


def test_what_runs_is_told_by_endpoint_and_flow() -> None:
    known, counted = table([A, B]), metrics()
    send(counted, known, 0, 100.0, flow="x")
    send(counted, known, 0, 20.0, flow="x")
    send(counted, known, 0, 3.0, flow="x", priority=-1)
    send(counted, known, 1, 7.0, flow="y")
    page = page_of(counted, Sources(known, "p", zero))
    for endpoint, flow, priority, requests, tokens in (
        ("a-rank-0", "x", "0", 2, 120),
        ("a-rank-0", "x", "-1", 1, 3),
        ("b-rank-0", "y", "0", 1, 7),
    ):
        labels = {"endpoint_name": endpoint, "fairness_id": flow, "priority": priority, **PRODUCER}
        assert value(page, "llm_d_epp_inflight_requests", **labels) == requests
        assert value(page, "llm_d_epp_inflight_tokens", **labels) == tokens


def test_an_endpoint_on_which_nothing_runs_has_a_zero_of_no_flow() -> None:
    known, counted = table([A, B]), metrics()
    made = send(counted, known, 0)
    page = page_of(counted, Sources(known, "p", zero))
    for name in ("llm_d_epp_inflight_requests", "llm_d_epp_inflight_tokens"):
        assert value(page, name, endpoint_name="b-rank-0", fairness_id="", priority="", **PRODUCER) == 0
        assert len(page[name].samples) == 2
    known.release(made.hold)
    counted.finished(made, Outcome.COMPLETE, 12.0)
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="a-rank-0", fairness_id="") == 0


def test_a_request_is_told_where_it_runs_now_and_with_the_tokens_that_are_left() -> None:
    known, counted = table([A, B]), metrics()
    made = send(counted, known, 0, 100.0)
    known.release(made.hold)  # another endpoint served it
    made.hold, made.endpoint = known.admit(1, 100.0), B
    labels = {"endpoint_name": "b-rank-0", "fairness_id": "f"}
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="a-rank-0") == 0
    assert value(page, "llm_d_epp_inflight_tokens", **labels) == 100
    known.prefill_done(made.hold)
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", **labels) == 1
    assert value(page, "llm_d_epp_inflight_tokens", **labels) == 0


def test_who_works_for_the_destination_is_told_too_until_it_is_done() -> None:
    known, counted = table([A, B]), metrics()
    made = send(counted, known, 0)
    made.helpers = (known.admit(1, 50.0),)
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="a-rank-0", fairness_id="f") == 1
    assert value(page, "llm_d_epp_inflight_tokens", endpoint_name="b-rank-0", fairness_id="f") == 50
    known.release(made.helpers[0])
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="b-rank-0", fairness_id="") == 0


def test_requests_on_an_endpoint_that_left_are_still_told() -> None:
    known, counted = table([A, B]), metrics()
    send(counted, known, 0, 100.0)
    send(counted, known, 1)
    known.drop(A.name)
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="a-rank-0", **PRODUCER) == 1
    assert value(page, "llm_d_epp_inflight_tokens", endpoint_name="a-rank-0", **PRODUCER) == 100
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="b-rank-0", **PRODUCER) == 1


def test_an_endpoint_that_changed_its_address_under_load_is_one_series() -> None:
    known, counted = table([A]), metrics()
    send(counted, known, 0)
    send(counted, known, known.put(Endpoint(A.name, "10.0.0.9:8000"), 1.0))
    page = page_of(counted, Sources(known, "p", zero))
    assert value(page, "llm_d_epp_inflight_requests", endpoint_name="a-rank-0") == 2


def test_flows_over_their_cap_share_one_series() -> None:
    known, counted = table([A]), metrics(limits=Limits(fairness_ids=2))
    for number in range(10):
        send(counted, known, 0, flow=f"flow-{number}")
    told = {s.labels["fairness_id"]: s.value for s in page_of(counted, Sources(known, "p", zero))[INFLIGHT].samples}
    assert told == {"flow-0": 1, "flow-1": 1, "other": 8}


def test_thousands_of_requests_under_way_are_gone_through_in_pieces() -> None:
    known, counted = table([A, B]), metrics()
    for number in range(4 * TICKETS):
        send(counted, known, number % 2, flow=f"flow-{number % 7}")
    pieces = list(render(counted, Sources(known, "p", zero)))
    assert pieces.count(b"") == 4
    page = dict(read(b"".join(pieces)))
    assert sum(sample.value for sample in page[INFLIGHT].samples) == 4 * TICKETS


def test_requests_that_end_while_others_are_gone_through_are_not_told() -> None:
    known, counted = table([A]), metrics()
    made = [send(counted, known, 0) for _ in range(3 * TICKETS)]
    page = []
    for piece in render(counted, Sources(known, "p", zero)):
        page.append(piece)
        if not piece:
            for each in made:
                known.release(each.hold)
                counted.finished(each, Outcome.COMPLETE, 12.0)
            made.clear()
    told = sum(sample.value for sample in dict(read(b"".join(page)))[INFLIGHT].samples)
    assert told == TICKETS


flows = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("xyz"), st.integers(0, 500), st.booleans()), max_size=40)


@given(flows)
def test_sums_over_flows_are_what_the_table_counts(sent: list[tuple[int, str, int, bool]]) -> None:
    known, counted = table([A, B, C]), metrics()
    for slot, flow, tokens, ends in sent:
        made = send(counted, known, slot, float(tokens), flow=flow)
        if ends:
            known.release(made.hold)
            counted.finished(made, Outcome.CUT, 12.0)
    page = page_of(counted, Sources(known, "p", zero))
    for name, column in ((INFLIGHT, "inflight"), ("llm_d_epp_inflight_tokens", "inflight_tokens")):
        sums = dict.fromkeys(("a-rank-0", "b-rank-0", "c-rank-0"), 0.0)
        for sample in page[name].samples:
            sums[sample.labels["endpoint_name"]] += sample.value
        assert list(sums.values()) == known.column(column, known.listed, 0.0)[0].tolist()


def test_the_pool_may_change_between_two_pieces_of_the_page() -> None:
    known = table([A, B], [FULL, FULL])
    pieces = []
    for piece in render(metrics(), Sources(known, "p", zero)):
        pieces.append(piece)
        known.replace([], 0.0)
    assert b"".join(pieces).endswith(b"\n")


def test_gpu_pages_are_counted_where_they_are_fetched() -> None:
    counted, sources = everything()
    name, labels = "llm_d_epp_datalayer_poll_errors_total", {"source_type": "dcgm-data-source"}
    assert [sample.labels for sample in page_of(counted, sources)[name].samples] == [
        {"source_type": "metrics-data-source"}
    ]
    page = page_of(counted, msgspec.structs.replace(sources, gpu_errors=lambda: (3, 4)))
    assert value(page, name, **labels) == 3
    labels = {**labels, "extractor_type": "dcgm-extractor"}
    assert value(page, "llm_d_epp_datalayer_extract_errors_total", **labels) == 4
