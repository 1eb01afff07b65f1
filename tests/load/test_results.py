"""What results say in a few numbers."""

from __future__ import annotations

import pytest

from epp.load.results import Result, percentile, summarize


def result(ttft: float | None = None, *, error: str = "", prompt: int = 0, cached: int = 0, server: str = "") -> Result:
    """Due at 1.0, ended at 3.0."""
    return Result("t", "m", "s", 0, 1.0, 1.0, 3.0, error, 200, ttft, None, None, prompt, 5, cached, server)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.25, 1.0), (0.26, 2.0), (0.5, 2.0), (0.9, 4.0), (1.0, 4.0)])
def test_percentile_is_the_nearest_rank(share: float, value: float) -> None:
    assert percentile([3.0, 1.0, 4.0, 2.0], share) == value


def test_percentile_of_nothing_is_unknown() -> None:
    assert percentile([], 0.5) is None


def test_summary_counts_errors_servers_and_cached_tokens() -> None:
    summary = summarize(
        [
            result(0.1, prompt=100, cached=80, server="b"),
            result(0.3, prompt=100, cached=0, server="a"),
            result(0.2, prompt=0, error="truncated", server="b"),
            result(error="connect"),
        ]
    )
    assert summary.requests == 4
    assert summary.errors == {"truncated": 1, "connect": 1}
    assert (summary.ttft_p50_s, summary.ttft_p90_s, summary.ttft_p99_s) == (0.2, 0.3, 0.3)
    assert summary.e2e_p50_s == 2.0
    assert summary.cached_share == 0.4
    assert summary.by_server == {"a": 1, "b": 2}


def test_summary_of_nothing_knows_nothing() -> None:
    summary = summarize([])
    assert (summary.requests, summary.ttft_p50_s, summary.cached_share) == (0, None, None)
