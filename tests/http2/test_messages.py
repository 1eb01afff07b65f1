"""gRPC in DATA and trailers: framing, compression, timeouts, statuses (grpc/grpc, doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import gzip
import itertools
import zlib
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.extproc.http2.events import CallLost, CallStarted, MessageReceived
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.http2.frames import header_block
from epp.extproc.http2.messages import CallFault, MessageReader, Status, parse_timeout, trailers, trailers_only
from tests.http2.peer import END_STREAM, GRPC, PATH, Site, call, data, message, with_fields

CONTENTS = st.lists(
    st.sampled_from((0, 1, 4, 5, 6, 200, 999, 1_000)).map(lambda size: b"\x00\x01\x02" * size), max_size=5
)
GZIP = with_fields(("grpc-encoding", "gzip"))


def read(pieces: list[bytes], encoding: bytes = b"", limit: int = 3_000) -> list[bytes]:
    reader = MessageReader(encoding, limit)
    return [content for piece in pieces for content in reader.feed(piece)]


@given(CONTENTS, st.lists(st.integers(0, 9_999), max_size=8), st.booleans())
def test_messages_are_whole_however_they_are_cut(contents: list[bytes], cuts: list[int], packed: bool) -> None:
    said = b"".join(message(gzip.compress(content), 1) if packed else message(content) for content in contents)
    places = [0, *sorted(cut % (len(said) + 1) for cut in cuts), len(said)]
    pieces = [said[a:b] for a, b in itertools.pairwise(places)]
    assert read(pieces, b"gzip" if packed else b"") == contents


@given(CONTENTS)
def test_a_part_of_a_message_is_held_and_no_more(contents: list[bytes]) -> None:
    reader = MessageReader(b"", 3_000)
    said = b"".join(map(message, contents))
    held = [(list(reader.feed(said[i : i + 1])), reader.held) for i in range(len(said))]
    at = 0
    for found, part in held:
        at = 0 if found else at + 1
        assert part == at
    assert [content for found, _ in held for content in found] == contents


def test_a_message_may_be_as_large_as_the_limit() -> None:
    assert read([message(bytes(3_000))]) == [bytes(3_000)]
    with pytest.raises(CallFault, match="3001 bytes") as fault:
        read([message(bytes(3_001))[:5]])
    assert (fault.value.status, fault.value.limit) == (Status.RESOURCE_EXHAUSTED, "max_message_bytes")


def test_an_unpacked_message_may_be_as_large_as_the_limit() -> None:
    assert read([message(gzip.compress(bytes(3_000)), 1)], b"gzip") == [bytes(3_000)]
    with pytest.raises(CallFault) as fault:
        read([message(gzip.compress(bytes(3_001)), 1)], b"gzip")
    assert (fault.value.status, fault.value.limit) == (Status.RESOURCE_EXHAUSTED, "max_message_bytes")


@pytest.mark.parametrize(
    ("said", "encoding"),
    [
        (message(gzip.compress(b"a"), 1), b""),
        (message(gzip.compress(b"a"), 2), b"gzip"),
        (message(b"a", 2), b""),
        (message(b"not gzip", 1), b"gzip"),
        (message(b"", 1), b"gzip"),
        (message(zlib.compress(b"deflate"), 1), b"gzip"),
        (message(gzip.compress(b"a")[:-1], 1), b"gzip"),
        (message(gzip.compress(b"a") + b"x", 1), b"gzip"),
        (message(gzip.compress(b"a") + gzip.compress(b"b"), 1), b"gzip"),
    ],
    ids=[
        "flag without encoding",
        "flag 2",
        "flag 2 and no encoding",
        "no gzip",
        "nothing",
        "zlib",
        "cut",
        "tail",
        "two",
    ],
)
def test_what_cannot_be_unpacked_ends_the_call(said: bytes, encoding: bytes) -> None:
    with pytest.raises(CallFault) as fault:
        read([said], encoding)
    assert (fault.value.status, fault.value.limit) == (Status.INTERNAL, "")


def test_an_uncompressed_message_may_follow_an_encoding() -> None:
    assert read([message(b"plain") + message(gzip.compress(b"packed"), 1)], b"gzip") == [b"plain", b"packed"]


# -- in a connection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status", "breach"),
    [
        (message(bytes(1_001)), Status.RESOURCE_EXHAUSTED, True),
        (message(bytes(1_001))[:5], Status.RESOURCE_EXHAUSTED, True),
        (message(gzip.compress(bytes(1_001)), 1), Status.RESOURCE_EXHAUSTED, True),
        (message(b"?", 1), Status.INTERNAL, False),
        (message(b"?", 7), Status.INTERNAL, False),
    ],
)
@pytest.mark.parametrize("cut", [None, 1, 4, 5])
def test_a_message_that_cannot_be_taken_ends_its_call(
    said: bytes, status: Status, breach: bool, cut: int | None
) -> None:
    site = Site(ConnectionLimits(max_message_bytes=1_000))
    site.feed(call(1, GZIP), call(3), data(1, message(b"good") + (said if cut is None else said[:cut])))
    site.feed(data(1, b"" if cut is None else said[cut:]))
    assert site.events == [
        CallStarted(1, PATH),
        CallStarted(3, PATH),
        MessageReceived(1, b"good"),
        CallLost(1),
    ]
    assert site.status(site.out())["grpc-status"] == str(int(status))
    assert site.breaches == ({"max_message_bytes": 1} if breach else {})
    site.check()
    site.feed(data(1, b"whatever follows"), data(3, message(b"others go on")))
    assert site.messages(3) == [b"others go on"]


@pytest.mark.parametrize("part", range(1, 8))
def test_an_end_in_the_middle_of_a_message_is_an_error(part: int) -> None:
    site = Site()
    said = message(b"abc")[:part]
    assert site.feed(call(1), data(1, said, END_STREAM)) == [CallStarted(1, PATH), CallLost(1)]
    (only,) = site.out()
    assert site.headers(only.payload)["grpc-status"] == "13"
    site.check()


def test_replies_before_a_fault_are_sent_before_its_status() -> None:
    site = Site()
    site.feed(call(1), data(1, message(b"m")))
    site.connection.send(1, b"reply")
    site.feed(data(1, message(b"?", 9)))
    head, reply, trailers_, _ = site.out()
    assert (head.kind, reply.payload) == (1, message(b"reply"))
    assert site.headers(trailers_.payload)["grpc-status"] == "13"


@pytest.mark.parametrize("encoding", ["deflate", "snappy", "gzip,identity"])
def test_an_unknown_encoding_is_refused_with_those_that_are_known(encoding: str) -> None:
    site = Site()
    assert site.feed(call(1, with_fields(("grpc-encoding", encoding))), data(1, message(b"m"))) == []
    fields = site.status(site.out())
    assert (fields["grpc-status"], fields["grpc-accept-encoding"]) == ("12", "identity,gzip")
    assert encoding in unquote(fields["grpc-message"])


@pytest.mark.parametrize("end", [False, True])
def test_a_refused_call_is_over_at_once(end: bool) -> None:
    site = Site()
    site.feed(call(1, with_fields(("grpc-encoding", "x")), end=end))
    assert [each.kind for each in site.out()] == ([1] if end else [1, 3])
    site.check()
    assert not site.connection._streams


def test_identity_is_an_encoding() -> None:
    site = Site()
    site.feed(call(1, with_fields(("grpc-encoding", "identity"))), data(1, message(b"m")))
    assert site.messages() == [b"m"]


def test_gzip_is_an_encoding() -> None:
    site = Site()
    site.feed(call(1, GZIP), data(1, message(gzip.compress(b"m" * 99), 1)), data(1, message(b"plain")))
    assert site.messages() == [b"m" * 99, b"plain"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1H", 3_600.0),
        ("2M", 120.0),
        ("99999999S", 99_999_999.0),
        ("1m", 0.001),
        ("5u", 5e-6),
        ("7n", 7e-9),
        ("0S", 0.0),
    ],
)
def test_timeouts_have_six_units(text: str, seconds: float) -> None:
    assert parse_timeout(text.encode()) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "S", "1", "1s", "-1S", "1.5S", "123456789S", "1S ", "1SS", "\u0661S", "1h"])
def test_other_timeouts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="grpc-timeout"):
        parse_timeout(text.encode())


def test_a_bad_timeout_refuses_the_call() -> None:
    site = Site()
    assert site.feed(call(1, with_fields(("grpc-timeout", "soon")))) == []
    assert site.status(site.out())["grpc-status"] == "13"


# -- statuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("plain text, all of it: ~!", b"plain text, all of it: ~!"),
        ("100%", b"100%25"),
        ("line\nfeed\t", b"line%0Afeed%09"),
        ("grün", b"gr%C3%BCn"),
        ("\x7f\x00", b"%7F%00"),
        ("\ud800", b"?"),
    ],
)
def test_a_status_message_is_percent_encoded(text: str, encoded: bytes) -> None:
    site = Site()
    fields = dict(site.decoder.decode(trailers(Status.UNKNOWN, text), raw=True))
    assert fields == {b"grpc-status": b"2", b"grpc-message": encoded}


@given(st.text(max_size=700))
def test_a_status_message_fits_in_a_frame_and_can_be_read_again(text: str) -> None:
    block = trailers_only(Status.UNKNOWN, text)
    assert len(block) < 16_384
    fields = {str(name): str(value) for name, value in Site().decoder.decode(block)}
    assert unquote(fields.get("grpc-message", "")) == text[:500].encode(errors="replace").decode()
    assert all(0x20 <= ord(letter) <= 0x7E for letter in fields.get("grpc-message", ""))


def test_the_longest_status_message_fits_in_a_frame() -> None:
    assert len(trailers_only(Status.UNKNOWN, "\U0001f600" * 10_000)) < 16_384


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.binary(max_size=40_000)), max_size=3))
def test_our_header_blocks_are_read_by_hpack(fields: list[tuple[bytes, bytes]]) -> None:
    block = header_block((b":status", b"200"), *fields)
    decoder = Site().decoder
    decoder.max_header_list_size = 1 << 20
    assert [tuple(map(bytes, field)) for field in decoder.decode(block, raw=True)] == [(b":status", b"200"), *fields]


def test_grpc_s_own_fields_make_a_call() -> None:
    site = Site()
    assert site.feed(call(1, site.encoder.encode(GRPC))) == [CallStarted(1, PATH)]
