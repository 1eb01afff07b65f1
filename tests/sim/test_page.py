"""The metrics page: what the network tests do not show."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from epp.signals.page import VLLM, read_page, recognise
from epp.sim.serve.driver import Counters
from epp.sim.serve.page import LORA_STATES, Page
from epp.sim.vllm import Stats
from tests.sim.serving import profile


def stats(running: tuple[str, ...] = (), waiting: tuple[str, ...] = ()) -> Stats:
    return Stats(0, 0, 0.0, 0, 0, 0, running, waiting)


def lora_states(page: bytes) -> list[tuple[str, str, float]]:
    families = {family.name: family for family in text_string_to_metric_families(page.decode())}
    return [
        (sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"], sample.value)
        for sample in families["vllm:lora_requests_info"].samples
    ]


def test_lora_gauge_keeps_past_states_and_the_newest_has_the_largest_value() -> None:
    page = Page(profile(), "tiny")
    page.render(stats(("a",)), Counters(), 1000.25)
    page.render(stats(("a", "b"), ("c",)), Counters(), 1001.0)
    rendered = page.render(stats(("a",)), Counters(), 1002.5)
    assert lora_states(rendered) == [("a,b", "c", 1001.0), ("a", "", 1002.5)]


def test_our_own_picker_reads_the_page_as_it_reads_vllms() -> None:
    simulated = profile()
    text = Page(simulated, "tiny").render(Stats(3, 5, 0.25, 0, 0, 0, ("a",), ("b",)), Counters(), 1000.0)
    assert recognise(text) is VLLM
    read = read_page(text, VLLM)
    assert (read.waiting, read.running, read.kv_usage) == (3.0, 5.0, 0.25)
    assert (read.kv_blocks, read.block_size) == (simulated.kv_blocks, simulated.block_size)
    assert (read.running_adapters, read.waiting_adapters, read.max_lora) == (("a",), ("b",), simulated.max_lora)


def test_lora_gauge_forgets_old_states() -> None:
    page = Page(profile(), "tiny")
    for number in range(100):
        rendered = page.render(stats((f"adapter-{number}",)), Counters(), float(number))
    assert len(lora_states(rendered)) == LORA_STATES
    assert max(lora_states(rendered), key=lambda state: state[2])[0] == "adapter-99"


def test_first_tokens_are_counted_in_the_bucket_of_their_time() -> None:
    counters = Counters()
    for seconds in (0.0005, 0.03, 0.04, 99.0):
        counters.first_token(seconds)
    families = text_string_to_metric_families(Page(profile(), "tiny").render(stats(), counters, 0.0).decode())
    samples = {
        (sample.name.removeprefix("vllm:time_to_first_token_seconds"), sample.labels.get("le", "")): sample.value
        for family in families
        if family.name == "vllm:time_to_first_token_seconds"
        for sample in family.samples
    }
    cumulative = [samples["_bucket", bound] for bound in ("0.001", "0.02", "0.04", "40.0", "+Inf")]
    assert cumulative == [1, 1, 3, 3, 4]
    assert (samples["_count", ""], samples["_sum", ""]) == (4, 99.0705)
