"""The reference picker's own integration cases, those in which scores decide.

Four scorers of weight 1 (KV use, queue, prefix, LoRA affinity), max-score-picker, endpoint i at 192.168.1.(i+1):8000;
a pod is queue/KV use{running adapters}, and how many adapters fit is 0, as in the reference's fixtures.
Totals are those of the reference, but where the target model is no adapter: then ours are 1 higher everywhere, since
a base model's request has no affinity to lose.
Source: Gateway API Inference Extension v1.3.0, test/integration/epp/hermetic_test.go.
"""

from __future__ import annotations

import pytest

from epp.endpoints.subset import in_subset
from epp.endpoints.table import Page
from epp.scheduling.decision import Exclusion
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import kv_cache, lora_affinity, prefix_cache, queue
from tests.scheduling.builders import ask, made, pool, profile, scheduler, with_prefix

T2, T3 = "sql-lora-1fdg2", "sql-lora-1fdg3"
FOO, BAR = "foo", "bar"


def pod(waiting: float, usage: float, *adapters: str) -> Page:
    return Page(waiting=waiting, kv_usage=usage, max_lora=0, running_adapters=adapters)


def reference() -> Scheduler:
    producer, context = with_prefix()
    scorers = made(kv_cache), made(queue), made(prefix_cache, None, context), made(lora_affinity)
    return scheduler(profile(*((scorer, 1.0) for scorer in scorers)), producer)


THREE = [pod(0, 0.2, FOO), pod(0, 0.1, FOO, T2), pod(10, 0.2, FOO)]


@pytest.mark.parametrize(
    ("target", "prompt", "pods", "route", "totals"),
    [
        pytest.param("my-model-12345", "test1", [pod(3, 0.2), pod(0, 0.1), pod(10, 0.2)], 1, [2.5, 2.9, 1.8], id="1"),
        pytest.param(
            T2,
            "test2",
            [pod(0, 0.2, FOO, BAR), pod(0, 0.1, FOO, T2), pod(10, 0.2, FOO, BAR)],
            1,
            [1.8, 2.9, 0.8],
            id="2",
        ),
        pytest.param(
            T2, "test3", [pod(10, 0.2, FOO, BAR), pod(10, 0.4, FOO, T2), pod(10, 0.3, FOO)], 1, [1.8, 2.6, 1.7], id="3"
        ),
        pytest.param(
            T2, "test4", [pod(6, 0.2, FOO, BAR, T2), pod(0, 0.85, FOO), pod(10, 0.9, FOO)], 0, [2.2, 1.15, 0.1], id="4"
        ),
        pytest.param(T3, "test6", [pod(4, 0.2, FOO, BAR, T3), pod(4, 0.85, FOO, T3)], 0, [2.8, 2.15], id="6"),
        pytest.param(T2, "test2", THREE, 1, [1.8, 2.9, 0.8], id="9: the subset is everybody"),
        pytest.param("direct-model", "test6", [pod(4, 0.2, FOO, BAR, T3)], 0, [2.8], id="12"),
        pytest.param("rewritten-model", "test-rewrite", [pod(0, 0.1, FOO, "rewritten-model")], 0, [2.9], id="13"),
    ],
)
def test_where_the_reference_sends_it(
    target: str, prompt: str, pods: list[Page], route: int, totals: list[float]
) -> None:
    decision = reference().schedule(ask(prompt, model=target), pool(*pods))
    assert decision.totals == pytest.approx(totals)
    assert decision.endpoints == (f"192.168.1.{route + 1}:8000",)


def test_a_subset_of_one_is_scored_alone() -> None:  # case 10
    everybody = pool(*THREE)
    mask = in_subset(everybody, ("192.168.1.3:8000",))
    exclusions = [Exclusion("subset", everybody.slots[~mask])]
    decision = reference().schedule(ask("test2", model=T2), everybody.keep(mask), exclusions)
    assert decision.endpoints == ("192.168.1.3:8000",)
    assert decision.totals == pytest.approx([1.8])  # 0.8 + 1: alone it has the shortest queue
