"""A simulated server as a client sees it: shapes as recorded from vLLM 0.32, real clients, metrics, ends."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from epp.errors import ConfigError
from epp.sim import text
from epp.sim.serve import run_model_servers, serve_model
from tests.sim.serving import CHAT, client_of, datas, events, metrics, post, profile, recorded, server, shape, stream

pytestmark = pytest.mark.anyio

ENDLESS = profile(a0=3600.0)
"""The first step takes an hour."""


def assert_shape_of_recorded(ours: Any, theirs: Any) -> None:
    """All names of ours are vLLM's, with the same types; ours may leave out what nobody reads."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert set(ours) <= set(theirs)
        for key, value in ours.items():
            assert_shape_of_recorded(value, theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list):
        for mine, their in zip(ours, theirs, strict=True):
            assert_shape_of_recorded(mine, their)
    else:
        assert ours is None or theirs is None or shape(ours) == shape(theirs)


async def test_chat_answers_as_vllm_does() -> None:
    async with server() as served, client_of(served) as client:
        status, answer = await post(client, "/v1/chat/completions", CHAT)
    assert status == 200
    assert_shape_of_recorded(answer, json.loads(recorded("chat.http")))
    assert answer["choices"][0]["message"]["content"] == "the sun set and "
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (57, 4, 61)  # 3 + 50 + 4


async def test_chat_stream_is_vllms_event_by_event() -> None:
    async with server() as served, client_of(served) as client:
        body = {**CHAT, "max_tokens": 16, "stream_options": {"include_usage": True}}
        ours = datas(await stream(client, "/v1/chat/completions", body))
    theirs = datas(events(recorded("chat-stream-usage.http")))
    assert len(ours) == len(theirs) == 1 + 16 + 1
    for mine, their in zip(ours, theirs, strict=True):
        assert_shape_of_recorded(mine, their)
    said = "".join(event["choices"][0]["delta"]["content"] for event in ours[:-1])
    assert said == text.words(0, 16)
    assert [event["choices"][0]["finish_reason"] for event in ours[:-1]] == [None] * 16 + ["length"]
    assert ours[-1]["usage"]["completion_tokens"] == 16


async def test_chat_stream_without_usage_ends_as_vllms() -> None:
    async with server() as served, client_of(served) as client:
        ours = datas(await stream(client, "/v1/chat/completions", {**CHAT, "max_tokens": 16}))
    for mine, their in zip(ours, datas(events(recorded("chat-stream-no-usage.http"))), strict=True):
        assert_shape_of_recorded(mine, their)


async def test_completion_answers_as_vllm_does() -> None:
    async with server() as served, client_of(served) as client:
        status, answer = await post(client, "/v1/completions", {"model": "b", "prompt": "hello", "max_tokens": 8})
    assert status == 200
    assert_shape_of_recorded(answer, json.loads(recorded("completion-lora-b.http")))
    assert (answer["model"], answer["usage"]["prompt_tokens"]) == ("b", 2)


async def test_messages_answer_as_vllm_does() -> None:
    async with server() as served, client_of(served) as client:
        status, answer = await post(client, "/v1/messages", {**CHAT, "max_tokens": 16})
    assert status == 200
    assert_shape_of_recorded(answer, json.loads(recorded("anthropic-messages.http")))
    assert answer["usage"] == {
        "input_tokens": 57,
        "output_tokens": 16,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


async def test_model_list_is_vllms() -> None:
    async with server() as served, client_of(served) as client, client.get("/v1/models") as response:
        listed = await response.json()
    assert [(card["id"], card["parent"]) for card in listed["data"]] == [("tiny", None), ("a", "tiny"), ("b", "tiny")]
    assert listed["data"][0]["max_model_len"] == 64 * 16


async def test_a_prompt_seen_before_is_cached_but_for_its_last_block() -> None:
    async with server() as served, client_of(served) as client:
        asked = [
            await post(client, "/v1/chat/completions", {**CHAT, "model": model}) for model in ("tiny", "tiny", "a")
        ]
        salted = await post(client, "/v1/chat/completions", {**CHAT, "cache_salt": "mine"})
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for _, answer in [*asked, salted]]
    assert cached == [0, 48, 0, 0]  # 57 tokens: 3 full blocks of 16; another adapter and another salt find nothing


