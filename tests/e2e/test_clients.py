"""The clients that people use, unchanged, through Envoy and the picker; the answers are a real vLLM's, recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import anthropic
import openai
import pytest
from openai.types.chat import ChatCompletionToolParam

from tests.e2e.upstream import Answer, Seen

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

RECORDED = Path(__file__).parents[1] / "data" / "vllm-0.32.0"
HELLO = "hello"

gateways = pytest.mark.parametrize("gateway", ["light", "duplex", "buffered"])


def recorded(name: str) -> Answer:
    """A recorded answer; a stream goes out event by event."""
    head, _, body = (RECORDED / f"{name}.http").read_bytes().replace(b"\r\n", b"\n").partition(b"\n\n")
    lines = head.decode().splitlines()
    fields = (line.partition(": ") for line in lines[1:])
    headers = tuple((name.lower(), value.encode()) for name, _, value in fields if name.lower() in KEPT)
    stream = dict(headers)["content-type"].startswith(b"text/event-stream")
    steps = tuple(part + b"\n\n" for part in body.split(b"\n\n") if part) if stream else (body,)
    return Answer(int(lines[0].split()[1]), headers, steps)


KEPT = ("content-type", "server", "vary")


def openai_client(site: Site, gateway: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.envoy.url(gateway)}/v1", api_key="k", max_retries=0)


def anthropic_client(site: Site, gateway: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=site.envoy.url(gateway), api_key="k", max_retries=0)


def answering(site: Site, answer: Answer) -> None:
    def give(seen: Seen) -> Answer:
        return answer

    site.a.answer = site.b.answer = give


@gateways
async def test_openai_chat_with_tools(site: Site, gateway: str) -> None:
    answering(site, recorded("chat"))
    tool: ChatCompletionToolParam = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    async with openai_client(site, gateway) as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": HELLO}], tools=[tool], max_tokens=16
        )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (867, 16)
    sent = json.loads(site.seen[0].body)
    assert (sent["model"], sent["tools"], sent["max_tokens"]) == ("tiny", [tool], 16)


@gateways
async def test_openai_stream(site: Site, gateway: str) -> None:
    answering(site, recorded("chat-stream-usage"))
    async with openai_client(site, gateway) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": HELLO}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert len(chunks) == len(recorded("chat-stream-usage").steps) - 1  # the last event is [DONE]
    assert chunks[-1].usage is not None


@gateways
async def test_openai_sees_the_errors_of_the_model_server(site: Site, gateway: str) -> None:
    answering(site, recorded("error-unknown-model"))
    async with openai_client(site, gateway) as client:
        with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
            await client.chat.completions.create(model="nope", messages=[{"role": "user", "content": HELLO}])


@gateways
async def test_openai_sees_our_refusals(site: Site, gateway: str) -> None:
    async with openai_client(site, gateway) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="", messages=[{"role": "user", "content": HELLO}])
    assert refused.value.type == "invalid_request_error"
    assert "model" in refused.value.message


async def test_openai_embeddings_and_models(site: Site) -> None:
    listed = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}], "model": "e"}
    usage = {"usage": {"prompt_tokens": 2, "total_tokens": 2}}
    answering(site, Answer(steps=(json.dumps(listed | usage).encode(),)))
    async with openai_client(site, "light") as client:
        embedded = await client.embeddings.create(model="e", input=[[1, 2]], encoding_format="float")
        assert embedded.data[0].embedding == [0.5, 1.0]
        answering(site, Answer(steps=(b'{"object":"list","data":[{"id":"e","object":"model"}]}',)))
        assert [model.id async for model in client.models.list()] == ["e"]


@gateways
async def test_anthropic_messages(site: Site, gateway: str) -> None:
    answering(site, recorded("anthropic-messages"))
    async with anthropic_client(site, gateway) as client:
        answer = await client.messages.create(
            model="tiny", max_tokens=16, messages=[{"role": "user", "content": HELLO}]
        )
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("max_tokens", 18, 16)


@gateways
async def test_anthropic_stream(site: Site, gateway: str) -> None:
    usage = {"input_tokens": 2, "output_tokens": 1}
    message: dict[str, object] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [],
        "stop_reason": None,
    }
    events: list[dict[str, object]] = [
        {"type": "message_start", "message": {**message, "stop_sequence": None, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    steps = tuple(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)
    answering(site, Answer(headers=(("content-type", b"text/event-stream"),), steps=steps))
    async with (
        anthropic_client(site, gateway) as client,
        client.messages.stream(model="tiny", max_tokens=16, messages=[{"role": "user", "content": HELLO}]) as stream,
    ):
        assert [text async for text in stream.text_stream] == ["hi"]


@gateways
async def test_anthropic_sees_our_refusals(site: Site, gateway: str) -> None:
    async with anthropic_client(site, gateway) as client:
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(model="", max_tokens=16, messages=[{"role": "user", "content": HELLO}])
    assert refused.value.body is not None
    assert refused.value.type == "invalid_request_error"
