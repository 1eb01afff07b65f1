"""The model's name replaced, all else byte for byte as it came."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects import Request, encoding, read, rename
from epp.errors import BadRequest
from tests.dialects.requests import CHAT, TEXTS, VALUES, headers


def renamed(body: bytes, model: str = "new") -> bytes:
    return rename(read(headers(), body), model)


def test_only_the_value_of_the_model_changes() -> None:
    body = b'{ "messages" : [1] , "model"\n:\t"old" , "seed": 9007199254740993, "z": 1.0e+2, "a": "\\u00e9\xc3\xa9" }\n'
    assert renamed(body) == body.replace(b'"old"', b'"new"')


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"old","messages":[1]}', b'{"model":"new","messages":[1]}'),
        (b'{"messages":[1],"model":"old"}', b'{"messages":[1],"model":"new"}'),
        (b'\xef\xbb\xbf{"model":"old","messages":[1]}', b'\xef\xbb\xbf{"model":"new","messages":[1]}'),
        (b'{"mod\\u0065l":"old","messages":[1]}', b'{"mod\\u0065l":"new","messages":[1]}'),
        (b'{"model":"a\\"\\\\b","messages":[1]}', b'{"model":"new","messages":[1]}'),
        (
            b'{"model":"a","messages":[1],"model" : "b","x":2,"\\u006dodel":"c"}',
            b'{"model":"new","messages":[1],"model" : "new","x":2,"\\u006dodel":"new"}',
        ),
        (
            b'{"model":"old","messages":[{"model":"old"}],"x":{"model":"old"},"t":"\\"model\\":\\"old\\""}',
            b'{"model":"new","messages":[{"model":"old"}],"x":{"model":"old"},"t":"\\"model\\":\\"old\\""}',
        ),
        (b'{"messages":["\\ud83d"],"model":"old"}', b'{"messages":["\\ud83d"],"model":"new"}'),
    ],
)
def test_each_place_of_the_model_is_found(before: bytes, after: bytes) -> None:
    assert renamed(before) == after


@pytest.mark.parametrize("model", ["", 'q"uote', "back\\slash", "line\nend", "é\N{GRINNING FACE}", "a/b-c.d:e"])
def test_any_name_is_written_as_json(model: str) -> None:
    body = renamed(b'{"messages":[1],"model":"old"}', model)
    assert json.loads(body) == {"messages": [1], "model": model}


SPACE = st.sampled_from(["", "", " ", "\n\t", "  \r\n"])
NAMES = ("old", "", 'a"b', "c\\d", "é\n")
KEYS = st.sampled_from(['"model"', '"mod\\u0065l"', '"\\u006Dodel"', '"models"', '"Model"', '"m"', '"\\"model\\":"'])
MEMBERS = st.lists(st.tuples(SPACE, KEYS, SPACE, SPACE, VALUES | st.sampled_from(NAMES), SPACE), max_size=6)


@given(MEMBERS, MEMBERS, SPACE, SPACE, TEXTS, st.booleans())
def test_a_renamed_body_differs_in_the_models_value_alone(
    before: list[tuple[str, str, str, str, object, str]],
    after: list[tuple[str, str, str, str, object, str]],
    opening: str,
    closing: str,
    name: str,
    ascii_only: bool,
) -> None:
    """The body is written from parts, once with the old and once with the new name: an oracle that parses nothing."""

    def write(new: str | None) -> bytes:
        written = []
        for first, key, second, third, value, last in members:
            text = json.dumps(value, ensure_ascii=ascii_only)
            if json.loads(key) == "model":
                text = json.dumps(new, ensure_ascii=False) if new is not None else text if value in NAMES else '"odd"'
            written.append(f"{first}{key}{second}:{third}{text}{last}")
        return f"{opening}{{{','.join(written)}}}{closing}".encode()

    members = [*before, ("", '"messages"', "", "", [1], ""), ("", '"model"', " ", "", "old", ""), *after]
    sent = write(None)
    try:
        request = read(headers(), sent)
    except BadRequest:
        assert sent.count(b'""') > 0  # the last model is empty
        return
    assert rename(request, name) == write(name)


def test_more_models_than_anybody_sends_are_refused() -> None:
    members = b'"model":"a",' * 16
    assert renamed(b"{" + members + b'"messages":[1]}').count(b'"new"') == 16
    with pytest.raises(BadRequest, match="more than 16 `model` keys"):
        renamed(b"{" + members + b'"model":"a","messages":[1]}')


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_compressed_body_keeps_its_coding(coding: str) -> None:
    text = b'\xef\xbb\xbf{"model":"old","messages":["' + b"x" * 10_000 + b'"]}'
    request = read(headers(CHAT, ("content-encoding", coding.encode())), encoding.pack(text, coding))
    body = rename(request, "new")
    assert encoding.unpack(body, coding, 20_000) == text.replace(b"old", b"new")
    if coding == "gzip":
        assert gzip.decompress(body) == text.replace(b"old", b"new")
    if coding == "zstd":
        assert zstandard.ZstdDecompressor().decompress(body) == text.replace(b"old", b"new")


def test_a_body_without_a_model_comes_back_as_it_is() -> None:
    for request in (
        read(headers("/generate"), b'{"text":"x"}'),
        read(headers("/v1/rerank"), b'{"model":"old"}'),
        read(headers("/v1/models", method=b"GET"), b""),
    ):
        assert rename(request, "new") is request.body


def form(*parts: tuple[str, bytes], boundary: bytes = b"XX") -> bytes:
    written = [
        b"--" + boundary + b"\r\nContent-Disposition: form-data; " + header.encode() + b"\r\n\r\n" + value + b"\r\n"
        for header, value in parts
    ]
    return b"".join(written) + b"--" + boundary + b"--\r\n"


def upload(body: bytes, content_type: bytes = b"multipart/form-data; boundary=XX") -> Request:
    return read(
        ((":method", b"POST"), (":path", b"/v1/audio/transcriptions"), ("content-type", content_type)),
        body,
    )


AUDIO = ('name="file"; filename="a.wav"', b"RIFF\r\n--X\r\n--XXY\r\n\x00\xff" * 100)


@pytest.mark.parametrize("place", [0, 1])
def test_the_model_of_a_form_is_read_and_replaced_in_place(place: int) -> None:
    parts = [AUDIO, ('name="stream"', b"true")]
    parts.insert(place, ('name="model"', b"whisper"))
    body = form(*parts)
    request = upload(body)
    assert (request.model, request.stream, request.tokens, request.prompt) == ("whisper", True, 225, b"")
    assert rename(request, "grand \N{GRINNING FACE}") == body.replace(b"whisper", "grand \N{GRINNING FACE}".encode())


def test_every_model_of_a_form_is_replaced_and_the_last_counts() -> None:
    body = form(('name="model"', b"one"), AUDIO, ('filename="x"; name="model"', b"two"))
    request = upload(body)
    assert request.model == "two"
    assert rename(request, "three") == body.replace(b"one", b"three").replace(b"two", b"three")


def test_a_form_may_come_in_the_header_forms_that_clients_write() -> None:
    body = form(("name=model", b"whisper"), AUDIO)
    assert upload(body, b'Multipart/Form-Data; charset=utf-8; boundary="XX"').model == "whisper"
    assert upload(body.replace(b"Content-Disposition", b"content-disposition")).model == "whisper"


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (form(AUDIO), b"multipart/form-data; boundary=XX", "`model` is missing"),
        (form(('name="model"', b"")), b"multipart/form-data; boundary=XX", "`model` is missing"),
        (form(('name="model"', b"\xff")), b"multipart/form-data; boundary=XX", "not UTF-8"),
        (form(AUDIO), b"multipart/form-data", "no multipart boundary"),
        (form(AUDIO), b"multipart/form-data; boundary=" + b"X" * 1000, "not valid multipart"),
        (form(AUDIO), b"multipart/form-data; boundary=YY", "not valid multipart"),
        (b"--XX\r\nno header\r\n\r\n", b"multipart/form-data; boundary=XX", "not valid multipart"),
        (form(*[('name="model"', b"x")] * 1001), b"multipart/form-data; boundary=XX", "more than 1000 parts"),
        (b"RIFF", b"audio/wav", "not valid JSON"),
    ],
)
def test_what_is_no_form_with_a_model_is_refused(body: bytes, content_type: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        upload(body, content_type)


@given(st.lists(st.tuples(st.sampled_from(["model", "stream", "file", "x"]), st.binary(max_size=20)), max_size=5))
def test_a_renamed_form_differs_in_the_models_value_alone(parts: list[tuple[str, bytes]]) -> None:
    if any(b"\r\n--QQ" in b"\r\n" + value for _, value in parts):
        return

    def write(model: bytes | None) -> bytes:
        values = [(name, model if model is not None and name == "model" and value else value) for name, value in parts]
        return form(*((f'name="{name}"', value) for name, value in values), boundary=b"QQ")

    try:
        request = upload(write(None), b"multipart/form-data; boundary=QQ")
    except BadRequest:
        return
    assert rename(request, "new") == write(b"new")