async def test_the_next_turn_finds_the_answer_too() -> None:
    async with server() as served, client_of(served) as client:
        _, answer = await post(client, "/v1/chat/completions", {**CHAT, "max_tokens": 40})
        said = [*CHAT["messages"], answer["choices"][0]["message"], {"role": "user", "content": "go on"}]
        _, answer = await post(client, "/v1/chat/completions", {**CHAT, "messages": said})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 96  # 57 + 39 = 6 full blocks


async def test_openai_client_reads_stream_and_whole_answer() -> None:
    async with server() as served, openai.AsyncOpenAI(base_url=f"http://{served.address}/v1", api_key="-") as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert whole.choices[0].message.content == "the sun set "
        said = []
        async for chunk in await client.chat.completions.create(
            model="a",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        ):
            said += [choice.delta.content for choice in chunk.choices]
            usage = chunk.usage
        assert said == ["", "the ", "sun ", "set "]
        assert usage is not None
        assert usage.completion_tokens == 3
        completed = await client.completions.create(model="tiny", prompt=[[5, 6, 7, 8, 9]])
        assert completed.usage is not None
        assert (completed.usage.prompt_tokens, completed.usage.completion_tokens) == (5, 16)
        with pytest.raises(openai.NotFoundError, match="The model `gpt` does not exist"):
            await client.completions.create(model="gpt", prompt="hi")


async def test_anthropic_client_reads_stream_and_whole_answer() -> None:
    async with server() as served, anthropic.AsyncAnthropic(base_url=f"http://{served.address}", api_key="-") as client:
        async with client.messages.stream(
            model="tiny", system="be brief", messages=[{"role": "user", "content": "hi"}], max_tokens=5
        ) as streamed:
            message = await streamed.get_final_message()
        assert [block.text for block in message.content if block.type == "text"] == [text.words(0, 5)]
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)
        whole = await client.messages.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}], max_tokens=1
        )
        assert whole.usage.input_tokens == 8
        with pytest.raises(anthropic.NotFoundError) as refused:
            await client.messages.create(model="claude", messages=[{"role": "user", "content": "hi"}], max_tokens=1)
        assert refused.value.body == {
            "type": "error",
            "error": {"type": "NotFoundError", "message": "The model `claude` does not exist. Valid aliases: tiny."},
        }


async def test_unknown_model_is_refused_in_vllms_words() -> None:
    async with server() as served, client_of(served) as client:
        status, answer = await post(client, "/v1/chat/completions", {**CHAT, "model": "nope"})
    assert (status, answer) == (404, json.loads(recorded("error-unknown-model.http")))


async def test_missing_messages_are_refused_in_vllms_words() -> None:
    async with server() as served, client_of(served) as client:
        status, answer = await post(client, "/v1/chat/completions", {"model": "tiny"})
    theirs = json.loads(recorded("error-missing-messages.http"))
    theirs["error"]["message"] = theirs["error"]["message"].replace(", 'input': '<dict of 1 items>'", "")
    assert (status, answer) == (400, theirs)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/chat/completions", b"{", "JSON decode error"),
        ("/v1/chat/completions", b"[]", "Expected `object`, got `array`"),
        ("/v1/chat/completions", {**CHAT, "n": 2}, "one answer"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "'loc': 'body.max_tokens'"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": 5}]}, "body.messages"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 1000}, "maximum context length is 1024 tokens, but 1057"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "body.prompt"),
        ("/v1/completions", {"prompt": [1, -1]}, "body.prompt"),
        ("/v1/completions", {"prompt": ""}, "at least one token"),
        ("/v1/messages", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}, "body.max_tokens"),
    ],
)
async def test_what_cannot_be_served_is_a_400_that_says_what(path: str, body: object, said: str) -> None:
    async with server() as served, client_of(served) as client:
        status, answer = await post(client, path, body)
    assert status == 400
    assert said in answer["error"]["message"]


async def test_every_answer_says_who_gave_it() -> None:
    async with server() as served, client_of(served) as client:
        for path in ("/health", "/v1/models", "/metrics"):
            async with client.get(path) as response:
                assert (response.status, response.headers["x-served-by"]) == (200, served.address)
        async with client.post("/v1/completions", json={"prompt": "x", "stream": True}) as response:
            assert response.headers["x-served-by"] == served.address


async def test_address_of_ipv6_is_in_brackets() -> None:
    async with server(host="::1") as served, client_of(served) as client, client.get("/health") as response:
        assert response.status == 200
    assert served.address.startswith("[::1]:")


