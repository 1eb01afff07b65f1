"""What runs where when a request is served in stages, or by a rank behind its pod's port."""

from __future__ import annotations

import json
from random import Random

from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from hypothesis import given
from hypothesis import strategies as st

from epp import dialects
from epp.config.build import build
from epp.config.load import load
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.events import BodyMode, Modes, Part, RequestEnded, RequestStarted
from epp.extproc.exchange import Limits
from epp.headers import Headers
from epp.picker import Picker, PickerOptions
from epp.ticket import Outcome, Ticket
from tests.extproc import oracle
from tests.watching import Watch

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
STAGES = """
plugins:
- {type: decode-filter}
- {type: prefill-filter}
- {type: encode-filter}
- {type: queue-scorer}
- {type: prefix-cache-scorer}
- {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}
- {type: always-disagg-pd-decider}
- {type: always-disagg-multimodal-decider}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: always-disagg-pd-decider, encode: always-disagg-multimodal-decider}}
schedulingProfiles:
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: queue-scorer}, {pluginRef: max-score-picker}]
- name: prefill
  plugins:
  - {pluginRef: prefill-filter}
  - {pluginRef: queue-scorer}
  - {pluginRef: prefix-cache-scorer}
  - {pluginRef: max-score-picker}
- name: encode
  plugins: [{pluginRef: encode-filter}, {pluginRef: queue-scorer}, {pluginRef: max-score-picker}]
"""
RANKS = """
plugins:
- {type: queue-scorer}
- {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}
- {type: data-parallel-profile-handler}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: queue-scorer}, {pluginRef: max-score-picker}]}
"""
D0, D1, P0, P1, E0 = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.1.1:8000", "10.0.1.2:8000", "10.0.2.1:8000"
POOL = [(D0, "decode"), (D1, "decode"), (P0, "prefill"), (P1, "prefill"), (E0, "encode")]
OK: Headers = ((":status", b"200"), ("content-type", b"application/json"))


def picker_of(config: str, pool: list[tuple[str, str]], watch: Watch) -> Picker:
    """A picker of endpoints with these roles; of two with the same, the first one is preferred."""
    table = EndpointTable(freshness=1e9)
    for i, (address, role) in enumerate(pool):
        slot = table.put(Endpoint(f"default/pod-{i}", address, {"llm-d.ai/role": role}), now=0.0)
        table.page_told(slot, table.generation(slot), Page(waiting=float(100 * i)), now=0.0)
    scheduler = build(load(HEAD + config), Random(1))
    return Picker(table, scheduler, Ejection(table, EjectionParams()), watch, lambda: 0.0, PickerOptions())


def decide(picker: Picker, *, image: bool = False, now: float = 100.0) -> Ticket:
    part = {"type": "image_url", "image_url": {"url": "https://x/y.png"}} if image else {"type": "text", "text": "hi"}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    headers = ((":method", b"POST"), (":path", b"/v1/chat/completions"))
    return picker.decide(dialects.read(headers, json.dumps(body).encode()), None, now, now)[0]


def counts(picker: Picker, column: str = "inflight") -> list[float]:
    table = picker.table
    return [float(count) for count in table.column(column, table.listed, 0.0)[0]]


def test_a_request_counts_on_each_of_its_stages_and_its_prompt_where_it_is_computed() -> None:
    picker = picker_of(STAGES, POOL, Watch())
    ticket = decide(picker, image=True)
    assert ticket.decision.plan == "encode-prefill-decode"
    assert ticket.endpoint.address == D0
    assert counts(picker) == [1, 0, 1, 0, 1]
    tokens = float(ticket.request.tokens)
    assert tokens > 0
    assert counts(picker, "inflight_tokens") == [0, 0, tokens, 0, 0]
    picker.response_started(ticket, OK, D0, now=101.0, bodies_seen=True)
    assert counts(picker) == [1, 0, 0, 0, 0]  # the others have done their part
    assert counts(picker, "inflight_tokens") == [0, 0, 0, 0, 0]
    picker.finish(ticket, Outcome.COMPLETE, now=102.0)
    assert counts(picker) == [0, 0, 0, 0, 0]


