"""Reading by slices against protobuf: whatever is read that way, protobuf reads the same; the rest is protobuf's."""

from __future__ import annotations

import itertools

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from hypothesis import example, given
from hypothesis import strategies as st

from epp.errors import ProtocolError
from epp.extproc import events, messages
from epp.extproc.events import Modes, RequestStarted
from epp.extproc.messages import BESIDE, ENTRIES, NAMES, REMEMBERED, Said, anything, usual
from tests.extproc import oracle
from tests.extproc.transcripts import ALL, WORDS

INTERNAL = (events.Decided, events.Refused, events.Lost, events.Expired)
SIZES = st.sampled_from((0, 1, 5, 100, 120, 121, 127, 128, 129, 300, 16_383, 16_384, 70_000))
NAMES_OF_HEADERS = st.sampled_from((":method", ":path", "X-Upper", "x-ünïcode", "", "n" * 110, "n" * 130)) | st.text()
METADATA = ("envoy.lb", "envoy.lb.subset_hint", "other")
FIELDS = ("x-gateway-destination-endpoint-subset", "x-gateway-destination-endpoint-served", "other")
FLIPS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A ProcessingRequest by Envoy's own types, usual and unusual ones."""
    request = ep.ProcessingRequest()
    kind = draw(st.sampled_from(("request_headers", "response_headers", "request_body", "response_body", "")))
    if kind.endswith("headers"):
        of_headers: ep.HttpHeaders = getattr(request, kind)
        if draw(st.booleans()):
            of_headers.headers.SetInParent()
        for name in draw(st.lists(NAMES_OF_HEADERS, max_size=5)):
            value = draw(st.binary(max_size=9)) or b"v" * draw(SIZES)
            text = draw(st.sampled_from(("", "", "", "text")))
            of_headers.headers.headers.add(key=name, raw_value=value, value=text)
        of_headers.end_of_stream = draw(st.booleans())
    elif kind:
        body: ep.HttpBody = getattr(request, kind)
        body.SetInParent()
        body.body = b"b" * draw(SIZES)
        body.end_of_stream = draw(st.booleans())
    if draw(st.booleans()):
        request.protocol_config.request_body_mode = draw(st.integers(0, 6))
        request.protocol_config.response_body_mode = draw(st.integers(0, 4))
    for namespace in draw(st.lists(st.sampled_from(METADATA), max_size=2)):
        struct = request.metadata_context.filter_metadata[namespace]
        struct[draw(st.sampled_from(FIELDS))] = draw(st.sampled_from(("", "10.0.0.1:80, [::1]:80", 3.0, True, None)))
        struct.get_or_create_list("x-gateway-destination-endpoint-subset").extend(["10.0.0.1:80", 3])
    data: bytes = request.SerializeToString()
    return data


def both(data: bytes) -> Said | None:
    """What slices read, after protobuf was seen to read the same; None: left to protobuf."""
    first, again = usual(data), usual(data)
    assert first == again  # the second time from what is remembered
    if first is not None:
        assert first == anything(data)
    return first


@given(requests())
def test_slices_read_what_protobuf_reads(data: bytes) -> None:
    both(data)


@given(requests(), FLIPS, st.integers(0, 400), st.booleans())
def test_of_broken_messages_too(data: bytes, flips: list[tuple[int, int]], cut: int, is_cut: bool) -> None:
    broken = bytearray(data[:cut] if is_cut else data)
    for at, byte in flips:
        if broken:
            broken[at % len(broken)] = byte
    both(bytes(broken))


@given(requests(), requests())
def test_two_messages_in_one_are_joined_as_protobuf_joins_them(one: bytes, other: bytes) -> None:
    both(one + other)


@given(st.binary(max_size=60))
@example(b"\x12\x00")
@example(b"\x12\x02\x0a\x00")
@example(b"\x22\x02\x10\x01")
@example(b"\x22\x02\x10\x00")
@example(b"\x22\x03\x0a\x02\x00")  # a body that reaches out of its message
@example(b"\x12\x02\x0a\x02\x0a\x00")  # a header map that does
@example(b"\x12\x04\x0a\x02\x0a\x02\x0a\x00")  # an entry that does
@example(b"\x12\x0c\x0a\x08\x0a\x08\x0a\x01a\x1a\x03b\x18\x01")  # one that reaches over the flag behind its map
def test_any_bytes_are_read_alike(data: bytes) -> None:
    both(data)