async def test_metrics_page_tells_what_runs_and_waits() -> None:
    async with server(ENDLESS) as served, client_of(served) as client:
        first = await begin(client, "a")
        await until_running(client, 1)
        others = [await begin(client, model) for model in ("b", "a")]  # no step admits them for an hour
        page = await metrics(client)
        assert (page["vllm:num_requests_running"][()], page["vllm:num_requests_waiting"][()]) == (1, 2)
        assert page["vllm:kv_cache_usage_perc"][()] == 4 / 64  # 57 tokens in blocks of 16
        states = page["vllm:lora_requests_info"]
        assert max(states, key=lambda state: states[state]) == ("1", "a", "a,b")  # max_lora, running, waiting
        assert page["vllm:cache_config_info"] == {("16", "auto", "True", "0.9", "1024", "64"): 1.0}
        for response in (first, *others):
            response.close()
        await until_running(client, 0)


async def test_metrics_page_counts_what_was_done() -> None:
    async with server() as served, client_of(served) as client:
        for _ in range(2):
            await post(client, "/v1/chat/completions", CHAT)
        await post(client, "/v1/chat/completions", {"model": "tiny", "messages": CHAT["messages"]})
        page = await metrics(client)
    assert page["vllm:prefix_cache_queries_total"][()] == 3 * 57
    assert page["vllm:prefix_cache_hits_total"][()] == 2 * 48
    assert page["vllm:prompt_tokens_total"][()] == 3 * 57
    assert page["vllm:generation_tokens_total"][()] == 4 + 4 + 64
    finished = page["vllm:request_success_total"]
    assert finished == {("length",): 2.0, ("stop",): 1.0, ("abort",): 0.0, ("error",): 0.0}
    assert page["vllm:time_to_first_token_seconds_count"][()] == 3
    assert page["vllm:time_to_first_token_seconds_bucket"][("+Inf",)] == 3
    assert page["vllm:num_preemptions_total"][()] == 0


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_aborts_its_request(streamed: bool) -> None:
    async with server(ENDLESS) as served, client_of(served) as client:
        asking = asyncio.create_task(post(client, "/v1/chat/completions", {**CHAT, "stream": streamed}))
        await until_running(client, 1)
        asking.cancel()
        await until_running(client, 0)
        assert (await metrics(client))["vllm:request_success_total"][("abort",)] == 1
        assert len(served.driver.engine) == 0


async def test_a_server_that_dies_cuts_its_streams() -> None:
    async with aiohttp.ClientSession() as client:
        async with server(ENDLESS) as served:
            response = await client.post(f"http://{served.address}/v1/chat/completions", json={**CHAT, "stream": True})
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(f"http://{served.address}/health")


async def test_a_taken_port_is_named() -> None:
    async with server() as served:
        port = int(served.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1 port {port}: .*choose another port"):
            async with serve_model("127.0.0.1", port, profile(), served_model="tiny"):
                pass


async def test_the_command_names_the_port_that_is_taken_though_others_are_served() -> None:
    async with server() as served:
        port = int(served.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="choose another port"):
            await run_model_servers("127.0.0.1", port - 1, 2, "demo", "tiny", (), "", 0)


async def test_the_command_says_where_it_serves_and_ends_on_sigterm() -> None:
    command = ("-m", "epp", "model-server", "--port", "0", "--count", "2", "--engine", "demo", "--model", "tiny")
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(30):
        addresses = json.loads(await process.stdout.readline())["addresses"]
        assert len(set(addresses)) == 2
        for address in addresses:
            async with aiohttp.ClientSession() as client:
                _, answer = await post(client, f"http://{address}/v1/completions", {"prompt": "x", "max_tokens": 1})
            assert answer["choices"][0]["text"] == "the "
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def begin(client: aiohttp.ClientSession, model: str) -> aiohttp.ClientResponse:
    """A streamed answer whose first token does not come."""
    return await client.post("/v1/chat/completions", json={**CHAT, "model": model, "stream": True})


async def until_running(client: aiohttp.ClientSession, running: int) -> None:
    """Wait, at most 5 seconds, until so many requests run and none waits."""
    async with asyncio.timeout(5):
        while True:
            page = await metrics(client)
            if (page["vllm:num_requests_running"][()], page["vllm:num_requests_waiting"][()]) == (running, 0):
                return
