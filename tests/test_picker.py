"""The pure whole: one request after another, with literal times."""

from __future__ import annotations

import json
import sys
from random import Random

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from epp import dialects
from epp.dialects.request import Request
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Candidates, Endpoint, Page
from epp.errors import NoEndpoint
from epp.flow.saturation import Utilization
from epp.headers import Headers
from epp.pb import decision_pb2
from epp.picker import Picker
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import Context, PickerParams, Scorer, Scores
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler
from epp.telemetry.views import decisions, endpoints
from epp.ticket import Outcome, Ticket
from tests.contract.transport import QUEUE_ALONE, picker_for
from tests.watching import Watch

A, B, C, D = "10.0.0.1:8000", "10.0.0.2:8000", "[fd00::3]:8000", "10.0.0.4:8000"
POST: Headers = ((":method", b"POST"), (":path", b"/v1/completions"), ("x-request-id", b"r-1"))
OK: Headers = ((":status", b"200"), ("content-type", b"application/json"))


def decide(picker: Picker, *, headers: Headers = (), subset: tuple[str, ...] | None = None, now: float = 0.0) -> Ticket:
    request = dialects.read(POST + headers, b'{"model":"m","prompt":"hello"}')
    return picker.decide(request, subset, started_at=now, now=now)[0]


def inflight(picker: Picker) -> list[float]:
    table = picker.table
    return [float(count) for count in table.column("inflight", table.listed, 0.0)[0]]


def test_the_shortest_queue_gets_the_request_and_the_count() -> None:
    picker = picker_for((A, B, C), Watch())
    ticket = decide(picker)
    assert ticket.endpoint.address == A
    assert ticket.decision.endpoints == (A, B, C)
    assert inflight(picker) == [1, 0, 0]
    picker.finish(ticket, Outcome.COMPLETE, now=1.0)
    assert inflight(picker) == [0, 0, 0]


def test_a_burst_between_two_pages_sees_itself() -> None:
    picker = picker_for((A, B), Watch())  # pages say 0 and 100 waiting
    tickets = [decide(picker) for _ in range(301)]
    chosen = [ticket.endpoint.address for ticket in tickets]
    assert chosen[:100] == [A] * 100  # until both have 100
    assert abs(chosen.count(A) - 200) <= 1  # then they take turns


@pytest.mark.parametrize(
    ("subset", "first"),
    [
        (None, A),
        ((B,), B),
        (("10.0.0.2",), B),
        ((C,), C),
        (("fd00::3",), C),
        (("[fd00:0:0::3]:8000",), C),
        (("[fd00::3]",), C),
        (("10.0.0.9:8000", B, C), B),
    ],
)
def test_the_gateways_subset_limits_the_choice(subset: tuple[str, ...] | None, first: str) -> None:
    assert decide(picker_for((A, B, C), Watch()), subset=subset).endpoint.address == first


@pytest.mark.parametrize("subset", [(), ("10.0.0.9:8000",), ("10.0.0.1:8001",), ("localhost:8000",), ("",)])
def test_a_subset_without_a_match_is_a_503(subset: tuple[str, ...]) -> None:
    picker = picker_for((A, B, C), Watch())
    with pytest.raises(NoEndpoint, match="subset"):
        decide(picker, subset=subset)
    assert inflight(picker) == [0, 0, 0]


def test_an_empty_pool_is_a_503() -> None:
    with pytest.raises(NoEndpoint, match="no endpoints"):
        decide(picker_for((), Watch()))


def test_the_endpoint_that_served_gets_the_count_and_those_before_it_a_failure() -> None:
    """Listed 100 s ago: the proxy knows them."""
    picker = picker_for((A, B, C, D), Watch())
    for _ in range(5):
        ticket = decide(picker, now=100.0)
        assert ticket.endpoint.address == A
        picker.response_started(ticket, OK, B, now=100.0, bodies_seen=False)
        assert inflight(picker) == [0, 1, 0, 0]
        picker.finish(ticket, Outcome.COMPLETE, now=100.0)
    assert inflight(picker) == [0, 0, 0, 0]
    ticket = decide(picker, now=100.0)  # five failures in a row have ejected the first, and nobody after the one served
    assert ticket.endpoint.address == B
    ((name, slots),) = [(each.name, each.slots.tolist()) for each in ticket.decision.exclusions]
    assert (name, slots) == ("ejected", [picker.table.slot_at(A)])