def test_without_a_prefill_endpoint_the_prompt_counts_where_the_request_goes() -> None:
    picker = picker_of(STAGES, [(D0, "decode")], Watch())
    ticket = decide(picker)
    assert ticket.decision.plan == "decode-only"
    assert counts(picker) == [1]
    assert counts(picker, "inflight_tokens") == [float(ticket.request.tokens)]
    picker.finish(ticket, Outcome.UNANSWERED, now=101.0)
    assert counts(picker) == counts(picker, "inflight_tokens") == [0]


def test_a_client_that_leaves_before_the_answer_leaves_nothing_behind() -> None:
    picker = picker_of(STAGES, POOL, Watch())
    ticket = decide(picker)
    picker.finish(ticket, Outcome.UNANSWERED, now=101.0)
    assert counts(picker) == counts(picker, "inflight_tokens") == [0, 0, 0, 0, 0]


def test_the_only_decode_endpoint_serves_though_it_is_new_or_ejected() -> None:
    picker = picker_of(STAGES, [(D0, "decode"), (P0, "prefill"), (P1, "prefill")], Watch())
    picker.table.rejoin(0, 100.0)
    first, second = decide(picker), decide(picker)  # one request is all that a new endpoint gets where others are
    assert first.endpoint.address == second.endpoint.address == D0
    assert first.decision.exclusions[0].name == second.decision.exclusions[0].name == "decode-filter"
    for ticket in (first, second, *(decide(picker, now=200.0) for _ in range(5))):
        picker.response_started(ticket, ((":status", b"500"),), D0, now=200.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=200.0)
    assert decide(picker, now=200.0).endpoint.address == D0


def test_where_another_endpoint_answered_only_the_destinations_count_moves() -> None:
    picker = picker_of(STAGES, POOL, Watch())
    ticket = decide(picker)
    assert ticket.decision.endpoints == (D0, D1)
    picker.response_started(ticket, OK, D1, now=101.0, bodies_seen=False)
    assert counts(picker) == [0, 1, 0, 0, 0]
    picker.finish(ticket, Outcome.COMPLETE, now=102.0)
    assert counts(picker) == [0, 0, 0, 0, 0]


def test_a_prefill_endpoint_that_leaves_keeps_its_count_until_the_answer() -> None:
    picker = picker_of(STAGES, POOL, Watch())
    ticket = decide(picker)
    slot = picker.table.slot_at(P0)
    assert slot is not None
    picker.table.drop("default/pod-2")
    assert not picker.table.is_listed(slot)
    picker.response_started(ticket, OK, D0, now=101.0, bodies_seen=False)
    assert picker.table.generation(slot) == 0  # free: the last of its work has ended
    picker.finish(ticket, Outcome.COMPLETE, now=102.0)
    assert counts(picker) == [0, 0, 0, 0]


def test_the_side_car_is_told_the_stages_and_never_what_a_client_says() -> None:
    picker = picker_of(STAGES, POOL, Watch())
    forged = (("x-prefiller-host-port", b"evil:1"), ("x-encoder-hosts-ports", b"evil:2"))
    headers = ((":method", b"POST"), (":path", b"/v1/chat/completions"), *forged)
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
    conversation = Conversation(picker, Limits(), Connection("test"), 100.0)
    modes = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE)
    started, ended = RequestStarted(headers), RequestEnded(Part.BODY, body)
    assert conversation.receive(oracle.message(started, modes).SerializeToString(), 100.0) == []
    replies = conversation.receive(oracle.message(ended, None).SerializeToString(), 100.0)
    mutation = ep.ProcessingResponse.FromString(replies[0]).request_headers.response.header_mutation
    told = {option.header.key: option.header.raw_value for option in mutation.set_headers}
    assert told["x-prefiller-host-port"] == P0.encode()
    assert "x-encoder-hosts-ports" not in told
    assert "x-encoder-hosts-ports" in mutation.remove_headers
    conversation.lose(101.0)
    assert counts(picker) == [0, 0, 0, 0, 0]


