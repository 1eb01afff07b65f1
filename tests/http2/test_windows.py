"""Flow control both ways (RFC 9113 sections 5.2, 6.9)."""

from __future__ import annotations

import pytest

from epp.extproc.http2.events import CallLost, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import Code
from tests.http2.peer import (
    CALL,
    DATA,
    END_HEADERS,
    HEADERS,
    PADDED,
    RST_STREAM,
    WINDOW_UPDATE,
    Frame,
    Site,
    call,
    data,
    frame,
    message,
    python_calls,
    reset,
    settings,
    window_update,
)

SMALL = ConnectionLimits(stream_window=65_535, connection_window=100_000)


def written(site: Site, stream: int = 1) -> list[bytes]:
    return [each.payload for each in site.out() if each.kind == DATA and each.stream == stream]


def granted(site: Site) -> list[tuple[int, int]]:
    return [(each.stream, int.from_bytes(each.payload)) for each in site.out() if each.kind == WINDOW_UPDATE]


# -- what we send --------------------------------------------------------------------------------------------------


def test_a_large_reply_goes_out_in_frames_that_any_peer_takes() -> None:
    site = Site()
    site.feed(settings(initial_window=1_000_000, max_frame=1_000_000), window_update(0, 1_000_000), call(1))
    site.connection.send(1, bytes(40_000))
    assert [len(piece) for piece in written(site)] == [16_384, 16_384, 40_005 - 2 * 16_384]


@pytest.mark.parametrize(("size", "pieces"), [(16_379, [16_384]), (16_380, [16_384, 1])])
def test_a_reply_fits_in_one_frame_up_to_the_last_byte(size: int, pieces: list[int]) -> None:
    site = Site()
    site.feed(call(1))
    site.connection.send(1, bytes(size))
    assert [len(piece) for piece in written(site)] == pieces


def test_no_more_is_sent_than_the_connection_takes() -> None:
    site = Site()
    site.feed(settings(initial_window=1_000_000), call(1))
    for _ in range(7):
        site.connection.send(1, bytes(9_995))
    assert sum(map(len, written(site))) == 65_535
    site.feed(window_update(0, 1_000_000))
    assert sum(map(len, written(site))) == 70_000 - 65_535


def test_no_more_is_sent_than_a_stream_takes_and_others_go_on() -> None:
    site = Site()
    site.feed(settings(initial_window=7), call(1), call(3))
    site.connection.send(1, b"long, too long")
    site.connection.send(3, b"ab")
    frames = site.out()
    assert [each for each in frames if each.kind == DATA] == [
        Frame(DATA, 0, 1, message(b"long, too long")[:7]),
        Frame(DATA, 0, 3, message(b"ab")),
    ]
    site.feed(window_update(1, 2))
    assert written(site) == [b"ng"]


def test_replies_that_wait_stay_in_order_whatever_opens_the_window() -> None:
    site = Site()
    site.feed(settings(initial_window=0), call(1))
    replies = [bytes((65 + i,)) * i for i in range(8)]
    for reply in replies[:4]:
        site.connection.send(1, reply)
    sent = written(site)
    site.feed(window_update(1, 3))
    sent += written(site)
    for reply in replies[4:]:
        site.connection.send(1, reply)
    for _ in range(33):
        site.feed(settings(initial_window=1), settings(initial_window=0), window_update(1, 2))
        sent += written(site)
    assert b"".join(sent) == b"".join(map(message, replies))


def test_a_smaller_initial_window_makes_windows_negative() -> None:
    """Section 6.9.2's example."""
    site = Site()
    site.feed(settings(initial_window=100), call(1))
    site.connection.send(1, bytes(85))  # 90 of 100
    site.feed(settings(initial_window=20))  # now -70
    site.connection.send(1, b"ab")
    assert [len(piece) for piece in written(site)] == [90]
    site.feed(window_update(1, 70))
    assert written(site) == []
    site.feed(window_update(1, 1))
    assert written(site) == [message(b"ab")[:1]]


def test_a_new_initial_window_is_acknowledged_before_what_it_lets_go() -> None:
    site = Site()
    site.feed(settings(initial_window=0), call(1))
    site.connection.send(1, b"reply")
    site.out()
    site.feed(settings(initial_window=100))
    assert [each.kind for each in site.out()] == [4, DATA]


def test_a_window_may_grow_to_its_largest() -> None:
    site = Site()
    site.feed(call(1), window_update(1, 2**31 - 1 - 65_535), window_update(0, 2**31 - 1 - 65_535))
    assert not site.connection.is_closed
    assert site.reset_codes() == {}


