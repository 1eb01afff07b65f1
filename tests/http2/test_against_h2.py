"""The `h2` library as the client, back to back with ours: what either sends arrives once, whole and in order."""

from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.settings import SettingCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.extproc.http2.events import CallEnded, CallLost, CallStarted, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from tests.http2.peer import GRPC, Site, message

SIZES: Final = st.sampled_from((0, 1, 100, 16_378, 16_379, 16_380, 70_000, 300_000))
FATES: Final = st.sampled_from(("served", "served", "served", "reset by the client", "ended early"))
CALLS: Final = st.lists(st.tuples(st.lists(SIZES, max_size=4), SIZES, FATES), min_size=1, max_size=5)
WINDOWS: Final = (0, 1, 5, 1_000, 65_535, 1_000_000)


class Link:
    """Both ends and the bytes between them; a random source decides who does what next, and how much of it."""

    def __init__(self, calls: list[tuple[list[int], int, str]], rng: Random) -> None:
        self.rng = rng
        self.site = Site(ConnectionLimits(stream_window=65_535, connection_window=100_000), greet=False)
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.client.initiate_connection()
        self.to_server, self.to_client = bytearray(), bytearray()
        self.plans = calls
        self.fates: dict[int, str] = {}
        self.reply_sizes: dict[int, int] = {}
        self.said: dict[int, list[bytes]] = {}
        self.unsaid: dict[int, bytearray] = {}
        """Of each call, what the client has not sent yet."""
        self.replied: dict[int, bytearray] = defaultdict(bytearray)
        self.heard: dict[int, bytearray] = defaultdict(bytearray)
        self.over: set[int] = set()
        """Streams whose end the client has heard of, or made."""
        self.unacknowledged: list[tuple[int, int]] = []
        self.asks = True
        """SETTINGS of the client's are under way. It has no others then: h2 takes an ACK for all that it has asked."""

    def run(self) -> None:
        steps = (
            self.open,
            self.speak,
            self.up,
            self.up,
            self.down,
            self.down,
            self.acknowledge,
            self.resize,
            self.leave,
        )
        for _ in range(150):
            self.rng.choice(steps)()
        while self.plans:
            self.open()
        for _ in range(1_000):
            if self.asks:
                self.up()
                self.down()
        assert not self.asks, "SETTINGS are not acknowledged"
        self.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1_000_000})
        quiet = 0
        for _ in range(10_000):  # then all say what is left, and take what comes
            before = self.progress()
            for step in (self.speak, self.speak, self.up, self.down, self.acknowledge):
                step()
            quiet = quiet + 1 if before == self.progress() and not self.to_server and not self.to_client else 0
            if quiet == 3:  # one round for a window to come back, one to use it
                return
        raise AssertionError(f"it goes on for ever: {self.site.connection}")

    def progress(self) -> tuple[object, ...]:
        left = sum(len(rest) for rest in self.unsaid.values())
        return left, len(self.unsaid), sum(map(len, self.heard.values())), len(self.over), len(self.site.events)

    # -- the client ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        if not self.plans:
            return
        sizes, reply, fate = self.plans.pop()
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, GRPC)
        self.fates[stream], self.reply_sizes[stream] = fate, reply
        self.said[stream] = [bytes((stream,)) * size for size in sizes]
        self.unsaid[stream] = bytearray(b"".join(map(message, self.said[stream])))

    def speak(self) -> None:
        for stream in self.rng.sample(sorted(self.unsaid), len(self.unsaid)):
            rest = self.unsaid[stream]
            room = min(self.client.local_flow_control_window(stream), self.client.max_outbound_frame_size)
            size = min(len(rest), room, self.rng.choice((1, 300, 100_000, 100_000)))
            padding = self.rng.choice((None, None, 0, 9)) if size + 10 <= room else None
            if size or not rest:
                self.client.send_data(stream, bytes(rest[:size]), end_stream=size == len(rest), pad_length=padding)
                del rest[:size]
            if not rest:
                del self.unsaid[stream]
                return

    def leave(self) -> None:
        for stream, fate in self.fates.items():
            if fate == "reset by the client" and stream not in self.over and self.rng.random() < 0.3:
                self.client.reset_stream(stream, 2)
                self.finished(stream)
                return

    def resize(self) -> None:
        self.client.ping(b"how far?")
        if not self.asks:
            self.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: self.rng.choice(WINDOWS)})
            self.asks = True

    def acknowledge(self) -> None:
        for size, stream in self.unacknowledged:
            self.client.acknowledge_received_data(size, stream)
        self.unacknowledged.clear()

    def finished(self, stream: int) -> None:
        self.over.add(stream)
        self.unsaid.pop(stream, None)

    def down(self) -> None:
        """Some bytes of the server's reach the client."""
        self.to_client += self.site.connection.output()
        size = self.rng.choice((1, 30, 20_000, 1_000_000))
        for event in self.client.receive_data(bytes(self.to_client[:size])):
            if isinstance(event, h2.events.DataReceived):
                self.heard[event.stream_id] += event.data
                self.unacknowledged.append((event.flow_controlled_length or 0, event.stream_id))
            elif isinstance(event, h2.events.TrailersReceived):
                assert (b"grpc-status", b"0") in [(bytes(name), bytes(value)) for name, value in event.headers]
            elif isinstance(event, h2.events.StreamReset):
                assert event.error_code == 0
                self.finished(event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.finished(event.stream_id)
            elif isinstance(event, h2.events.SettingsAcknowledged):
                self.asks = False
            else:
                assert not isinstance(event, h2.events.ConnectionTerminated)
        del self.to_client[:size]

    # -- the server ------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Some bytes of the client's reach the server, who answers each message by one, and the end by the end."""
        self.to_server += self.client.data_to_send()
        size = self.rng.choice((1, 30, 20_000, 1_000_000))
        events = self.site.feed(bytes(self.to_server[:size]))
        del self.to_server[:size]
        for event in events:
            stream = event.stream
            if isinstance(event, MessageReceived) and stream in self.site.live:
                reply = b"r" * self.reply_sizes[stream]
                self.replied[stream] += message(reply)
                self.site.connection.send(stream, reply)
                if self.fates[stream] == "ended early":
                    self.site.end(stream)
            elif isinstance(event, CallEnded) and stream in self.site.live:
                self.site.end(stream)
        self.site.check()


@settings(max_examples=max(15, settings().max_examples // 4))
@given(CALLS, st.integers(0, 2**32))
def test_everything_arrives_once_and_in_order_and_both_end_clean(
    calls: list[tuple[list[int], int, str]], seed: int
) -> None:
    link = Link(list(calls), Random(seed))
    link.run()
    site = link.site
    assert not site.connection.is_closed
    assert not site.live
    assert site.breaches == {}
    assert site.connection.bytes_held == 0
    assert link.client.open_outbound_streams == 0
    assert sum(isinstance(event, CallStarted) for event in site.events) == len(calls)
    for stream, fate in link.fates.items():
        told = site.messages(stream)
        if fate == "served":
            assert told == link.said[stream]
            assert (
                link.heard[stream]
                == link.replied[stream]
                == b"".join(message(b"r" * link.reply_sizes[stream]) for _ in told)
            )
        else:
            assert told == link.said[stream][: len(told)]
            assert link.replied[stream].startswith(bytes(link.heard[stream]))
        if fate == "ended early" and told:
            assert link.heard[stream] == message(b"r" * link.reply_sizes[stream])
        assert fate == "reset by the client" or CallLost(stream) not in site.events


def test_a_reply_of_megabytes_reaches_a_client_that_reads_slowly() -> None:
    link = Link([([10], 3_000_000, "served")], Random(1))
    link.run()
    assert link.heard[1] == message(b"r" * 3_000_000)
