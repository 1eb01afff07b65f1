"""Header names of the endpoint picker protocol, and how headers are read.

Headers are a tuple of (name, value) in the order in which the client sent them, duplicates kept; names are lower
case, values raw bytes. Nothing here copies or merges them.
Source: Gateway API Inference Extension proposal 004 (endpoint picker protocol); llm-d router's header vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

Headers = tuple[tuple[str, bytes], ...]

DESTINATION: Final = "x-gateway-destination-endpoint"
SERVED: Final = "x-gateway-destination-endpoint-served"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
SCORES: Final = "x-gateway-destination-endpoint-scores"
DROP_REASON: Final = "x-llm-d-request-dropped-reason"
REQUEST_ID: Final = "x-request-id"

# Canonical name first, legacy twin second: where both are present the canonical one counts.
FAIRNESS_ID: Final = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
MODEL_REWRITE: Final = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
SLO_TTFT_MS: Final = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
SLO_TPOT_MS: Final = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")

CONTROL: Final = frozenset(
    (
        *FAIRNESS_ID,
        *OBJECTIVE,
        *MODEL_REWRITE,
        *SLO_TTFT_MS,
        *SLO_TPOT_MS,
        "x-llm-d-video-fps",
        "x-llm-d-video-duration-seconds",
        "x-llm-d-video-resolution",
        SUBSET,
        DROP_REASON,
    )
)
"""What a client says to the picker: read here, never passed on to the model server."""

ROUTING: Final = frozenset(
    (
        DESTINATION,
        SERVED,
        SCORES,
        "x-gateway-destination-endpoint-fallback",
        "x-prefiller-host-port",
        "x-encoder-hosts-ports",
        "x-data-parallel-host-port",
        "x-data-parallel-rank",
        "x-kv-cache-source-host-port",
    )
)
"""What only a picker may say to a proxy or a sidecar: a client's copy is forged and never survives."""


def first(headers: Headers, *names: str) -> bytes | None:
    """Value of the first header that has one of `names`, an earlier name before a later one; None: absent."""
    for name in names:
        for key, value in headers:
            if key == name:
                return value
    return None


def text(headers: Headers, *names: str) -> str:
    """As `first`, decoded leniently and stripped; empty when absent."""
    value = first(headers, *names)
    return "" if value is None else value.decode("utf-8", "replace").strip()


def present(headers: Headers, names: Iterable[str] = CONTROL | ROUTING) -> tuple[str, ...]:
    """Those of `names` that occur in `headers`, each once, in the order of the headers."""
    wanted = names if isinstance(names, frozenset) else frozenset(names)
    return tuple(dict.fromkeys(name for name, _ in headers if name in wanted))
