from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric

from epp.dialects.usage import Usage
from epp.endpoints.table import Endpoint
from epp.errors import BadRequest, NoEndpoint, Saturated, TooLarge
from epp.flow.policies import Rule, Target
from epp.telemetry.metrics import REMEMBERED, Metrics
from epp.telemetry.series import Limits
from epp.ticket import Outcome, Ticket
from tests.telemetry.builders import decision, metrics, page_of, request, ticket, value


def run(
    counted: Metrics, made: Ticket | None = None, outcome: Outcome = Outcome.COMPLETE, *, until: float = 12.0
) -> None:
    made = made or ticket()
    counted.decided(made)
    counted.finished(made, outcome, until)


def count(families: dict[str, Metric], name: str) -> float:
    """Observations of a family's only series; 0 when it is absent."""
    return value(families, f"{name}_count") if name in families else 0.0


# -- what a whole request leaves behind --------------------------------------------------------------------------


def test_a_streamed_request_is_told_as_the_reference_tells_it() -> None:
    """Headers at 10.0 s, first byte at 10.5, end at 12.0; 50 output tokens."""
    counted = metrics()
    asked = request("llama", fairness_id="team", stream=True, size=700)
    run(counted, ticket(asked, first_byte_at=10.5, usage=Usage(1000, 50, 800), response_bytes=9000))
    page = page_of(counted)
    labels = {"model_name": "llama", "target_model_name": "llama", "fairness_id": "team", "priority": "0"}
    assert value(page, "llm_d_epp_request_total", **labels) == 1
    assert value(page, "llm_d_epp_request_running", **labels) == 0
    assert value(page, "llm_d_epp_request_duration_seconds_sum", **labels) == 2.0
    assert value(page, "llm_d_epp_request_duration_seconds_bucket", le="1.5", **labels) == 0
    assert value(page, "llm_d_epp_request_duration_seconds_bucket", le="2", **labels) == 1
    assert value(page, "llm_d_epp_request_ttft_seconds_sum", streaming="true", **labels) == 0.5
    assert value(page, "llm_d_epp_request_size_bytes_sum", **labels) == 700
    assert value(page, "llm_d_epp_response_size_bytes_sum", **labels) == 9000
    assert value(page, "llm_d_epp_request_input_tokens_sum", **labels) == 1000
    assert value(page, "llm_d_epp_request_output_tokens_sum", **labels) == 50
    assert value(page, "llm_d_epp_request_cached_tokens_sum", **labels) == 800
    assert value(page, "llm_d_epp_request_ntpot_seconds_sum", **labels) == pytest.approx(2.0 / 50)
    assert value(page, "llm_d_epp_request_streaming_tpot_seconds_sum", **labels) == pytest.approx(1.5 / 49)
    assert value(page, "llm_d_epp_request_processing_duration_seconds_sum") == pytest.approx(0.003)
    assert value(page, "llm_d_epp_scheduler_e2e_duration_seconds_sum") == pytest.approx(150e-6)
    assert count(page, "llm_d_epp_response_processing_duration_seconds") == 0
    assert value(page, "epp_exchanges_total", outcome="complete") == 1


def test_an_answer_that_is_not_streamed_has_a_response_phase_but_no_time_between_tokens() -> None:
    counted = metrics()
    run(counted, ticket(first_byte_at=10.5, usage=Usage(10, 5, None)))
    page = page_of(counted)
    assert value(page, "llm_d_epp_request_ttft_seconds_sum", streaming="false") == 0.5
    assert value(page, "llm_d_epp_response_processing_duration_seconds_sum") == pytest.approx(1.8)
    assert "llm_d_epp_request_streaming_tpot_seconds" not in page
    assert "llm_d_epp_request_cached_tokens" not in page  # not told is not zero


def test_where_bodies_are_not_shown_only_the_duration_is_told() -> None:
    counted = metrics()
    run(counted)
    page = page_of(counted)
    assert value(page, "llm_d_epp_request_duration_seconds_count") == 1
    for name in ("request_ttft_seconds", "response_size_bytes", "request_output_tokens", "request_ntpot_seconds"):
        assert f"llm_d_epp_{name}" not in page


def test_legacy_families_are_sums_over_the_labels_that_they_lack() -> None:
    counted = metrics()
    run(counted, ticket(request("m", fairness_id="a", size=100)))
    run(counted, ticket(request("m", fairness_id="b", size=1000)))
    run(counted, ticket(request("n", fairness_id="a", size=5000)))
    page = page_of(counted)
    assert value(page, "inference_objective_request_sizes_sum", model_name="m") == 1100
    assert value(page, "inference_objective_request_sizes_bucket", model_name="m", le="128") == 1
    assert value(page, "inference_objective_request_sizes_bucket", model_name="m", le="1024") == 2
    assert value(page, "inference_objective_request_total", model_name="m", priority="0") == 2
    assert value(page, "inference_objective_request_duration_seconds_count", model_name="n") == 1
    assert value(page, "inference_objective_running_requests", model_name="m") == 0


