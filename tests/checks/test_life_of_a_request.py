"""docs/life-of-a-request.md names the files that a request goes through, all of them, and few."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import sys
import time
from pathlib import Path
from types import FrameType

import pytest
from hpack import Encoder

from epp.config.build import build
from epp.config.load import load
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.extproc.conversation import PROCESS, Conversation
from epp.extproc.events import BodyMode, Modes, Part, RequestEnded, RequestStarted, ResponseStarted
from epp.extproc.exchange import Limits
from epp.extproc.http2 import frames
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.wire import Peer, WireTransport
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
CALL = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", PROCESS),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
LIGHT = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE)


class Socket(asyncio.Transport):
    """The other side of a connection, which takes all that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


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

    port = WireTransport(
        {PROCESS: lambda peer, push, now: Conversation(picker, Limits(), peer, now)}, ConnectionLimits(), lambda: 1.0
    )
    peer, socket = Peer(port), Socket()
    sys.setprofile(look)
    try:
        peer.connection_made(socket)
        peer.data_received(frames.PREFACE + frames.settings({}))
        peer.data_received(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, Encoder().encode(CALL)))
        for message in messages:
            data = message.SerializeToString()
            peer.data_received(frames.frame(frames.DATA, 0, 1, frames.MESSAGE_PREFIX.pack(0, len(data)) + data))
        peer.data_received(frames.rst_stream(1, frames.Code.CANCEL))
    finally:
        sys.setprofile(None)
    assert b"10.0.0.1:8000" in socket.written
    return {str(Path(name).relative_to(ROOT)) for name in seen if name.startswith(str(ROOT / "epp"))}


def test_the_walk_is_short() -> None:
    files = LINK.findall(WALK)
    assert len(files) == len(set(files)) <= MOST_FILES
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= MOST_LINES


def test_every_file_of_the_walk_is_gone_through(gone_through: set[str]) -> None:
    assert set(LINK.findall(WALK)) - gone_through == set()


def test_every_file_that_is_gone_through_is_named(gone_through: set[str]) -> None:
    assert gone_through - set(LINK.findall(DOC)) == set()
