"""What a real vLLM does with the picker before it, and what the load client and the page's reader make of it.

Whatever the model: nothing here hangs on its words, its speed, or the size of its cache.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from epp.signals.page import VLLM, read_page, recognise
from tests.e2e.serving import until
from tests.vllm.fleet import SERVED_BY, Fleet, Told

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

REQUESTS: Final = 63
PROMPTS: Final = 9
"""Each is asked seven times. An odd number: of an even one, servers in turn would each always get the same ones."""
OUTPUT: Final = 12
"""Tokens of an answer."""
TRIES: Final = 3
LONG: Final = 1_000
"""Tokens of an answer that is looked at while it is made."""

PROMPT: Final = "vllm:prompt_tokens_total"
CACHED: Final = "vllm:prompt_tokens_cached_total"
COMPUTED: Final = "vllm:prompt_tokens_by_source_total"
ENDED: Final = "vllm:request_success_total"


async def load(fleet: Fleet, folder: Path, seed: int) -> tuple[int, dict[str, Any], str]:
    """`epp load` of nine prompts, seven times each within 21 seconds, through the picker and then without.

    Returns:
        Its exit code, what it printed, and its errors.
    """
    trace = folder / f"trace-{seed}.jsonl"
    rows = [
        {
            "timestamp": 333 * at,
            "input_length": 200,
            "output_length": OUTPUT,
            "hash_ids": [1_000 * seed + at % PROMPTS],
        }
        for at in range(REQUESTS)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["load", "trace", f"--trace={trace}", f"--model={fleet.model}", "--rate=1x", "--block=60", "--json"]
    words += [f"--target={fleet.picked}", f"--versus={fleet.round_robin}", f"--served-by={SERVED_BY}"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "epp", *words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out), err.decode()


async def pages(fleet: Fleet) -> list[Told]:
    return [await fleet.told(address) for address in fleet.addresses]


def grown(before: list[Told], after: list[Told], name: str, **labels: str) -> float:
    """By how much a counter grew, over all servers."""
    return sum(new.sum(name, **labels) - old.sum(name, **labels) for old, new in zip(before, after, strict=True))


async def decided(fleet: Fleet) -> float:
    return sum((await fleet.picker.metric("llm_d_epp_request_total")).values())


async def test_load_through_the_picker_is_answered_counted_and_cached_better_than_in_turn(
    fleet: Fleet, tmp_path: Path
) -> None:
    for seed in range(1, TRIES + 1):
        before, asked = await pages(fleet), await decided(fleet)
        code, told, err = await load(fleet, tmp_path, seed)
        if "refused" not in told:
            break
    else:
        pytest.fail(told["refused"])
    assert code == 0, err
    await fleet.idle()
    after = await pages(fleet)
    picked, in_turn = told["targets"]
    for target in (picked, in_turn):
        assert (target["requests"], target["failed"], target["errors"]) == (REQUESTS, 0, {})
        assert 0 < target["ttft_p50_s"] <= target["ttft_p90_s"] <= target["ttft_p99_s"] < target["e2e_p99_s"]
        assert target["itl_p50_s"] > 0
        assert target["output_tok_s"] > 0
    # Every answer says which server gave it, and the picker counted each of its own once.
    assert set(picked["servers"]) <= set(fleet.addresses)
    assert sum(server["requests"] for server in picked["servers"].values()) == REQUESTS
    assert await decided(fleet) - asked == REQUESTS
    # The servers' own account: as many requests and tokens, and as many of them cached.
    assert grown(before, after, ENDED) == 2 * REQUESTS
    assert grown(before, after, "vllm:generation_tokens_total") == 2 * REQUESTS * OUTPUT
    share = grown(before, after, CACHED) / grown(before, after, PROMPT)
    assert (picked["cached_share"] + in_turn["cached_share"]) / 2 == pytest.approx(share, abs=1e-5)
    # A prompt that stays where it was is computed once, in turn once on each server.
    print(json.dumps(told["targets"]))
    assert picked["cached_share"] > in_turn["cached_share"]
    assert picked["cached_share"] > 0.5


async def test_the_picker_knows_of_each_server_what_its_page_says(fleet: Fleet) -> None:
    await fleet.idle()
    for row, own in zip(await fleet.rows(), await pages(fleet), strict=True):
        assert row.page_age is not None
        assert row.page_age < 1.0
        assert (row.waiting, row.running) == (0, 0)
        assert row.kv_usage == own.sum("vllm:kv_cache_usage_perc")
        assert row.kv_blocks == int(own.text("vllm:cache_config_info", "num_gpu_blocks"))
        assert row.block_size == int(own.text("vllm:cache_config_info", "block_size"))


async def test_the_picker_sees_which_server_is_busy_while_it_is(fleet: Fleet) -> None:
    """The request is sent past the picker, so that only the page can tell."""
    await fleet.idle()
    body = {"model": fleet.model, "prompt": "once upon a time", "max_tokens": LONG, "ignore_eos": True}
    asking = asyncio.create_task(fleet.ask(f"http://{fleet.addresses[1]}", "/v1/completions", body))

    async def running() -> list[tuple[float | None, bool]]:
        return [(row.running, bool(row.kv_usage)) for row in await fleet.rows()]

    try:
        await until(running, [(0.0, False), (1.0, True)])
    finally:
        asking.cancel()
    await fleet.idle()  # vLLM notices that its client went


async def test_our_reader_reads_a_real_page_as_a_whole_parser_does(fleet: Fleet) -> None:
    page = await fleet.page(fleet.addresses[0])
    own, read = Told(page), read_page(page, VLLM)
    assert recognise(page) == VLLM
    assert {
        "waiting": read.waiting,
        "running": read.running,
        "kv_usage": read.kv_usage,
        "prompt_tokens": read.prompt_tokens,
        "prompts": read.prompts,
        "first_tokens": read.first_tokens,
    } == {
        "waiting": own.sum("vllm:num_requests_waiting"),
        "running": own.sum("vllm:num_requests_running"),
        "kv_usage": own.sum("vllm:kv_cache_usage_perc"),
        "prompt_tokens": own.sum("vllm:request_prompt_tokens_sum"),
        "prompts": own.sum("vllm:request_prompt_tokens_count"),
        "first_tokens": own.sum("vllm:time_to_first_token_seconds_count"),
    }


async def test_a_pages_counters_mean_what_speeds_are_learned_from(fleet: Fleet) -> None:
    """One prompt twice, alone on its server. A newer vLLM that counts otherwise fails here, and not in production."""
    await fleet.idle()
    address = fleet.addresses[0]
    body = {"model": fleet.model, "prompt": "count this once " * 30, "max_tokens": 20, "ignore_eos": True}
    for _ in range(2):
        before = [await fleet.told(address)]
        status, _, answer = await fleet.ask(f"http://{address}", "/v1/completions", body)
        assert status == 200
        usage: Mapping[str, Any] = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        await fleet.idle()
        after = [await fleet.told(address)]
        computed = usage["prompt_tokens"] - cached
        expected = {
            PROMPT: usage["prompt_tokens"],
            CACHED: cached,
            "vllm:prefix_cache_queries_total": usage["prompt_tokens"],
            "vllm:prefix_cache_hits_total": cached,
            "vllm:generation_tokens_total": 20,
            "vllm:time_to_first_token_seconds_count": 1,
            "vllm:inter_token_latency_seconds_count": 19,
            "vllm:iteration_tokens_total_sum": computed + 20,
            "vllm:iteration_tokens_total_count": 20,
            "vllm:request_prefill_kv_computed_tokens_sum": computed,
            ENDED: 1,
            "vllm:num_preemptions_total": 0,
        }
        assert {name: grown(before, after, name) for name in expected} == expected
        assert grown(before, after, COMPUTED, source="local_compute") == computed
        times = ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time")
        first, queued, prefill, decode = (grown(before, after, f"vllm:{name}_seconds_sum") for name in times)
        assert 0 <= queued + prefill <= first  # the rest is the API server and its tokenizer
        assert grown(before, after, "vllm:inter_token_latency_seconds_sum") == pytest.approx(decode)
    assert cached > 0


@pytest.mark.parametrize(
    ("path", "asks"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 4}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}),
    ],
)
async def test_each_dialect_reaches_a_server_through_the_picker(fleet: Fleet, path: str, asks: dict[str, Any]) -> None:
    status, headers, answer = await fleet.ask(fleet.picked, path, {"model": fleet.model, **asks})
    assert status == 200, answer
    assert headers[SERVED_BY] in fleet.addresses


async def test_what_vllm_refuses_comes_back_in_its_own_words(fleet: Fleet) -> None:
    body = {"model": "nobody", "prompt": "hello"}
    direct = await fleet.ask(f"http://{fleet.addresses[0]}", "/v1/completions", body)
    through = await fleet.ask(fleet.picked, "/v1/completions", body)
    assert (through[0], through[2]) == (direct[0], direct[2])
    assert direct[0] == 404