def test_requests_under_way_are_counted_up_and_down() -> None:
    counted = metrics()
    first, second = ticket(), ticket()
    counted.decided(first)
    counted.decided(second)
    assert value(page_of(counted), "llm_d_epp_request_running") == 2
    counted.finished(first, Outcome.CUT, 11.0)
    assert value(page_of(counted), "llm_d_epp_request_running") == 1


def test_requests_refusals_and_those_under_way_are_told_by_priority() -> None:
    """Sums over models and fairness ids say what each priority got; the legacy total has the label too."""
    counted = metrics()
    for priority, model in ((-1, "m"), (-1, "n"), (0, "m"), (10, "m")):
        counted.decided(ticket(request(model, priority=priority)))
    counted.refused(request(priority=-1), Saturated("full"), 0.001)
    page = page_of(counted)
    for name in ("llm_d_epp_request_total", "inference_objective_request_total", "llm_d_epp_request_running"):
        assert value(page, name, model_name="m", priority="-1") == 1
        assert value(page, name, model_name="n", priority="-1") == 1
        assert value(page, name, priority="10") == 1
    refused = {"priority": "-1", "error_code": "ResourceExhausted"}
    assert value(page, "llm_d_epp_request_error_total", **refused) == 1


def test_a_request_whose_labels_change_under_way_is_counted_down_where_it_was_counted_up() -> None:
    """A pipeline may set the priority of a request that it holds."""
    counted = metrics()
    made = ticket()
    counted.decided(made)
    made.request.priority = 5
    made.request.target_model = "rewritten"
    counted.finished(made, Outcome.COMPLETE, 12.0)
    page = page_of(counted)
    labels = {"priority": "0", "target_model_name": "m"}
    assert value(page, "llm_d_epp_request_running", **labels) == 0
    assert value(page, "llm_d_epp_request_duration_seconds_count", **labels) == 1


def test_gaps_between_pieces_are_wanted_of_streamed_answers_alone() -> None:
    counted = metrics()
    streamed, whole = ticket(request(stream=True)), ticket()
    counted.decided(streamed)
    counted.decided(whole)
    assert whole.gaps is None
    assert streamed.gaps is not None
    for gap in (0.003, 0.005, 0.1):
        streamed.gaps.observe(gap)
    page = page_of(counted)
    name = "llm_d_epp_request_streaming_itl_seconds"
    assert value(page, f"{name}_sum", model_name="m") == pytest.approx(0.108)
    assert [value(page, f"{name}_bucket", le=le) for le in ("0.001", "0.005", "0.08", "0.1")] == [0, 2, 2, 3]


# -- how exchanges end otherwise ---------------------------------------------------------------------------------


def test_a_cut_stream_has_a_duration_and_a_first_byte_but_no_size() -> None:
    """The reference records nothing of it, and so forgets the slowest requests."""
    counted = metrics()
    made = ticket(first_byte_at=69.0, response_bytes=10, usage=Usage(5, 1, 0))
    run(counted, made, Outcome.CUT, until=70.0)
    page = page_of(counted)
    assert value(page, "llm_d_epp_request_duration_seconds_sum") == 60.0
    assert value(page, "llm_d_epp_request_ttft_seconds_sum") == 59.0
    assert "llm_d_epp_response_size_bytes" not in page
    assert "llm_d_epp_request_output_tokens" not in page
    assert value(page, "epp_exchanges_total", outcome="cut") == 1


def test_an_exchange_without_response_headers_is_told_apart() -> None:
    """Envoy may not send the response phase at all; its end then says nothing about the request's."""
    counted = metrics()
    run(counted, None, Outcome.UNANSWERED, until=10.004)
    page = page_of(counted)
    assert "llm_d_epp_request_duration_seconds" not in page
    assert value(page, "epp_unanswered_seconds_sum") == pytest.approx(0.004)
    assert value(page, "epp_exchanges_total", outcome="unanswered") == 1


