"""What results come to: worked out by hand."""

from __future__ import annotations

import pytest

from epp.errors import ConfigError
from epp.load.figures import Goal, Server, balance, by_server, figures, parse_answer_goal
from epp.load.results import Result


def result(
    ttft: float | None = None,
    *,
    error: str = "",
    itl: float | None = None,
    ended_at: float = 3.0,
    tokens: tuple[int, int, int] = (0, 0, 0),
    server: str = "",
) -> Result:
    """Due at 1.0. `tokens`: prompt, completion, cached."""
    return Result("t", "m", "s", 0, 1.0, 1.0, ended_at, error, 200, ttft, itl, itl, *tokens, server)


def test_figures_count_what_was_refused() -> None:
    told = figures(
        [
            result(0.1, itl=0.01, ended_at=2.0, tokens=(100, 50, 80)),
            result(0.3, itl=0.03, ended_at=5.0, tokens=(100, 50, 0)),
            result(2.5, itl=0.02, ended_at=4.0),  # too late to be good
            result(0.2, error="truncated", tokens=(0, 20, 0)),
            result(error="http_429"),
        ],
        4.0,
        Goal(2.0, 0.05),
    )
    assert (told.requests, told.failed, told.errors) == (5, 2, {"http_429": 1, "truncated": 1})
    assert told.ttft_mean_s == pytest.approx(3.1 / 4)
    assert (told.ttft_p50_s, told.ttft_p90_s, told.ttft_p99_s) == (0.2, 2.5, 2.5)
    assert (told.itl_p50_s, told.itl_p90_s) == (0.02, 0.03)
    assert (told.e2e_p50_s, told.e2e_p90_s) == (3.0, 4.0)
    assert told.output_tok_s == 120 / 4
    assert told.cached_share == 0.4
    assert told.goodput_share == 2 / 5


def test_figures_of_nothing_are_unknown() -> None:
    told = figures([], 0.0, Goal())
    assert (told.requests, told.failed, told.errors) == (0, 0, {})
    assert (told.ttft_mean_s, told.ttft_p50_s, told.output_tok_s, told.cached_share, told.goodput_share) == (None,) * 5


@pytest.mark.parametrize(
    ("ttft", "itl", "error", "met"),
    [
        (2.0, 0.05, "", True),
        (2.01, 0.05, "", False),
        (2.0, 0.051, "", False),
        (2.0, None, "", True),  # one token
        (0.1, 0.01, "reset", False),
        (None, None, "", False),
    ],
)
def test_the_goal_is_met_by_whole_answers_in_time(ttft: float | None, itl: float | None, error: str, met: bool) -> None:
    assert Goal(2.0, 0.05).met(result(ttft, itl=itl, error=error)) is met


def test_goals_are_read_as_durations() -> None:
    assert parse_answer_goal("") == Goal()
    assert parse_answer_goal("ttft=500ms, itl=0.1s") == Goal(0.5, 0.1)
    assert parse_answer_goal("itl=50ms") == Goal(2.0, 0.05)
    for wrong in ("ttft=fast", "ttfb=1s", "2s"):
        with pytest.raises(ConfigError, match="expected as in ttft=2s,itl=50ms"):
            parse_answer_goal(wrong)


def test_each_server_has_its_part() -> None:
    told = by_server(
        [
            result(0.1, server="b", tokens=(100, 1, 50)),
            result(0.2, server="a"),
            result(0.4, server="b", tokens=(100, 1, 100)),
            result(error="connect"),
        ]
    )
    assert list(told.items()) == [("a", Server(1, 0.2, 0.2, None)), ("b", Server(2, 0.1, 0.4, 0.75))]


def test_balance_is_the_fullest_server_by_the_mean_of_all_over_time() -> None:
    """Each was asked at 1.0. Until 2.0 there are two on a and one on b: 2 by 1.5; until 3.0 one on a alone: 1 by 0.5.
    Before and after nobody is anywhere, and nothing is looked at."""
    results = [result(0.1, server="a", ended_at=3.0)] + [result(0.1, server=name, ended_at=2.0) for name in "ab"]
    assert balance([(results, 9.0)], ["a", "b"]) == pytest.approx((10 * 4 / 3 + 10 * 2) / 20, rel=0.02)
    assert balance([(results, 1.95)], ["a", "b"]) == pytest.approx(4 / 3)  # while requests come
    assert balance([(results, 1.95)], ["a", "b", "c"]) == pytest.approx(2.0)  # one that was idle counts
    assert balance([(results, 1.95)] * 2, ["a", "b"]) == pytest.approx(4 / 3)


def test_balance_is_unknown_where_no_server_is_named_or_nothing_was_in_flight() -> None:
    assert balance([([result(0.1), result(error="connect")], 9.0)], []) is None
    assert balance([([], 9.0)], ["a"]) is None
    assert balance([], ["a"]) is None
