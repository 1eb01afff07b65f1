"""Who is turned away, and in which words."""

from __future__ import annotations

import json

import pytest

from epp import dialects
from epp.dialects.request import Request
from epp.endpoints.table import EndpointTable
from epp.errors import Saturated
from epp.flow.admission import admit
from epp.flow.saturation import Concurrency, Saturation, Utilization
from tests.flow.test_saturation import FULL, IDLE, pool

POST = ((":method", b"POST"), (":path", b"/v1/chat/completions"), ("x-llm-d-inference-objective", b"batch"))
MESSAGES = ((":method", b"POST"), (":path", b"/v1/messages"))


def sheddable() -> Request:
    request = dialects.read(POST, b'{"model":"m","messages":[{"role":"user","content":"hello"}]}')
    request.priority = -1
    return request


def test_a_pool_with_room_lets_it_pass_and_says_how_full_it_is() -> None:
    assert admit(sheddable(), pool(FULL, IDLE, None, IDLE), Utilization()) == Saturation(0.5, 4, 1)


def test_a_full_pool_refuses_it_and_says_why() -> None:
    with pytest.raises(Saturated) as caught:
        admit(sheddable(), pool(FULL, (10, 0.0, 0.0), None), Utilization())
    assert "priority is -1 (objective 'batch')" in caught.value.message
    assert "saturation is 1.33 over 3 endpoints" in caught.value.message
    assert "of which 1 counted as full for want of recent metrics" in caught.value.message


def test_what_is_known_of_all_is_not_called_unknown() -> None:
    with pytest.raises(Saturated) as caught:
        admit(sheddable(), pool(FULL), Utilization())
    assert "metrics" not in caught.value.message


def test_no_endpoint_is_not_a_full_pool() -> None:
    for detector in (Utilization(), Concurrency()):
        assert admit(sheddable(), EndpointTable().candidates(0.0), detector) is None


def test_the_refusal_is_429_with_its_reason_in_the_callers_dialect() -> None:
    refusal = Saturated("full")
    answer = dialects.refuse(POST, refusal)
    assert answer.status == 429
    assert answer.headers == (
        ("content-type", b"application/json"),
        ("retry-after", b"1"),
        ("x-llm-d-request-dropped-reason", b"rejected-saturated"),
    )
    assert json.loads(answer.body)["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": None,
        "code": "ResourceExhausted",
    }
    assert json.loads(dialects.refuse(MESSAGES, refusal).body) == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "full"},
    }
