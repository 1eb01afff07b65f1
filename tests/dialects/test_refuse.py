"""Our refusals, as the caller's client library reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.dialects import Answer, refuse
from epp.errors import (
    BadRequest,
    DecisionTimeout,
    InternalError,
    NoEndpoint,
    Refusal,
    RequestTimeout,
    ShuttingDown,
    TooLarge,
)
from epp.headers import Headers
from tests.dialects.requests import CHAT, headers

SHED = type("Shed", (Refusal,), {"status": 429, "code": "ResourceExhausted", "reason": "rejected-saturated"})


def test_a_refusal_in_openais_shape_says_everything() -> None:
    answer = refuse(headers(CHAT), NoEndpoint("no endpoint is ready"))
    assert answer == Answer(
        503,
        (
            ("content-type", b"application/json"),
            ("retry-after", b"1"),
            ("x-llm-d-request-dropped-reason", b"rejected-no-endpoints"),
        ),
        b'{"error":{"message":"no endpoint is ready","type":"server_error","param":null,"code":"ServiceUnavailable"}}',
    )


def test_a_refusal_in_anthropics_shape_says_everything() -> None:
    answer = refuse(headers("/v1/messages?beta=true"), BadRequest("`messages` is missing"))
    assert answer == Answer(
        400,
        (("content-type", b"application/json"),),
        b'{"type":"error","error":{"type":"invalid_request_error","message":"`messages` is missing"}}',
    )


@pytest.mark.parametrize(
    ("refusal", "status", "openai_type", "anthropic_type"),
    [
        (BadRequest("x"), 400, "invalid_request_error", "invalid_request_error"),
        (RequestTimeout("x"), 408, "invalid_request_error", "timeout_error"),
        (TooLarge("x"), 413, "invalid_request_error", "request_too_large"),
        (SHED("x"), 429, "rate_limit_error", "rate_limit_error"),
        (InternalError("x"), 500, "server_error", "api_error"),
        (NoEndpoint("x"), 503, "server_error", "overloaded_error"),
        (DecisionTimeout("x"), 503, "server_error", "overloaded_error"),
        (ShuttingDown("x"), 503, "server_error", "overloaded_error"),
    ],
)
def test_each_status_has_its_type(refusal: Refusal, status: int, openai_type: str, anthropic_type: str) -> None:
    ours, theirs = refuse(headers(CHAT), refusal), refuse(headers("/v1/messages/count_tokens"), refusal)
    assert (ours.status, theirs.status) == (status, status)
    assert json.loads(ours.body)["error"]["type"] == openai_type
    assert json.loads(theirs.body)["error"]["type"] == anthropic_type


@pytest.mark.parametrize(("seconds", "header"), [(0.0, b"0"), (0.2, b"1"), (1.0, b"1"), (1.01, b"2"), (59.5, b"60")])
def test_retry_after_is_whole_seconds_rounded_up(seconds: float, header: bytes) -> None:
    assert dict(refuse((), NoEndpoint("x", retry_after=seconds)).headers)["retry-after"] == header


def test_no_retry_after_and_no_reason_send_no_header() -> None:
    assert refuse((), InternalError("x")).headers == (("content-type", b"application/json"),)
    assert "retry-after" not in dict(refuse((), NoEndpoint("x", retry_after=None)).headers)


@given(st.lists(st.tuples(st.sampled_from([":path", ":method", "x-original-path", "x"]), st.binary()), max_size=4))
def test_no_headers_make_a_refusal_fail(sent: list[tuple[str, bytes]]) -> None:
    answer = refuse(tuple(sent), BadRequest("\N{GRINNING FACE} and \ud800 alone"))
    assert "\N{GRINNING FACE} and ? alone" in json.loads(answer.body)["error"]["message"]


def test_paths_that_nobody_knows_are_answered_in_openais_shape() -> None:
    unknown: list[Headers] = [(), headers("/v1/rerank"), headers("/v1/models", method=b"GET"), headers("/generate")]
    for sent in unknown:
        assert set(json.loads(refuse(sent, BadRequest("x")).body)) == {"error"}


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The URL of a server that answers everything with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(answer.status)
            for name, value in (*answer.headers, ("content-length", b"%d" % len(answer.body))):
                self.send_header(name, value.decode())
            self.end_headers()
            self.wfile.write(answer.body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_openais_client_reads_our_refusals() -> None:
    with (
        answering(refuse(headers(CHAT), SHED("come back later"))) as url,
        openai.OpenAI(api_key="k", max_retries=0, base_url=url + "/v1") as client,
        pytest.raises(openai.RateLimitError, match="come back later") as caught,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.code, caught.value.type, caught.value.param) == ("ResourceExhausted", "rate_limit_error", None)


def test_anthropics_client_reads_our_refusals() -> None:
    with (
        answering(refuse(headers("/v1/messages"), TooLarge("too long"))) as url,
        anthropic.Anthropic(api_key="k", max_retries=0, base_url=url) as client,
        pytest.raises(anthropic.APIStatusError, match="too long") as caught,
    ):
        client.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.status_code, caught.value.type) == (413, "request_too_large")
