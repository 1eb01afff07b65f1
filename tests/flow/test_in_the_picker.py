"""Policies and admission where they happen: one request after another through the whole picker, with literal times."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from google.protobuf import json_format

from epp import dialects
from epp.config.build import build
from epp.config.load import load
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.errors import NoEndpoint, Refusal, Saturated
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.events import BodyMode, Modes, Part, RequestEnded, RequestStarted
from epp.extproc.exchange import Limits
from epp.flow.policies import NO_POLICIES, Policies, Rule, Target
from epp.flow.saturation import Concurrency, Counted, Detector, Saturation, Utilization
from epp.headers import Headers
from epp.pb import decision_pb2
from epp.picker import Picker, PickerOptions
from epp.telemetry.views import decisions
from epp.ticket import Outcome, Ticket
from tests.contract.transport import QUEUE_ALONE
from tests.extproc import oracle
from tests.watching import Watch

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
POST: Headers = ((":method", b"POST"), (":path", b"/v1/completions"), ("x-request-id", b"r-1"))
BODY = b'{"model":"m","prompt":"hello"}'
LEVELS = Policies({"low": -1, "normal": 0, "high": 1})


def picker_of(*kv_usage: float | None, watch: Watch | None = None, detector: Detector | None = None) -> Picker:
    """Endpoints at 10.0.0.1 and on, with this share of their cache in use at 0.0; None: no page ever came."""
    table = EndpointTable()
    for i, usage in enumerate(kv_usage):
        slot = table.put(Endpoint(f"default/pod-{i}", f"10.0.0.{i + 1}:8000"), now=-100.0)
        if usage is not None:
            table.page_told(slot, table.generation(slot), Page(waiting=0.0, kv_usage=usage), now=0.0)
    scheduler = build(load(QUEUE_ALONE), Random(1))
    options = PickerOptions(detector=detector or Utilization())
    picker = Picker(
        table, scheduler, Ejection(table, EjectionParams()), watch or Watch(), lambda: 0.0, options, Random(5)
    )
    picker.policies = LEVELS
    return picker


def ask(objective: str = "", *headers: tuple[str, bytes]) -> Request:
    own = (("x-gateway-inference-objective", objective.encode()),) if objective else ()
    return dialects.read((*POST, *own, *headers), BODY)


def decide(picker: Picker, request: Request, subset: tuple[str, ...] | None = None, now: float = 0.0) -> Ticket:
    return picker.decide(request, subset, now, now)[0]


# -- admission ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_usage", "now", "refused"),
    [
        (0.792, 0.0, False),  # 0.99 of the threshold of 0.8
        (0.8, 0.0, True),
        (None, 0.0, True),  # unknown counts as full
        (0.1, 0.25, True),  # so does what is older than 200 ms
        (0.1, 0.2, False),
    ],
)
@pytest.mark.parametrize("objective", ["low", "normal", "high", "unheard-of", ""])
def test_only_who_is_below_zero_is_refused_and_only_by_a_full_pool(
    objective: str, kv_usage: float | None, now: float, refused: bool
) -> None:
    picker, request = picker_of(kv_usage), ask(objective)
    if refused and objective == "low":
        with pytest.raises(Saturated, match="priority is -1"):
            decide(picker, request, now=now)
        assert picker.table.column("inflight", picker.table.listed, now)[0].tolist() == [0]
        assert not picker.records
    else:
        assert decide(picker, request, now=now).endpoint.address == A
    assert (request.priority, request.objective) == ({"low": -1, "high": 1}.get(objective, 0), objective)


def test_an_empty_pool_or_subset_is_503_whatever_the_priority() -> None:
    with pytest.raises(NoEndpoint, match="no endpoints"):
        decide(picker_of(), ask("low"))
    with pytest.raises(NoEndpoint, match="subset"):
        decide(picker_of(0.9), ask("low"), ("10.0.0.9:8000",))


def test_what_is_full_is_what_the_gateway_allows() -> None:
    picker = picker_of(0.9, 0.0)
    assert decide(picker, ask("low")).saturation == Saturation(0.5625, 2)  # 0.9 / 0.8 / 2
    with pytest.raises(Saturated):
        decide(picker, ask("low"), (A,))
    assert decide(picker, ask("low"), (B,)).saturation == Saturation(0.0, 1)


def test_saturation_is_only_worked_out_where_something_depends_on_it() -> None:
    ticket = decide(picker_of(0.1), ask("high"))
    assert ticket.saturation is None


def test_the_operators_detector_decides() -> None:
    picker = picker_of(0.9, detector=Concurrency(Counted.REQUESTS, requests=2))
    tickets = [decide(picker, ask("low")), decide(picker, ask("high"))]
    with pytest.raises(Saturated):
        decide(picker, ask("low"))
    picker.finish(tickets[0], Outcome.COMPLETE, 0.0)
    decide(picker, ask("low"))


def test_who_counts_tokens_has_them_counted_though_no_plugin_asks() -> None:
    """`hello` in 4 bytes a token, plus one: 2 tokens."""
    picker = picker_of(0.1, detector=Concurrency(Counted.TOKENS, tokens=4))
    first = decide(picker, ask("low"))
    assert first.decision.prompt_tokens == 2
    assert decide(picker, ask("low")).saturation == Saturation(0.5, 1)
    with pytest.raises(Saturated):
        decide(picker, ask("low"))
    picker.response_started(first, ((":status", b"200"),), None, 0.1, bodies_seen=True)
    picker.response_data(first, b"x", 0.1)  # its prompt has been read
    decide(picker, ask("low"))


# -- policies ----------------------------------------------------------------------------------------------------------


def test_a_rule_rewrites_the_body_and_the_header_does_so_where_there_is_none() -> None:
    picker = picker_of(0.1)
    picker.policies = Policies({}, (Rule("m", (Target("m-v2", 1),), source="a rule"),))
    request = ask("", ("x-llm-d-model-name-rewrite", b"forced"))
    ticket, body = picker.decide(request, None, 0.0, 0.0)
    assert body == b'{"model":"m-v2","prompt":"hello"}'
    assert ticket.rule is not None
    assert (request.model, request.target_model, ticket.rule.source) == ("m", "m-v2", "a rule")
    picker.policies = NO_POLICIES
    request = ask("", ("x-llm-d-model-name-rewrite", b"forced"))
    ticket, body = picker.decide(request, None, 0.0, 0.0)
    assert (ticket.rule, body) == (None, b'{"model":"forced","prompt":"hello"}')


def test_a_rule_that_keeps_the_name_keeps_the_body() -> None:
    picker = picker_of(0.1)
    picker.policies = Policies({}, (Rule(None, (Target("m", 1),), source="a rule"),))
    ticket, body = picker.decide(ask(), None, 0.0, 0.0)
    assert body is None
    assert ticket.rule is not None


def test_a_rewrite_is_drawn_once_a_decision_and_the_same_for_the_same_seed() -> None:
    rule = Rule("m", (Target("a", 3), Target("b", 1)))

    def drawn() -> list[str]:
        picker = picker_of(0.1)
        picker.policies = Policies({}, (rule,))
        return [decide(picker, ask()).request.target_model for _ in range(400)]

    models, rng = drawn(), Random(5)
    assert models == ["a" if rng.random() * 4 < 3 else "b" for _ in range(400)]
    assert models == drawn()
    assert abs(Counter(models)["b"] - 100) < 4 * 8.7  # standard deviation of 400 draws at 1/4


def test_new_policies_hold_from_the_next_request_on() -> None:
    picker = picker_of(0.9)
    decide(picker, ask())
    picker.policies = Policies({}, (Rule("m", (), priority=-1),))
    with pytest.raises(Saturated):
        decide(picker, ask())
    picker.policies = Policies()
    decide(picker, ask())


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_record_says_priority_objective_rule_and_how_full_it_was() -> None:
    picker = picker_of(0.4, None, 0.0)
    picker.policies = Policies(
        {"low": -1}, (Rule("m", (Target("m-v2", 1),), source="InferenceModelRewrite ns/r rules[0]"),)
    )
    decide(picker, ask("low"))
    picker.policies = NO_POLICIES
    decide(picker, ask("unheard-of"))
    later, earlier = [
        json_format.ParseDict(json.loads(json.dumps(shown)), decision_pb2.Decision())
        for shown in decisions(picker, 10, wall_offset=0.0)
    ]
    assert (earlier.priority, earlier.objective, earlier.model, earlier.target_model) == (-1, "low", "m", "m-v2")
    assert earlier.rule == "InferenceModelRewrite ns/r rules[0]"
    assert earlier.saturation == decision_pb2.Saturation(value=0.5, endpoints=3, unknown=1)  # (0.5 + 1 + 0) / 3
    assert (later.priority, later.objective, later.rule) == (0, "unheard-of", "")
    assert not later.HasField("saturation")


def test_the_observer_sees_the_priority_of_who_was_refused() -> None:
    class Asking(Watch):
        seen: tuple[int, str] | None = None

        def refused(self, request: Request | None, refusal: Refusal, duration: float) -> None:
            assert request is not None
            assert isinstance(refusal, Saturated)
            self.seen = request.priority, request.objective

    watch = Asking()
    picker = picker_of(0.9, watch=watch)
    headers = (*POST, ("x-llm-d-inference-objective", b"low"))
    conversation = Conversation(picker, Limits(), Connection("test"), 0.0)
    for event in (RequestStarted(headers), RequestEnded(Part.BODY, BODY)):
        modes = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE) if isinstance(event, RequestStarted) else None
        replies = conversation.receive(oracle.message(event, modes).SerializeToString(), 0.0)
    (reply,) = replies
    answer = ep.ProcessingResponse.FromString(reply).immediate_response
    watch.check()
    assert watch.seen == (-1, "low")
    assert answer.status.code == 429
    assert {option.header.key: option.header.raw_value for option in answer.headers.set_headers} == {
        "content-type": b"application/json",
        "retry-after": b"1",
        "x-llm-d-request-dropped-reason": b"rejected-saturated",
    }
