"""The metrics page of a simulated server: vLLM's families, names and labels, those that routers and dashboards read.

In: an engine's stats and a driver's counters. Out: the page, Prometheus text format.
Rules here: the LoRA gauge keeps a series for every past state, whose value is when it began, and the newest counts, as
vLLM does it; but only the last 32 of them.
Source: pages recorded from vLLM 0.32.0.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Final

from epp.sim.profile import EngineProfile
from epp.sim.serve.driver import TTFT_BUCKETS, Counters
from epp.sim.vllm import Stats

LORA_STATES: Final = 32

_GAUGES: Final = (
    ("vllm:num_requests_running", "gauge", "Number of requests in model execution batches."),
    ("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed."),
    ("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage."),
    ("vllm:prefix_cache_queries_total", "counter", "Prefix cache queries, in terms of number of queried tokens."),
    ("vllm:prefix_cache_hits_total", "counter", "Prefix cache hits, in terms of number of cached tokens."),
    ("vllm:num_preemptions_total", "counter", "Cumulative number of preemption from the engine."),
    ("vllm:prompt_tokens_total", "counter", "Number of prefill tokens processed."),
    ("vllm:generation_tokens_total", "counter", "Number of generation tokens processed."),
)
_SUMS: Final = (
    ("vllm:request_prompt_tokens", "histogram", "Number of prefill tokens processed."),
    ("vllm:iteration_tokens_total", "histogram", "Histogram of number of tokens per engine_step."),
)
_REASONS: Final = ("stop", "length", "abort", "error")


class Page:
    """Renders the page of one server."""

    def __init__(self, profile: EngineProfile, model: str) -> None:
        self._labels = f'engine="0",model_name="{model}"'
        self._max_lora = profile.max_lora
        self._lora_states: dict[tuple[str, str], float] = {}
        self._cache_config = (
            _head("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig")
            + f'vllm:cache_config_info{{block_size="{profile.block_size}",cache_dtype="auto",'
            f'enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.9",'
            f'kv_cache_size_tokens="{profile.kv_tokens}",num_gpu_blocks="{profile.kv_blocks}"}} 1.0\n'
        )

    def render(self, stats: Stats, counters: Counters, unix_time: float) -> bytes:
        values = (
            stats.running,
            stats.waiting,
            stats.kv_usage,
            stats.prefix_queries,
            stats.prefix_hits,
            stats.preemptions,
            counters.prompt_tokens,
            counters.generation_tokens,
        )
        parts = [
            f"{_head(*family)}{family[0]}{{{self._labels}}} {float(value)}\n"
            for family, value in zip(_GAUGES, values, strict=True)
        ]
        parts += self._sums(stats)
        parts += self._finished(counters), self._ttft(counters), self._lora(stats, unix_time), self._cache_config
        return "".join(parts).encode()

    def _sums(self, stats: Stats) -> list[str]:
        """Histograms of which only count and sum are told."""
        values = (stats.prompts, stats.prompt_tokens), (stats.steps, stats.processed)
        return [
            f'{_head(*family)}{family[0]}_bucket{{{self._labels},le="+Inf"}} {float(count)}\n'
            f"{family[0]}_count{{{self._labels}}} {float(count)}\n{family[0]}_sum{{{self._labels}}} {float(total)}\n"
            for family, (count, total) in zip(_SUMS, values, strict=True)
        ]

    def _finished(self, counters: Counters) -> str:
        name = "vllm:request_success_total"
        head = _head(name, "counter", "Count of successfully processed requests.")
        return head + "".join(
            f'{name}{{finished_reason="{reason}",{self._labels}}} {float(counters.finished[reason])}\n'
            for reason in _REASONS
        )

    def _ttft(self, counters: Counters) -> str:
        name = "vllm:time_to_first_token_seconds"
        bounds = [str(bound) for bound in TTFT_BUCKETS] + ["+Inf"]
        buckets = [
            f'{name}_bucket{{le="{bound}",{self._labels}}} {float(count)}\n'
            for bound, count in zip(bounds, accumulate(counters.ttft_counts), strict=True)
        ]
        total = f"{name}_count{{{self._labels}}} {float(sum(counters.ttft_counts))}\n"
        head = _head(name, "histogram", "Histogram of time to first token in seconds.")
        return head + "".join(buckets) + total + f"{name}_sum{{{self._labels}}} {counters.ttft_sum}\n"

    def _lora(self, stats: Stats, unix_time: float) -> str:
        state = ",".join(stats.running_adapters), ",".join(stats.waiting_adapters)
        self._lora_states.pop(state, None)
        self._lora_states[state] = unix_time
        if len(self._lora_states) > LORA_STATES:
            del self._lora_states[next(iter(self._lora_states))]
        return _head("vllm:lora_requests_info", "gauge", "Running stats on lora requests.") + "".join(
            f'vllm:lora_requests_info{{max_lora="{self._max_lora}",running_lora_adapters="{running}",'
            f'waiting_lora_adapters="{waiting}"}} {began!r}\n'
            for (running, waiting), began in self._lora_states.items()
        )


def _head(name: str, kind: str, text: str) -> str:
    """HELP and TYPE. A counter's family is named as its series, as vLLM's pages have it."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
