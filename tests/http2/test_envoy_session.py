"""A session of a real Envoy: tests/data/envoy-1.40/ORIGIN.md says where it comes from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, Event, MessageReceived
from epp.pb.ext_proc_pb2 import ProcessingRequest
from tests.http2.peer import PATH, PING, RST_STREAM, Site, data, frame, message, parse

SESSION = (Path(__file__).parent.parent / "data" / "envoy-1.40" / "session.bin").read_bytes()
CALLS = 24
"""Three gateways, five calls each one after another and three each at once."""


def heard(size: int, tail: bytes = b"") -> tuple[Site, list[Event]]:
    site = Site(greet=False)
    said = SESSION + tail
    for at in range(0, len(said), size):
        site.feed(said[at : at + size])
    return site, site.events


@pytest.fixture(scope="module")
def whole() -> list[Event]:
    return heard(len(SESSION))[1]


def test_every_call_starts_says_something_and_is_reset(whole: list[Event]) -> None:
    kinds = Counter(type(event) for event in whole)
    assert kinds[CallStarted] == kinds[CallLost] == CALLS
    assert kinds[CallEnded] == 0
    assert {event.path for event in whole if isinstance(event, CallStarted)} == {PATH}


def test_every_message_is_one_of_ext_proc(whole: list[Event]) -> None:
    kinds: Counter[str | None] = Counter()
    sizes: Counter[int] = Counter()
    for event in whole:
        if isinstance(event, MessageReceived):
            request = ProcessingRequest.FromString(event.data)
            kinds[request.WhichOneof("request")] += 1
            sizes[event.stream] += len(request.request_body.body)
    assert kinds["request_headers"] == kinds["response_headers"] == CALLS
    assert kinds["response_body"] > 0
    # {"model": "m", "prompt": "word word ..."}: 28 bytes around 15 or 4,000 times five.
    assert Counter(sizes.values()) == {0: 6, 28 + 75: 15, 28 + 20_000: 3}


@pytest.mark.parametrize("size", [1, 2, 3, 1_000, 16_384 + 9])
def test_it_means_the_same_however_it_is_cut(whole: list[Event], size: int) -> None:
    site, events = heard(size)
    assert events == whole
    site.check()
    assert site.connection.bytes_held == 0


def test_nothing_is_left_and_nothing_is_wrong() -> None:
    site, _ = heard(len(SESSION))
    assert not site.connection._streams
    assert not site.connection.is_closed
    assert RST_STREAM not in [each.kind for each in site.out()]
    assert site.breaches == {}


def test_what_follows_it_is_read_too() -> None:
    ping = frame(PING, 0, 0, b"the tail")
    site, _ = heard(10_000, ping + data(1, b"")[:5])
    assert site.out()[-1].payload == b"the tail"
    assert site.connection.bytes_held == 5


def test_it_is_answered_in_order_while_it_goes_on() -> None:
    """Each message by one reply, as a picker does; all goes out before the call's reset is read."""
    site = Site(greet=False)
    written = bytearray()
    replies = 0
    for at in range(0, len(SESSION), 500):
        for event in site.feed(SESSION[at : at + 500]):
            if isinstance(event, MessageReceived) and event.stream in site.live:
                replies += 1
                site.connection.send(event.stream, b"%d" % event.stream)
        written += site.connection.output()
    answers = [each for each in parse(bytes(written)) if each.kind == 0]
    assert len(answers) == replies
    assert all(each.payload == message(b"%d" % each.stream) for each in answers)
