"""Any order of what a peer, an owner and time do; garbage, and sessions with mistakes in them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import PREFACE
from epp.extproc.http2.messages import Status
from tests.http2 import peer
from tests.http2.peer import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GREETING,
    HEADERS,
    PADDED,
    PING,
    SETTINGS,
    WINDOW_UPDATE,
    Site,
    call,
    data,
    frame,
    message,
    plain_block,
    reset,
    window_update,
    with_fields,
)
from tests.http2.test_rules import HARMLESS, RULES

LIMITS = ConnectionLimits(
    max_streams=4,
    max_header_bytes=1_000,
    max_resets=10,
    max_control_frames=50,
    max_message_bytes=70_000,
    max_held_bytes=100_000,
    max_queued_bytes=100_000,
    stream_window=65_535,
    connection_window=100_000,
)
WHICH = st.integers(0, 15)
"""A stream, see `AnyOrder.number`."""
SIZES = st.sampled_from((0, 1, 5, 100, 16_000, 60_000))
BLOCKS = st.sampled_from(
    (
        with_fields(),
        with_fields(("grpc-timeout", "3S")),
        with_fields(("grpc-encoding", "gzip")),
        with_fields(("grpc-encoding", "zstd")),
        with_fields(("content-type", "text/html")),
        with_fields(("content-length", "10")),
        with_fields(("a", "b" * 100)) + b"\x40\x01a\x01b" * 25,
        plain_block([("a", "b")]),
    )
)


class AnyOrder(RuleBasedStateMachine):
    """`Site` checks the promise of events after each step, this the peer's windows."""

    def __init__(self) -> None:
        super().__init__()
        self.connects()

    def connects(self) -> None:
        self.site = Site(LIMITS)
        self.window = 65_535
        self.initial = 65_535
        self.windows: dict[int, int] = {}

    @invariant()
    def what_is_kept_is_what_is_open(self) -> None:
        self.site.check()

    def feed(self, said: bytes, cut: int = 0) -> None:
        self.site.feed(said[:cut])
        self.site.feed(said[cut:])

    def number(self, which: int) -> int:
        """Mostly one that is open, else any; 0 is the next one."""
        opened = sorted(self.site.connection._streams)
        if which == 0 or (which < 12 and not opened):
            return self.site.connection._last_stream + 2 | 1
        return opened[which % len(opened)] if which < 12 else which * 2 - 23

    # -- the peer --------------------------------------------------------------------------------------------------

    @rule(which=st.sampled_from((0, 0, 0, 5, 13)), block=BLOCKS, end=st.booleans(), cut=st.integers(0, 200))
    def headers(self, which: int, block: bytes, end: bool, cut: int) -> None:
        stream = self.number(which)
        self.windows.setdefault(stream, self.initial)
        self.feed(call(stream, block, end=end), cut)

    @rule(which=WHICH, block=BLOCKS, cut=st.integers(0, 100), last=st.booleans())
    def headers_in_pieces(self, which: int, block: bytes, cut: int, last: bool) -> None:
        stream = self.number(which)
        self.windows.setdefault(stream, self.initial)
        self.feed(frame(HEADERS, 0, stream, block[:cut]))
        if last:
            self.feed(frame(CONTINUATION, END_HEADERS, stream, block[cut:]))

    @rule(which=WHICH, size=SIZES, flag=st.sampled_from((0, 0, 0, 1)), end=st.booleans(), left=st.integers(0, 6))
    def messages(self, which: int, size: int, flag: int, end: bool, left: int) -> None:
        stream = self.number(which)
        said = message(bytes(size), flag)
        said = said[: len(said) - left]
        for at in range(0, len(said), 16_384):
            last = END_STREAM if end and at + 16_384 >= len(said) else 0
            self.feed(data(stream, said[at : at + 16_384], last), at % 11)

    @rule(which=WHICH, payload=st.binary(max_size=4), flags=st.sampled_from((0, END_STREAM, PADDED)))
    def odd_data(self, which: int, payload: bytes, flags: int) -> None:
        stream = self.number(which)
        self.feed(data(stream, payload, flags))

    @rule(which=WHICH)
    def resets(self, which: int) -> None:
        stream = self.number(which)
        self.feed(reset(stream))

    @rule(which=st.one_of(st.none(), WHICH), more=st.sampled_from((0, 1, 10, 50_000, 2**31 - 1)))
    def widens(self, which: int | None, more: int) -> None:
        stream = 0 if which is None else self.number(which)
        self.feed(window_update(stream, more))
        if stream:
            self.windows[stream] = self.windows.get(stream, 0) + more
        else:
            self.window += more

    @rule(initial=st.sampled_from((0, 1, 10, 65_535, 200_000)))
    def resizes(self, initial: int) -> None:
        self.writes()  # what goes out before we hear of it counts by the old one
        self.feed(peer.settings(initial_window=initial))
        for stream in self.windows:
            self.windows[stream] += initial - self.initial
        self.initial = initial

    @rule(kind=st.integers(0, 12), flags=st.integers(0, 255), which=WHICH, payload=st.binary(max_size=9))
    def anything(self, kind: int, flags: int, which: int, payload: bytes) -> None:
        stream = self.number(which)
        if kind in (HEADERS, SETTINGS, WINDOW_UPDATE, CONTINUATION):
            payload, stream = b"", 0 if kind == SETTINGS else stream  # so that the model knows what they mean
        self.feed(frame(kind, flags, stream, payload))

    @rule()
    def knows_of_the_drain(self) -> None:
        self.feed(frame(PING, ACK, 0, b"draining"))

    # -- the owner and time ----------------------------------------------------------------------------------------

    @rule(which=WHICH, size=SIZES)
    def replies(self, which: int, size: int) -> None:
        stream = self.number(which)
        self.site.connection.send(stream, bytes(size))

    @rule(which=WHICH, status=st.sampled_from(Status))
    def ends(self, which: int, status: Status) -> None:
        stream = self.number(which)
        self.site.end(stream, status, "why")

    @rule(seconds=st.sampled_from((0.1, 1.0, 30.0)))
    def time_passes(self, seconds: float) -> None:
        self.site.tick(seconds)

    @rule()
    def drains(self) -> None:
        self.site.connection.drain(self.site.now)

    @rule()
    def writes(self) -> None:
        for each in self.site.out():
            if each.kind == DATA:
                self.windows[each.stream] -= len(each.payload)
                self.window -= len(each.payload)
                assert len(each.payload) == 0 or min(self.window, self.windows[each.stream]) >= 0

    @precondition(lambda self: self.site.connection.is_closed)
    @rule()
    def starts_again(self) -> None:
        self.site.out()
        self.site.take(self.site.connection.lose())
        assert self.site.connection.bytes_held == 0
        self.connects()

    def teardown(self) -> None:
        self.writes()
        self.site.take(self.site.connection.lose())
        assert not self.site.live
        assert self.site.connection.bytes_held == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=max(40, settings().max_examples // 2), stateful_step_count=40)

# -- garbage -------------------------------------------------------------------------------------------------------

SESSIONS = [GREETING + rule.said for rule in RULES] + [GREETING + said for said in HARMLESS.values()]
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "double", "cut"]), st.integers(0, 10_000)), max_size=4
)
CUTS = st.lists(st.integers(0, 10_000), max_size=6)


