"""Asks who may read the metrics port, once for all who ask the same at the same time.

In: what a request says of itself. Out: OK, or the status to refuse it with.
Rules here:
- Without a verdict that holds nobody is let in: when nobody can tell (the API server is away), that is a refusal.
- A review is made once for each question under way, and goes on when the reader who began it leaves.
- Strangers are bounded: reviews under way, reviews a second (`epp.telemetry.access`), and those who wait for one.
- A token is in the clear in its own request and in its own review, and nowhere else.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from hashlib import sha256
from http import HTTPStatus
from typing import Final

from epp.telemetry.access import Allowance, Question, Verdicts

Review = Callable[[str, str, str], Awaitable[HTTPStatus]]
"""Of a token, a verb and a path: OK, UNAUTHORIZED (nobody knows the token), FORBIDDEN, or INTERNAL_SERVER_ERROR when
nobody could tell. It takes seconds at most and does not raise."""

UNDER_WAY: Final = 32
"""Reviews at once; above it strangers are told to come back."""
WAITING: Final = 128
"""Readers who wait for a review; above it no more strangers join one."""

_BEARER: Final = re.compile(r"\s*bearer +([!-~]+)\s*", re.ASCII | re.IGNORECASE)


class Guard:
    """Lets readers in, or does not."""

    def __init__(self, review: Review, now: Callable[[], float]) -> None:
        """
        Args:
            now: seconds, monotonic.
        """
        self._review = review
        self._now = now
        self._verdicts = Verdicts()
        self._allowance = Allowance()
        self._under_way: dict[Question, asyncio.Task[HTTPStatus]] = {}
        self._waiting = 0

    async def admit(self, authorization: str, verb: str, path: str, peer: str) -> HTTPStatus:
        """OK; UNAUTHORIZED, FORBIDDEN or INTERNAL_SERVER_ERROR as the review says; TOO_MANY_REQUESTS: it was not made.

        Args:
            authorization: the header's value, "" where there is none.
            peer: the reader's IP address.
        """
        found = _BEARER.fullmatch(authorization)
        if found is None:
            return HTTPStatus.UNAUTHORIZED
        question = Question(sha256(found[1].encode()).digest(), verb, path)
        verdict = self._verdicts.recall(question, self._now())
        if verdict is not None:
            return verdict
        if not self._verdicts.was_allowed(question) and not self._has_room(question, peer):
            return HTTPStatus.TOO_MANY_REQUESTS
        return await self._shared(question, found[1])

    def _has_room(self, question: Question, peer: str) -> bool:
        """For a stranger."""
        if question in self._under_way:
            return self._waiting < WAITING
        return len(self._under_way) < UNDER_WAY and self._allowance.take(peer, self._now())

    async def _shared(self, question: Question, token: str) -> HTTPStatus:
        task = self._under_way.get(question)
        if task is None:
            task = self._under_way[question] = asyncio.create_task(self._ask(question, token))
        self._waiting += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting -= 1

    async def _ask(self, question: Question, token: str) -> HTTPStatus:
        try:
            verdict = await self._review(token, question.verb, question.path)
        finally:
            del self._under_way[question]
        self._verdicts.learn(question, verdict, self._now())
        return verdict
