"""What a prompt costs from its body's bytes to a place in the prefix index, beside json.loads and xxhash of that body.

`python -m bench.prompt` prints microseconds, the best of many short rounds: reading the body, counting its tokens,
its prompt's hashes, a match of a prompt that is held, putting in one that is new into an index that is full. The index
has 8 endpoints of the default capacity. Below that: memory beyond the body's own at the largest, and what reading the
usage of a stream of 100 events costs.
"""

from __future__ import annotations

import functools
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from xxhash import xxh3_64_intdigest

from epp.dialects import Request, read, usage_reader
from epp.headers import Headers
from epp.prefix.approximate import ApproximateIndex
from epp.prefix.hashing import HASH_BYTES, block_hashes, prompt_to_hash, root_seed

SIZES: Final = (100, 10_000, 100_000, 1_000_000, 4_000_000)
LARGEST: Final = SIZES[-1]
BLOCK_TOKENS: Final = 64
MOST_BLOCKS: Final = 2_048
"""131,072 tokens: as many as are looked at by default."""
CAPACITY: Final = 7_812
"""Blocks of an endpoint that does not tell its capacity."""
SLOTS: Final = np.arange(8)
EVENTS: Final = 100
WORDS: Final = ("the", "model", "cache", "of", "a", "prefix", "routes", "tokens", "every", "server", "in", "request")


class Costs(msgspec.Struct, frozen=True):
    """Microseconds."""

    read: float
    tokens: float
    hashes: float
    match: float
    add: float
    loads: float
    """json.loads of the body."""
    digest: float
    """xxhash of the body in one piece."""


def headers(path: str) -> Headers:
    """As a client and Envoy send them."""
    return (
        (":method", b"POST"),
        (":scheme", b"http"),
        (":authority", b"gateway.example:8080"),
        (":path", path.encode()),
        ("content-type", b"application/json"),
        ("accept", b"application/json"),
        ("user-agent", b"OpenAI/Python 1.99.0"),
        ("authorization", b"Bearer none"),
        ("x-forwarded-proto", b"http"),
        ("x-request-id", b"7e7b1d3c-9f7a-4d4e-8d3c-2b1f0a9e8d7c"),
    )


