"""An open-loop load client for any OpenAI-compatible endpoint: asks when it is time, whatever has been answered.

In: arrivals in the order of time, a URL. Out: one `Result` an arrival, live counts for whoever looks.
Rules here:
- A request that is late is sent late and its lateness is kept; none is skipped, and none waits for another.
- Every request ends in exactly one result, with a kind of error or none.
- Times to tokens are measured from when the request was due: a client that cannot keep up does not flatter the server.
- The client measures its own event loop's lag; where that is not small, the figures are the client's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

import aiohttp
import msgspec

from epp.load.results import Result
from epp.sim.workload import Arrival

LAG_INTERVAL: Final = 0.05
TAIL_BYTES: Final = 2048
"""Of an answer that are kept: usage and [DONE] are in them."""


class Load:
    """One run's live picture."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        """In the order in which they ended."""
        self.sent = 0
        self.errors = 0
        self.lateness_max = 0.0
        """Seconds that a request was sent after it was due, at most."""
        self.lag_max = 0.0
        """Seconds that the event loop was late, at most."""

    def __repr__(self) -> str:
        return f"<Load [Sent: {self.sent} | In flight: {self.in_flight} | Errors: {self.errors}]>"

    @property
    def in_flight(self) -> int:
        return self.sent - len(self.results)

    def _begin(self, lateness: float) -> None:
        self.sent += 1
        self.lateness_max = max(self.lateness_max, lateness)

    def _end(self, result: Result) -> None:
        self.errors += bool(result.error)
        self.results.append(result)


async def run_load(
    arrivals: Iterable[Arrival],
    url: str,
    *,
    load: Load | None = None,
    start: float | None = None,
    answer_within: float = 120.0,
) -> Load:
    """Send every arrival when it is due and wait for all answers.

    Args:
        arrivals: in the order of time; may be endless, then the run ends when it is cancelled.
        url: `http://host:port` of a gateway or a model server.
        load: filled while the run goes on; None: a new one.
        start: `time.monotonic()` of second 0, so that several runs begin together; None: now.
        answer_within: seconds from sending to the end of the answer, then it is given up.

    Returns:
        `load`, complete.
    """
    load = Load() if load is None else load
    start = time.monotonic() if start is None else start
    connector = aiohttp.TCPConnector(limit=0)
    limits = aiohttp.ClientTimeout(total=answer_within)
    async with aiohttp.ClientSession(url, connector=connector, timeout=limits) as session, asyncio.TaskGroup() as tasks:
        lag = tasks.create_task(_measure_lag(load))
        asked = set[asyncio.Task[None]]()
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, start + arrival.at - time.monotonic()))  # late: at once, after the others
            task = tasks.create_task(_ask(session, arrival, load, start))
            asked.add(task)
            task.add_done_callback(asked.discard)
        if asked:
            await asyncio.wait(asked)
        lag.cancel()
    return load


async def _ask(session: aiohttp.ClientSession, arrival: Arrival, load: Load, start: float) -> None:
    sent_at = time.monotonic() - start
    load._begin(sent_at - arrival.at)
    answer = _Answer()
    error = "cancelled"
    try:
        error = await answer.read(session, arrival)
    except TimeoutError:
        error = "timeout"
    except aiohttp.ClientConnectorError:
        error = "connect"
    except (aiohttp.ClientError, ConnectionError):
        error = "reset"
    finally:
        load._end(answer.result(arrival, start, sent_at, time.monotonic() - start, error))


class _Answer:
    """One answer as it comes in."""

    def __init__(self) -> None:
        self.status = 0
        self.served_by = ""
        self.times: list[float] = []
        """When pieces of the stream came."""
        self.tail = b""

    async def read(self, session: aiohttp.ClientSession, arrival: Arrival) -> str:
        """Returns the kind of error; empty: none."""
        headers = {"content-type": "application/json", "x-llm-d-inference-fairness-id": arrival.tenant}
        async with session.post("/v1/chat/completions", data=_body(arrival), headers=headers) as response:
            self.status = response.status
            self.served_by = response.headers.get("x-served-by", "")
            if response.status != 200:
                await response.read()
                return f"http_{response.status}"
            async for chunk in response.content.iter_any():
                self.times.append(time.monotonic())
                self.tail = (self.tail + chunk)[-TAIL_BYTES:]
        return "" if self.tail.rstrip().endswith(b"data: [DONE]") else "truncated"

    def result(self, arrival: Arrival, start: float, sent_at: float, ended_at: float, error: str) -> Result:
        times, usage = self.times, read_usage(self.tail)
        pauses = [later - earlier for earlier, later in pairwise(times)]
        return Result(
            tenant=arrival.tenant,
            model=arrival.model,
            session=arrival.session,
            turn=arrival.turn,
            scheduled_at=arrival.at,
            sent_at=sent_at,
            ended_at=ended_at,
            error=error,
            status=self.status,
            ttft=times[0] - start - arrival.at if times else None,
            itl_mean=sum(pauses) / len(pauses) if pauses else None,
            itl_max=max(pauses, default=None),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0,
            served_by=self.served_by,
        )


class CachedTokens(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """OpenAI's, as far as it is read here."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None


class _Event(msgspec.Struct):
    usage: Usage | None = None


_event = msgspec.json.Decoder(_Event)


def read_usage(tail: bytes) -> Usage:
    """Usage in the last event that has one; zeros where there is none."""
    at = tail.rfind(b'"usage":')
    begin = tail.rfind(b"data: ", 0, at) if at >= 0 else -1
    if begin < 0:
        return Usage()
    try:
        return _event.decode(tail[begin + len(b"data: ") :].partition(b"\n")[0]).usage or Usage()
    except msgspec.DecodeError:
        return Usage()


def _body(arrival: Arrival) -> bytes:
    return msgspec.json.encode(
        {
            "model": arrival.model,
            "messages": [{"role": role, "content": content} for role, content in arrival.messages],
            "max_tokens": arrival.max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def _measure_lag(load: Load) -> None:
    while True:
        due = time.monotonic() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        load.lag_max = max(load.lag_max, time.monotonic() - due)