@pytest.mark.parametrize("served", [B, None])
def test_one_that_the_proxy_may_not_know_yet_is_not_blamed_for_what_it_did_not_answer(served: str | None) -> None:
    """B served, or the proxy itself said 503 for want of hosts."""
    status = b"200" if served else b"503"
    picker = picker_for((A, B, C, D), Watch())
    for now in range(9):
        ticket = decide(picker, now=float(now))
        picker.response_started(ticket, ((":status", status),), served, now=float(now), bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=float(now))
    assert decide(picker, now=9.0).endpoint.address == A


def test_one_that_answers_with_failures_itself_is_left_out_at_once() -> None:
    picker = picker_for((A, B), Watch())
    for _ in range(5):
        ticket = decide(picker, now=1.0)
        picker.response_started(ticket, ((":status", b"500"),), A, now=1.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=1.0)
    assert decide(picker, now=1.0).endpoint.address == B


def test_an_endpoint_that_left_the_pool_may_answer_twice_on_its_last_request() -> None:
    """First with an informational status, say."""
    picker = picker_for((A, B), Watch())
    ticket = decide(picker)
    picker.response_started(ticket, OK, B, now=0.0, bodies_seen=False)
    picker.table.drop("default/pod-1")
    picker.response_started(ticket, OK, B, now=0.0, bodies_seen=False)
    assert inflight(picker) == [0]
    picker.finish(ticket, Outcome.COMPLETE, now=1.0)
    picker.table.put(Endpoint("default/pod-1", B), 1.0)
    assert inflight(picker) == [0, 0]


def test_an_endpoint_outside_the_pool_that_served_changes_nothing() -> None:
    picker = picker_for((A,), Watch())
    ticket = decide(picker)
    picker.response_started(ticket, OK, "192.0.2.1:80", now=0.0, bodies_seen=False)
    assert inflight(picker) == [1]


def test_the_answers_of_an_endpoint_outside_the_pool_are_no_merit_of_the_one_that_was_passed_over() -> None:
    picker = picker_for((A, B), Watch())
    for _ in range(5):
        ticket = decide(picker, now=100.0)
        assert ticket.endpoint.address == A
        picker.response_started(ticket, OK, "192.0.2.1:80", now=100.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=100.0)
    assert decide(picker, now=100.0).endpoint.address == B


def test_failures_in_a_row_eject_and_the_reason_is_in_the_decision() -> None:
    picker = picker_for((A, B), Watch())
    for _ in range(5):
        ticket = decide(picker, now=100.0)
        picker.response_started(ticket, ((":status", b"500"),), None, now=100.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=100.0)
    assert decide(picker, now=101.0).endpoint.address == B
    views = endpoints(picker.table, Ejection(picker.table, EjectionParams()), 101.0)
    assert [view["ejected"] for view in views] == [False, False]  # another ejection knows nothing of this one


def test_guards_add_up() -> None:
    picker = picker_for((A, B, C), Watch())
    for _ in range(5):  # A is ejected at 100.0
        ticket = decide(picker, now=100.0)
        picker.response_started(ticket, ((":status", b"502"),), None, now=100.0, bodies_seen=False)
        picker.finish(ticket, Outcome.COMPLETE, now=100.0)
    new = picker.table.put(Endpoint("default/new", D), now=100.0)
    picker.table.page_told(new, picker.table.generation(new), Page(waiting=0.0), now=100.0)
    assert decide(picker, subset=(A, B, D), now=101.0).endpoint.address == D
    ticket = decide(picker, subset=(A, B, D), now=101.0)  # one is what a new endpoint gets at first
    assert ticket.endpoint.address == B
    assert [exclusion.name for exclusion in ticket.decision.exclusions] == ["subset", "ejected", "slow-start"]


