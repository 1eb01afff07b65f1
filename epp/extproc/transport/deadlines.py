"""One timer for every stream that waits for its client.

In: a coroutine and when it must be done. Out: its result, or TimeoutError a quarter of a second late at most.
Rejected: asyncio.timeout around each read. It makes and cancels a timer a read, 90 us of CPU a request in `make bench`,
for a deadline that nearly never comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

SWEEP: Final = 0.25
"""Seconds between two looks at who waits too long."""


class Deadlines:
    """Ends waiting at a deadline. Each task waits for one thing at a time."""

    def __init__(self, now: Callable[[], float]) -> None:
        """
        Args:
            now: the clock of the deadlines.
        """
        self._now = now
        self._waiting: dict[asyncio.Task[object], float] = {}
        self._expired: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def before(self, deadline: float, result: Awaitable[T]) -> T:
        """Wait for a result. Raises TimeoutError when the deadline passes first."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = deadline
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP, self._sweep)
        try:
            return await result
        except asyncio.CancelledError:
            if task not in self._expired or task.uncancel():  # somebody else cancels it too
                raise
            raise TimeoutError from None
        finally:
            del self._waiting[task]
            self._expired.discard(task)

    def _sweep(self) -> None:
        self._timer = None
        now = self._now()
        for task, deadline in self._waiting.items():
            if deadline <= now and task not in self._expired:
                self._expired.add(task)
                task.cancel()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(SWEEP, self._sweep)
