"""Metrics pages: recorded ones and generated ones against prometheus_client's parser, the rest worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from epp.endpoints.table import Page
from epp.signals.page import (
    ENGINES,
    MOST_ADAPTERS,
    SGLANG,
    TRITON,
    TRITON_TRTLLM,
    TRTLLM_SERVE,
    VLLM,
    Engine,
    Spec,
    read_page,
    recognise,
)

RECORDED = sorted((Path(__file__).parents[1] / "data" / "vllm-0.32.0").glob("metrics-*.txt"))
ONE = {"waiting": 'vllm:num_requests_waiting{engine="0"} 3\n', "running": "vllm:num_requests_running 2\n"}


def vllm(text: str) -> Page:
    return read_page(text.encode(), VLLM)


# -- against prometheus_client's parser ------------------------------------------------------------------------------


def parsed(text: str) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def good(values: list[float]) -> bool:
    return bool(values) and all(0 <= value < math.inf for value in values) and sum(values) < math.inf


def oracle(text: str) -> Page:
    """What the rules in the header of page.py make of a full parse; no ranks that share requests."""
    samples = parsed(text)

    def values(name: str) -> list[float]:
        return [sample.value for sample in samples.get(name, ())]

    def labels(name: str, label: str) -> list[float]:
        texts = [sample.labels.get(label, "") for sample in samples.get(name, ())]
        return [float(text) if re.fullmatch(r"[0-9]+", text) else math.nan for text in texts]

    def names(text: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))

    def total(name: str) -> float | None:
        return sum(values(name)) if good(values(name)) else None

    usage = values("vllm:kv_cache_usage_perc") or values("vllm:gpu_cache_usage_perc")
    blocks = labels("vllm:cache_config_info", "num_gpu_blocks")
    sizes = labels("vllm:cache_config_info", "block_size")
    lora = [sample for sample in samples.get("vllm:lora_requests_info", ()) if 0 <= sample.value < math.inf]
    newest = max(reversed(lora), key=lambda sample: sample.value, default=None)
    page = Page(
        waiting=total("vllm:num_requests_waiting"),
        running=total("vllm:num_requests_running"),
        kv_usage=sum(min(v, 1) for v in usage) / len(usage) if good(usage) and max(usage) <= 1.05 else None,
        kv_blocks=(sum(blocks) or None) if good(blocks) else None,
        block_size=(sizes[0] or None) if good(sizes[:1]) else None,
        prompt_tokens=total("vllm:request_prompt_tokens_sum"),
        prompts=total("vllm:request_prompt_tokens_count"),
        first_tokens=total("vllm:time_to_first_token_seconds_count"),
        steps=total("vllm:iteration_tokens_total_count"),
        processed=total("vllm:iteration_tokens_total_sum"),
        generated=total("vllm:generation_tokens_total"),
    )
    if newest is None or not newest.labels:
        return page
    most = newest.labels.get("max_lora", "")
    return msgspec.structs.replace(
        page,
        max_lora=(float(most) or None) if re.fullmatch(r"[0-9]+", most) else None,
        running_adapters=names(newest.labels.get("running_lora_adapters", "")),
        waiting_adapters=names(newest.labels.get("waiting_lora_adapters", "")),
    )


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_pages_say_what_a_full_parse_says(path: Path) -> None:
    page = path.read_bytes()
    assert read_page(page, VLLM) == oracle(page.decode())
    assert recognise(page) is VLLM


def test_the_recorded_page_under_load_by_hand() -> None:
    page = read_page((RECORDED[0].parent / "metrics-busy-3.txt").read_bytes(), VLLM)
    gauges = 8.0, 4.0, 0.3869346733668342, 200.0, 32.0, 1.0, ("a",), ("a",)
    assert page == Page(*gauges, (), 5913.0, 11.0, first_tokens=15.0, steps=313.0, processed=6662.0, generated=937.0)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_a_recorded_page_counts_adds_up(path: Path) -> None:
    """Tokens processed are those generated and those of prompts that were not cached; and who has no first token yet
    is one of those that ended, run or wait: at this moment each of those that wait, for none of them was preempted."""
    page = read_page(path.read_bytes(), VLLM)
    (computed,) = [
        sample.value
        for sample in parsed(path.read_text())["vllm:prompt_tokens_by_source_total"]
        if sample.labels["source"] == "local_compute"
    ]
    assert page.processed is not None
    assert page.generated is not None
    assert page.processed == computed + page.generated
    assert page.prompts is not None
    assert page.running is not None
    assert page.waiting is not None
    assert page.first_tokens is not None
    assert page.waiting <= page.prompts + page.running + page.waiting - page.first_tokens
    assert page.prompts + page.waiting + page.running - page.first_tokens <= page.waiting + page.running


def test_there_are_recorded_pages() -> None:
    assert len(RECORDED) == 6


WORDS = st.text(st.sampled_from('ab,{}"\\= \n#\u00e9'), max_size=6) | st.sampled_from(
    ["\nvllm:num_requests_waiting 7", '",engine="1"} 5', ',num_gpu_blocks="9"', ',block_size="']
)
NUMBERS = st.one_of(
    st.integers(0, 40).map(str),
    st.sampled_from(["0.25", "1.0", "1.04", "1.06", "48.2", "1e3", "2.5e-1", "NaN", "+Inf", "-Inf", "-1", "0.0"]),
    st.floats(0, 2).map(repr),
)
NAMES = (
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:num_requests_waiting_by_reason",
    "vllm:num_requests",
    "vllm:kv_cache_usage_perc2",
    "my_vllm:num_requests_running",
    "vllm:lora_requests_info_more",
    "vllm:cache_config",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
)


def escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


@st.composite
def label_text(draw: st.DrawFn, fixed: dict[str, str]) -> str:
    labels = {
        **draw(st.dictionaries(st.sampled_from(["engine", "model_name", "x", "block"]), WORDS, max_size=3)),
        **fixed,
    }
    order = draw(st.permutations(sorted(labels)))
    pairs = [f'{name}="{escaped(labels[name])}"' for name in order]
    comma = draw(st.sampled_from(["", ","])) if pairs else ""
    bare = draw(st.sampled_from(["", "{}"]))
    return "{" + ",".join(pairs) + comma + "}" if pairs else bare


ADAPTERS = st.sampled_from(["", "a", 'q"x', "back\\slash\\n", "new\nline", "a,b", " a , b ", "b,b", ",", "x" * 70])
CONFIGURED = st.sampled_from(["16", "200", "None", "0", "-1", "1_6", ""])


@st.composite
def family(draw: st.DrawFn, name: str) -> str:
    lines = [f"# HELP {name} Text with vllm:num_requests_waiting 7 in it.", f"# TYPE {name} gauge"]
    lines = lines if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        fixed = {}
        if name == "vllm:lora_requests_info":
            fixed = {
                "max_lora": draw(CONFIGURED),
                "running_lora_adapters": draw(ADAPTERS),
                "waiting_lora_adapters": draw(ADAPTERS),
            }
        if name == "vllm:cache_config_info":
            fixed = {"block_size": draw(CONFIGURED), "num_gpu_blocks": draw(CONFIGURED)}
        stamp = draw(st.sampled_from(["", " 1795452060", " -5"]))
        lines.append(f"{name}{draw(label_text(fixed))} {draw(NUMBERS)}{stamp}")
    return "\n".join(lines)


@st.composite
def pages(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    blocks = [draw(family(name)) for name in names]
    return "\n".join(block for block in blocks if block) + draw(st.sampled_from(["", "\n", "\n\n"]))


@given(text=pages())
def test_any_page_says_what_a_full_parse_says(text: str) -> None:
    expected = oracle(text)
    assert vllm(text) == expected
    assert vllm(text.replace("\n", "\r\n")) == expected


@given(page=st.binary(max_size=200))
def test_no_bytes_are_a_surprise(page: bytes) -> None:
    for engine in ENGINES:
        read_page(page, engine)
    recognise(page)


@given(cut=st.integers(0, 60_000), junk=st.binary(max_size=40), path=st.sampled_from(RECORDED))
def test_a_page_with_a_hole_in_it_is_no_surprise(cut: int, junk: bytes, path: Path) -> None:
    page = path.read_bytes()
    read_page(page[:cut] + junk + page[cut + 100 :], VLLM)


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_ranks_behind_one_address_are_summed_and_their_usage_averaged() -> None:
    page = vllm(
        'vllm:num_requests_waiting{engine="0"} 3\nvllm:num_requests_waiting{engine="1"} 4\n'
        'vllm:num_requests_running{engine="0"} 1\nvllm:num_requests_running{engine="1"} 2\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.6\n'
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1\n'
        'vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="150"} 1\n'
    )
    assert page == Page(waiting=7, running=3, kv_usage=0.4, kv_blocks=250, block_size=16)


def test_one_rank_that_says_nonsense_makes_the_sum_unknown() -> None:
    page = vllm('vllm:num_requests_waiting{engine="0"} 3\nvllm:num_requests_waiting{engine="1"} NaN\n')
    assert page.waiting is None
    page = vllm('vllm:num_requests_waiting{engine="0"} 1e308\nvllm:num_requests_waiting{engine="1"} 1e308\n')
    assert page.waiting is None


@pytest.mark.parametrize(
    "text", ["NaN", "Inf", "+Inf", "-Inf", "-1", "1_0", "0x10", "", "many", "1 2 3", "1e999", "\u0663", "1,5"]
)
def test_what_is_no_number_of_requests_is_unknown(text: str) -> None:
    page = vllm(f'vllm:num_requests_waiting{{engine="0"}} {text}\n' + ONE["running"])
    assert (page.waiting, page.running) == (None, 2.0)


@pytest.mark.parametrize(
    ("text", "usage"), [("0", 0.0), ("1", 1.0), ("1.05", 1.0), ("1.051", None), ("48.2", None), ("-0.1", None)]
)
def test_kv_usage_is_a_share(text: str, usage: float | None) -> None:
    assert vllm(f"vllm:kv_cache_usage_perc {text}\n").kv_usage == usage


def test_the_old_name_of_the_kv_usage_counts_where_the_new_one_is_missing() -> None:
    old, new = "vllm:gpu_cache_usage_perc 0.7\n", "vllm:kv_cache_usage_perc 0.3\n"
    assert vllm(old).kv_usage == 0.7
    assert vllm(old + new).kv_usage == 0.3
    assert vllm(old + "vllm:kv_cache_usage_perc NaN\n").kv_usage is None


def test_a_family_whose_name_only_begins_alike_is_another() -> None:
    assert vllm('vllm:num_requests_waiting_by_reason{reason="capacity"} 9\n').waiting is None
    page = vllm('vllm:num_requests_waiting_by_reason{reason="capacity"} 9\n' + ONE["waiting"])
    assert page.waiting == 3.0


def test_the_newest_lora_series_counts_even_where_nothing_runs_any_more() -> None:
    series = 'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{}",waiting_lora_adapters="{}"}} {}\n'
    older = series.format("a, b", "", "1.7e+09") + series.format("c", " d ,e,", "1.8e+09")
    page = vllm(older + series.format("a", "", "1.75e+09"))
    assert (page.max_lora, page.running_adapters, page.waiting_adapters) == (4.0, ("c",), ("d", "e"))
    page = vllm(older + series.format("", "", "1.9e+09"))
    assert (page.running_adapters, page.waiting_adapters) == ((), ())
    page = vllm(older + series.format("z", "", "NaN") + series.format("z", "", "+Inf"))
    assert page.running_adapters == ("c",)
    assert vllm(ONE["waiting"]).running_adapters is None


def test_adapters_are_bounded() -> None:
    many = ",".join(f"adapter-{i}" for i in range(100_000))
    page = vllm(f'vllm:lora_requests_info{{max_lora="1",running_lora_adapters="{many}"}} 1\n')
    assert page.running_adapters is not None
    assert len(page.running_adapters) == MOST_ADAPTERS


def test_ranks_that_share_their_requests_count_once() -> None:
    page = read_page(
        b'sglang:num_queue_reqs{dp_rank="0",pp_rank="0",tp_rank="0"} 5\n'
        b'sglang:num_queue_reqs{dp_rank="0",pp_rank="0",tp_rank="1"} 4\n'
        b'sglang:num_queue_reqs{dp_rank="1",pp_rank="0",tp_rank="2"} 7\n'
        b'sglang:num_running_reqs{pp_rank="0",tp_rank="0"} 4\n'
        b'sglang:num_running_reqs{pp_rank="1",tp_rank="0"} NaN\n'
        b'sglang:token_usage{tp_rank="0"} 0.5\nsglang:token_usage{tp_rank="1"} 0.5\n',
        SGLANG,
    )
    assert page == Page(waiting=12.0, running=None, kv_usage=0.5)


PAGES = [
    (
        SGLANG,
        b'sglang:num_running_reqs{model_name="m"} 4.0\nsglang:num_running_reqs_offline_batch{model_name="m"} 9\n'
        b'sglang:num_queue_reqs{model_name="m"} 2.0\nsglang:token_usage{model_name="m"} 0.28\n'
        b'sglang:cache_config_info{num_pages="4000",page_size="16"} 1.0\n',
        Page(2.0, 4.0, 0.28, 4000.0, 16.0),
    ),
    (
        TRTLLM_SERVE,
        b"trtllm_num_requests_waiting 3\ntrtllm_num_requests_running 5\ntrtllm_kv_cache_utilization 0.62\n"
        b"trtllm_kv_cache_tokens_per_block 32\ntrtllm_kv_cache_max_blocks 900\n",
        Page(3.0, 5.0, 0.62, 900.0, 32.0),
    ),
    (
        TRITON_TRTLLM,
        b'nv_inference_pending_request_count{model="tensorrt_llm",version="1"} 8\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 1\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 6\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2\n'
        b'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.4\n'
        b'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64\n'
        b'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239\n',
        Page(2.0, 6.0, 0.4, 6239.0, 64.0),
    ),
    (
        TRITON,
        b'nv_inference_exec_count{model="m",version="1"} 123456\n'
        b'nv_inference_pending_request_count{model="m",version="1"} 4\n'
        b'nv_inference_pending_request_count{model="n",version="1"} 1\n',
        Page(waiting=5.0),
    ),
]


@pytest.mark.parametrize(("engine", "text", "page"), PAGES, ids=[engine.name for engine, _, _ in PAGES])
def test_each_engine_is_recognised_and_read(engine: Engine, text: bytes, page: Page) -> None:
    assert recognise(text) is engine
    assert read_page(text, engine) == page


def test_a_page_of_something_else_is_no_engines() -> None:
    assert recognise(b"# HELP vllm:num_requests_waiting Text.\npython_info 1\n") is None
    assert recognise(b"<html>vllm:num_requests_waiting</html>") is None
    assert recognise(b"") is None


CUSTOM = Engine(
    "custom",
    waiting=Spec(b"my:queue", (("kind", "text"), ("stage", "decode"))),
    running=None,
    lora=Spec(b"my:lora", (("kind", "text"),)),
    attributes=(("heat", Spec(b"my:celsius")), ("cost", Spec(b"my:cost", (("kind", "text"),)))),
)


def test_only_series_with_all_the_labels_count() -> None:
    page = read_page(
        b'my:queue{kind="text",stage="decode",engine="0"} 2\nmy:queue{kind="text",stage="decode",engine="1"} 3\n'
        b'my:queue{kind="text",stage="prefill"} 40\nmy:queue{stage="decode"} 50\nmy:queue 60\n'
        b'my:lora{kind="image",max_lora="9",running_lora_adapters="x"} 7\n'
        b'my:lora{kind="text",max_lora="2",running_lora_adapters="a"} 5\n',
        CUSTOM,
    )
    assert (page.waiting, page.max_lora, page.running_adapters) == (5.0, 2.0, ("a",))


def test_an_attribute_is_the_mean_of_its_series_and_may_be_below_0() -> None:
    page = read_page(b'my:celsius{gpu="0"} -4\nmy:celsius{gpu="1"} 10.5\nmy:cost{kind="text"} 1e3\n', CUSTOM)
    assert page.attributes == (("heat", 3.25), ("cost", 1000.0))
    assert not page.says_nothing


@pytest.mark.parametrize("text", ["NaN", "+Inf", "-Inf", "1_0", "warm", ""])
def test_an_attribute_with_one_series_that_says_nonsense_is_unknown(text: str) -> None:
    page = read_page(
        f'my:celsius{{gpu="0"}} 5\nmy:celsius{{gpu="1"}} {text}\nmy:cost{{kind="text"}} 2\n'.encode(), CUSTOM
    )
    (_, heat), (_, cost) = page.attributes
    assert math.isnan(heat)
    assert cost == 2.0


def test_sums_too_large_for_a_number_are_unknown() -> None:
    page = read_page(b'my:celsius{gpu="0"} 1e308\nmy:celsius{gpu="1"} 1e308\n', CUSTOM)
    assert math.isnan(page.attributes[0][1])


def test_a_page_without_any_of_it_says_nothing() -> None:
    assert read_page(b"python_info 1\n", CUSTOM).says_nothing
    assert read_page(b"my:celsius NaN\n", CUSTOM).says_nothing
    assert not read_page(b'my:queue{kind="text",stage="decode"} 0\n', CUSTOM).says_nothing


def test_an_engine_is_recognised_by_what_it_tells() -> None:
    alone = Engine("alone", waiting=None, running=None, attributes=(("heat", Spec(b"my:celsius")),))
    cache = Engine("cache", waiting=None, running=None, kv_usage=(Spec(b"my:cache"),))
    assert recognise(b"my:celsius 4\n", (cache, alone)) is alone
    assert recognise(b"my:celsius 4\nmy:cache 0\n", (cache, alone)) is cache
    assert recognise(b"vllm:num_requests_waiting 1\n", (cache, alone)) is None
