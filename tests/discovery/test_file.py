"""Endpoints from a file: what is read, what is refused and where, and what a change does."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from epp.config.document import ConfigErrors
from epp.discovery import file as discovery
from epp.discovery.file import FileDiscovery, read_entries
from epp.endpoints.table import EndpointTable
from epp.errors import ConfigError

GOOD = """
endpoints:
- {name: a, address: 10.0.0.1, port: "8000", labels: {llm-d.ai/engine-type: vllm}}
- {name: b, namespace: other, address: "fd00:0:0::1", port: 8001}
"""


def addresses(table: EndpointTable) -> list[str]:
    return [table.endpoint(slot).address for slot in table.listed.tolist()]


def errors(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as raised:
        read_entries(text, "endpoints.yaml")
    return [str(error) for error in raised.value.errors]


def test_yaml_and_json_say_the_same() -> None:
    as_json = json.dumps({"endpoints": [{"name": "a", "address": "10.0.0.1", "port": "8000"}]})
    (entry,) = read_entries(as_json)
    assert (entry.name, entry.host, entry.port) == ("default/a", "10.0.0.1", 8000)
    first, second = read_entries(GOOD)
    assert first.labels == {"llm-d.ai/engine-type": "vllm"}
    assert second.endpoint("fd00:0:0::1").address == "[fd00::1]:8001"
    assert second.name == "other/b"


def test_labels_say_where_metrics_are() -> None:
    (entry,) = read_entries(
        "endpoints: [{name: a, address: 10.0.0.1, port: 1, labels: {metricsAddress: 'fd00::2', metricsPort: '9'}}]"
    )
    assert entry.endpoint("10.0.0.1").metrics_address == "[fd00::2]:9"
    (entry,) = read_entries("endpoints: [{name: a, address: 10.0.0.1, port: 1, labels: {metricsPort: '9'}}]")
    assert entry.endpoint("10.0.0.1").metrics_address == "10.0.0.1:9"


def test_every_mistake_is_told_with_its_line() -> None:
    text = """endpoints:
- {name: a, address: 10.0.0.256, port: 8000}
- {name: b, address: 10.0.0.1, port: 99999}
- {address: 10.0.0.2, port: 1}
- {name: c, adress: 10.0.0.3, port: 1}
- nonsense
"""
    found = errors(text)
    assert [error.split(": ")[0] for error in found] == [
        "endpoints.yaml:2:22",
        "endpoints.yaml:3:38",
        "endpoints.yaml:4:3",
        "endpoints.yaml:5:3",
        "endpoints.yaml:5:13",
        "endpoints.yaml:6:3",
    ]
    assert "'10.0.0.256' is neither an IP address nor a DNS name" in found[0]
    assert "expected a port from 1 to 65535, not '99999'" in found[1]
    assert "name is missing" in found[2]
    assert "did you mean address?" in found[4]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the file is empty"),
        ("{}", "endpoints is missing"),
        ("[1]", "expected fields"),
        ("endpoints: 3", "expected a list"),
        ("endpoints: [", "not YAML"),
        (
            "endpoints: [{name: a, address: 10.0.0.1, port: 1}, {name: a, address: 10.0.0.2, port: 1}]",
            "the name is the",
        ),
        ("endpoints: [{name: a, address: 10.0.0.1, port: 1}, {name: b, address: 10.0.0.1, port: 1}]", "the address is"),
        (
            "endpoints: [{name: a, address: 'fd00::1', port: 1}, {name: b, address: 'FD00:0::1', port: 1}]",
            "the address is the same as that of line 1",
        ),
        ("endpoints: [{name: a, address: -x, port: 1}]", "neither an IP address nor"),
        (
            "endpoints: [{name: a, address: 10.0.0.1, port: 1, labels: {metricsAddress: 'a b'}}]",
            "the label metricsAddress must be an IP address or a DNS name",
        ),
        ("endpoints: [{name: a, address: 10.0.0.1, port: " + "9" * 5000 + "}]", "expected a port"),
        ("endpoints: [{name: a, address: 10.0.0.1, port: 1, labels: {metricsPort: no}}]", "labels"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, what: str) -> None:
    assert what in errors(text)[0]


def test_no_endpoints_are_allowed_when_that_is_said() -> None:
    assert read_entries("endpoints: []") == ()


@pytest.mark.anyio
async def test_a_file_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        await FileDiscovery(tmp_path / "none.yaml", False, EndpointTable(), time.monotonic).begin()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        await FileDiscovery(tmp_path / "binary.yaml", False, EndpointTable(), time.monotonic).begin()
    (tmp_path / "large.yaml").write_text("#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        await FileDiscovery(tmp_path / "large.yaml", False, EndpointTable(), time.monotonic).begin()


@pytest.mark.anyio
async def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        await FileDiscovery(tmp_path / "deep.yaml", False, EndpointTable(), time.monotonic).begin()


@pytest.mark.anyio
async def test_of_two_entries_that_lead_to_one_address_the_first_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints: [{name: a, address: 127.0.0.1, port: 8}, {name: b, address: localhost, port: 8}]")
    table = EndpointTable()
    reading = FileDiscovery(path, False, table, time.monotonic)
    await reading.begin()
    assert table.endpoint(0).name == "default/a"
    assert addresses(table).count("127.0.0.1:8") == 1
    listed = table.listed
    await reading.begin()
    assert table.listed is listed
    assert [record.getMessage() for record in caplog.records] == [
        "endpoint default/b-127.0.0.1: 127.0.0.1:8 is that of default/a already; this one is left out"
    ]


@pytest.mark.anyio
async def test_a_name_is_looked_up_again_and_keeps_what_it_had_when_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "WATCH_INTERVAL", 0.001)
    monkeypatch.setattr(discovery, "LOOKUP_INTERVAL", 0.001)
    caplog.set_level("INFO")
    answers = [["10.0.0.1", "10.0.0.2"], ["10.0.0.3", "10.0.0.2", "fd00::1"], [], [], ["10.0.0.9"]]
    listed: list[dict[str, int]] = []
    table = EndpointTable()

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        listed.append({table.endpoint(slot).address: table.generation(slot) for slot in table.listed.tolist()})
        found = answers[min(len(listed), len(answers)) - 1]
        if not found:
            raise OSError(-3, "try again")
        return [(0, 0, 0, "", (ip, port)) for ip in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints: [{name: a, address: pods.example, port: 80}]")
    reading = FileDiscovery(path, False, table, time.monotonic)
    await reading.begin()
    following = asyncio.create_task(reading.run())
    async with asyncio.timeout(5):
        while len(listed) < 6:
            await asyncio.sleep(0.001)
    following.cancel()
    assert [sorted(addresses) for addresses in listed[1:6]] == [
        ["10.0.0.1:80", "10.0.0.2:80"],
        ["10.0.0.2:80", "10.0.0.3:80", "[fd00::1]:80"],
        ["10.0.0.2:80", "10.0.0.3:80", "[fd00::1]:80"],
        ["10.0.0.2:80", "10.0.0.3:80", "[fd00::1]:80"],
        ["10.0.0.9:80"],
    ]
    assert listed[1]["10.0.0.2:80"] == listed[4]["10.0.0.2:80"]
    begins, ends = (record.getMessage() for record in caplog.records)
    assert begins == (
        "endpoint default/a: pods.example cannot be looked up (try again); its last 3 addresses stay in use"
    )
    assert ends.startswith("endpoint default/a: no longer so: ")


@pytest.mark.anyio
async def test_a_name_stands_for_all_its_addresses(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints: [{name: a, address: localhost, port: 8000}]")
    table = EndpointTable()
    await FileDiscovery(path, False, table, time.monotonic).begin()
    assert "127.0.0.1:8000" in addresses(table)
    assert {table.endpoint(slot).name.rpartition("-")[0] for slot in table.listed.tolist()} == {"default/a"}


@pytest.mark.anyio
async def test_a_name_that_nobody_knows_is_no_reason_to_stop(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    text = "endpoints: [{name: a, address: name.invalid, port: 1}, {name: b, address: 10.0.0.1, port: 1}]"
    path.write_text(text)
    table = EndpointTable()
    await FileDiscovery(path, False, table, time.monotonic).begin()
    assert addresses(table) == ["10.0.0.1:1"]


@pytest.mark.anyio
async def test_changes_are_followed_and_bad_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "WATCH_INTERVAL", 0.001)
    path = tmp_path / "endpoints.yaml"
    path.write_text(GOOD)
    table = EndpointTable()
    watching = FileDiscovery(path, True, table, time.monotonic)
    await watching.begin()
    assert addresses(table) == ["10.0.0.1:8000", "[fd00::1]:8001"]
    following = asyncio.create_task(watching.run())

    async def until(expected: list[str]) -> None:
        async with asyncio.timeout(5):
            while addresses(table) != expected:
                await asyncio.sleep(0.001)

    path.write_text("endpoints: [{name: c, address: 10.0.0.3, port: 3}]")  # in place
    await until(["10.0.0.3:3"])
    (tmp_path / "next").write_text("endpoints: [{name: d, address: 10.0.0.4, port: 4}]")
    os.replace(tmp_path / "next", path)  # renamed into place
    await until(["10.0.0.4:4"])
    path.write_text("endpoints: [{name: d, address: 10.0.0.4, port: none}]")
    async with asyncio.timeout(5):
        while not watching.failed_reloads:
            await asyncio.sleep(0.001)
    path.unlink()
    async with asyncio.timeout(5):
        while watching.failed_reloads < 2:
            await asyncio.sleep(0.001)
    assert addresses(table) == ["10.0.0.4:4"]
    (tmp_path / "target").write_text("endpoints: [{name: e, address: 10.0.0.5, port: 5}]")
    path.symlink_to(tmp_path / "target")
    await until(["10.0.0.5:5"])
    (tmp_path / "other").write_text("endpoints: [{name: f, address: 10.0.0.6, port: 6}]")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    os.replace(tmp_path / "link", path)  # how a mounted ConfigMap changes
    await until(["10.0.0.6:6"])
    following.cancel()