@pytest.mark.parametrize(("status", "errors"), [(200, 0), (204, 0), (399, 0), (400, 1), (404, 1), (503, 1), (0, 0)])
def test_a_status_of_400_or_more_is_an_error_of_the_model_server(status: int, errors: int) -> None:
    counted = metrics()
    run(counted, ticket(status=status))
    page = page_of(counted)
    if not errors:
        assert "llm_d_epp_request_error_total" not in page
        return
    assert value(page, "llm_d_epp_request_error_total", error_code="ModelServerError", fairness_id="f") == 1
    assert value(page, "inference_objective_request_error_total", error_code="ModelServerError") == 1


def test_a_refused_request_is_an_error_and_no_request() -> None:
    counted = metrics()
    counted.refused(request("llama"), NoEndpoint("none"), 0.002)
    counted.refused(None, TooLarge("too large"), 0.5)
    page = page_of(counted)
    assert "llm_d_epp_request_total" not in page
    assert "llm_d_epp_request_duration_seconds" not in page
    assert value(page, "llm_d_epp_request_error_total", model_name="llama", error_code="ServiceUnavailable") == 1
    assert value(page, "llm_d_epp_request_error_total", model_name="", error_code="BadRequest") == 1
    assert value(page, "epp_refusals_total", reason="rejected-no-endpoints", status="503") == 1
    assert value(page, "epp_refusals_total", reason="BadRequest", status="413") == 1
    assert value(page, "llm_d_epp_request_processing_duration_seconds_sum") == pytest.approx(0.502)
    attempts = {"status": "failure", "target_model_name": "llama", "endpoint_name": ""}
    assert value(page, "llm_d_epp_scheduler_attempts_total", **attempts) == 1


def test_a_bad_request_is_no_attempt_at_scheduling() -> None:
    counted = metrics()
    counted.refused(None, BadRequest("no model"), 0.001)
    assert "llm_d_epp_scheduler_attempts_total" not in page_of(counted)


# -- decisions ---------------------------------------------------------------------------------------------------


def test_an_attempt_names_the_pod_without_its_rank_and_the_port() -> None:
    counted = metrics()
    run(counted, ticket(endpoint=Endpoint("ns/vllm-7-rank-1", "[2001:db8::7]:8001")))
    labels = {"status": "success", "target_model_name": "m", "namespace": "ns", "port": "8001"}
    page = page_of(counted)
    assert value(page, "llm_d_epp_scheduler_attempts_total", endpoint_name="vllm-7", **labels) == 1
    assert value(page, "inference_extension_scheduler_attempts_total", pod_name="vllm-7", **labels) == 1


def test_a_pod_that_came_back_under_another_address_is_one_series() -> None:
    counted = metrics()
    run(counted, ticket(endpoint=Endpoint("ns/a-rank-0", "10.0.0.1:8000")))
    run(counted, ticket(endpoint=Endpoint("ns/a-rank-0", "10.0.0.2:8000")))
    assert value(page_of(counted), "llm_d_epp_scheduler_attempts_total", endpoint_name="a") == 2


def test_more_endpoints_than_are_remembered_are_all_told() -> None:
    """The short way to a counter is forgotten from time to time; the counter is not."""
    counted = metrics()
    endpoints = [Endpoint(f"ns/pod-{at}-rank-0", f"10.0.{at >> 8}.{at & 255}:8000") for at in range(REMEMBERED + 200)]
    made = ticket()
    for _ in range(2):
        for endpoint in endpoints:
            made.endpoint = endpoint
            counted.decided(made)
    counts = [count for _, count in counted.attempts]
    assert counts == [2.0] * len(endpoints)


def test_an_address_that_another_pod_has_now_is_another_series() -> None:
    counted = metrics()
    for name in ("ns/a-rank-0", "ns/b-rank-0", "ns/a-rank-0"):
        run(counted, ticket(endpoint=Endpoint(name, "10.0.0.1:8000")))
    page = page_of(counted)
    assert value(page, "llm_d_epp_scheduler_attempts_total", endpoint_name="a") == 2
    assert value(page, "llm_d_epp_scheduler_attempts_total", endpoint_name="b") == 1


def test_attempts_over_their_cap_share_one_series() -> None:
    counted = metrics(limits=Limits(endpoint_sets=2))
    for at in (1, 2, 3, 4, 1):
        run(counted, ticket(endpoint=Endpoint(f"ns/pod-{at}-rank-0", f"10.0.0.{at}:8000")))
    page = page_of(counted)
    assert value(page, "llm_d_epp_scheduler_attempts_total", endpoint_name="pod-1") == 2
    other = dict.fromkeys(("target_model_name", "endpoint_name", "namespace", "port"), "other")
    assert value(page, "llm_d_epp_scheduler_attempts_total", status="success", **other) == 2


