"""Recorded traffic as a workload: lengths and shared beginnings are the trace's, the words are ours.

In: a trace file by its path. Out: its requests in the order of time, and `Arrival`s made of them one by one.
Rules here:
- A prompt is one user message. Where the trace names the blocks of a prompt, each name is its own 512 tokens of text,
  so prompts share as long a beginning as their block names do; where it does not, nothing is shared.
- Prompts have as many tokens as the trace says, what the chat template adds included; the shortest has one token more
  than that.
- What cannot be so is refused at its line: fewer tokens than none, more than `MOST_TOKENS`, more names of blocks than
  the prompt has blocks (then they are of another size, and what is shared would be).
- Times are the trace's own. Mooncake's come in steps of three seconds, so up to 28 requests come at once: that is how
  it was published, and how others replay it.
Source: kvcache-ai/Mooncake, FAST'25 release (timestamp in ms, input_length, output_length, hash_ids of 512 tokens);
Azure/AzurePublicDataset 2023 (TIMESTAMP, ContextTokens, GeneratedTokens).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from epp.errors import ConfigError
from epp.sim import text
from epp.sim.workload import Arrival

BLOCK_TOKENS: Final = 512
"""Of each name in Mooncake's `hash_ids`."""
TEMPLATE_TOKENS: Final = text.count_tokens(text.chat_prompt((("user", ""),)))
"""What the chat template adds to a prompt of one message."""
AZURE_FIELDS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOST_TOKENS: Final = 1_000_000
"""Of a prompt, and of an answer; no engine here holds more, and text is made of them."""

Tokens = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]


class Traced(msgspec.Struct, frozen=True):
    """One request of a trace."""

    at: float
    """Seconds from the first request."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks, the first first; the last one may be cut short. Empty: the trace names none."""


class Trace(msgspec.Struct, frozen=True):
    """All requests of a trace file, at least one."""

    name: str
    requests: tuple[Traced, ...]
    model: str = "qwen3-32b"

    @property
    def rate(self) -> float:
        """Requests a second, on average."""
        return len(self.requests) / self.seconds

    @property
    def seconds(self) -> float:
        """From the first request to the last; at least one."""
        return max(1.0, self.requests[-1].at)

    def arrivals(self, seed: int, duration: float = math.inf, rate: float | None = None) -> Iterator[Arrival]:
        """As `Workload.arrivals`. A trace is the same for every seed; another rate makes it faster or slower."""
        faster = 1.0 if rate is None else rate / self.rate
        for number, request in enumerate(self.requests):
            if request.at / faster >= duration:
                return
            session = f"{number}" if not request.blocks else f"{request.blocks[0]}"
            messages = (("user", _content(request, number)),)
            yield Arrival(request.at / faster, self.name, self.model, messages, request.output_tokens, session)


class _Row(msgspec.Struct):
    """A line of a Mooncake trace."""

    timestamp: float
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.hash_ids) > -(-self.input_length // BLOCK_TOKENS):
            raise ValueError(
                f"{len(self.hash_ids)} hash_ids for {self.input_length} tokens: each must stand for {BLOCK_TOKENS}"
            )


class _Line(msgspec.Struct):
    """A line of an Azure trace."""

    prompt: Tokens
    answer: Tokens


def read_trace(path: str) -> Trace:
    """Read a trace: .csv is Azure's form, anything else Mooncake's JSON lines.

    Raises:
        ConfigError: it cannot be read, or a line is not what its form says.
    """
    file = Path(path)
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=path) from error
    rows = list(_azure(lines, path) if file.suffix.lower() == ".csv" else _mooncake(lines, path))
    if not rows:
        raise ConfigError("there is no request in this trace", file=path)
    rows.sort(key=lambda row: row.at)
    first = rows[0].at
    return Trace(file.stem, tuple(msgspec.structs.replace(row, at=row.at - first) for row in rows))


def _mooncake(lines: Sequence[str], path: str) -> Iterator[Traced]:
    decoder = msgspec.json.Decoder(_Row)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"not a line of a Mooncake trace: {error}", file=path, line=number) from error
        yield Traced(row.timestamp / 1000, row.input_length, max(1, row.output_length), row.hash_ids)


def _azure(lines: Sequence[str], path: str) -> Iterator[Traced]:
    wanted = ",".join(AZURE_FIELDS)
    rows = csv.reader(lines)
    try:
        names = next(rows, [])
        places = [names.index(name) for name in AZURE_FIELDS] if names else []
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"not an Azure trace: the first line must name {wanted}", file=path, line=1) from error
    try:
        for row in rows:
            if row:
                yield _request(*(row[place] for place in places))
    except IndexError as error:
        told = f"not a line of an Azure trace: it ends before it has {wanted}"
        raise ConfigError(told, file=path, line=rows.line_num) from error
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"not a line of an Azure trace: {error}", file=path, line=rows.line_num) from error


def _request(at: str, asked: str, answered: str) -> Traced:
    """Of an Azure trace. Raises ValueError."""
    line = msgspec.convert({"prompt": asked, "answer": answered}, _Line, strict=False)
    # seven digits of a second: one more than datetime reads
    came = datetime.fromisoformat(at[:26]).replace(tzinfo=UTC)
    return Traced(came.timestamp(), line.prompt, max(1, line.answer))


def _content(request: Traced, number: int) -> str:
    """What the user says, of exactly as many tokens as are left beside the template's."""
    size = max(1, request.prompt_tokens - TEMPLATE_TOKENS) * text.TOKEN_BYTES
    if not request.blocks:
        return text.filler(f"request {number}", size)
    block = BLOCK_TOKENS * text.TOKEN_BYTES
    said = "".join(text.filler(f"block {name}", block) for name in request.blocks)
    return said[:size] if len(said) >= size else said + text.filler(f"rest of {number}", size - len(said))
