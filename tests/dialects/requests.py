"""Builders of requests, and the answers that a real vLLM gave."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from epp.dialects import Request, read
from epp.headers import Headers

RECORDED = Path(__file__).parent.parent / "data" / "vllm-0.32.0"
CHAT = "/v1/chat/completions"

TEXTS = st.text('a"\\/u[{,:é\n\N{GRINNING FACE}', max_size=4)
VALUES: st.SearchStrategy[object] = st.recursive(
    st.sampled_from([None, True, False, 0, -1, 7, 2**53 + 1, 10**30, 0.1, 1e300]) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.just("model"), inner, max_size=3),
    max_leaves=5,
)
"""Any JSON value, and the ones that are read wrong most easily."""


def headers(path: str = CHAT, *more: tuple[str, bytes], method: bytes = b"POST") -> Headers:
    return ((":method", method), (":path", path.encode()), ("content-type", b"application/json"), *more)


def post(path: str, body: object) -> Request:
    """A POST of `body` as JSON, or as it is when it is bytes."""
    return read(headers(path), body if isinstance(body, bytes) else json.dumps(body).encode())


def chat(**fields: object) -> Request:
    return post(CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields)


def recorded(name: str) -> tuple[Headers, bytes]:
    """Status and headers, and body, of a recorded answer."""
    head, _, body = (RECORDED / f"{name}.http").read_bytes().partition(b"\n\n")
    status, *lines = head.decode().splitlines()
    fields = [line.partition(": ") for line in lines]
    return ((":status", status.split()[1].encode()), *((n.lower(), v.encode()) for n, _, v in fields)), body