def test_a_decision_tells_what_it_believed_to_be_cached() -> None:
    counted = metrics()
    run(counted, ticket(made=decision(prompt=1000, matched=250)))
    run(counted, ticket(made=decision()))  # nobody asked for the prompt: no look-up
    assert counted.hit_ratio.count == counted.hit_bytes.count == 1
    assert counted.hit_ratio.total == 0.25
    assert counted.hit_bytes.total == 1000  # 250 tokens at 4 bytes


def test_decisions_made_without_knowing_enough_are_counted() -> None:
    counted = metrics()
    run(counted, ticket(made=decision(unknown=True)))
    run(counted, ticket(made=decision(failures=("prefix-cache-scorer",))))
    page = page_of(counted)
    assert value(page, "epp_unknown_signal_decisions_total") == 1
    assert value(page, "epp_plugin_failures_total", plugin_name="prefix-cache-scorer", kind="error") == 1


def test_decisions_are_told_by_their_stages_and_by_who_planned_them() -> None:
    counted = metrics()
    handler, older = ("stages", "disagg-profile-handler"), ("pd", "pd-profile-handler")
    for plan in ("prefill-decode", "decode-only", "prefill-decode"):
        run(counted, ticket(request(target="t"), made=decision(plan=plan, handler=handler)))
    run(counted, ticket(request(target="t"), made=decision(plan="decode-only", handler=older)))
    run(counted, ticket(request(target="t")))  # no stages were weighed
    page = page_of(counted)
    for plan, count in (("prefill-decode", 2), ("decode-only", 1)):
        labels = {"model_name": "t", "decision_type": plan}
        named = {**labels, "plugin_name": "stages", "plugin_type": "disagg-profile-handler"}
        assert value(page, "llm_d_epp_disagg_decision_total", **named) == count
        assert value(page, "llm_d_inference_scheduler_disagg_decision_total", **labels) == count
    labels = {"model_name": "t", "decision_type": "decode-only"}
    assert value(page, "llm_d_inference_scheduler_pd_decision_total", **labels) == 1
    assert sum(count for _, count in counted.plans) == 4


CANARY = Rule("m", (Target("m-v2", 1),), source="InferenceModelRewrite default/canary rules[0]")


def test_decisions_of_a_rewrite_rule_are_told_by_its_resource_and_both_models() -> None:
    counted = metrics()
    for target in ("m-v1", "m-v2", "m-v2"):
        run(counted, ticket(request("m", target=target), rule=CANARY))
    run(counted, ticket(request("m", target="m-v1", fairness_id="another"), rule=CANARY))
    run(counted, ticket(request("m", target="m-v2")))  # the client's own rewrite header
    page = page_of(counted)
    for prefix in ("llm_d_epp_", "inference_extension_"):
        for target in ("m-v1", "m-v2"):
            labels = {"model_rewrite_name": "canary", "model_name": "m", "target_model": target}
            assert value(page, f"{prefix}model_rewrite_decisions_total", **labels) == 2


def test_rules_of_the_same_resource_count_together_and_others_apart() -> None:
    counted = metrics()
    for source in (
        "InferenceModelRewrite default/canary rules[0]",
        "InferenceModelRewrite default/canary rules[1]",
        "InferenceModel default/chat",
        "by hand",
        "",
    ):
        run(counted, ticket(rule=Rule("m", (Target("m", 1),), source=source)))
    assert [(labels[0], count) for labels, count in counted.rewrites] == [
        ("canary", 2),
        ("chat", 1),
        ("hand", 1),
        ("", 1),
    ]


def test_a_generic_rule_and_any_model_that_clients_name_stay_bounded() -> None:
    counted = metrics(limits=Limits(models=2, label_sets=5))
    generic = Rule(None, (Target("base", 1),), source="InferenceModelRewrite default/all rules[0]")
    for number in range(50):
        run(counted, ticket(request(f"model-{number}", target="base"), rule=generic))
    told = {labels[1:]: count for labels, count in counted.rewrites}
    assert told == {("model-0", "base"): 1, ("other", "base"): 49}


# -- whatever clients and servers send ---------------------------------------------------------------------------


def test_label_sets_stay_bounded_whatever_clients_send() -> None:
    counted = metrics(limits=Limits(label_sets=3))
    for number in range(50):
        run(counted, ticket(request(f"model-{number}", fairness_id=f"id-{number}")))
    totals = page_of(counted)["llm_d_epp_request_total"].samples
    assert [(sample.labels["model_name"], sample.value) for sample in totals] == [
        ("model-0", 1),
        ("model-1", 1),
        ("model-2", 1),
        ("other", 47),
    ]
    assert totals[3].labels == dict.fromkeys(("model_name", "target_model_name", "fairness_id", "priority"), "other")