@pytest.mark.parametrize("kind", [b"\x12", b"\x1a", b"\x22", b"\x2a"])
def test_every_byte_of_a_message_may_be_any_other(kind: bytes) -> None:
    entry = b"\x0a\x06\x0a\x01a\x1a\x01b"
    content = b"\x0a" + bytes([len(entry)]) + entry + (b"\x18\x01" if kind in b"\x12\x1a" else b"\x10\x01")
    whole = kind + bytes([len(content)]) + content + b"\x5a\x02\x08\x04"
    assert both(whole) is not None
    for at, byte in itertools.product(range(len(whole)), range(256)):
        both(whole[:at] + bytes([byte]) + whole[at + 1 :])
    for end in range(len(whole)):
        both(whole[:end])
        both(whole + whole[:end])


@pytest.mark.parametrize("padding", range(7))
def test_lengths_may_be_padded(padding: int) -> None:
    def size(number: int) -> bytes:
        return bytes([number | 0x80, *[0x80] * (padding - 1), 0]) if padding else bytes([number])

    body = b"\x0a" + size(3) + b"abc"
    entry = b"\x0a" + size(6) + b"\x0a\x01a\x1a\x01b"
    headers = b"\x0a" + size(len(entry)) + entry
    for data in (b"\x22" + size(len(body)) + body, b"\x12" + size(len(headers)) + headers):
        assert (both(data) is not None) == (padding < 5)  # no length has more than five bytes


@pytest.mark.parametrize("key", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"a\x00", b"\xf4\x8f\xbf\xbf", "É".encode()])
def test_names_are_text_for_both(key: bytes) -> None:
    entry = b"\x0a%c%b\x1a\x01b" % (len(key), key)
    data = b"\x12%c\x0a%c\x0a%c%b" % (len(entry) + 4, len(entry) + 2, len(entry), entry)
    try:
        key.decode()
    except UnicodeDecodeError:
        assert both(data) is None
        with pytest.raises(ProtocolError):
            anything(data)
    else:
        assert both(data) is not None


def test_what_envoy_sends_is_read_by_slices() -> None:
    trailers = ("request_trailers", "response_trailers")
    for transcript in ALL:
        told: Modes | None = Modes()
        for step in transcript.steps:
            if not isinstance(step.event, INTERNAL):
                data = oracle.message(step.event, told).SerializeToString()
                assert (both(data) is None) == (anything(data)[0] in trailers), f"{transcript.name}.txt:{step.line}"
                told = None


def with_header(name: str, value: bytes) -> bytes:
    headers = (*WORDS["POST"], (name, value))
    data: bytes = oracle.message(RequestStarted(headers), Modes()).SerializeToString()
    return data


def test_streams_share_what_repeats() -> None:
    one, other = usual(with_header("x-tenant", b"blue")), usual(with_header("x-tenant", b"blue"))
    assert one is not None
    assert other is not None
    assert all(pair is same for pair, same in zip(one[1], other[1], strict=True))


def test_what_is_remembered_is_bounded() -> None:
    for n in range(3 * REMEMBERED):
        assert usual(with_header(f"x-{n}", b"%d" % n)) is not None
        request = oracle.message(RequestStarted(WORDS["POST"], subset=(str(n),)), None)
        assert usual(request.SerializeToString()) is not None
    assert all(0 < len(memory) <= REMEMBERED for memory in (NAMES, ENTRIES, BESIDE))


def test_large_values_and_long_hints_are_read_each_time() -> None:
    large = b"l" * 5000
    told = usual(with_header("x-large", large))
    assert told is not None
    assert told[1][-1] == ("x-large", large)
    long = tuple(f"10.0.0.1:{port}" for port in range(10_000, 10_200))
    hinted = usual(oracle.message(RequestStarted(WORDS["POST"], subset=long), None).SerializeToString())
    assert hinted is not None
    assert hinted[3].subset == long
    assert all(len(data) <= 1024 for memory in (NAMES, ENTRIES, BESIDE) for data in memory)


def test_secrets_are_not_remembered() -> None:
    for name in ("Authorization", "cookie", "x-api-key"):
        said = usual(with_header(name, b"hunter2"))
        assert said is not None
        assert said[1][-1] == (name.lower(), b"hunter2")
    assert not any(b"hunter2" in entry for entry in ENTRIES)


def test_our_tags_are_envoys() -> None:
    theirs = ep.ProcessingRequest.DESCRIPTOR.fields_by_name
    kinds = {**messages.HEADERS, **messages.BODIES}
    assert kinds == {theirs[kind].number << 3 | 2: kind for kind in kinds.values()}
    assert len(kinds) == 4
