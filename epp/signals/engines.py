"""Which engine an endpoint's page is read as: the configured ones beside those that are built in.

In: the parameters of core-metrics-extractor. Out: engines, in the order in which they are tried.
Rules here:
- What an endpoint's label names counts. Without it the page itself says whose it is: the default engine is tried first,
  then those that are configured, then the built-in ones. (The reference reads every such page as the default engine's,
  and finds nothing on that of another.)
- A configured engine with a built-in one's name replaces it whole; what it leaves out is not read.
Source: llm-d router, core-metrics-extractor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from epp.config.pages import CoreMetrics, EngineConfig, parse_metric
from epp.signals.page import ENGINES, Engine, Spec

ENGINE_LABELS: Final = ("llm-d.ai/engine-type", "inference.networking.k8s.io/engine-type")
"""Endpoint labels that name the engine; the second is the older spelling."""


class Engines(msgspec.Struct, frozen=True):
    """Every engine whose pages are understood."""

    tried: tuple[Engine, ...] = ENGINES
    """In this order."""
    labels: tuple[str, ...] = ENGINE_LABELS
    """Endpoint labels that name the engine; the first that is there counts."""

    def labelled(self, labels: Mapping[str, str]) -> Engine | None:
        """The engine that an endpoint's labels name; None: they name none that is known."""
        name = next((labels[label] for label in self.labels if label in labels), "")
        return next((engine for engine in self.tried if engine.name == name), None)


def engines(params: CoreMetrics) -> Engines:
    """The engines that a configuration describes."""
    by_name = {config.name: engine(config) for config in params.engine_configs}
    by_name |= {built_in.name: built_in for built_in in ENGINES if built_in.name not in by_name}
    tried = (by_name[params.default_engine], *by_name.values())
    return Engines(tuple(dict.fromkeys(tried)), tuple(dict.fromkeys((params.engine_label_key, *ENGINE_LABELS))))


def engine(config: EngineConfig) -> Engine:
    """One of `engineConfigs`."""
    usage = spec(config.kv_usage_spec)
    return Engine(
        config.name,
        waiting=spec(config.queued_requests_spec),
        running=spec(config.running_requests_spec),
        kv_usage=() if usage is None else (usage,),
        kv_blocks=spec(config.cache_num_blocks_spec)
        or spec(config.cache_info_spec, config.cache_num_blocks_label_name),
        block_size=spec(config.cache_block_size_spec)
        or spec(config.cache_info_spec, config.cache_block_size_label_name),
        lora=spec(config.lora_spec),
        attributes=tuple(
            (custom.attribute_key, found)
            for custom in config.custom_metrics
            if (found := spec(custom.metric_spec)) is not None
        ),
    )


def spec(text: str, label: str = "") -> Spec | None:
    """What `family{label=value,...}` says; None: it is empty.

    Args:
        label: the number is this label's text; empty: it is the series' value.
    """
    if not text.strip():
        return None
    family, where = parse_metric(text)
    return Spec(family.encode(), where, label)