def text(size: int) -> str:
    rng = random.Random(0)
    return " ".join(rng.choices(WORDS, k=size // 4 + 8))[:size]


def chat(content: object) -> tuple[Headers, bytes]:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    body = {"model": "meta-llama/Llama-3.1-8B-Instruct", "messages": messages, "max_tokens": 100, "stream": True}
    return headers("/v1/chat/completions"), json.dumps(body, ensure_ascii=False).encode()


def turns(size: int) -> tuple[Headers, bytes]:
    """A conversation in messages of 1 KB."""
    said = text(size)
    return chat([{"role": "user", "content": said[at : at + 1_000]} for at in range(0, size, 1_000)])


def image(size: int) -> tuple[Headers, bytes]:
    """A question, and a picture of nearly all the size."""
    url = {"url": "data:image/png;base64," + "iVBOR/+8" * (size // 8)}
    parts = [{"type": "text", "text": text(500)}, {"type": "image_url", "image_url": url}]
    return chat([{"role": "user", "content": parts}])


def ids(size: int) -> tuple[Headers, bytes]:
    """A completion of token ids."""
    rng = random.Random(0)
    body = {"model": "m", "prompt": [rng.randrange(128_000) for _ in range(size // 8)]}
    return headers("/v1/completions"), json.dumps(body).encode()


SHAPES: Final[dict[str, Callable[[int], tuple[Headers, bytes]]]] = {
    "one message": lambda size: chat(text(size)),
    "one message, Chinese": lambda size: chat("你好，世界 " * (size // 16)),
    "turns of 1 KB": turns,
    "an image": image,
    "token ids": ids,
}


def hashes_of(request: Request, salt: str = "") -> bytes:
    prompt = prompt_to_hash(request, MOST_BLOCKS * BLOCK_TOKENS * 4)
    return block_hashes(prompt, root_seed(request.model, salt), BLOCK_TOKENS, MOST_BLOCKS)


def full_index(blocks: int) -> ApproximateIndex:
    """An index without room, of prompts of so many blocks."""
    rng, index = random.Random(0), ApproximateIndex()
    for slot in SLOTS.tolist():
        for _ in range(CAPACITY // blocks + 1):
            index.add(rng.randbytes(HASH_BYTES * blocks), slot, CAPACITY)
    return index


def measure(sent: Headers, body: bytes) -> Costs:
    request = read(sent, body)
    hashes = hashes_of(request)
    index = full_index(max(1, len(hashes) // HASH_BYTES))
    others = [hashes_of(request, salt=str(i)) for i in range(20)]
    adding = min(_round(functools.partial(index.add, other, 0, CAPACITY), 1) for other in others) * 1e6
    index.add(hashes, 0, CAPACITY)
    return Costs(
        read=best(lambda: read(sent, body)),
        tokens=best(lambda: request.content.prompt_tokens()),
        hashes=best(lambda: hashes_of(request)),
        match=best(lambda: index.match(hashes, SLOTS)),
        add=adding,
        loads=best(lambda: json.loads(body)),
        digest=best(lambda: xxh3_64_intdigest(body)),
    )


def best(work: Callable[[], object], rounds: int = 7) -> float:
    """Microseconds of one call, in the best of some rounds of 5 ms or a call."""
    began = time.perf_counter()
    work()
    calls = max(1, int(0.005 / (time.perf_counter() - began)))
    return min(_round(work, calls) for _ in range(rounds)) / calls * 1e6


def _round(work: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - began


def peak(sent: Headers, body: bytes) -> int:
    """Bytes allocated at the most from reading a body to having it in the index, beyond the body itself."""
    index = full_index(MOST_BLOCKS)
    tracemalloc.start()
    request = read(sent, body)
    assert request.tokens
    hashes = hashes_of(request)
    index.match(hashes, SLOTS)
    index.add(hashes, 0, CAPACITY)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def stream() -> float:
    """Microseconds for the usage of one stream."""
    event = (
        b'data: {"id":"chatcmpl-7e7b1d3c9f7a4d4e","object":"chat.completion.chunk","created":1760000000,"model":'
        b'"meta-llama/Llama-3.1-8B-Instruct","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,'
        b'"finish_reason":null}]}\n\n'
    )
    last = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":99}}\n\n', b"data: [DONE]\n\n"
    pieces = [event] * (EVENTS - len(last)) + list(last)
    request = read(*chat("hello"))

    def feed() -> None:
        reader = usage_reader(request, ((":status", b"200"), ("content-type", b"text/event-stream")))
        for piece in pieces:
            reader.feed(piece)
        reader.end()
        assert reader.usage is not None

    return best(feed)


def main() -> None:
    table = Table(
        "body", "bytes", "read", "tokens", "hashes", "match", "add", "in all", "json.loads", "xxhash", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, shape in SHAPES.items():
        for size in SIZES if name == "one message" else (100_000, LARGEST):
            sent, body = shape(size)
            costs = measure(sent, body)
            ours = (costs.read, costs.tokens, costs.hashes, costs.match, costs.add)
            numbers = (*ours, sum(ours), costs.loads, costs.digest)
            table.add_row(name, f"{len(body):,}", *(f"{number:,.1f}" for number in numbers))
    console = Console(width=120)
    console.print(table)
    for name, shape in SHAPES.items():
        console.print(f"{name}: {peak(*shape(LARGEST)) / 2**20:.1f} MiB at the most, beyond a body of 4 MB")
    console.print(f"usage of a stream of {EVENTS} events: {stream():.0f} us")


if __name__ == "__main__":
    main()