def test_a_new_endpoint_starts_slowly_and_is_like_any_other_after_its_window() -> None:
    """Ten seconds, by default. A and B were there from the beginning, 100 s ago."""
    picker = picker_for((A, B), Watch())
    new = picker.table.put(Endpoint("default/new", D), now=100.0)
    picker.table.page_told(new, picker.table.generation(new), Page(waiting=0.0), now=100.0)
    picker.table.admit(new)
    held = decide(picker, now=109.9)  # nothing runs elsewhere, so one is the new one's share
    assert held.endpoint.address == A
    assert [exclusion.name for exclusion in held.decision.exclusions] == ["slow-start"]
    assert decide(picker, now=110.0).decision.exclusions == ()


def test_prefill_tokens_count_until_the_first_byte_where_bodies_are_seen() -> None:
    picker = picker_for((A,), Watch())
    hold = picker.table.admit(0, prefill_tokens=100.0)
    assert picker.table.column("inflight_tokens", picker.table.listed, 0.0)[0].tolist() == [100.0]
    picker.table.release(hold)
    ticket = decide(picker)
    picker.response_started(ticket, OK, None, now=0.5, bodies_seen=True)
    picker.response_data(ticket, b'{"usage":{"prompt_tokens":5,"completion_tokens":2}}', now=0.7)
    assert ticket.first_byte_at == 0.7
    assert picker.table.column("inflight_tokens", picker.table.listed, 0.0)[0].tolist() == [0.0]
    picker.response_ended(ticket)
    assert ticket.usage is not None
    assert ticket.usage.usage is not None
    assert ticket.usage.usage.prompt_tokens == 5


def test_gaps_are_told_to_whoever_wants_them_from_the_second_piece_on() -> None:
    class Gaps:
        def __init__(self) -> None:
            self.told: list[float] = []

        def observe(self, value: float) -> None:
            self.told.append(value)

    picker = picker_for((A,), Watch())
    ticket, unwatched = decide(picker), decide(picker)
    ticket.gaps = gaps = Gaps()
    for each in (ticket, unwatched):
        picker.response_started(each, OK, None, now=0.5, bodies_seen=True)
        for at in (1.0, 1.25, 3.25):
            picker.response_data(each, b"x", at)
    assert gaps.told == [0.25, 2.0]
    assert (ticket.first_byte_at, ticket.last_byte_at) == (1.0, 3.25)


def test_decisions_may_be_made_while_the_last_ones_are_read() -> None:
    picker = picker_for((A, B), Watch())
    for _ in range(3):
        decide(picker)
    shown = []
    for each in decisions(picker, 10, wall_offset=0.0):
        shown.append(each["endpoints"])
        decide(picker)
    assert len(shown) == 3


def test_a_ticket_outlives_its_record_and_keeps_what_it_needs() -> None:
    picker = picker_for((A, B, C), Watch())
    tickets = [decide(picker) for _ in range(257)]
    oldest, next_oldest = tickets[:2]
    assert len(oldest.decision.slots) == len(oldest.decision.raw) == len(oldest.decision.page_ages) == 0
    assert len(next_oldest.decision.slots) == 3
    assert picker.records[0].decision is next_oldest.decision
    before = inflight(picker)
    picker.response_started(oldest, OK, B, now=0.0, bodies_seen=False)  # it moves, and the first choice failed
    assert inflight(picker) == [before[0] - 1, before[1] + 1, before[2]]
    for ticket in tickets:
        picker.finish(ticket, Outcome.COMPLETE, now=1.0)
    assert inflight(picker) == [0, 0, 0]


def test_decisions_that_are_forgotten_while_they_are_read_are_left_out() -> None:
    picker = picker_for((A, B), Watch())
    for _ in range(256):
        decide(picker)
    shown = decisions(picker, 1000, wall_offset=0.0)
    assert len(next(shown)["candidates"]) == 2
    for _ in range(250):  # of the 256 that were there, six are left
        decide(picker)
    rest = [each["candidates"] for each in shown]
    assert [len(candidates) for candidates in rest] == [2] * 5


def test_endpoints_may_leave_while_they_are_read() -> None:
    picker = picker_for((A, B, C), Watch())
    shown = []
    for each in endpoints(picker.table, Ejection(picker.table, EjectionParams()), 1.0):
        shown.append((each["address"], each["waiting"], each["page_age"]))
        picker.table.replace([], 1.0)
    assert shown == [(A, 0.0, 1.0), (B, 100.0, 1.0), (C, 200.0, 1.0)]


