"""Follows all objects of one kind: list once, then watch, as client-go's reflectors do.

In: a path of the API. Out: calls of a sink, which so always holds what the API server holds, a little later.
Rules here:
- Whatever happens to the API server, what is known stays known: a sink is told of changes, never of silence.
- A watch goes on from where the last one ended. Only when the server has forgotten that (410 Gone) is all listed anew,
  and the sink is given the whole list, so that nothing that was missed stays.
- A kind that does not exist (404, in any version) is asked for again and again: CRDs may come later. One that was there
  is believed to be gone only after a while.
- Attempts that fail wait longer and longer, with jitter, so that a server that comes back is not run over. So does what
  leads nowhere without failing: a watch that ends at once, a list that is forgotten before it can be watched.
Source: client-go, tools/cache (reflector: back-off of 0.8 to 30 s, factor 2, jitter 1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, Protocol

from epp.discovery.kube.api import UNREACHABLE, Api, ApiError, Json, Query

FIRST_WAIT: Final = 0.8
LONGEST_WAIT: Final = 30.0
WATCH: Final = 60.0, 120.0
"""A watch ends by itself after a time between these, so that a server that died without a word is noticed."""
SHORTEST: Final = 1.0
"""Seconds that a watch lasts at least in which nothing changes."""
BELIEVED: Final = 3
"""Times in a row, seconds apart, that a kind that was there must be missing: one 404 of whatever stands before the API
server must not empty a pool."""
ABSENT_WAIT: Final = 10.0
"""Seconds between two looks for a kind that does not exist."""


class Sink(Protocol):
    """Who is told."""

    def replace(self, objects: list[Json]) -> None:
        """These are all."""

    def put(self, item: Json) -> None:
        """A new one, or an old one changed."""

    def drop(self, item: Json) -> None:
        """It is gone."""

    def absent(self) -> None:
        """The API server does not know the kind."""


class Informer:
    """One kind in one place."""

    def __init__(
        self,
        api: Api,
        paths: Sequence[str],
        query: Query,
        sink: Sink,
        rng: Random,
        failed: Callable[[str, Exception], None],
    ) -> None:
        """
        Args:
            paths: of the same objects in different versions; the first that the server knows counts.
            query: selectors.
            failed: told of each attempt that failed, with the path.
        """
        self._api = api
        self._paths = tuple(paths)
        self._at = 0
        """Which of the paths."""
        self._query = query
        self._sink = sink
        self._rng = rng
        self._failed = failed
        self._version = ""
        """Where the next watch goes on; "": nowhere, all must be listed."""
        self._wait = FIRST_WAIT
        self._misses = BELIEVED
        """Times in a row that the kind was not there."""
        self.synced = asyncio.Event()
        """Set when the sink has been told of all, or that there is no such kind."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            wait = await self._follow()
            if wait:
                await asyncio.sleep(wait * (1 + self._rng.random()))

    async def _follow(self) -> float:
        """List if need be, and watch until that ends; returns the seconds to wait before the next attempt."""
        is_anew = not self._version
        try:
            if is_anew:
                await self._list()
            await self._watch()
        except ApiError as error:
            if error.status == 410:
                self._version = ""
                if not is_anew:
                    return 0.0
            elif error.status == 404:
                self._version = ""
                self._at = (self._at + 1) % len(self._paths)
                if self._at:
                    return 0.0
                self._misses += 1
                if self._misses >= BELIEVED or not self.synced.is_set():
                    self._sink.absent()
                    self.synced.set()
                    return ABSENT_WAIT
            elif error.status == 403 and not self.synced.is_set():
                self._sink.absent()  # what may not be read is as good as not there; its message names the verb
                self.synced.set()
            self._failed(self._path, error)
        except UNREACHABLE as error:
            self._failed(self._path, error)
        else:
            return 0.0
        wait, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)
        return wait

    @property
    def _path(self) -> str:
        return self._paths[self._at]

    async def _list(self) -> None:
        objects, version = await self._api.list(self._path, self._query)
        self._sink.replace(objects)
        self._version = version
        self._misses = 0
        self.synced.set()

    async def _watch(self) -> None:
        query = {**self._query, "resourceVersion": self._version}
        now = asyncio.get_running_loop().time
        began, is_silent = now(), True
        async for kind, item in self._api.watch(self._path, query, self._rng.uniform(*WATCH)):
            match kind:
                case "ADDED" | "MODIFIED":
                    self._sink.put(item)
                case "DELETED":
                    self._sink.drop(item)
            self._version = item["metadata"]["resourceVersion"]
            self._wait, is_silent = FIRST_WAIT, False
        if is_silent and now() - began < SHORTEST:
            raise ConnectionError("the watch ended at once, without a word")
        self._wait = FIRST_WAIT