def edited(session: bytes, edits: list[tuple[str, int]]) -> bytes:
    said = bytearray(session)
    for edit, place in edits:
        at = place % (len(said) + 1)
        match edit:
            case "flip" if at < len(said):
                said[at] ^= 1 << place % 8
            case "insert":
                said[at:at] = bytes((place % 256,))
            case "delete":
                del said[at : at + 1 + place % 9]
            case "double":
                said[at:at] = said[at : at + 30]
            case _:
                del said[at:]
    return bytes(said)


def heard(said: list[bytes]) -> tuple[object, ...]:
    """All that a connection makes of them."""
    site = Site(LIMITS, greet=False)
    for piece in said:
        site.feed(piece)
        site.check()
    return site.events, site.out(), site.connection.is_closed, site.breaches


def check_cut(said: bytes, cuts: list[int]) -> None:
    """However the socket cuts it, it means the same."""
    places = [0, *sorted(cut % (len(said) + 1) for cut in cuts), len(said)]
    assert heard([said]) == heard([said[a:b] for a, b in pairwise(places)])


@given(st.sampled_from(SESSIONS), EDITS, CUTS)
def test_a_session_with_mistakes_in_it_gives_events_and_nothing_else(
    session: bytes, edits: list[tuple[str, int]], cuts: list[int]
) -> None:
    check_cut(edited(session, edits), cuts)


@given(st.lists(st.sampled_from(SESSIONS), min_size=2, max_size=4), EDITS, CUTS)
def test_sessions_run_together_give_events_and_nothing_else(
    sessions: list[bytes], edits: list[tuple[str, int]], cuts: list[int]
) -> None:
    check_cut(GREETING + edited(b"".join(each[len(GREETING) :] for each in sessions), edits), cuts)


@given(st.sampled_from((b"", PREFACE, GREETING)), st.binary(max_size=200), CUTS)
def test_garbage_gives_events_and_nothing_else(start: bytes, garbage: bytes, cuts: list[int]) -> None:
    check_cut(start + garbage, cuts)
