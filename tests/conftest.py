"""What holds for every test.

- Nothing but loopback is reached: a test that talks to the internet fails at the first packet.
- A skip says what is missing; with EPP_REQUIRE_ALL=1 it is a failure, so that CI cannot pass by skipping.
- Hypothesis has no deadline per example: two cores that others use too are no clock. EPP_EXAMPLES sets how many
  examples each property gets (`make fuzz`).
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Generator, Iterator

import pytest
from anyio.pytest_plugin import get_runner
from hypothesis import settings

# Tests start processes beside grpcio's threads; its own handlers at a fork crashed one such child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

REQUIRE_ALL = os.environ.get("EPP_REQUIRE_ALL", "") not in ("", "0")

IS_CI = os.environ.get("CI") == "true"
# CI takes the same examples every time: what lands must not depend on luck. Elsewhere every run tries new ones.
settings.register_profile(
    "epp", deadline=None, derandomize=IS_CI, max_examples=int(os.environ.get("EPP_EXAMPLES", "100"))
)
settings.load_profile("epp")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, which production uses."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def one_event_loop() -> Iterator[None]:
    """Keeps one event loop for all async tests: grpcio's one poller tells the loop of a finished test of its last
    events, and fails whoever runs by then if that loop is closed."""
    with get_runner("asyncio", {}):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", _no_skip(report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome, report.longrepr = "failed", _no_skip(report.longrepr)
    return report


def _no_skip(why: object) -> str:
    return f"skipped although EPP_REQUIRE_ALL is set: {why[2] if isinstance(why, tuple) else why}"


def _loopback_only(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: it sees every socket of Python's, asyncio's included, whoever opened it."""
    address = arguments[1] if event == "socket.connect" else None
    if not isinstance(address, tuple):
        return  # another event, or a Unix socket
    host = str(address[0])
    if host != "localhost" and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise RuntimeError(f"a test reaches for {address}, which is not loopback")


sys.addaudithook(_loopback_only)
