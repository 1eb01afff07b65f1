"""An open-loop load client for any OpenAI-compatible endpoint: asks when it is time, whatever has been answered.

In: arrivals in the order of time, a URL. Out: one `Result` an arrival, live counts for whoever looks.
Rules here:
- A request that is late is sent late and its lateness is kept; none is skipped, and none waits for another.
- Every request ends in exactly one result, with a kind of error or none.
- Times to tokens are measured from when the request was due: a client that cannot keep up does not flatter the server.
- The client measures its own event loop's lag (`delay.py`); where that is not small, the figures are the client's.
- A body is written before its request is due: what it costs to write a long one makes nothing late that is alone.
- Nothing that one answer says changes what the next request is: no cookies are kept (a gateway would take the whole
  load for one user, and send it to one server), no redirect is followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import re
import time
from collections.abc import Callable, Iterable
from typing import Final

import aiohttp
import msgspec

from epp.errors import ConfigError
from epp.load.delay import watch_loop
from epp.load.results import Result
from epp.load.stream import StreamedAnswer
from epp.sim.workload import Arrival

PATH: Final = "/v1/chat/completions"
KEEPALIVE: Final = 4.0
"""Seconds that an idle connection is kept: less than the 5 s after which vLLM's server closes it, as a request sent
into a closing connection would be an error of nobody's making."""

REFUSAL_BYTES: Final = 1 << 16
"""Of an answer that is an error: read so far, so that its connection can be used again; one with more is given up."""

LARGE_BYTES: Final = 1 << 20
"""Bodies over this are sent piece by piece; in one they hold up the event loop, of which aiohttp warns."""


_NAME: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""Of a header (RFC 9110, token)."""
NO_SOCKET: Final = "no_socket"
"""Kind of error: this machine has no more files, or no more ports. The server has no part in it."""
_NO_SOCKET: Final = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)


class Client(msgspec.Struct, frozen=True):
    """How this client asks."""

    answer_within: float = 120.0
    """Seconds from sending to the end of the answer, then it is given up."""
    served_by: str = "x-served-by"
    """Header of an answer that names the server which gave it."""
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request, as for authentication."""


def parse_header(text: str) -> tuple[str, str]:
    """Read "name: value".

    Raises:
        ConfigError: there is no name, or it or the value cannot be sent.
    """
    name, colon, value = (part.strip() for part in text.partition(":"))
    if not colon or not re.fullmatch(_NAME, name) or not value.isprintable():
        raise ConfigError(f"--header {text!r}: expected as in 'authorization: Bearer TOKEN'")
    return name, value


class Load:
    """One run's live picture."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        """In the order in which they ended."""
        self.sent = 0
        self.errors = 0
        self.lateness_max = 0.0
        """Seconds that a request was sent after it was due, at most."""
        self.lag: list[float] = []
        """Seconds that the event loop was late, sampled."""
        self.began = 0.0
        """By the run's clock."""
        self.all_sent = asyncio.Event()

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
    client: Client = Client(),  # noqa: B008 - frozen
    clock: Callable[[], float] = time.monotonic,
) -> Load:
    """Send every arrival when it is due and wait for all answers.

    Args:
        arrivals: in the order of time; may be endless, then the run ends when it is cancelled.
        url: `http://host:port` of a gateway or a model server; a path before `/v1` is kept.
        load: filled while the run goes on; None: a new one.
        start: `clock()` of second 0, so that several runs begin together; None: now.
        clock: seconds from any zero.

    Returns:
        `load`, complete.
    """
    load = Load() if load is None else load
    load.began = start = clock() if start is None else start
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE)
    limits = aiohttp.ClientTimeout(total=client.answer_within)
    async with (
        aiohttp.ClientSession(
            connector=connector, timeout=limits, headers=client.headers, cookie_jar=aiohttp.DummyCookieJar()
        ) as session,
        asyncio.TaskGroup() as tasks,
    ):
        asker = _Asker(session, asked_at(url), client, load, start, clock)
        lag = tasks.create_task(watch_loop(clock, load.lag))
        asked = set[asyncio.Task[None]]()
        for arrival in arrivals:
            body = _body(arrival)
            await asyncio.sleep(max(0.0, start + arrival.at - clock()))  # late: at once, after the others
            task = tasks.create_task(asker.ask(arrival, body))
            asked.add(task)
            task.add_done_callback(asked.discard)
        load.all_sent.set()
        if asked:
            await asyncio.wait(asked)
        lag.cancel()
    return load


def asked_at(url: str) -> str:
    """Where chats are asked for, of a URL as people have it: with or without `/v1`, or with the whole path."""
    return url.rstrip("/").removesuffix(PATH).removesuffix("/v1") + PATH


class _Asker:
    """Asks for one run."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        client: Client,
        load: Load,
        start: float,
        clock: Callable[[], float],
    ) -> None:
        self._session, self._url, self._client, self._load = session, url, client, load
        self._start, self._clock = start, clock

    def _now(self) -> float:
        """Seconds from the start."""
        return self._clock() - self._start

    async def ask(self, arrival: Arrival, body: bytes) -> None:
        """Send one request, and leave its result."""
        sent_at = self._now()
        self._load._begin(sent_at - arrival.at)
        answer = _Answer()
        error = "cancelled"
        try:
            error = await self._read(arrival, body, answer)
        except TimeoutError:
            error = "timeout"
        except aiohttp.ClientConnectorCertificateError:
            error = "certificate"
        except aiohttp.ClientConnectorError as failed:
            error = NO_SOCKET if failed.errno in _NO_SOCKET else "connect"
        except (aiohttp.ClientError, ConnectionError):
            error = "reset"
        finally:
            self._load._end(answer.result(arrival, sent_at, self._now(), error))

    async def _read(self, arrival: Arrival, body: bytes, answer: _Answer) -> str:
        """Returns the kind of error; empty: none."""
        headers = {"content-type": "application/json", "x-llm-d-inference-fairness-id": arrival.tenant}
        data = body if len(body) <= LARGE_BYTES else io.BytesIO(body)
        async with self._session.post(self._url, data=data, headers=headers, allow_redirects=False) as response:
            answer.status = response.status
            answer.served_by = response.headers.get(self._client.served_by, "")
            if response.status != 200:
                with contextlib.suppress(EOFError, TimeoutError, aiohttp.ClientError, ConnectionError):
                    await response.content.readexactly(REFUSAL_BYTES)
                return f"http_{response.status}"
            async for piece in response.content.iter_any():
                answer.stream.feed(piece, self._now())
        return answer.stream.end(self._now())


class _Answer:
    """One answer as it comes in."""

    def __init__(self) -> None:
        self.status = 0
        self.served_by = ""
        self.stream = StreamedAnswer()

    def result(self, arrival: Arrival, sent_at: float, ended_at: float, error: str) -> Result:
        stream = self.stream
        usage = stream.usage
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
            ttft=None if stream.first_at is None else stream.first_at - arrival.at,
            itl_mean=stream.itl_mean,
            itl_max=stream.pause_max if stream.itl_mean is not None else None,
            prompt_tokens=(usage and usage.prompt_tokens) or 0,
            completion_tokens=stream.completion_tokens,
            cached_tokens=usage.cached_tokens if usage else 0,
            served_by=self.served_by,
        )


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