def test_streams_that_wait_for_the_connection_are_served_in_turn() -> None:
    site = Site()
    site.feed(settings(initial_window=1_000_000), call(1), call(3), call(5))
    site.connection.send(1, bytes(65_530))
    site.out()
    for stream in (5, 3, 1):
        site.connection.send(stream, bytes(95))
    site.feed(window_update(0, 150))
    assert [(each.stream, len(each.payload)) for each in site.out()[2:]] == [(5, 100), (3, 50)]
    site.feed(reset(3), window_update(0, 200))
    assert [(each.stream, len(each.payload)) for each in site.out()] == [(1, 100)]
    site.check()


def narrow(streams: int) -> Site:
    """A connection whose window is used up, and so many streams that wait for it."""
    site = Site()
    site.feed(settings(initial_window=1_000_000), call(1))
    site.connection.send(1, bytes(65_530))
    for stream in range(3, 3 + 2 * streams, 2):
        site.feed(call(stream), data(stream, message(b"m")))
        site.connection.send(stream, b"reply")
    site.out()
    return site


def test_a_narrow_connection_is_not_a_walk_over_all_who_wait() -> None:
    """A thousand streams that wait cost a WINDOW_UPDATE by one no more than one stream does."""
    one, many = narrow(1), narrow(1_000)
    update = window_update(0, 1)
    assert python_calls(lambda: one.feed(update)) == python_calls(lambda: many.feed(update))
    assert written(one, 3) == written(many, 3) == [b"\0"]


def test_small_replies_that_wait_take_what_they_are_counted_as() -> None:
    site = Site()
    site.feed(settings(initial_window=0), call(1))
    for _ in range(1_000):
        site.connection.send(1, b"r")
    assert site.connection.bytes_held == 6_000
    site.feed(window_update(1, 6_000))
    site.out()
    assert site.connection.bytes_held == 0


def test_a_stream_whose_peer_takes_nothing_is_reset_once_too_much_waits() -> None:
    site = Site(ConnectionLimits(max_queued_bytes=1_000))
    site.feed(settings(initial_window=0), call(1), call(3), data(1, message(b"m")))
    for _ in range(2):
        site.connection.send(1, bytes(400))
    assert site.tick() == []
    site.connection.send(3, bytes(185))
    assert site.tick() == []
    site.connection.send(3, b"")
    assert site.tick() == [CallLost(3)]
    assert site.reset_codes() == {3: Code.ENHANCE_YOUR_CALM}
    assert site.breaches == {"max_queued_bytes": 1}
    site.check()


def test_too_many_replies_that_nobody_takes_end_the_connection_and_all_is_told_later() -> None:
    site = Site(ConnectionLimits(max_queued_bytes=100, max_resets=1))
    site.feed(settings(initial_window=0), *(call(stream) for stream in (1, 3, 5)))
    for stream in (1, 3):
        site.connection.send(stream, bytes(100))
    assert site.connection.is_closed
    assert site.tick() == [CallLost(1), CallLost(3), CallLost(5)]
    assert site.goaway().code == Code.ENHANCE_YOUR_CALM
    assert site.breaches == {"max_queued_bytes": 2, "max_resets": 1}


# -- what we take --------------------------------------------------------------------------------------------------


def test_windows_are_granted_again_by_halves() -> None:
    site = Site(SMALL)
    site.feed(call(1), call(3))
    site.feed(data(1, bytes(16_384)))
    assert granted(site) == []
    site.feed(data(1, bytes(16_384)))
    assert granted(site) == [(1, 32_768)]
    site.feed(data(3, bytes(16_384)), data(3, bytes(848)))
    assert granted(site) == [(0, 50_000)]
    site.check()


def test_padding_counts_as_data() -> None:
    site = Site(SMALL)
    site.feed(call(1), data(1, b"\xff" + message(b"m") + bytes(255), PADDED))
    assert site.connection._taken == 256 + 6
    assert site.messages() == [b"m"]


def test_more_than_a_streams_window_ends_the_stream() -> None:
    site = Site(SMALL)
    site.feed(settings(initial_window=0), call(1), data(1, message(b"m")))
    site.connection.send(1, b"nobody takes it, so no window is granted")
    site.feed(data(1, message(bytes(65_535))[: 65_535 - 6 - 1][:16_384]))
    for _ in range(2):
        site.feed(data(1, bytes(16_384)))
    site.feed(data(1, bytes(65_535 - 6 - 3 * 16_384)))
    assert site.connection._streams[1].receive_window == 0
    site.out()
    site.feed(data(1, b"x"))
    assert site.reset_codes() == {1: Code.FLOW_CONTROL_ERROR}
    assert not site.connection.is_closed