def test_a_client_that_hangs_up_after_the_last_event_of_a_stream_has_its_whole_answer() -> None:
    watch = Watch()
    picker = picker_for((A,), watch)
    request = dialects.read(POST, b'{"model":"m","prompt":"hello","stream":true}')
    ticket, _ = picker.decide(request, None, 0.0, 0.0)
    picker.response_started(
        ticket, ((":status", b"200"), ("content-type", b"text/event-stream")), None, 0.0, bodies_seen=True
    )
    picker.response_data(ticket, b"data: {}\n\ndata: [DONE]\n\n", 0.0)
    picker.finish(ticket, Outcome.CUT, 0.0)
    assert watch.outcomes == [Outcome.COMPLETE]


def test_a_client_that_hangs_up_before_the_last_event_of_a_stream_cut_it() -> None:
    watch = Watch()
    picker = picker_for((A,), watch)
    request = dialects.read(POST, b'{"model":"m","prompt":"hello","stream":true}')
    ticket, _ = picker.decide(request, None, 0.0, 0.0)
    picker.response_started(
        ticket, ((":status", b"200"), ("content-type", b"text/event-stream")), None, 0.0, bodies_seen=True
    )
    picker.response_data(ticket, b"data: {}\n\n", 0.0)
    picker.finish(ticket, Outcome.CUT, 0.0)
    assert watch.outcomes == [Outcome.CUT]


def test_a_rewritten_model_is_spliced_into_the_body() -> None:
    picker = picker_for((A,), Watch())
    body = b'{"model":"m","prompt":"hello"}'
    request = dialects.read((*POST, ("x-llm-d-model-name-rewrite", b"other")), body)
    _, sent = picker.decide(request, None, 0.0, 0.0)
    assert sent == b'{"model":"other","prompt":"hello"}'
    assert request.target_model == "other"
    assert picker.decide(dialects.read(POST, body), None, 0.0, 0.0)[1] is None


@pytest.mark.parametrize("config", [QUEUE_ALONE, ""], ids=["queue", "default"])
def test_nothing_keeps_a_body_once_it_was_forwarded(config: str) -> None:
    body = b'{"model":"m","prompt":"%b"}' % (b"long " * 1000)
    before = sys.getrefcount(body)
    picker = picker_for((A,), Watch(), config)
    ticket, _ = picker.decide(dialects.read(POST, body), None, 0.0, 0.0)
    assert sys.getrefcount(body) == before
    assert ticket.request.prompt == b""
    assert ticket.request.size_bytes == len(body)
    picker.response_started(ticket, OK, None, 0.0, bodies_seen=True)
    picker.finish(ticket, Outcome.COMPLETE, 0.0)


def test_a_request_that_cannot_be_rewritten_is_not_counted() -> None:
    class Breaks(Watch):
        def decided(self, ticket: Ticket) -> None:
            raise RuntimeError("no")

    picker = picker_for((A,), Breaks())
    with pytest.raises(RuntimeError):
        decide(picker)
    assert inflight(picker) == [0]


