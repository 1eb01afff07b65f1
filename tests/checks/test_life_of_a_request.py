"""docs/life-of-a-request.md names the files that a request goes through, all of them, and few."""

from __future__ import annotations

import logging
import random
import re
import sys
import time
from pathlib import Path
from types import FrameType

import pytest

from epp.config.build import build
from epp.config.load import load
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.events import BodyMode, Modes, Part, RequestEnded, RequestStarted, ResponseStarted
from epp.extproc.exchange import Limits
from epp.picker import Picker, PickerOptions
from epp.telemetry.log import Problems
from epp.telemetry.metrics import Metrics
from tests.extproc import oracle

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "life-of-a-request.md").read_text()
WALK, _, ASIDE = DOC.partition("## On the way")
LINK = re.compile(r"\]\(\.\./(epp/[\w/]+\.py)\)")
MOST_FILES = 12
MOST_LINES = 3_500
LIGHT = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE)


@pytest.fixture(scope="module")
def gone_through() -> set[str]:
    """Files of ours whose code runs while one chat completion is decided, answered and counted out."""
    scheduler = build(load(""), random.Random(1))
    table = EndpointTable(on_forget=scheduler.forget)
    slot = table.put(Endpoint("default/a", "10.0.0.1:8000"), now=0.0)
    table.page_told(slot, table.generation(slot), Page(waiting=0.0, running=0.0, kv_usage=0.1), now=0.0)
    metrics = Metrics(Problems(logging.getLogger("epp.test")))
    picker = Picker(table, scheduler, Ejection(table, EjectionParams()), metrics, time.perf_counter, PickerOptions())
    headers = ((":method", b"POST"), (":path", b"/v1/chat/completions"), ("content-type", b"application/json"))
    body = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"hello " * 200)
    messages = [
        oracle.message(RequestStarted(headers), LIGHT),
        oracle.message(RequestEnded(Part.BODY, body), None),
        oracle.message(ResponseStarted(((":status", b"200"),)), None),
    ]
    seen: set[str] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        seen.add(frame.f_code.co_filename)

    sys.setprofile(look)
    try:
        conversation = Conversation(picker, Limits(), Connection("test"), 1.0)
        for message in messages:
            conversation.receive(message.SerializeToString(), 1.0)
        conversation.lose(1.0)
    finally:
        sys.setprofile(None)
    inside = {str(Path(name).relative_to(ROOT)) for name in seen if name.startswith(str(ROOT / "epp"))}
    return inside | {"epp/extproc/transport/grpcio.py"}  # what calls `receive`


def test_the_walk_is_short() -> None:
    files = LINK.findall(WALK)
    assert len(files) == len(set(files)) <= MOST_FILES
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= MOST_LINES


def test_every_file_of_the_walk_is_gone_through(gone_through: set[str]) -> None:
    assert set(LINK.findall(WALK)) - gone_through == set()


def test_every_file_that_is_gone_through_is_named(gone_through: set[str]) -> None:
    assert gone_through - set(LINK.findall(DOC)) == set()
