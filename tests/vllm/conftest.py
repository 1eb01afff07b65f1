"""One fleet for all tests here, where there is a vLLM to make it of; elsewhere nothing of this folder is run.

EPP_VLLM is a command of the shell that serves an OpenAI API with vLLM's metrics on 127.0.0.1:$PORT, in the foreground:
docs/load.md. Left out rather than skipped: a run in which a skipped test is a failed one must not ask for a model.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.envoys import envoy_or_skip

if TYPE_CHECKING:
    from tests.vllm.fleet import Fleet

COMMAND: Final = os.environ.get("EPP_VLLM", "")
HERE: Final = Path(__file__).parent
START_AND_WORK: Final = 400.0
"""Seconds: two servers start in one minute of a machine that is not busy, and the first test pays for it."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.timeout(START_AND_WORK))
    if not COMMAND:
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not COMMAND:
        terminalreporter.write_line("tests/vllm was left out: EPP_VLLM names no command that serves (docs/load.md)")


@pytest.fixture(scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    envoy_or_skip()
    from tests.vllm import fleet as made

    async with made.fleet(tmp_path_factory.mktemp("vllm"), COMMAND) as running:
        yield running
