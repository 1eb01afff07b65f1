"""Requests that belong together go where the first one went."""

from __future__ import annotations

import json
from base64 import b64encode
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Candidates, EndpointTable, Page
from epp.headers import Headers
from epp.scheduling import handlers, sessions
from epp.scheduling.deciders import always
from epp.scheduling.labels import decode_role, prefill_role
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import Answer, Context, Filter, Params, PickerParams, Plugin, Scorer
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import queue
from epp.scheduling.sessions import affinity_filter, affinity_scorer, session_id
from tests.scheduling.builders import NOW, made, pool, profile, scheduler

BY_ID = {"strategy": "session_id"}


def asking(*headers: tuple[str, bytes]) -> Request:
    return read(((":path", b"/v1/completions"), *headers), json.dumps({"model": "m", "prompt": "hello"}).encode())


def token(slot: int) -> bytes:
    return b64encode(f"default/pod{slot}-rank-0".encode())


def given(plugin: Plugin[Any], parameters: dict[str, Any]) -> Params:
    params: Params = msgspec.convert(parameters, plugin.params)
    return params


def both(parameters: dict[str, Any]) -> tuple[Filter, Scorer]:
    return (
        made(affinity_filter, given(affinity_filter, parameters)),
        made(affinity_scorer, given(affinity_scorer, parameters)),
    )


# -- by the endpoint's name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "slot"),
    [
        ((("x-session-token", token(1)),), 1),
        ((("x-session-token", token(0)),), 0),
        ((), None),
        ((("x-session-token", b""),), None),
        ((("x-session-token", b"%%%"),), None),
        ((("x-session-token", b64encode(b"\xff\xfe")),), None),
        ((("x-session-token", token(9)),), None),  # it has left the pool
        ((("x-other", token(1)),), None),
    ],
)
def test_the_endpoint_that_a_token_names_is_kept_and_scores_one(headers: Headers, slot: int | None) -> None:
    candidates, (keep, score) = pool(Page(), Page(), Page()), both({})
    mask, scores = keep.keep(asking(*headers), candidates), score.score(asking(*headers), candidates)
    assert mask.tolist() == [slot in (None, position) for position in range(3)]
    assert scores.tolist() == [float(slot == position) for position in range(3)]


def test_an_endpoint_that_is_no_candidate_is_not_waited_for() -> None:
    candidates, (keep, score) = pool(Page(), Page()), both({})
    left = candidates.keep(np.array([True, False]))
    assert keep.keep(asking(("x-session-token", token(1))), left).tolist() == [True]
    assert score.score(asking(("x-session-token", token(1))), left).tolist() == [0.0]


def test_the_response_names_the_endpoint_that_served_under_the_operators_header() -> None:
    config = {"encodedEndpointHeaderConfig": {"header": "X-Sticky"}}
    chosen = made(affinity_filter, given(affinity_filter, config))
    choosing, candidates = scheduler(profile((made(queue), 1.0), filters=[chosen])), pool(Page(waiting=5), Page())
    request = asking()
    decision = choosing.schedule(request, candidates)
    ((name, answered),) = choosing.lineup.answered
    assert name == "session-affinity-filter"
    served = candidates.table.endpoint(0)
    headers = answered(request, Answer(served, None, (), decision))
    assert headers == (("x-sticky", token(0)),)
    assert choosing.schedule(asking(*headers), candidates).first == 0


# -- by the session's id -----------------------------------------------------------------------------------------------


def in_session(name: bytes) -> Request:
    return asking(("x-session-id", name))


def test_a_session_stays_where_it_went_first_and_others_are_spread() -> None:
    chosen = made(affinity_filter, given(affinity_filter, BY_ID))
    choosing, table = scheduler(profile((made(queue), 1.0), filters=[chosen])), EndpointTable()
    candidates = pool(Page(waiting=0), Page(waiting=1), table=table)
    assert choosing.schedule(in_session(b"s"), candidates).first == 0
    table.page_told(0, table.generation(0), Page(waiting=9), NOW)
    later = table.candidates(NOW)
    assert choosing.schedule(in_session(b"s"), later).first == 0
    assert choosing.schedule(in_session(b"t"), later).first == 1
    assert choosing.schedule(asking(), later).first == 1
    assert [
        answered(in_session(b"s"), Answer(table.endpoint(0), None, (), choosing.schedule(asking(), later)))
        for _, answered in choosing.lineup.answered
    ] == [()]


