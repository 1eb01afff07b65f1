"""How close endpoints are: hand-worked tables of hosts, racks, zones and regions."""

from __future__ import annotations

import numpy as np
import pytest

from epp.endpoints.table import Endpoint, EndpointTable
from epp.scheduling.topology import HOST, RACK, REGION, ZONE, Closest, Topology

KEYS = {
    "region": "topology.kubernetes.io/region",
    "zone": "topology.kubernetes.io/zone",
    "rack": "topology.kubernetes.io/rack",
    "host": "kubernetes.io/hostname",
}


def at(name: str, node: str = "", **place: str) -> Endpoint:
    return Endpoint(name, f"10.0.0.{ord(name[0])}:80", {KEYS[key]: value for key, value in place.items()}, node=node)


def table(*endpoints: Endpoint) -> EndpointTable:
    made = EndpointTable()
    made.replace(endpoints, 0.0)
    return made


def close(other: Endpoint, *endpoints: Endpoint) -> list[int]:
    return list(map(int, Closest(Topology())(table(*endpoints).candidates(0.0), other)))


def test_the_smallest_that_two_share_counts() -> None:
    other = at("x", region="r", zone="a", rack="1", host="h")
    assert close(
        other,
        at("a", region="r", zone="a", rack="1", host="h"),
        at("b", region="r", zone="a", rack="1", host="i"),
        at("c", region="r", zone="a", rack="2", host="j"),
        at("d", region="r", zone="b", rack="3", host="k"),
        at("e", region="s", zone="c", rack="4", host="l"),
    ) == [HOST, RACK, ZONE, REGION, 0]


def test_names_count_only_within_what_is_around_them() -> None:
    other = at("x", region="r", zone="a", rack="1")
    assert close(other, at("a", region="r", zone="b", rack="1"), at("b", region="s", zone="a", rack="1")) == [REGION, 0]


def test_what_is_not_known_is_not_held_against_anybody() -> None:
    other = at("x", zone="a", host="h")
    assert close(other, at("a", host="h"), at("b", rack="1"), at("c", zone="a", rack="1"), at("d")) == [
        HOST,
        0,
        ZONE,
        0,
    ]
    assert close(at("x"), at("a"), at("b", zone="a")) == [0, 0]
    assert close(other, at("a", host="")) == [0]


def test_a_pod_without_the_label_is_on_its_node() -> None:
    assert close(at("x", node="n"), at("a", node="n"), at("b", node="m"), at("c", host="n")) == [HOST, 0, HOST]
    assert close(at("x", node="n"), at("a", node="n", host="other")) == [0]


def test_labels_may_have_other_names() -> None:
    topology = Topology(rack="example.com/rack")
    endpoint = Endpoint("a", "10.0.0.1:80", {"example.com/rack": "7"}, node="n")
    assert topology.place(endpoint) == ("", "", "7", "n")


def test_the_pool_is_followed() -> None:
    made, closest, other = table(at("a", zone="a")), Closest(Topology()), at("x", zone="b")
    assert closest(made.candidates(0.0), other).tolist() == [0]
    made.put(at("b", zone="b"), 1.0)
    assert closest(made.candidates(1.0), other).tolist() == [0, ZONE]
    made.put(at("a", zone="b"), 2.0)
    assert closest(made.candidates(2.0), other).tolist() == [ZONE, ZONE]
    assert closest(made.candidates(2.0).keep(np.array([False, True])), other).tolist() == [ZONE]


@pytest.mark.parametrize("count", [1, 300])
def test_any_number_of_candidates(count: int) -> None:
    made = table(
        *(Endpoint(f"e{i}", f"10.1.{i // 250}.{i % 250}:80", {KEYS["rack"]: str(i % 3)}) for i in range(count))
    )
    found = Closest(Topology())(made.candidates(0.0), at("x", rack="0"))
    assert found.tolist() == [RACK if i % 3 == 0 else 0 for i in range(count)]
