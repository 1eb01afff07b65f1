"""What headers say of who asks."""

from __future__ import annotations

import json
from random import Random

import pytest

from epp.config.build import build
from epp.config.load import load
from epp.dialects import read
from epp.dialects.request import DEFAULT_FLOW, Request
from epp.endpoints.table import Page
from epp.headers import Headers
from epp.scheduling.processors import AgentParams, agent_identity
from tests.scheduling.builders import made, pool


def asking(*headers: tuple[str, bytes]) -> Request:
    return read(((":path", b"/v1/completions"), *headers), json.dumps({"model": "m", "prompt": "hello"}).encode())


@pytest.mark.parametrize(
    ("headers", "flow", "session"),
    [
        ((), DEFAULT_FLOW, ""),
        ((("x-claude-code-session-id", b"c"),), "c", "c"),
        ((("x-session-affinity", b"o"),), "o", "o"),
        ((("session-id", b"x"),), "x", "x"),
        ((("session_id", b"y"),), "y", "y"),
        ((("session_id", b"y"), ("session-id", b"x"), ("x-session-affinity", b"o")), "o", "o"),
        ((("x-claude-code-session-id", b" "), ("session-id", b"x")), "x", "x"),  # an empty one does not count
        ((("x-mine", b"z"), ("x-claude-code-session-id", b"c")), "z", "z"),
        ((("x-llm-d-inference-fairness-id", b"team"), ("session-id", b"x")), "team", "x"),
        ((("x-gateway-inference-fairness-id", b"team"), ("session-id", b"x")), "team", "x"),
        ((("x-llm-d-inference-fairness-id", b""), ("session-id", b"x")), "x", "x"),
        ((("x-other", b"q"),), DEFAULT_FLOW, ""),
    ],
)
def test_the_first_header_that_is_not_empty_names_the_flow_and_the_session(
    headers: Headers, flow: str, session: str
) -> None:
    request = asking(*headers)
    made(agent_identity, AgentParams(additional_session_headers=("X-Mine",))).process(request)
    assert (request.fairness_id, request.session) == (flow, session)


def test_a_session_that_was_found_already_stays() -> None:
    request = asking(("session-id", b"x"))
    request.session = "mine"
    made(agent_identity).process(request)
    assert (request.fairness_id, request.session) == ("x", "mine")


def test_turns_of_one_agent_go_where_the_first_one_went() -> None:
    """Declared beside a filter that reads the session, it decides."""
    text = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: agent-identity
- type: session-affinity-filter
  parameters: {strategy: session_id, sessionIdConfig: {sources: [{attribute: agent-identity}]}}
- type: random-picker
"""
    scheduler = build(load(text, experimental=True), Random(3))
    candidates = pool(*[Page(waiting=0, kv_usage=0.0)] * 8)
    first = scheduler.schedule(asking(("x-claude-code-session-id", b"a")), candidates).first
    turns = {scheduler.schedule(asking(("x-claude-code-session-id", b"a")), candidates).first for _ in range(20)}
    others = {scheduler.schedule(asking(), candidates).first for _ in range(20)}
    assert turns == {first}
    assert len(others) > 1
