"""Header blocks: the cache of heads says what unpacking says, whatever the dynamic table goes through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from epp.extproc.http2.faults import ConnectionFault, StreamFault
from epp.extproc.http2.heads import KNOWN, KNOWN_BYTES, Head, HeadReader
from tests.http2.peer import CALL, GRPC, PATH, plain_block, python_calls

PATHS = st.sampled_from(("/a", "/b", "/c", PATH))
ENTRIES = st.tuples(
    st.sampled_from(("x-a", "x-b", "grpc-encoding", "grpc-timeout", "content-length", "te", "X-Bad")),
    st.sampled_from(("gzip", "identity", "1S", "9S", "3", "trailers", "v" * 60, "w" * 1_500, "")),
)
INDEXING = st.sampled_from(("indexed", "not indexed", "never indexed"))


def outcome(read: Callable[[bytes], Head | None], block: bytes) -> object:
    """None: it ends the connection."""
    try:
        return read(block) or "fine"
    except StreamFault as fault:
        return fault.code, str(fault)
    except ConnectionFault:
        return None


class Heads(RuleBasedStateMachine):
    """An encoder with a dynamic table, and two readers of its blocks: one forgets what it knows before each."""

    def __init__(self) -> None:
        super().__init__()
        self.connects()

    def connects(self) -> None:
        self.encoder = Encoder()
        self.cached, self.plain = HeadReader(4_000), HeadReader(4_000)
        self.last = CALL

    def both(self, block: bytes, how: str = "read") -> None:
        self.plain._known.clear()
        found, expected = (outcome(getattr(reader, how), block) for reader in (self.cached, self.plain))
        assert found == expected
        if found is None:
            self.connects()

    @rule(path=PATHS, entries=st.lists(st.tuples(ENTRIES, INDEXING), max_size=3), huffman=st.booleans())
    def a_call(self, path: str, entries: list[tuple[tuple[str, str], str]], huffman: bool) -> None:
        fields = [(name, path if name == ":path" else value, False) for name, value in GRPC]
        fields += [(*each, how == "never indexed") for each, how in entries]
        literal = plain_block(each for each, how in entries if how == "not indexed" and len(each[1]) < 127)
        self.last = self.encoder.encode(fields, huffman=huffman) + literal
        self.both(self.last)

    @rule(times=st.integers(1, 3))
    def the_same_bytes_again(self, times: int) -> None:
        """Whatever they mean by now: the encoder does not know of it."""
        for _ in range(times):
            self.both(self.last)

    @rule(size=st.sampled_from((0, 50, 150, 400, 4_096)))
    def a_new_table_size(self, size: int) -> None:
        self.encoder.header_table_size = size

    @rule(resize=st.sampled_from((b"\x20", b"\x3f\x13", b"\x3f\xe1\x1f")), call=st.booleans())
    def a_block_that_only_resizes(self, resize: bytes, call: bool) -> None:
        self.both(resize + CALL if call else resize, "read" if call else "skip")

    @rule(entry=ENTRIES, how=st.sampled_from(("read_trailers", "skip")))
    def a_block_that_is_no_request(self, entry: tuple[str, str], how: str) -> None:
        self.both(self.encoder.encode([entry]), how)


TestHeads = Heads.TestCase
TestHeads.settings = settings(max_examples=max(20, settings().max_examples // 4), stateful_step_count=20)


@given(st.lists(st.tuples(st.sampled_from((0x80, 0xBE, 0xBF, 0xC0, 0xC5)), st.integers(0, 2)), max_size=6))
def test_references_into_the_table_are_read_anew_when_it_moves(steps: list[tuple[int, int]]) -> None:
    """The same byte means another entry once there is a newer one."""
    cached, plain = HeadReader(4_000), HeadReader(4_000)
    for number, (reference, added) in enumerate(steps):
        block = CALL + bytes((reference,))
        for reader in (cached, plain):
            for entry in range(added):
                reader.skip(plain_block([("grpc-timeout", f"{number * 10 + entry}S")]).replace(b"\x00", b"\x40", 1))
        plain._known.clear()
        found = outcome(cached.read, block)
        assert found == outcome(plain.read, block)
        if found is None:
            return


def test_a_block_that_was_seen_is_looked_up() -> None:
    """Envoy's second and later blocks are all references."""
    reader, encoder = HeadReader(4_000), Encoder()
    blocks = [encoder.encode(GRPC) for _ in range(3)]
    assert blocks[1] == blocks[2]
    first, second = reader.read(blocks[0]), reader.read(blocks[1])
    assert first == second
    assert reader.read(blocks[2]) is second
    assert python_calls(lambda: reader.read(blocks[2])) < 6


