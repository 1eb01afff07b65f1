"""From one metrics page to what the endpoint table keeps.

In: a page in Prometheus' text format, and the engine that wrote it. Out: an `endpoints.table.Page`.
Rules here:
- Only the few families that are needed are looked for, by byte search; no line of the others is ever looked at. A
  recorded page of 57 KB costs 30 us, a full parse by prometheus_client 8,000 us.
- What is not there, not a number, NaN, infinite or negative is unknown (None), never a value. One such series makes
  the value of its whole family unknown: a sum that lacks a rank would make the server look idle.
- Several series of one family are several data-parallel engines behind one address: waiting, running and blocks are
  summed, KV usage is their mean. (The reference takes the first: a server with eight ranks looks an eighth as busy.)
  Of attributes nobody knows what they count: their mean, so that a limit means the same with one engine and eight.
  Series that differ only in a tensor, pipeline, expert or context rank tell of the same requests and count once, by
  the largest: SGLang writes them with --enable-metrics-for-all-schedulers.
- The series of one family stand together, as the format demands.
- Everything is bounded by the page's size, adapters by `MOST_ADAPTERS`.
Rejected: prometheus_client's parser (above); one regular expression for all families (240 us: it stops at each line).
Source: model server protocol (proposal 003) for quantities and names; the engine table of llm-d's metrics extractor.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

import msgspec

from epp.endpoints.table import Page

MOST_ADAPTERS: Final = 256
"""Adapters read from each list of a page; the rest are ignored."""
LEAST: Final = -sys.float_info.max
"""An attribute may be below 0."""
MOST_USAGE: Final = 1.05
"""KV usage above 1 by this little is full (blocks promised beyond the pool); above that it is some other unit."""


class Spec(msgspec.Struct, frozen=True):
    """Where a number stands."""

    family: bytes
    where: tuple[tuple[str, str], ...] = ()
    """Only series with these labels and values."""
    label: str = ""
    """The number is this label's text; empty: it is the series' value."""


class Engine(msgspec.Struct, frozen=True):
    """What one kind of model server calls its metrics. None: it does not tell."""

    name: str
    waiting: Spec | None
    running: Spec | None
    kv_usage: tuple[Spec, ...] = ()
    """The first of them that is on the page counts."""
    kv_blocks: Spec | None = None
    block_size: Spec | None = None
    prompt_tokens: Spec | None = None
    prompts: Spec | None = None
    first_tokens: Spec | None = None
    steps: Spec | None = None
    processed: Spec | None = None
    generated: Spec | None = None
    lora: Spec | None = None
    """Series whose value is a time and whose labels list adapters."""
    attributes: tuple[tuple[str, Spec], ...] = ()
    """What else is read of its pages, under the names of the table's attributes."""

    @property
    def marks(self) -> tuple[Spec, ...]:
        """What a page of it has at least one of."""
        loads = [spec for spec in (self.waiting, self.running) if spec is not None]
        marks = loads if len(loads) > 1 else [*loads, *self.kv_usage]
        return tuple(marks or [spec for _, spec in self.attributes])


VLLM: Final = Engine(
    "vllm",
    waiting=Spec(b"vllm:num_requests_waiting"),
    running=Spec(b"vllm:num_requests_running"),
    kv_usage=(Spec(b"vllm:kv_cache_usage_perc"), Spec(b"vllm:gpu_cache_usage_perc")),  # the second: before 0.11
    kv_blocks=Spec(b"vllm:cache_config_info", label="num_gpu_blocks"),
    block_size=Spec(b"vllm:cache_config_info", label="block_size"),
    prompt_tokens=Spec(b"vllm:request_prompt_tokens_sum"),
    prompts=Spec(b"vllm:request_prompt_tokens_count"),
    first_tokens=Spec(b"vllm:time_to_first_token_seconds_count"),
    steps=Spec(b"vllm:iteration_tokens_total_count"),
    processed=Spec(b"vllm:iteration_tokens_total_sum"),
    generated=Spec(b"vllm:generation_tokens_total"),
    lora=Spec(b"vllm:lora_requests_info"),
)
SGLANG: Final = Engine(
    "sglang",
    waiting=Spec(b"sglang:num_queue_reqs"),
    running=Spec(b"sglang:num_running_reqs"),
    kv_usage=(Spec(b"sglang:token_usage"),),
    kv_blocks=Spec(b"sglang:cache_config_info", label="num_pages"),
    block_size=Spec(b"sglang:cache_config_info", label="page_size"),
)
TRTLLM_SERVE: Final = Engine(
    "trtllm-serve",
    waiting=Spec(b"trtllm_num_requests_waiting"),
    running=Spec(b"trtllm_num_requests_running"),
    kv_usage=(Spec(b"trtllm_kv_cache_utilization"),),
    kv_blocks=Spec(b"trtllm_kv_cache_max_blocks"),
    block_size=Spec(b"trtllm_kv_cache_tokens_per_block"),
)
TRITON_TRTLLM: Final = Engine(
    "triton-tensorrt-llm",
    waiting=Spec(b"nv_trt_llm_request_metrics", (("request_type", "waiting"),)),
    running=Spec(b"nv_trt_llm_request_metrics", (("request_type", "scheduled"),)),
    kv_usage=(Spec(b"nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", "fraction"),)),),
    kv_blocks=Spec(b"nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", "max"),)),
    block_size=Spec(b"nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", "tokens_per"),)),
)
TRITON: Final = Engine(
    "triton",
    waiting=Spec(b"nv_inference_pending_request_count"),
    running=None,  # the reference reads nv_inference_exec_count, which counts executions since the server started
)
ENGINES: Final = (VLLM, SGLANG, TRTLLM_SERVE, TRITON_TRTLLM, TRITON)
"""In the order in which they are recognised: a Triton with TensorRT-LLM has Triton's own families too."""

