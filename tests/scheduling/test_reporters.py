"""What the proxy is told of a whole answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from google.protobuf.json_format import MessageToDict

from epp.config.document import ConfigErrors
from epp.config.load import load
from epp.dialects.request import Request
from epp.dialects.usage import Usage
from epp.extproc.conversation import Connection, Conversation
from epp.extproc.events import (
    BodyMode,
    Modes,
    Part,
    RequestEnded,
    RequestEvent,
    RequestStarted,
    ResponseData,
    ResponseEnded,
    ResponseEvent,
    ResponseStarted,
)
from epp.extproc.exchange import Limits
from epp.headers import Headers
from epp.scheduling.reporters import Metadata, Reporter, ReporterParams, reported, request_attribute
from tests.contract.transport import picker_for
from tests.extproc import oracle
from tests.scheduling.builders import ask, made
from tests.watching import Watch

COST = "x-gateway-inference-request-cost"


def reporter(expression: str, condition: str = "", namespace: str = "envoy.lb") -> Reporter:
    attribute = {"key": {"namespace": namespace, "name": COST}, "expression": expression, "condition": condition}
    return made(request_attribute, msgspec.convert({"attributes": [attribute]}, ReporterParams))


USAGE = Usage(prompt_tokens=32, completion_tokens=10)


@pytest.mark.parametrize(
    ("expression", "condition", "usage", "value"),
    [
        ("usage.completion_tokens", "has(usage.completion_tokens)", USAGE, 10.0),
        ("usage.completion_tokens\n", "", USAGE, 10.0),
        ("usage.prompt_tokens + usage.completion_tokens", "", USAGE, 42.0),
        ("usage.prompt_tokens / 3", "", USAGE, 10.0),  # 10.67, cut off
        ("0 - usage.prompt_tokens / 3", "", USAGE, -10.0),
        ("-1", "", USAGE, -1.0),
        ("usage.completion_tokens - 10", "", USAGE, None),  # 0 is not told
        ("usage.completion_tokens / 100", "", USAGE, None),  # nor is what is cut off to 0
        ("usage.completion_tokens", "usage.completion_tokens > 10", USAGE, None),
        ("usage.completion_tokens", "", Usage(prompt_tokens=32), None),
        ("usage.completion_tokens", "usage.total_tokens > 1", Usage(completion_tokens=3), None),
        ("usage.completion_tokens / 0", "", USAGE, None),
        ("1e999", "", USAGE, None),
    ],
)
def test_a_value_is_worked_out_from_the_answers_tokens(
    expression: str, condition: str, usage: Usage, value: float | None
) -> None:
    expected = () if value is None else (("envoy.lb", COST, value),)
    assert reporter(expression, condition).report(ask(), usage) == expected


def test_an_empty_namespace_is_the_proxys_own() -> None:
    assert reporter("1", namespace="").report(ask(), USAGE) == (("envoy.lb", COST, 1.0),)
    assert reporter("1", namespace="mine").report(ask(), USAGE) == (("mine", COST, 1.0),)


def broken(request: Request, usage: Usage) -> Metadata:
    raise RuntimeError("no")


def test_a_reporter_that_fails_is_told_and_the_others_report() -> None:
    told: list[tuple[str, str]] = []
    bad = Reporter(name="bad", chosen=None, forget=None, answered=None, pins=None, needs=(), report=broken)
    every = [bad, reporter("1")]
    found = reported(every, ask(), USAGE, lambda what, error: told.append((what, str(error))))
    assert found == (("envoy.lb", COST, 1.0),)
    assert told == [("plugin bad at the end of a response", "no")]
    assert reported(every, ask(), None, lambda what, error: told.append((what, str(error)))) == ()


# -- in a configuration ------------------------------------------------------------------------------------------------

CONFIG = """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- name: total-tokens-cost-reporter
  type: request-attribute-reporter
  parameters:
    attributes:
    - key: {namespace: envoy.lb, name: x-gateway-inference-request-cost}
      expression: |
        %s
      condition: "%s"