def test_a_block_that_changes_the_table_is_never_looked_up() -> None:
    reader = HeadReader(4_000)
    adding = CALL + b"\x40\x01a\x01b"
    for count in range(1, 4):
        reader.read(adding)
        assert len(reader._table.dynamic_entries) == count


def test_a_block_that_resizes_the_table_does_so_each_time_it_matters() -> None:
    reader = HeadReader(4_000)
    reader.read(CALL + b"\x40\x01a\x01b")
    for _ in range(2):
        reader.read(b"\x20\x3f\xe1\x1f" + CALL)
        assert not reader._table.dynamic_entries
        reader.read(CALL + b"\x40\x01a\x01b")


def test_an_entry_too_large_for_the_table_empties_it_and_the_cache() -> None:
    """RFC 7541 section 4.4."""
    reader = HeadReader(40_000)
    reader.skip(b"\x40\x0cgrpc-timeout\x021S")
    timed = CALL + b"\xbe"
    assert reader.read(timed).timeout == 1.0
    reader.skip(b"\x40\x01a\x7f\x81\x1f" + b"x" * 4_096)
    with pytest.raises(ConnectionFault):
        reader.read(timed)


def test_an_entry_that_a_resize_throws_out_is_gone_from_the_cache_too() -> None:
    """RFC 7541 section 4.3."""
    reader = HeadReader(4_000)
    reader.skip(b"\x40\x0cgrpc-timeout\x021S")
    timed = CALL + b"\xbe"
    assert reader.read(timed).timeout == 1.0
    reader.skip(b"\x20")
    with pytest.raises(ConnectionFault):
        reader.read(timed)


def test_what_is_remembered_is_bounded() -> None:
    reader = HeadReader(4_000)
    for number in range(3 * KNOWN):
        block = CALL + plain_block([("x-request-id", str(number))])
        reader.read(block)
        assert block in reader._known
        assert len(reader._known) <= KNOWN
    long = CALL + plain_block([("a", "b" * 110)])
    assert len(long) > KNOWN_BYTES
    reader.read(long)
    assert long not in reader._known


def test_a_malformed_block_is_malformed_again() -> None:
    reader = HeadReader(4_000)
    for _ in range(3):
        with pytest.raises(StreamFault):
            reader.read(plain_block([(":method", "GET")]))


def test_a_head_says_what_a_server_needs() -> None:
    fields = {**dict(GRPC), "grpc-timeout": "2S", "grpc-encoding": "gzip", "content-length": "12"}
    assert HeadReader(4_000).read(plain_block(fields.items())) == Head(
        method=b"POST", path=PATH, is_grpc=True, content_length=12, encoding=b"gzip", timeout=2.0, refusal=None
    )


@pytest.mark.parametrize(
    ("length", "fine"), [("7", True), ("+7", False), ("", False), ("9" * 19, False), ("\xb2", False)]
)
def test_a_content_length_is_digits(length: str, fine: bool) -> None:
    block = plain_block([*GRPC, ("content-length", length), ("content-length", length)])
    assert isinstance(outcome(HeadReader(4_000).read, block), Head) is fine


def test_two_content_lengths_are_one_too_many() -> None:
    block = plain_block([*GRPC, ("content-length", "1"), ("content-length", "2")])
    assert isinstance(outcome(HeadReader(4_000).read, block), tuple)


def test_what_hpack_could_not_read_is_not_told_to_the_peer() -> None:
    """Its text quotes addresses of our memory."""
    with pytest.raises(ConnectionFault, match=r"^a header block that HPACK cannot read$"):
        HeadReader(4_000).read(CALL + b"\x7f" + b"\xff" * 400)
