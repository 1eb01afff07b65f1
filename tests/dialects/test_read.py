"""Which requests are read, which pass through, which are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from epp.dialects import Dialect, Request, read
from epp.errors import BadRequest, Refusal
from epp.headers import Headers
from tests.dialects.requests import CHAT, VALUES, chat, headers, post

MESSAGES = [{"role": "user", "content": "hi"}]

PATHS: dict[str, tuple[Dialect, dict[str, object]]] = {
    "/v1/chat/completions": (Dialect.OPENAI, {"messages": MESSAGES}),
    "/v1/chat/completions/": (Dialect.OPENAI, {"messages": MESSAGES}),
    "/v1/chat/completions?beta=/generate": (Dialect.OPENAI, {"messages": MESSAGES}),
    "/openai/deployments/x/chat/completions": (Dialect.OPENAI, {"messages": MESSAGES}),
    "/v1/chat/completions/render": (Dialect.OPENAI, {"messages": MESSAGES}),
    "/v1/chat/completions/batch": (Dialect.OPENAI, {"messages": [MESSAGES]}),
    "/v1/completions": (Dialect.OPENAI, {"prompt": "hi"}),
    "/v1/completions/render": (Dialect.OPENAI, {"prompt": "hi"}),
    "/v1/embeddings": (Dialect.OPENAI, {"input": "hi"}),
    "/v1/responses": (Dialect.OPENAI, {"input": "hi"}),
    "/v1/conversations": (Dialect.OPENAI, {}),
    "/v1/images/generations": (Dialect.OPENAI, {"prompt": "a cat"}),
    "/v1/images/edits": (Dialect.OPENAI, {"prompt": "a cat"}),
    "/v1/images/variations": (Dialect.OPENAI, {}),
    "/v1/audio/speech": (Dialect.OPENAI, {"input": "hi"}),
    "/v1/messages": (Dialect.ANTHROPIC, {"messages": MESSAGES}),
    "/anthropic/v1/messages": (Dialect.ANTHROPIC, {"messages": MESSAGES}),
    "/v1/messages/count_tokens": (Dialect.ANTHROPIC, {"messages": MESSAGES}),
    "/inference/v1/generate": (Dialect.VLLM, {"token_ids": [1]}),
    "/generate": (Dialect.SGLANG, {"text": "hi"}),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_known_path_is_read_in_its_dialect(path: str) -> None:
    dialect, body = PATHS[path]
    request = post(path, body | {"model": "m"})
    assert (request.dialect, request.model, request.target_model) == (dialect, "m", "m")
    assert request.path == path.partition("?")[0]


@pytest.mark.parametrize(
    "path",
    [
        "/x/mycompletions",
        "/v1/xchat/completionsx",
        "/v1/generate",
        "/x/generate",
        "/v1/messages/batches",
        "/v1/responses/resp_1/cancel",
        "/v1/rerank",
        "/v1/Chat/Completions",
        "/",
        "",
        "*",
        "/vllm.grpc.engine.VllmEngine/Generate",
    ],
)
def test_an_unknown_path_passes_through_unread(path: str) -> None:
    request = read(headers(path), b"\x00 no JSON")
    assert (request.dialect, request.model, request.body) == (Dialect.PASSTHROUGH, "", b"\x00 no JSON")
    assert request.prompt == b""
    assert request.messages == ()
    assert request.tokens == 10 // 4 + 1  # it weighs something


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"PUT", b"post"])
def test_methods_but_post_pass_through(method: bytes) -> None:
    request = read(headers("/v1/responses", method=method), b"")
    assert (request.dialect, request.method, request.tokens) == (Dialect.PASSTHROUGH, method.decode(), 0)


def test_the_path_is_found_in_its_fallbacks_only_without_a_path() -> None:
    body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
    original: Headers = (("x-forwarded-path", b"/v1/rerank"), ("x-original-path", b"/v1/chat/completions"))
    assert read(original, body).dialect is Dialect.OPENAI
    assert read((("x-forwarded-path", b"/v1/messages"),), body).dialect is Dialect.ANTHROPIC
    assert read(((":path", b"/v1/rerank"), *original), body).dialect is Dialect.PASSTHROUGH
    assert read((), body).dialect is Dialect.PASSTHROUGH


@pytest.mark.parametrize("path", [path for path, (_, body) in PATHS.items() if body and "variations" not in path])
def test_a_body_without_its_input_is_refused_by_the_fields_name(path: str) -> None:
    (field, _), *_ = PATHS[path][1].items()
    if path == "/v1/images/edits":  # the image is there, as a form or as JSON: not ours to check
        return
    nothing: list[dict[str, object]] = [{}, {field: None}, {field: ""}, {field: []}]
    for empty in nothing:
        with pytest.raises(BadRequest, match=f"`{field}"):
            post(path, {"model": "m"} | empty)


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
def test_a_missing_model_is_refused_but_where_the_api_needs_none(model: dict[str, object]) -> None:
    for path, (_, body) in PATHS.items():
        if path in ("/v1/messages/count_tokens", "/v1/conversations", "/generate"):
            assert post(path, model | body).model == ""
        else:
            with pytest.raises(BadRequest, match="`model` is missing or empty"):
                post(path, model | body)


@pytest.mark.parametrize("model", [5, ["m"], {"model": "m"}, True, 1.5])
def test_a_model_that_is_no_string_is_refused(model: object) -> None:
    with pytest.raises(BadRequest, match="`model` must be a string"):
        chat(model=model)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no body"),
        (b" ", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model":"m","messages":[1]} x', "not valid JSON"),
        (b'{"model":"m","messages":[NaN]}', "not valid JSON"),
        (b"model=m", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"m"', "must be a JSON object"),
        (b"[" * 100_000, "must be a JSON object"),
        (b'{"x":' * 100_000, "nested too deep"),
        (b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"model":"\xff","messages":[1]}', "not UTF-8"),
        (b'{"model":"m","messages":["\xff"]}', "not UTF-8"),
        (b'{"model":"m","messages":["\xe4"]}', "not UTF-8"),
        (b'{"model":"m","messages":["' + b"x" * 262_143 + b"\xe4\xbd", "not UTF-8"),
        ('{"model":"m","messages":[1]}'.encode("utf-16"), "not UTF-8"),
        (b'{"model":"m","messages":["\\ud8zz"]}', "not valid JSON"),
        (b'{"model":"m","messages":["\\ud80"]}', "not valid JSON"),
    ],
)
def test_what_is_no_json_object_of_utf8_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(headers(), body)


@pytest.mark.parametrize("cut", [262_143, 262_144, 262_145])
def test_characters_across_the_pieces_of_the_utf8_check_are_whole(cut: int) -> None:
    before = b'{"model":"m","messages":["'
    body = before + b"x" * (cut - len(before) - 1) + "\N{GRINNING FACE}".encode() + b'"]}'
    assert read(headers(), body).model == "m"


def test_a_byte_order_mark_is_tolerated() -> None:
    assert read(headers(), b'\xef\xbb\xbf{"model":"m","messages":[1]}').model == "m"


@pytest.mark.parametrize("text", [r"\ud83d", r"a\udc00b", r"\\\ud83d", r"\ud83d\ud83d\ude00", r"\uD83D"])
def test_lone_surrogates_which_cut_emoji_leave_are_tolerated(text: str) -> None:
    body = f'{{"messages":["{text}"],"model":"m"}}'.encode()
    request = read(headers(), body)
    assert (request.model, request.body) == ("m", body)


def test_an_escaped_backslash_is_no_surrogate() -> None:
    body = rb'{"messages":["\\ud83d \ud83d"],"model":"m"}'
    assert read(headers(), body).prompt == rb'["\\ud83d \ufffd"'


def test_fields_that_are_not_ours_to_check_pass() -> None:
    odd = {"temperature": "hot", "stream": "yes", "n": "two", "max_tokens": [1], "tools": 5, "cache_salt": 7, "x": {}}
    request = chat(messages=[{"role": "oracle", "content": 5}], **odd)
    assert (request.stream, request.n, request.max_tokens, request.cache_salt) == (False, 1, None, "")
    assert chat(messages="not a list").model == "m"


@pytest.mark.parametrize(
    ("path", "fields", "limit"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 0}, 0),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (CHAT, {"max_tokens": -5}, None),
        (CHAT, {"max_tokens": 5.0}, None),
        (CHAT, {"max_tokens": True}, None),
        (CHAT, {"max_tokens": "5"}, None),
        (CHAT, {"max_tokens": 10**18 - 1}, 10**18 - 1),
        (CHAT, {"max_tokens": 10**18}, None),
        ("/v1/completions", {"prompt": "x", "max_tokens": 5}, 5),
        ("/v1/responses", {"input": "x", "max_output_tokens": 5, "max_tokens": 1}, 5),
        ("/v1/messages", {"max_tokens": 5}, 5),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"max_tokens": 5}}, 5),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": None}, None),
        ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 5}}, 5),
        ("/generate", {"text": ["x"], "sampling_params": [{"max_new_tokens": 5}]}, None),
        ("/v1/embeddings", {"input": "x", "max_tokens": 5}, None),
    ],
)
def test_the_limit_of_output_is_read_where_each_api_has_it(
    path: str, fields: dict[str, object], limit: int | None
) -> None:
    assert post(path, {"model": "m", "messages": MESSAGES} | fields).max_tokens == limit


def test_stream_n_and_salt_are_read() -> None:
    request = chat(stream=True, n=3, cache_salt='a"b')
    assert (request.stream, request.n, request.cache_salt) == (True, 3, 'a"b')
    assert chat(n=0).n == 1
    sglang = post("/generate", {"text": "x", "extra_key": "k", "stream": True, "sampling_params": {"n": 2}})
    assert (sglang.stream, sglang.n, sglang.cache_salt) == (True, 2, "k")
    assert post("/inference/v1/generate", {"model": "m", "token_ids": [1], "sampling_params": {"n": 4}}).n == 4


def read_with(*more: tuple[str, bytes]) -> Request:
    return read(headers(CHAT, *more), b'{"model":"m","messages":[1]}')


def test_control_headers_are_read_by_their_canonical_name_first() -> None:
    request = read_with(
        ("x-gateway-inference-fairness-id", b"old"),
        ("x-llm-d-inference-fairness-id", b" team-a "),
        ("x-llm-d-inference-fairness-id", b"second"),
        ("x-gateway-inference-objective", b"batch"),
    )
    assert (request.fairness_id, request.objective, request.priority) == ("team-a", "batch", 0)


def test_a_request_without_fairness_id_is_of_the_default_flow() -> None:
    assert (read_with().fairness_id, read_with().objective) == ("default-flow", "")
    assert read_with(("x-llm-d-inference-fairness-id", b"  ")).fairness_id == "default-flow"


def test_a_request_keeps_headers_and_body_as_they_came() -> None:
    body = b' {"messages":[1], "model" :"m"}\n'
    sent = headers(CHAT, ("cookie", b"a=1"), ("cookie", b"b=2"))
    request = read(sent, body)
    assert request.headers is sent
    assert request.body is body
    assert (request.size_bytes, request.method) == (len(body), "POST")
    assert repr(request) == f"<Request POST /v1/chat/completions openai model='m' {len(body)} bytes>"


def test_the_last_of_two_models_counts_as_for_every_json_decoder() -> None:
    assert post(CHAT, b'{"model":"a","messages":[1],"mo\\u0064el":"b"}').model == "b"


@given(st.binary(max_size=60))
@example(b'{"model":"\\ud800","messages":[1]}')
@example(b'{"model":"m","messages":"\\u')
def test_no_body_ends_in_anything_but_a_request_or_a_refusal(body: bytes) -> None:
    for path in PATHS:
        try:
            request = read(headers(path), body)
        except Refusal:
            continue
        assert request.body == body


FIELDS = ["messages", "prompt", "input", "token_ids", "text", "input_ids", "items", "tools", "system", "instructions"]
FIELDS += ["sampling_params", "stream", "n", "max_tokens", "cache_salt", "extra_key"]


@given(st.sampled_from(sorted(PATHS)), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))
def test_any_value_in_any_field_can_be_asked_about(path: str, fields: dict[str, object]) -> None:
    try:
        request = post(path, {"model": "m"} | fields)
    except BadRequest:
        return
    assert isinstance(request.prompt, bytes)
    assert request.tokens >= 0
    assert isinstance(request.messages, tuple)
    assert request.n >= 1