def test_a_session_moves_on_when_its_endpoint_is_no_candidate() -> None:
    chosen = made(affinity_filter, given(affinity_filter, BY_ID))
    choosing, candidates = (
        scheduler(profile((made(queue), 1.0), filters=[chosen])),
        pool(Page(waiting=0), Page(waiting=1)),
    )
    assert choosing.schedule(in_session(b"s"), candidates).first == 0
    assert choosing.schedule(in_session(b"s"), candidates.keep(np.array([False, True]))).first == 1
    assert choosing.schedule(in_session(b"s"), candidates).first == 1


def test_a_session_is_forgotten_after_its_time_and_with_its_endpoint() -> None:
    table = EndpointTable(freshness=1e9)
    pool(Page(), Page(), table=table)
    bindings = sessions.Bindings(ttl=300.0)
    bindings.bind(b"s", 1, table, now=0.0)
    assert bindings.find(b"s", table, 300.0) == 1
    assert bindings.find(b"s", table, 300.1) is None
    assert bindings.find(b"t", table, 0.0) is None
    table.drop("default/pod1-rank-0")
    assert bindings.find(b"s", table, 1.0) is None
    pool(Page(), Page(), table=table)  # the same slot, another generation
    assert bindings.find(b"s", table, 1.0) is None


def test_no_more_sessions_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 3)
    table = EndpointTable()
    pool(Page(), table=table)
    bindings = sessions.Bindings(ttl=300.0)
    for name in (b"a", b"b", b"c", b"a", b"d"):
        bindings.bind(name, 0, table, now=1.0)
    assert [bindings.find(name, table, 1.0) for name in (b"a", b"b", b"c", b"d")] == [0, None, 0, 0]
    bindings.bind(b"e", 0, table, now=500.0)
    bindings.bind(b"f", 0, table, now=500.0)
    bindings.bind(b"g", 0, table, now=500.0)
    assert len(bindings) == 3


