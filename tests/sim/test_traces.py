"""Traces of the published forms, written here: none of the published data is in this project."""

from __future__ import annotations

from pathlib import Path

import pytest

from epp.errors import ConfigError
from epp.sim import text
from epp.sim.traces import Trace, read_trace

MOONCAKE = """\
{"timestamp": 0, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 1030, "output_length": 3, "hash_ids": [0, 1, 3]}
{"timestamp": 6000, "input_length": 600, "output_length": 0, "hash_ids": [4, 5]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4799600,110,27
"""

ROW = '{"timestamp": 0, "input_length": %d, "output_length": %d, "hash_ids": %s}'


def written(tmp_path: Path, name: str, content: str) -> Trace:
    path = tmp_path / name
    path.write_text(content)
    return read_trace(str(path))


def test_mooncake_requests_come_when_and_as_long_as_the_trace_says(tmp_path: Path) -> None:
    arrivals = list(written(tmp_path, "conversation.jsonl", MOONCAKE).arrivals(1))
    assert [arrival.at for arrival in arrivals] == [0.0, 3.0, 6.0]
    assert [text.count_tokens(text.chat_prompt(arrival.messages)) for arrival in arrivals] == [1100, 1030, 600]
    assert [arrival.max_tokens for arrival in arrivals] == [50, 3, 1]  # an answer has one token at least


def test_mooncake_prompts_share_what_their_blocks_share(tmp_path: Path) -> None:
    """The first two share two blocks of 512 tokens, behind 3 of the template: 1,027 tokens, 64 whole blocks of 16."""
    first, second, third = (
        text.block_keys(text.chat_prompt(arrival.messages), 16)
        for arrival in written(tmp_path, "conversation.jsonl", MOONCAKE).arrivals(1)
    )
    assert first[:64] == second[:64]
    assert not set(first[64:]) & set(second[64:])
    assert not set(first) & set(third)


def test_azure_requests_share_nothing(tmp_path: Path) -> None:
    trace = written(tmp_path, "code.csv", AZURE)
    arrivals = list(trace.arrivals(1))
    assert [arrival.at for arrival in arrivals] == [0.0, pytest.approx(0.5)]
    assert [text.count_tokens(text.chat_prompt(arrival.messages)) for arrival in arrivals] == [4808, 110]
    assert [arrival.max_tokens for arrival in arrivals] == [10, 27]
    one, other = (text.block_keys(text.chat_prompt(arrival.messages), 16) for arrival in arrivals)
    assert not set(one) & set(other)


def test_another_rate_makes_a_trace_faster_and_loses_nothing(tmp_path: Path) -> None:
    """Three requests in six seconds are half a request a second."""
    trace = written(tmp_path, "conversation.jsonl", MOONCAKE)
    assert trace.rate == 0.5
    assert [arrival.at for arrival in trace.arrivals(1, rate=1.0)] == [0.0, 1.5, 3.0]
    assert [arrival.at for arrival in trace.arrivals(1, duration=3.1)] == [0.0, 3.0]


def test_lines_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    lines = MOONCAKE.splitlines(keepends=True)
    assert written(tmp_path, "a.jsonl", "".join(reversed(lines))) == written(tmp_path, "a.jsonl", MOONCAKE)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", MOONCAKE), ("a.csv", AZURE)])
def test_a_trace_from_another_system_is_the_same_trace(tmp_path: Path, name: str, content: str) -> None:
    """A byte order mark, line ends of two characters, a suffix in capitals."""
    same = written(tmp_path, name, content).requests
    for changed in ("\ufeff" + content, content.replace("\n", "\r\n"), content + "\n\n"):
        assert written(tmp_path, name, changed).requests == same
    assert written(tmp_path, name.upper(), content).requests == same


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", MOONCAKE + '{"timestamp": "soon"}\n', r"a\.jsonl:4: not a line of a Mooncake trace"),
        ("a.jsonl", "\n", "no request"),
        ("a.jsonl", MOONCAKE[:-9], r"a\.jsonl:3: .*truncated"),
        ("a.jsonl", ROW % (-1, 5, "[]"), r"a\.jsonl:1: .*Expected `int` >= 0 - at `\$\.input_length`"),
        ("a.jsonl", ROW % (5, -1, "[]"), r">= 0 - at `\$\.output_length`"),
        ("a.jsonl", ROW % (10**10, 5, "[]"), r"<= 1000000 - at `\$\.input_length`"),
        ("a.jsonl", ROW % (1024, 5, "[1, 2, 3]"), r"a\.jsonl:1: .*3 hash_ids for 1024 tokens: each must stand for 512"),
        ("a.csv", "when,what\n1,2\n", r"a\.csv:1: not an Azure trace: the first line must name TIMESTAMP,"),
        ("a.csv", MOONCAKE, r"a\.csv:1: not an Azure trace"),
        ("a.csv", AZURE.replace("110", "many"), r"a\.csv:3: not a line of an Azure trace"),
        ("a.csv", AZURE.replace("110", "-110"), r"a\.csv:3: not a line of an Azure trace: .* >= 0"),
        ("a.csv", AZURE.replace("110,27", "110"), r"a\.csv:3: not a line of an Azure trace: it ends before"),
        ("a.csv", AZURE + "x" * 200_000, r"a\.csv:4: not a line of an Azure trace: field larger"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        written(tmp_path, name, content)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: cannot be read"):
        read_trace("nowhere.jsonl")
