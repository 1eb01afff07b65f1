"""Times are whole or halves, which floats hold exactly."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.telemetry.access import ALLOWED, BURST, DENIED, PEER_BURST, PEERS, RATE, Allowance, Question, Verdicts

OK, UNAUTHORIZED, FORBIDDEN = HTTPStatus.OK, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN


def question(number: int = 0, path: str = "/metrics") -> Question:
    return Question(b"%032d" % number, "get", path)


@pytest.mark.parametrize(("verdict", "lasts"), [(OK, 60.0), (UNAUTHORIZED, 10.0), (FORBIDDEN, 10.0)])
def test_a_verdict_holds_for_its_time_and_not_a_moment_longer(verdict: HTTPStatus, lasts: float) -> None:
    verdicts = Verdicts()
    assert verdicts.recall(question(), 100.0) is None
    verdicts.learn(question(), verdict, 100.0)
    assert verdicts.recall(question(), 100.0) is verdict
    assert verdicts.recall(question(), 100.0 + lasts - 0.5) is verdict
    assert verdicts.recall(question(), 100.0 + lasts) is None


def test_a_verdict_is_about_one_token_one_verb_and_one_path() -> None:
    verdicts = Verdicts()
    verdicts.learn(question(), OK, 0.0)
    for other in (question(1), question(path="/debug/decisions"), Question(question().digest, "head", "/metrics")):
        assert verdicts.recall(other, 0.0) is None
        assert not verdicts.was_allowed(other)


def test_that_nobody_could_tell_is_not_remembered_and_takes_nothing_back() -> None:
    verdicts = Verdicts()
    verdicts.learn(question(), HTTPStatus.INTERNAL_SERVER_ERROR, 0.0)
    assert verdicts.recall(question(), 0.0) is None
    assert len(verdicts) == 0
    verdicts.learn(question(), OK, 0.0)
    verdicts.learn(question(), HTTPStatus.INTERNAL_SERVER_ERROR, 60.0)
    assert verdicts.recall(question(), 60.0) is None
    assert verdicts.was_allowed(question())


def test_the_last_verdict_is_the_one_that_holds() -> None:
    verdicts = Verdicts()
    verdicts.learn(question(), FORBIDDEN, 0.0)
    verdicts.learn(question(), OK, 10.0)
    assert verdicts.recall(question(), 10.0) is OK
    verdicts.learn(question(), UNAUTHORIZED, 70.0)
    assert verdicts.recall(question(), 70.0) is UNAUTHORIZED
    assert not verdicts.was_allowed(question())
    assert verdicts.recall(question(), 80.0) is None


def test_denies_push_no_allow_out_and_both_stay_bounded() -> None:
    verdicts = Verdicts()
    verdicts.learn(question(), OK, 0.0)
    for number in range(1, 2 * DENIED):
        verdicts.learn(question(number), UNAUTHORIZED, 0.0)
    assert verdicts.recall(question(), 0.0) is OK
    assert len(verdicts) == 1 + DENIED
    assert verdicts.recall(question(1), 0.0) is None  # the oldest
    for number in range(1, 2 * ALLOWED):
        verdicts.learn(question(-number), OK, 0.0)
    assert len(verdicts) == ALLOWED + DENIED


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([OK, UNAUTHORIZED, FORBIDDEN]), st.integers(0, 40))))
def test_nobody_is_let_in_longer_than_a_minute_after_the_last_word_was_an_allow(
    learned: list[tuple[int, HTTPStatus, int]],
) -> None:
    verdicts, now = Verdicts(), 0.0
    last: dict[int, tuple[HTTPStatus, float]] = {}
    for number, verdict, later in learned:
        verdicts.learn(question(number), verdict, now)
        last[number] = verdict, now
        now += later
        for each in range(4):
            said, at = last.get(each, (None, now))
            holds = said is not None and now < at + (60.0 if said is OK else 10.0)
            assert verdicts.recall(question(each), now) is (said if holds else None)


def test_a_peer_has_a_few_reviews_at_once_and_then_one_a_second() -> None:
    allowance = Allowance()
    assert [allowance.take("a", 100.0) for _ in range(PEER_BURST + 1)] == [True] * PEER_BURST + [False]
    assert not allowance.take("a", 100.5)
    assert allowance.take("a", 101.0)
    assert not allowance.take("a", 101.0)
    assert [allowance.take("a", 200.0) for _ in range(PEER_BURST + 1)] == [True] * PEER_BURST + [False]


def test_a_peer_who_asks_too_often_leaves_the_others_theirs() -> None:
    allowance = Allowance()
    for tenth in range(1000):  # 100 seconds, ten a second from the flood
        allowance.take("flood", tenth / 10)
    assert allowance.take("scraper", 100.0)


def test_all_peers_together_have_an_end_too() -> None:
    allowance = Allowance()
    taken = [allowance.take(f"10.0.0.{number}", 0.0) for number in range(BURST + 10)]
    assert taken == [True] * BURST + [False] * 10
    assert [allowance.take(f"10.0.1.{number}", 1.0) for number in range(int(RATE) + 1)] == [True] * int(RATE) + [False]


def test_peers_that_are_forgotten_do_not_get_more_than_all_may() -> None:
    allowance, taken = Allowance(), 0
    for second in range(200):
        for peer in range(100):  # 20,000 peers, never the same twice
            taken += allowance.take(f"fd00::{second:x}:{peer:x}", float(second))
    assert len(allowance) == PEERS
    assert taken == BURST + 199 * int(RATE)