_LABEL = re.compile(rb'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*,?', re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_SHARED_RANK = re.compile(rb'(?:tp|pp|moe_ep|attn_cp)_rank="[^"]*",?')


def recognise(page: bytes, engines: Iterable[Engine] = ENGINES) -> Engine | None:
    """The first engine whose families are on the page; None: none of them."""
    for engine in engines:
        if any(_find(page, spec.family, 0, len(page)) >= 0 for spec in engine.marks):
            return engine
    return None


def read_page(page: bytes, engine: Engine) -> Page:
    """Read what the engine says of itself. An empty `Page()`: nothing that could be used.

    Args:
        page: text format 0.0.4; series may carry timestamps, lines may end in CRLF.
    """
    families = Families(page)  # asked for in the order in which pages have them
    running = _total(values(families, engine.running))
    waiting = _total(values(families, engine.waiting))
    usage: list[float] = []
    for spec in engine.kv_usage:
        usage = usage or values(families, spec)
    max_lora, running_adapters, waiting_adapters = _adapters(families, engine.lora)
    return Page(
        waiting=waiting,
        running=running,
        kv_usage=_mean([_share(value) for value in usage]),
        kv_blocks=_total(values(families, engine.kv_blocks)) or None,
        block_size=_total(values(families, engine.block_size)[:1]) or None,
        prompt_tokens=_total(values(families, engine.prompt_tokens)),
        generated=_total(values(families, engine.generated)),
        prompts=_total(values(families, engine.prompts)),
        steps=_total(values(families, engine.steps)),
        processed=_total(values(families, engine.processed)),
        first_tokens=_total(values(families, engine.first_tokens)),
        max_lora=max_lora,
        running_adapters=running_adapters,
        waiting_adapters=waiting_adapters,
        attributes=tuple((name, _typical(values(families, spec, LEAST))) for name, spec in engine.attributes),
    )


class Families(dict[bytes, list[bytes]]):
    """The series of the families that were asked for, each from the end of its name to the end of its line."""

    def __init__(self, page: bytes) -> None:
        self._page = page
        self._at = 0  # end of the family found last: the next one mostly follows, which saves a third of the search

    def __missing__(self, family: bytes) -> list[bytes]:
        page, begin = self._page, self._at
        at = _find(page, family, begin, len(page))
        if at < 0 and begin:
            at = _find(page, family, 0, begin)
        lines = self[family] = []
        while at >= 0:
            end = page.find(b"\n", at)
            end = len(page) if end < 0 else end
            lines.append(page[at + len(family) : end])
            self._at = end
            at = end + 1 if _begins(page, family, end + 1) else -1
        return lines


# -- numbers ---------------------------------------------------------------------------------------------------------


def values(families: Families, spec: Spec | None, least: float = 0.0) -> list[float]:
    """One number for each set of requests that the family tells of; NaN where a series says nonsense.

    Args:
        least: numbers below it are nonsense.
    """
    if spec is None:
        return []
    lines = _lines(families, spec)
    if spec.label:
        numbers = [_number(_labels(line).get(spec.label, "").encode(), least) for line in lines]
    else:
        numbers = [_number(_value(line), least) for line in lines]
    if len(lines) > 1 and b'_rank="' in lines[0]:
        return _once_each(lines, numbers)
    return numbers


def _lines(families: Families, spec: Spec) -> list[bytes]:
    lines = families[spec.family]
    if spec.where:
        return [line for line in lines if set(spec.where) <= _labels(line).items()]
    return lines


def _once_each(lines: list[bytes], numbers: list[float]) -> list[float]:
    """Of series that differ only in ranks which share their requests, the largest."""
    groups: dict[bytes, list[float]] = {}
    for line, number in zip(lines, numbers, strict=True):
        groups.setdefault(_SHARED_RANK.sub(b"", line[: line.rfind(b"}")]), []).append(number)
    return [math.nan if any(map(math.isnan, group)) else max(group) for group in groups.values()]


def _number(text: bytes, least: float = 0.0) -> float:
    """NaN unless it is a finite number, `least` or more."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if least <= value < math.inf and b"_" not in text else math.nan  # Python alone reads 1_000


def _share(value: float) -> float:
    return math.nan if value > MOST_USAGE else min(value, 1.0)  # min(NaN, 1.0) is NaN


def _total(values: list[float]) -> float | None:
    total = sum(values)
    return total if values and total < math.inf else None  # NaN is not below anything


def _mean(values: list[float]) -> float | None:
    total = _total(values)
    return None if total is None else total / len(values)


def _typical(values: list[float]) -> float:
    """The mean, whatever it is that they count, so that a limit is one for each engine; NaN: unknown."""
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else math.nan


# -- adapters --------------------------------------------------------------------------------------------------------

Adapters = tuple[float | None, tuple[str, ...] | None, tuple[str, ...] | None]


def _adapters(families: Families, spec: Spec | None) -> Adapters:
    """Most adapters in a batch, those that run and those that wait, from the newest series; Nones: the page is silent.

    vLLM leaves a series behind for each pair of lists there ever was; its value says when the pair was last true. Two
    empty lists are such a pair too: nothing runs. (The reference skips those, and keeps adapters long gone.)
    """
    newest, newest_at = b"", -1.0
    for line in _lines(families, spec) if spec else ():
        at = _number(_value(line))
        if at >= newest_at:
            newest, newest_at = line, at
    labels = _labels(newest)
    if not labels:
        return None, None, None
    return (
        _total([_number(labels.get("max_lora", "").encode())]) or None,
        _names(labels.get("running_lora_adapters", "")),
        _names(labels.get("waiting_lora_adapters", "")),
    )


def _names(text: str) -> tuple[str, ...]:
    names = (name.strip() for name in text.split(",", MOST_ADAPTERS)[:MOST_ADAPTERS])
    return tuple(dict.fromkeys(name for name in names if name))


# -- the text format -------------------------------------------------------------------------------------------------


def _find(page: bytes, family: bytes, start: int, stop: int) -> int:
    """Where the family's first series within these bounds begins; -1: there is none."""
    if start == 0 and _begins(page, family, 0):
        return 0
    at = start
    while (at := page.find(b"\n" + family, at, stop) + 1) > 0:
        if _begins(page, family, at):
            return at  # otherwise another family whose name begins alike
    return -1


def _begins(page: bytes, family: bytes, at: int) -> bool:
    end = at + len(family)
    return page.startswith(family, at) and page[end : end + 1] in (b"{", b" ", b"\t")


def _value(line: bytes) -> bytes:
    """Text of a series' value; empty where there is none. What follows is a timestamp, without a brace."""
    tail = line[line.rfind(b"}") + 1 :].split()
    return tail[0] if 1 <= len(tail) <= 2 else b""


def _labels(line: bytes) -> Mapping[str, str]:
    """The labels of a series; empty when there are none or they cannot be understood."""
    text = line[: line.rfind(b"}") + 1].lstrip()
    return _parsed(text) if len(text) <= 4096 else _parsed.__wrapped__(text)


@lru_cache(maxsize=512)  # a server's configuration is the same on every page; 512 x 4 KiB at most
def _parsed(text: bytes) -> Mapping[str, str]:
    labels: dict[str, str] = {}
    at = 1
    while match := _LABEL.match(text, at):
        name, value = match.groups()
        if b"\\" in value:
            value = _ESCAPE.sub(_unescaped, value)
        labels[name.decode()] = value.decode("utf-8", "replace")
        at = match.end()
    return labels if text[at:].strip() == b"}" else {}


def _unescaped(match: re.Match[bytes]) -> bytes:
    character = match[1]
    return b"\n" if character == b"n" else character if character in b'\\"' else match[0]