def test_more_than_the_connections_window_ends_the_connection() -> None:
    site = Site(SMALL)
    site.feed(settings(initial_window=1_000_000), call(1), data(1, message(b"m")))
    site.connection.send(1, bytes(150_000))  # the peer takes 65,535 of it: no window for the connection any more
    site.feed(call(3))
    left = 100_000 - 6
    while left and not site.connection.is_closed:
        size = min(left, 16_384)
        stream = 3 if left > 50_000 else 1
        site.feed(data(stream, bytes(size)))
        left -= size
    assert not site.connection.is_closed
    site.feed(data(3, b"x"))
    assert site.goaway().code == Code.FLOW_CONTROL_ERROR


def test_a_stream_with_replies_that_wait_is_granted_nothing_until_they_are_taken() -> None:
    site = Site(SMALL)
    site.feed(settings(initial_window=0), call(1), data(1, message(b"m")))
    site.connection.send(1, b"reply")
    site.feed(data(1, bytes(16_384)), data(1, bytes(16_384)), data(1, bytes(16_384)))
    assert granted(site) == []
    site.feed(window_update(1, 10))
    assert granted(site) == [(1, 6 + 3 * 16_384)]
    site.check()


def test_a_connection_that_takes_nothing_is_granted_nothing_until_it_does() -> None:
    site = Site(SMALL)
    site.feed(settings(initial_window=1_000_000), call(1), call(3), data(1, message(b"m")))
    site.connection.send(1, bytes(65_530 + 70_000))
    site.out()
    site.feed(data(3, bytes(16_384)), data(3, bytes(16_384)), data(3, bytes(16_384)), data(3, bytes(1_000)))
    assert [stream for stream, _ in granted(site)] == [3]
    site.feed(window_update(0, 200_000))
    assert granted(site) == [(0, 6 + 3 * 16_384 + 1_000)]
    site.check()


def test_what_was_withheld_is_granted_once_nobody_waits_any_more() -> None:
    site = Site(SMALL)
    site.feed(settings(initial_window=1_000_000), call(1), call(3), data(1, message(b"m")))
    site.connection.send(1, bytes(65_530 + 70_000))
    site.feed(data(3, bytes(16_384)), data(3, bytes(16_384)), data(3, bytes(16_384)), data(3, bytes(1_000)))
    site.feed(reset(1))
    site.out()
    site.tick()
    assert granted(site) == [(0, 6 + 3 * 16_384 + 1_000)]


def test_data_of_streams_that_we_ended_counts_for_the_connection() -> None:
    site = Site(SMALL)
    site.feed(call(1))
    site.end(1)
    site.out()
    for _ in range(20):
        site.feed(data(1, bytes(16_384)))
    assert not site.connection.is_closed
    site.check()


def test_a_call_that_has_ended_is_granted_nothing() -> None:
    site = Site(SMALL)
    site.feed(settings(initial_window=0), call(1))
    site.connection.send(1, b"r")
    site.end(1)
    site.out()
    site.feed(data(1, bytes(16_384)), data(1, bytes(16_384)))
    assert granted(site) == []


def test_a_large_message_costs_a_copy_not_a_square() -> None:
    """Work is counted in frames: each of 16 KB is appended once."""
    limits = ConnectionLimits(max_message_bytes=9_000_000)
    site = Site(limits)
    site.feed(call(1))
    content = bytes(range(256)) * 32_768  # 8 MiB
    whole = message(content)
    for at in range(0, len(whole), 16_384):
        site.feed(data(1, whole[at : at + 16_384]))
    assert site.messages() == [content]
    assert site.connection.bytes_held == 0


def test_many_messages_in_one_frame_and_one_in_many() -> None:
    site = Site()
    said = b"".join(message(bytes((i,)) * i) for i in range(100))
    site.feed(call(1), data(1, said))
    for byte in said:
        site.feed(data(1, bytes((byte,))))
    assert site.messages() == [bytes((i,)) * i for i in range(100)] * 2
    assert all(isinstance(event, MessageReceived) for event in site.events[1:])
    assert site.connection.bytes_held == 0


def test_frames_arrive_in_pieces_of_any_kind() -> None:
    said = frame(HEADERS, END_HEADERS, 1, CALL) + data(1, message(b"one")) + data(1, message(b"two"))
    for cut in range(len(said)):
        site = Site()
        site.feed(said[:cut])
        site.feed(said[cut:])
        assert site.messages() == [b"one", b"two"]


def test_a_reset_drops_what_waits() -> None:
    site = Site()
    site.feed(settings(initial_window=0), call(1))
    site.connection.send(1, bytes(10_000))
    assert site.connection.bytes_held == 10_005
    site.feed(reset(1))
    assert site.connection.bytes_held == 0
    assert RST_STREAM not in [each.kind for each in site.out()]