"""


@pytest.mark.parametrize(
    ("expression", "condition", "message"),
    [
        ("usage.tokens", "true", "expression: at character 1 of 'usage.tokens.*': expected one of usage.prompt_tokens"),
        (
            "usage.prompt_tokens",
            "usage.prompt_tokens",
            "condition: 'usage.prompt_tokens' is a number, and must be a",
        ),
        ("1 < 2", "true", r"expression: '1 < 2\\n' is a yes or no, and must be a number"),
    ],
)
def test_an_expression_that_is_not_understood_is_an_error_of_the_configuration(
    expression: str, condition: str, message: str
) -> None:
    with pytest.raises(ConfigErrors, match=message):
        load(CONFIG % (expression, condition))


@pytest.mark.parametrize("attributes", [[], [{"key": {"name": "a"}, "expression": "1"}] * 2])
def test_there_is_exactly_one_attribute(attributes: list[Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"attributes": attributes}, ReporterParams)


# -- on the wire -------------------------------------------------------------------------------------------------------

POST: Headers = ((":method", b"POST"), (":path", b"/v1/chat/completions"))
JSON: Headers = ((":status", b"200"), ("content-type", b"application/json"))
ANSWER = b'{"choices":[],"usage":{"completion_tokens":10,"prompt_tokens":32,"total_tokens":42}}'
REQUEST: tuple[RequestEvent, ...] = (
    RequestStarted(POST),
    RequestEnded(Part.BODY, b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'),
)
EVENTS = b'data: {"choices":[]}\n\ndata: {"usage":{"completion_tokens":10,"prompt_tokens":32}}\n\ndata: [DONE]\n\n'


def last_reply(*events: ResponseEvent, response: BodyMode = BodyMode.FULL_DUPLEX) -> ep.ProcessingResponse:
    """The last of a conversation whose picker reports completion tokens; no other one tells anything."""
    config = CONFIG % ("usage.completion_tokens", "has(usage.completion_tokens)")
    conversation = Conversation(picker_for(("10.0.0.1:8000",), Watch(), config), Limits(), Connection("test"), 0.0)
    modes: Modes | None = Modes(BodyMode.FULL_DUPLEX, response)
    replies: list[ep.ProcessingResponse] = []
    every: tuple[RequestEvent | ResponseEvent, ...] = (*REQUEST, *events)
    for event in every:
        message = oracle.message(event, modes).SerializeToString()
        replies += map(ep.ProcessingResponse.FromString, conversation.receive(message, 0.0))
        modes = None
    assert not any(COST in str(reply) for reply in replies[:-1])
    return replies[-1]


TOLD = {"envoy.lb": {COST: 10.0}}


@pytest.mark.parametrize("cut", range(0, len(ANSWER) + 1, 7))
def test_the_last_reply_to_a_body_tells_it_however_the_body_comes(cut: int) -> None:
    reply = last_reply(ResponseStarted(JSON), ResponseData(ANSWER[:cut]), ResponseEnded(Part.BODY, ANSWER[cut:]))
    assert MessageToDict(reply.dynamic_metadata) == TOLD
    streamed = reply.response_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (ANSWER[cut:], True)


def test_the_reply_to_trailers_tells_it() -> None:
    reply = last_reply(ResponseStarted(JSON), ResponseData(ANSWER), ResponseEnded(Part.TRAILERS))
    assert reply.WhichOneof("response") == "response_trailers"
    assert MessageToDict(reply.dynamic_metadata) == TOLD


def test_a_stream_tells_it() -> None:
    stream: Headers = ((":status", b"200"), ("content-type", b"text/event-stream"))
    reply = last_reply(ResponseStarted(stream), ResponseData(EVENTS), ResponseEnded(Part.BODY))
    assert MessageToDict(reply.dynamic_metadata) == TOLD


@pytest.mark.parametrize("mode", [BodyMode.BUFFERED, BodyMode.STREAMED])
def test_where_the_body_is_not_ours_to_pass_on_the_reply_tells_it_and_leaves_the_body_alone(mode: BodyMode) -> None:
    reply = last_reply(ResponseStarted(JSON), ResponseEnded(Part.BODY, ANSWER), response=mode)
    assert reply.WhichOneof("response") == "response_body"
    assert not reply.response_body.response.HasField("body_mutation")
    assert MessageToDict(reply.dynamic_metadata) == TOLD


def test_an_answer_without_tokens_tells_nothing() -> None:
    reply = last_reply(ResponseStarted(JSON), ResponseEnded(Part.BODY, b"{}"))
    assert not reply.HasField("dynamic_metadata")