@pytest.mark.parametrize(
    ("sources", "headers", "session", "found"),
    [
        ([{"header": "X-Chat"}], (("x-chat", b"s"),), "", True),
        ([{"header": "X-Chat"}], (("x-session-id", b"s"),), "", False),
        ([{"header": "x-none"}, {"header": "x-chat"}], (("x-chat", b"s"),), "", True),
        ([{"attribute": "SessionID", "producer": "session-id-producer"}], (), "s", True),
        ([{"attribute": "SessionID"}], (), "", False),
    ],
)
def test_a_sessions_id_is_looked_for_where_the_operator_says(
    sources: list[dict[str, str]], headers: Headers, session: str, found: bool
) -> None:
    chosen = made(affinity_scorer, given(affinity_scorer, {**BY_ID, "sessionIdConfig": {"sources": sources}}))
    candidates = pool(Page(), Page())
    request = asking(*headers)
    request.session = session
    assert chosen.chosen is not None
    chosen.chosen(request, candidates, np.array([1]))
    assert chosen.score(request, candidates).tolist() == ([0.0, 1.0] if found else [0.0, 0.0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"strategy": "cookie"}, "Invalid enum value 'cookie'"),
        ({"sessionIdConfig": {"sources": [{"header": "a", "attribute": "b"}]}}, "either a header or an attribute"),
        ({"sessionIdConfig": {"sources": [{}]}}, "either a header or an attribute"),
        ({"sessionIdConfig": {"sources": []}}, "length >= 1"),
        ({"sessionIdConfig": {"evictionTtlSeconds": 0}}, "> 0"),
        ({"sessionIdConfig": {"evictionSweepSeconds": 0}}, "> 0"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        given(affinity_filter, parameters)


def test_what_the_other_strategy_would_read_is_told_to_have_no_effect() -> None:
    params = sessions.SessionParams(strategy="session_id", profile_name="prefill")
    assert params.idle(["encodedEndpointHeaderConfig", "profileName"]).keys() == {
        "encodedEndpointHeaderConfig",
        "profileName",
    }
    assert sessions.SessionParams().idle(["sessionIdConfig"]).keys() == {"sessionIdConfig"}


# -- with disaggregation -----------------------------------------------------------------------------------------------


def test_each_stage_may_be_pinned_by_a_token_of_its_own() -> None:
    of_decode = made(affinity_filter)
    config = {"profileName": "prefill", "encodedEndpointHeaderConfig": {"header": "x-prefill-token"}}
    of_prefill = made(affinity_filter, given(affinity_filter, config))
    picker = made(max_score, PickerParams())
    by_queue = [(made(queue), 1.0)]
    context = Context(deciders={"always": made(always)}, profiles=("decode", "prefill"))
    params = given(handlers.disaggregated, {"deciders": {"prefill": "always"}})
    choosing = Scheduler(
        Lineup(
            [
                Profile("decode", [made(decode_role), of_decode], by_queue, picker),
                Profile("prefill", [made(prefill_role), of_prefill], by_queue, picker),
            ],
            handler=made(handlers.disaggregated, params, context),
        ),
        Random(0),
    )
    labels = [{"llm-d.ai/role": role} for role in ("decode", "decode", "prefill", "prefill")]
    candidates = pool(Page(waiting=9), Page(), Page(waiting=9), Page(), labels=labels)
    decision = choosing.schedule(asking(("x-session-token", token(0)), ("x-prefill-token", token(2))), candidates)
    assert decision.prefill is not None
    assert (decision.first, decision.prefill.first) == (0, 2)
    answer = Answer(candidates.table.endpoint(0), None, (), decision)
    headers = [answered(asking(), answer) for _, answered in choosing.lineup.answered]
    assert headers == [(("x-session-token", token(0)),), (("x-prefill-token", token(2)),)]
    decision.encode, decision.prefill = decision.prefill, None  # of a profile named prefill; and one of none
    assert [answered(asking(), answer) for _, answered in choosing.lineup.answered] == headers
    decision.encode.profile = "encode"
    assert [answered(asking(), answer) for _, answered in choosing.lineup.answered] == [headers[0], ()]


# -- session-id-producer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "headers", "session"),
    [
        ({"headerName": "X-Chat"}, (("x-chat", b" s1 "),), "s1"),
        ({"headerName": "X-Chat"}, (), ""),
        ({"cookieName": "chat"}, (("cookie", b"a=1; chat=s2; b=3"),), "s2"),
        ({"cookieName": "chat"}, (("cookie", b"a=1"), ("cookie", b'chat="s3"')), "s3"),
        ({"cookieName": "chat"}, (("cookie", b"chat2=x; xchat=y; chat="),), ""),
        ({"cookieName": "chat"}, (("x-chat", b"s"),), ""),
    ],
)
def test_a_header_or_a_cookie_names_the_session(parameters: dict[str, str], headers: Headers, session: str) -> None:
    request = asking(*headers)
    made(session_id, given(session_id, parameters)).process(request)
    assert request.session == session


@pytest.mark.parametrize("parameters", [{}, {"headerName": "a", "cookieName": "b"}])
def test_a_session_is_named_by_exactly_one_of_the_two(parameters: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError, match="either headerName or cookieName"):
        given(session_id, parameters)


def test_what_the_producer_finds_pins_the_session() -> None:
    sources = {"sessionIdConfig": {"sources": [{"attribute": "SessionID"}]}}
    chosen = made(affinity_filter, given(affinity_filter, {**BY_ID, **sources}))
    finds = made(session_id, given(session_id, {"cookieName": "chat"}))
    choosing = Scheduler(Lineup([profile((made(queue), 1.0), filters=[chosen])], processors=[finds]), Random(0))
    table = EndpointTable()

    def at(waiting: float) -> Candidates:
        return pool(Page(waiting=waiting), Page(waiting=1), table=table)

    cookie = ("cookie", b"chat=s")
    assert choosing.schedule(asking(cookie), at(0)).first == 0
    assert choosing.schedule(asking(cookie), at(9)).first == 0
    assert choosing.schedule(asking(), at(9)).first == 1