class Follower:
    """A scorer that prefers the first and remembers what it is told; it fails at the model "poison"."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool, float]] = []

    def __call__(self, request: Request, candidates: Candidates) -> Scores:
        return np.arange(len(candidates), 0, -1) / len(candidates)

    def followed(self, request: Request, over: bool, now: float) -> None:
        self.told.append((request.request_id, over, now))
        if request.model == "poison":
            raise RuntimeError("no")


def followed_by(follower: Follower, watch: Watch) -> Picker:
    picker = picker_for((A, B), watch)
    plugin = Scorer("follower", None, None, None, None, (), follower, follower.followed)
    order = max_score.make(max_score.name, PickerParams(max_num_of_endpoints=2), Context())
    profile = Profile("default", (), ((plugin, 1.0),), order)
    picker.reconfigure(Scheduler(Lineup([profile]), Random(0)), Utilization())
    return picker


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("served", [A, B, None, "192.0.2.1:80"])
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_plugins_are_told_of_the_first_byte_once_and_of_the_end_once(
    outcome: Outcome, served: str | None, pieces: int
) -> None:
    follower, watch = Follower(), Watch()
    picker = followed_by(follower, watch)
    ticket = decide(picker)
    picker.response_started(ticket, OK, served, now=1.0, bodies_seen=True)
    assert follower.told == []
    for number in range(pieces):
        picker.response_data(ticket, b"{", now=2.0 + number)
    picker.response_ended(ticket)
    picker.finish(ticket, outcome, now=9.0)
    first = [("r-1", False, 2.0)] if pieces else []
    assert follower.told == [*first, ("r-1", True, 9.0)]
    watch.check()


@pytest.mark.parametrize("outcome", list(Outcome))
def test_plugins_are_told_of_the_end_of_a_request_that_was_never_answered(outcome: Outcome) -> None:
    follower = Follower()
    picker = followed_by(follower, Watch())
    picker.finish(decide(picker), outcome, now=3.0)
    assert follower.told == [("r-1", True, 3.0)]


def test_a_plugin_that_fails_as_a_request_goes_on_is_named_and_harms_nothing() -> None:
    follower, watch = Follower(), Watch()
    picker = followed_by(follower, watch)
    request = dialects.read(POST, b'{"model":"poison","prompt":"hello"}')
    ticket, _ = picker.decide(request, None, 0.0, 0.0)
    picker.response_started(ticket, OK, A, now=1.0, bodies_seen=True)
    picker.response_data(ticket, b'{"usage":{"prompt_tokens":5,"completion_tokens":2}}', now=2.0)
    picker.response_ended(ticket)
    picker.finish(ticket, Outcome.COMPLETE, now=3.0)
    assert [over for _, over, _ in follower.told] == [False, True]
    assert [str(mistake) for mistake in watch.mistakes] == ["no", "no"]
    assert inflight(picker) == [0, 0]
    assert watch.outcomes == [Outcome.COMPLETE]


def test_a_decision_is_rendered_as_its_record_says() -> None:
    picker = picker_for((A, B, C), Watch())
    decide(picker, subset=(A, B))
    (shown,) = decisions(picker, 10, wall_offset=1_000.0)
    record = json_format.ParseDict(json.loads(json.dumps(shown)), decision_pb2.Decision())
    assert record.request_id == "r-1"
    assert list(record.endpoints) == [A, B]
    assert {c.address: c.excluded_by for c in record.candidates} == {A: "", B: "", C: "subset"}
    (scorer,) = record.scorers
    assert (scorer.name, list(scorer.scores)) == ("queue-scorer", [1.0, 0.0])


def test_records_do_not_keep_bodies_alive() -> None:
    picker = picker_for((A,), Watch())
    decide(picker)
    (record,) = picker.records
    assert not hasattr(record, "request")
    assert not hasattr(record.decision, "request")


@given(
    st.lists(st.tuples(st.sampled_from(["decide", "served", "finish", "drop", "put"]), st.integers(0, 9)), max_size=60)
)
def test_whatever_happens_counts_return_to_zero(steps: list[tuple[str, int]]) -> None:
    watch = Watch()
    picker = picker_for((A, B, C), watch)
    running: list[Ticket] = []
    for now, (step, n) in enumerate(steps):
        if step == "decide" and len(picker.table):
            running.append(decide(picker, now=float(now)))
        elif step == "served" and running:
            picker.response_started(running[n % len(running)], OK, (A, B, C)[n % 3], float(now), bodies_seen=False)
        elif step == "finish" and running:
            picker.finish(running.pop(n % len(running)), Outcome.COMPLETE, float(now))
        elif step == "drop":
            picker.table.drop(f"default/pod-{n % 3}")
        elif step == "put":
            picker.table.put(Endpoint(f"default/pod-{n % 3}", (A, B, C)[n % 3]), float(now))
    for ticket in running:
        picker.finish(ticket, Outcome.CUT, 100.0)
    for n, address in enumerate((A, B, C)):
        picker.table.put(Endpoint(f"default/pod-{n}", address), 100.0)
    assert inflight(picker) == [0, 0, 0]
    watch.check()
