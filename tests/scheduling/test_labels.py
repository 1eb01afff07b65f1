"""Filters by labels and roles, and when labels are looked at."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.errors import NoEndpoint
from epp.scheduling.labels import (
    PerEndpoint,
    by_label,
    by_label_selector,
    decode_role,
    encode_role,
    label_selector,
    prefill_role,
)
from epp.scheduling.plugin import Filter, Params, Plugin
from epp.scheduling.scorers import queue
from tests.scheduling.builders import NOW, ask, made, pool, profile, scheduler

A = {"gpu": "h100", "zone": "a"}
B = {"gpu": "a100", "zone": "b"}
C = {"zone": "a"}
NONE: dict[str, str] = {}


def kept(plugin: Plugin[Filter], labels: list[dict[str, str]], parameters: dict[str, Any] | None = None) -> list[int]:
    """Slots that stay, of endpoints with these labels."""
    params: Params = msgspec.convert(parameters or {}, plugin.params)
    candidates = pool(*[Page()] * len(labels), labels=labels)
    mask = made(plugin, params).keep(ask(), candidates)
    assert mask.dtype == np.bool_
    slots: list[int] = candidates.slots[mask].tolist()
    return slots


@pytest.mark.parametrize("plugin", [label_selector, by_label_selector], ids=lambda plugin: plugin.name)
@pytest.mark.parametrize(
    ("parameters", "slots"),
    [
        ({}, [0, 1, 2, 3]),
        ({"matchLabels": {"gpu": "h100"}}, [0]),
        ({"matchLabels": {"zone": "a"}}, [0, 2]),
        ({"matchLabels": {"zone": "a", "gpu": "h100"}}, [0]),
        ({"matchLabels": {"zone": ""}}, []),
        ({"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100", "h100"]}]}, [0, 1]),
        ({"matchExpressions": [{"key": "gpu", "operator": "NotIn", "values": ["h100"]}]}, [1, 2, 3]),
        ({"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}, [0, 1]),
        ({"matchExpressions": [{"key": "gpu", "operator": "DoesNotExist"}]}, [2, 3]),
        (
            {"matchLabels": {"zone": "a"}, "matchExpressions": [{"key": "gpu", "operator": "DoesNotExist"}]},
            [2],
        ),
    ],
)
def test_a_selector_selects_as_in_kubernetes(
    plugin: Plugin[Filter], parameters: dict[str, Any], slots: list[int]
) -> None:
    assert kept(plugin, [A, B, C, NONE], parameters) == slots


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ({"key": "gpu", "operator": "In"}, "gpu: In takes at least one of values"),
        ({"key": "gpu", "operator": "NotIn", "values": []}, "gpu: NotIn takes at least one of values"),
        ({"key": "gpu", "operator": "Exists", "values": ["a"]}, "gpu: Exists takes none of values"),
        ({"key": "gpu", "operator": "Is", "values": ["a"]}, "Invalid enum value 'Is'"),
        ({"key": "", "operator": "Exists"}, "length >= 1"),
    ],
)
def test_an_expression_that_kubernetes_would_refuse_is_refused(expression: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        kept(label_selector, [A], {"matchExpressions": [expression]})


@pytest.mark.parametrize(
    ("parameters", "slots"),
    [
        ({"label": "gpu", "validValues": ["h100"]}, [0]),
        ({"label": "gpu", "validValues": ["h100"], "allowsNoLabel": True}, [0, 2, 3]),
        ({"label": "gpu", "allowsNoLabel": True}, [2, 3]),
    ],
)
def test_by_label_keeps_the_values_named(parameters: dict[str, Any], slots: list[int]) -> None:
    assert kept(by_label, [A, B, C, NONE], parameters) == slots


def test_by_label_that_would_keep_nobody_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="validValues is empty and allowsNoLabel false"):
        kept(by_label, [A], {"label": "gpu"})


ROLES = ["encode", "prefill", "decode", "encode-prefill", "prefill-decode", "encode-prefill-decode", "both"]


@pytest.mark.parametrize(
    ("plugin", "roles"),
    [
        (decode_role, ["decode", "prefill-decode", "encode-prefill-decode", "both", ""]),
        (prefill_role, ["prefill", "encode-prefill", "prefill-decode", "encode-prefill-decode", "both"]),
        (encode_role, ["encode", "encode-prefill", "encode-prefill-decode"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_stage_takes_its_roles_and_only_decode_takes_those_without_one(
    plugin: Plugin[Filter], roles: list[str]
) -> None:
    """The last two of the pool: no label, and a role that nobody knows."""
    labels = [*({"llm-d.ai/role": role} for role in ROLES), NONE, {"llm-d.ai/role": "encode-decode"}]
    names = [*ROLES, "", "encode-decode"]
    assert sorted(names[slot] for slot in kept(plugin, labels)) == sorted(roles)


@pytest.mark.parametrize(("role", "slots"), [("decode", [0]), ("prefill", [])])
def test_one_candidate_stays_or_goes(role: str, slots: list[int]) -> None:
    assert kept(decode_role, [{"llm-d.ai/role": role}]) == slots


def test_a_role_changes_where_a_request_goes_and_its_absence_is_a_503() -> None:
    roles = [{"llm-d.ai/role": "prefill"}, {"llm-d.ai/role": "decode"}]
    candidates = pool(Page(waiting=0), Page(waiting=9), labels=roles)
    by_queue = (made(queue), 1.0)
    assert scheduler(profile(by_queue)).schedule(ask(), candidates).first == 0
    choosing = scheduler(profile(by_queue, filters=[made(decode_role)]))
    assert choosing.schedule(ask(), candidates).first == 1
    with pytest.raises(NoEndpoint, match="of 2 endpoints, encode-filter left out 2") as caught:
        scheduler(profile(by_queue, filters=[made(encode_role)])).schedule(ask(), candidates)
    assert (caught.value.status, caught.value.retry_after) == (503, 1.0)


def test_labels_are_looked_at_once_for_each_change_of_the_pool() -> None:
    seen: list[str] = []

    def fact(endpoint: Endpoint) -> float:
        seen.append(endpoint.name)
        return float(endpoint.labels.get("weight", "0"))

    weights, table = PerEndpoint(fact), EndpointTable()
    candidates = pool(None, None, None, labels=[{"weight": "1"}, {}, {"weight": "3"}], table=table)
    assert weights(candidates).tolist() == [1.0, 0.0, 3.0]
    assert weights(candidates.keep(np.array([False, True, True]))).tolist() == [0.0, 3.0]
    assert len(seen) == 3
    table.put(Endpoint("default/pod1-rank-0", "192.168.1.2:8000", {"weight": "2"}), NOW)
    assert weights(table.candidates(NOW)).tolist() == [1.0, 2.0, 3.0]
    table.drop("default/pod0-rank-0")
    table.put(Endpoint("default/other", "10.0.0.1:1", {"weight": "7"}), NOW)  # in the slot that is free now
    assert table.candidates(NOW).slots.tolist() == [1, 2, 0]
    assert weights(table.candidates(NOW)).tolist() == [2.0, 3.0, 7.0]
    assert len(seen) == 9


def test_a_pool_without_endpoints_has_no_facts() -> None:
    assert PerEndpoint(lambda endpoint: 1.0)(EndpointTable().candidates(NOW)).tolist() == []