def test_models_and_fairness_ids_over_their_caps_are_other() -> None:
    counted = metrics(limits=Limits(models=2, fairness_ids=1))
    for model, fairness_id in (("a", "x"), ("b", "x"), ("c", "x"), ("a", "y"), ("a", "x")):
        run(counted, ticket(request(model, fairness_id=fairness_id)))
    page = page_of(counted)
    assert value(page, "llm_d_epp_request_total", model_name="a", fairness_id="x") == 2
    assert value(page, "llm_d_epp_request_total", model_name="b", fairness_id="x") == 1
    assert value(page, "llm_d_epp_request_total", model_name="other", fairness_id="x") == 1
    assert value(page, "llm_d_epp_request_total", model_name="a", fairness_id="other") == 1


def test_more_sets_of_labels_than_are_remembered_are_counted_up_and_down() -> None:
    counted = metrics(limits=Limits(models=5000, label_sets=REMEMBERED + 100))
    asked = [ticket(request(f"model-{at}")) for at in range(REMEMBERED + 200)]
    for _ in range(2):
        for made in asked:
            run(counted, made)
    requests = [series.requests for _, series in counted.requests]
    assert requests == [2] * (REMEMBERED + 100) + [200]  # the last is `other`
    assert not any(series.under_way for _, series in counted.requests)


def test_long_values_are_cut_and_meet_their_like_again() -> None:
    counted = metrics()
    run(counted, ticket(request("x" * 1000)))
    run(counted, ticket(request("x" * 1000 + "y")))
    page = page_of(counted)
    assert value(page, "llm_d_epp_request_total", model_name="x" * 128) == 2
    assert value(page, "llm_d_epp_request_running", model_name="x" * 128) == 0


@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=1, max_size=30))
def test_any_text_in_a_label_comes_back_from_the_page(names: list[tuple[str, str]]) -> None:
    counted = metrics(limits=Limits(label_sets=10))
    for model, fairness_id in names:
        run(counted, ticket(request(model, fairness_id=fairness_id)))
    page = page_of(counted)
    samples = page["llm_d_epp_request_total"].samples
    assert sum(sample.value for sample in samples) == len(names)
    assert all(sample.value == 0 for sample in page["llm_d_epp_request_running"].samples)
    told = [tuple(sample.labels.values()) for sample in samples]
    assert len(told) == len(set(told)) <= 11
    model, fairness_id = names[0]
    assert value(page, "llm_d_epp_request_total", model_name=model, fairness_id=fairness_id) >= 1


def test_no_cached_tokens_are_told_as_zero_but_no_prompt_and_no_output_are_not() -> None:
    counted = metrics()
    run(counted, ticket(usage=Usage(0, 0, 0)))
    page = page_of(counted)
    assert value(page, "llm_d_epp_request_cached_tokens_bucket", le="1") == 1
    assert value(page, "llm_d_epp_request_cached_tokens_sum") == 0
    for name in ("request_input_tokens", "request_output_tokens", "request_ntpot_seconds"):
        assert f"llm_d_epp_{name}" not in page


@pytest.mark.parametrize("tokens", [10**400, -1, 0, 1 << 53], ids=["huge", "negative", "zero", "2^53"])
def test_nonsense_in_a_usage_is_not_added_up(tokens: int) -> None:
    counted = metrics()
    run(counted, ticket(usage=Usage(tokens, tokens, tokens if tokens else None)))
    page = page_of(counted)
    for name in ("request_input_tokens", "request_output_tokens", "request_cached_tokens", "request_ntpot_seconds"):
        assert f"llm_d_epp_{name}" not in page


# -- mishaps -----------------------------------------------------------------------------------------------------


def test_a_mistake_of_our_own_is_counted_and_logged_once_without_the_body(caplog: pytest.LogCaptureFixture) -> None:
    counted = metrics(logger=logging.getLogger("epp.test"))
    for _ in range(5):
        try:
            b"secret \xff".decode()
        except UnicodeDecodeError as error:
            counted.broke("a decision", error)
    assert value(page_of(counted), "epp_mistakes_total") == 5
    assert len(caplog.records) == 1
    assert "a decision: UnicodeDecodeError" in caplog.text
    assert "secret" not in caplog.records[0].getMessage()


def test_a_proxy_that_sends_no_response_headers_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    counted = metrics(logger=logging.getLogger("epp.test"))
    counted.never_answered("ipv4:10.0.0.9:41")
    counted.never_answered("ipv4:10.0.0.9:42")
    assert value(page_of(counted), "epp_silent_connections_total") == 2
    assert len(caplog.records) == 1
    assert "response_header_mode SEND" in caplog.text