# -- ranks -------------------------------------------------------------------------------------------------------------

R0, R1 = "10.0.0.1:8000", "10.0.0.1:8001"
RANKED = [(R1, ""), (R0, "")]
"""The second rank has the shorter queue."""


def test_a_request_counts_on_the_rank_though_it_goes_to_the_primary_port() -> None:
    picker = picker_of(RANKS, RANKED, Watch())
    ticket = decide(picker)
    assert ticket.decision.endpoints == (R0,)
    assert ticket.decision.set_headers == (("x-data-parallel-host-port", R1.encode()),)
    assert ticket.endpoint.address == R1
    assert counts(picker) == [1, 0]
    picker.response_started(ticket, OK, R0, now=101.0, bodies_seen=False)
    assert ticket.endpoint.address == R1
    assert counts(picker) == [1, 0]
    picker.finish(ticket, Outcome.COMPLETE, now=102.0)
    assert counts(picker) == [0, 0]


def test_failures_that_the_primary_port_answers_with_are_the_ranks() -> None:
    picker = picker_of(RANKS, RANKED, Watch())
    for _ in range(5):
        ticket = decide(picker)
        assert ticket.endpoint.address == R1
        picker.response_started(ticket, ((":status", b"500"),), R0, now=100.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=100.0)
    assert decide(picker).endpoint.address == R0


def test_successes_that_the_primary_port_answers_with_are_the_ranks() -> None:
    picker = picker_of(RANKS, RANKED, Watch())
    for turn in range(12):  # never five failures in a row
        ticket = decide(picker)
        assert ticket.endpoint.address == R1
        status = b"200" if turn % 4 == 3 else b"500"
        picker.response_started(ticket, ((":status", status),), R0, now=100.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=100.0)


# -- any order ---------------------------------------------------------------------------------------------------------

STEPS = ["decide", "image", "started", "data", "finish", "drop", "put"]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), max_size=60))
def test_whatever_happens_every_stages_counts_return_to_zero(steps: list[tuple[str, int]]) -> None:
    watch = Watch()
    picker = picker_of(STAGES, POOL, watch)
    running: list[Ticket] = []

    def listed() -> set[str]:
        return {picker.table.endpoint(slot).labels["llm-d.ai/role"] for slot in picker.table.listed.tolist()}

    for now, (step, n) in enumerate(steps, 100):
        ticket = running[n % len(running)] if running else None
        if step in ("decide", "image") and "decode" in listed():
            running.append(decide(picker, image=step == "image", now=float(now)))
        elif step == "started" and ticket is not None:
            served = (*(address for address, _ in POOL), None)[n % 6]
            picker.response_started(ticket, OK, served, float(now), bodies_seen=n % 2 == 0)
        elif step == "data" and ticket is not None and ticket.response_started_at is not None:
            picker.response_data(ticket, b"{}", float(now))
        elif step == "finish" and ticket is not None:
            running.remove(ticket)
            picker.finish(ticket, list(Outcome)[n % 4], float(now))
        elif step == "drop":
            picker.table.drop(f"default/pod-{n % 5}")
        elif step == "put":
            address, role = POOL[n % 5]
            picker.table.put(Endpoint(f"default/pod-{n % 5}", address, {"llm-d.ai/role": role}), float(now))
        held = [hold for each in running for hold in (each.hold, *each.helpers)]
        assert not any(hold.released for hold in held)
        for slot in picker.table.listed.tolist():
            here = [hold for hold in held if hold.slot == slot]
            position = picker.table.listed.tolist().index(slot)
            assert counts(picker)[position] == len(here)
            assert counts(picker, "inflight_tokens")[position] == sum(hold.tokens for hold in here)
    for ticket in running:
        picker.finish(ticket, Outcome.CUT, 1000.0)
    for i, (address, role) in enumerate(POOL):
        picker.table.put(Endpoint(f"default/pod-{i}", address, {"llm-d.ai/role": role}), 1000.0)
    assert counts(picker) == counts(picker, "inflight_tokens") == [0, 0, 0, 0, 0]
    watch.check()
