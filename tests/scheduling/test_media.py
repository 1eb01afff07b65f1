"""Who holds a request's images: hand-worked tables, a model, and a decision that it changes."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.config.build import build
from epp.config.load import load
from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import EndpointTable, Page
from epp.errors import ConfigError
from epp.scheduling import media as media_module
from epp.scheduling.media import Holders, MediaCache, MediaParams, media
from epp.scheduling.plugin import Context, NoParams, Scorer
from epp.scheduling.scorers import queue
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler


def chat(*images: str) -> Request:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content: Any = [{"type": "text", "text": "what is this?"}, *parts]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return read(((":path", b"/v1/chat/completions"),), json.dumps(body).encode())


def told(scorer: Scorer, table: EndpointTable, slot: int, *images: str) -> None:
    assert scorer.chosen is not None
    scorer.chosen(chat(*images), table.candidates(NOW), np.array([slot]))


@pytest.fixture
def table() -> EndpointTable:
    table = EndpointTable()
    pool(None, None, None, table=table)
    return table


def scored(scorer: Scorer, table: EndpointTable, request: Request) -> list[float]:
    got: list[float] = scorer.score(request, table.candidates(NOW)).tolist()
    return got


def test_the_share_of_the_requests_items_that_an_endpoint_holds(table: EndpointTable) -> None:
    scorer = made(media)
    assert scored(scorer, table, chat("a")) == [0.0, 0.0, 0.0]
    told(scorer, table, 0, "a", "b")
    told(scorer, table, 1, "b")
    assert scored(scorer, table, chat("a", "b", "c", "d")) == [0.5, 0.25, 0.0]
    assert scored(scorer, table, chat("a", "b")) == [1.0, 0.5, 0.0]
    assert scored(scorer, table, chat("b")) == [1.0, 1.0, 0.0]  # a tie
    assert scored(scorer, table, chat("b", "b", "b", "c")) == [0.5, 0.5, 0.0]  # each counts once
    assert scorer.score(chat("a"), table.candidates(NOW).keep(np.array([True, False, False]))).tolist() == [1.0]


def test_a_request_without_media_scores_nothing_and_teaches_nothing(table: EndpointTable) -> None:
    scorer = made(media)
    told(scorer, table, 0, "a")
    assert scorer.chosen is not None
    for request in (ask("a text"), chat()):
        scorer.chosen(request, table.candidates(NOW), np.array([1]))
        assert scored(scorer, table, request) == [0.0, 0.0, 0.0]
    assert scored(scorer, table, chat("a")) == [1.0, 0.0, 0.0]


def test_an_endpoint_holds_as_many_as_its_cache_has_room_for_and_the_latest_used_stay(table: EndpointTable) -> None:
    context = Context(settings={"small": MediaCache(cache_size_in_mb_per_server=5)})  # two of 2 MiB
    scorer = made(media, MediaParams(producer_name="small"), context)
    told(scorer, table, 0, "a")
    told(scorer, table, 0, "b")
    told(scorer, table, 0, "a")  # used again, so b is the older one
    told(scorer, table, 0, "c")
    assert [scored(scorer, table, chat(name))[0] for name in "abc"] == [1.0, 0.0, 1.0]
    told(scorer, table, 1, "b")  # each has its own
    assert [scored(scorer, table, chat(name)) for name in "ab"] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(("megabytes", "items"), [(1, 1), (2, 1), (4096, 2048)])
def test_a_cache_has_room_for_at_least_one(megabytes: int, items: int) -> None:
    assert msgspec.convert({"cacheSizeInMBPerServer": megabytes}, MediaCache).items == items


def test_a_plugin_that_is_no_such_producer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens is no mm-embeddings-cache-producer"):
        made(media, MediaParams(producer_name="tokens"), Context(settings={"tokens": NoParams()}))


def test_an_endpoint_that_comes_new_into_a_slot_holds_nothing(table: EndpointTable) -> None:
    scorer = made(media)
    told(scorer, table, 0, "a")
    told(scorer, table, 1, "a")
    assert scorer.forget is not None
    scorer.forget(0)
    scorer.forget(2)
    assert scored(scorer, table, chat("a")) == [0.0, 1.0, 0.0]


def test_the_image_decides_and_its_next_turn_goes_there_again() -> None:
    candidates = pool(*[Page(waiting=0)] * 8)
    choosing = scheduler(profile((made(media), 1.0)), seed=3)
    first = choosing.schedule(chat("https://a/cat.png"), candidates).first
    assert {choosing.schedule(chat("https://a/cat.png", f"{i}"), candidates).first for i in range(12)} == {first}
    by_queue = scheduler(profile((made(queue), 1.0)), seed=3)
    assert len({by_queue.schedule(chat("https://a/cat.png"), candidates).first for _ in range(12)}) > 1


def test_all_that_is_remembered_is_bounded_however_many_endpoints_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "MOST_ITEMS", 60)
    table, holders = EndpointTable(), Holders(40)
    pool(None, table=table)
    holders.add([b"%d" % i for i in range(100)], 0, table)
    assert len(holders) == 40  # one endpoint: its own limit
    pool(*[None] * 6, table=table)
    for slot in range(1, 6):
        holders.add([b"%d" % i for i in range(100)], slot, table)
    assert len(holders) == 60  # six endpoints: ten each, the first one too


ITEMS = [b"%d" % i for i in range(6)]


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.sampled_from(ITEMS), max_size=4, unique=True)) | st.integers(0, 3),
        max_size=40,
    ),
    room=st.integers(1, 4),
    asked=st.lists(st.sampled_from(ITEMS), min_size=1, max_size=6, unique=True),
)
def test_it_is_a_list_of_the_latest_per_endpoint(
    steps: list[tuple[int, list[bytes]] | int], room: int, asked: list[bytes]
) -> None:
    table, holders = EndpointTable(), Holders(room)
    model: dict[int, list[bytes]] = {slot: [] for slot in range(4)}
    candidates = pool(None, None, None, None, table=table)
    for step in steps:
        if isinstance(step, int):
            holders.forget(step)
            model[step] = []
            continue
        slot, items = step
        holders.add(items, slot, table)
        model[slot] = ([item for item in model[slot] if item not in items] + items)[-room:]
    assert holders.count(asked, candidates).tolist() == [len(set(asked) & set(model[slot])) for slot in range(4)]
    assert len(holders) == sum(map(len, model.values()))


def test_an_image_that_is_sent_again_and_again_is_remembered_once(table: EndpointTable) -> None:
    holders = Holders(9)
    for _ in range(100):
        holders.add([b"a"], 1, table)
    assert holders._by_item == {b"a": (1,)}


CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: mm-embeddings-cache-producer, parameters: {cacheSizeInMBPerServer: 2}}
- {type: mm-embeddings-cache-scorer}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: mm-embeddings-cache-scorer}]}
"""


def test_the_producer_of_a_configuration_says_how_large_caches_are() -> None:
    config = load(CONFIG)
    assert config.warnings == ()
    choosing, candidates = build(config, Random(5)), pool(*[Page()] * 2)
    first = choosing.schedule(chat("a"), candidates).first
    assert choosing.schedule(chat("a"), candidates).raw.tolist() == [[float(slot == first) for slot in range(2)]]
    for image in range(20):  # room for one: each server is given others
        choosing.schedule(chat(f"{image}"), candidates)
    assert choosing.schedule(chat("a"), candidates).raw.tolist() == [[0.0, 0.0]]
