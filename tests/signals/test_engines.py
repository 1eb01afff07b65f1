"""Engines from a configuration: which are tried, in which order, and what is read of their pages."""

from __future__ import annotations

import pytest

from epp.config.load import load
from epp.config.pages import BUILT_IN_ENGINES, CoreMetrics, CustomMetric, EngineConfig
from epp.endpoints.table import Page
from epp.signals.engines import Engines, engine, engines, spec
from epp.signals.page import ENGINES, SGLANG, TRITON, VLLM, Spec, read_page, recognise

ATOM = EngineConfig(
    name="atom",
    queued_requests_spec="atom:waiting",
    running_requests_spec="atom:running{stage=decode}",
    kv_usage_spec='atom:usage{kind="kv"}',
    lora_spec="atom:lora",
    cache_info_spec="atom:cache",
    cache_block_size_label_name="page_size",
    cache_num_blocks_spec="atom:blocks",
    custom_metrics=(CustomMetric(attribute_key="Heat", metric_spec="atom:celsius"),),
)


def test_the_built_in_engines_are_those_that_a_configuration_may_name() -> None:
    assert tuple(each.name for each in ENGINES) == BUILT_IN_ENGINES


def test_without_a_word_the_built_in_engines_are_tried() -> None:
    assert engines(CoreMetrics()) == Engines()


@pytest.mark.parametrize("label", ["llm-d.ai/engine-type", "inference.networking.k8s.io/engine-type"])
def test_a_label_names_the_engine(label: str) -> None:
    assert Engines().labelled({label: "sglang"}) is SGLANG
    assert Engines().labelled({label: "something"}) is None
    assert Engines().labelled({"app": "sglang"}) is None


def test_the_newer_label_counts_where_both_are_there() -> None:
    labels = {"inference.networking.k8s.io/engine-type": "vllm", "llm-d.ai/engine-type": "triton"}
    assert Engines().labelled(labels) is TRITON


def test_the_label_may_have_another_name() -> None:
    found = engines(CoreMetrics(engine_label_key="server"))
    assert found.labelled({"server": "sglang", "llm-d.ai/engine-type": "vllm"}) is SGLANG
    assert found.labelled({"llm-d.ai/engine-type": "vllm"}) is VLLM


def test_the_default_engine_is_tried_first_then_configured_ones() -> None:
    found = engines(CoreMetrics(default_engine="sglang", engine_configs=(ATOM,)))
    assert [each.name for each in found.tried] == [
        "sglang", "atom", "vllm", "trtllm-serve", "triton-tensorrt-llm", "triton",
    ]  # fmt: skip
    both = b"vllm:num_requests_waiting 1\nsglang:num_queue_reqs 2\n"
    assert recognise(both, found.tried) is SGLANG
    assert recognise(both, engines(CoreMetrics()).tried) is VLLM
    assert recognise(b"atom:waiting 1\n" + both, engines(CoreMetrics(engine_configs=(ATOM,))).tried) is VLLM


def test_a_configured_engine_reads_what_it_names() -> None:
    page = read_page(
        b'atom:waiting{rank="0"} 2\natom:waiting{rank="1"} 3\n'
        b'atom:running{stage="prefill"} 9\natom:running{stage="decode"} 4\n'
        b'atom:usage{kind="gpu"} 0.9\natom:usage{kind="kv"} 0.5\n'
        b'atom:cache{page_size="64",num_gpu_blocks="1"} 1\natom:blocks 700\n'
        b'atom:lora{max_lora="3",running_lora_adapters="a",waiting_lora_adapters=""} 5\n'
        b"atom:celsius 40\n",
        engine(ATOM),
    )
    assert page == Page(5.0, 4.0, 0.5, 700.0, 64.0, 3.0, ("a",), (), (("Heat", 40.0),))


def test_cache_facts_may_be_metrics_or_labels() -> None:
    labels = engine(EngineConfig(name="e", cache_info_spec="e:cache"))
    assert labels.kv_blocks == Spec(b"e:cache", label="num_gpu_blocks")
    assert labels.block_size == Spec(b"e:cache", label="block_size")
    metrics = engine(EngineConfig(name="e", cache_info_spec="e:cache", cache_block_size_spec="e:size{unit=token}"))
    assert metrics.block_size == Spec(b"e:size", (("unit", "token"),))


def test_a_built_in_name_is_replaced_as_a_whole() -> None:
    mine = EngineConfig(name="vllm", queued_requests_spec="vllm:num_requests_waiting")
    found = engines(CoreMetrics(engine_configs=(mine,)))
    replaced = found.labelled({"llm-d.ai/engine-type": "vllm"})
    assert replaced is not None
    page = read_page(b"vllm:num_requests_waiting 1\nvllm:num_requests_running 2\n", replaced)
    assert page == Page(waiting=1.0)
    assert [each.name for each in found.tried].count("vllm") == 1


def test_nothing_written_is_nothing_read() -> None:
    assert spec("") is None
    assert spec("  ") is None


def test_engines_of_a_file() -> None:
    config = load("""
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: core-metrics-extractor
  parameters:
    defaultEngine: atom
    engineConfigs:
    - name: atom
      queuedRequestsSpec: 'atom:waiting{a=b, c="d e"}'
      kvUsageSpec: atom:usage
      loraSpec: ""
""")
    first = engines(config.pages.core).tried[0]
    assert first.waiting == Spec(b"atom:waiting", (("a", "b"), ("c", "d e")))
    assert first.kv_usage == (Spec(b"atom:usage"),)
    assert (first.running, first.lora) == (None, None)
    assert config.warnings == ()
