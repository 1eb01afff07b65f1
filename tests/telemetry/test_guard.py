"""The guard over an authority that the test plays: it says what it knows when the test lets it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from http import HTTPStatus

import pytest

from epp.telemetry.access import BURST, PEER_BURST
from epp.telemetry.guard import UNDER_WAY, WAITING, Guard

pytestmark = pytest.mark.anyio

GOOD = "Bearer good"
UNTIL_ALL_WAIT = 3
"""Turns of the loop after which everybody who was asked waits for what he waits for."""


class Authority:
    """Knows the token "good", and others that a test gives it."""

    def __init__(self) -> None:
        self.rights = {"good": HTTPStatus.OK, "weak": HTTPStatus.FORBIDDEN}
        self.asked: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0
        self.speaks = asyncio.Event()
        self.speaks.set()
        self.is_away = False

    async def review(self, token: str, verb: str, path: str) -> HTTPStatus:
        assert (verb, path) == ("get", "/metrics")
        self.asked[token] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.speaks.wait()
        self.under_way -= 1
        known = self.rights.get(token, HTTPStatus.UNAUTHORIZED)
        return HTTPStatus.INTERNAL_SERVER_ERROR if self.is_away else known


class Door:
    """A guard, its authority and the time."""

    def __init__(self) -> None:
        self.authority = Authority()
        self.now = 1000.0
        self.guard = Guard(self.authority.review, lambda: self.now)

    def ask(self, authorization: str, peer: str = "10.0.0.1") -> Awaitable[HTTPStatus]:
        return self.guard.admit(authorization, "get", "/metrics", peer)

    async def asking(self, authorizations: Sequence[str], peer: str = "10.0.0.1") -> list[asyncio.Task[HTTPStatus]]:
        """Tasks that wait by now for whatever they wait for."""
        tasks = [asyncio.ensure_future(self.ask(each, peer)) for each in authorizations]
        for _ in range(UNTIL_ALL_WAIT):
            await asyncio.sleep(0)
        return [task for task in tasks if isinstance(task, asyncio.Task)]


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "good",
        "Bearer",
        "Bearer ",
        "Bearer  ",
        "Basic good",
        "Bearer good more",
        "Bearer g\xf6\xf6d",
        "Bearer a\x00",
    ],
)
async def test_what_is_no_bearer_token_is_refused_and_bothers_nobody(authorization: str) -> None:
    door = Door()
    assert await door.ask(authorization) is HTTPStatus.UNAUTHORIZED
    assert not door.authority.asked


@pytest.mark.parametrize("authorization", ["Bearer good", "bearer good", "BEARER  good", " Bearer good "])
async def test_the_scheme_is_read_in_any_case(authorization: str) -> None:
    assert await Door().ask(authorization) is HTTPStatus.OK


async def test_the_authority_is_asked_once_in_the_time_of_a_verdict() -> None:
    door = Door()
    for authorization, verdict, lasts in (
        (GOOD, HTTPStatus.OK, 60.0),
        ("Bearer weak", HTTPStatus.FORBIDDEN, 10.0),
        ("Bearer bad", HTTPStatus.UNAUTHORIZED, 10.0),
    ):
        began, token = door.now, authorization.removeprefix("Bearer ")
        for later in (0.0, lasts / 2, lasts - 0.5):
            door.now = began + later
            assert await door.ask(authorization) is verdict
        assert door.authority.asked[token] == 1
        door.now = began + lasts
        assert await door.ask(authorization) is verdict
        assert door.authority.asked[token] == 2


async def test_a_right_that_is_taken_ends_with_its_time_and_one_that_is_given_begins_with_the_denys() -> None:
    door = Door()
    assert await door.ask(GOOD) is HTTPStatus.OK
    assert await door.ask("Bearer late") is HTTPStatus.UNAUTHORIZED
    door.authority.rights = {"late": HTTPStatus.OK}
    door.now += 10.0
    assert await door.ask("Bearer late") is HTTPStatus.OK
    assert await door.ask(GOOD) is HTTPStatus.OK
    door.now += 50.0
    assert await door.ask(GOOD) is HTTPStatus.UNAUTHORIZED


async def test_readers_with_one_token_share_one_review() -> None:
    door = Door()
    door.authority.speaks.clear()
    readers = await door.asking([GOOD] * 20)
    door.authority.speaks.set()
    assert await asyncio.gather(*readers) == [HTTPStatus.OK] * 20
    assert door.authority.asked == {"good": 1}


async def test_a_reader_who_leaves_takes_the_review_from_nobody() -> None:
    door = Door()
    door.authority.speaks.clear()
    first, second = await door.asking([GOOD, GOOD])
    first.cancel()
    await asyncio.sleep(0)
    door.authority.speaks.set()
    assert await second is HTTPStatus.OK
    assert first.cancelled()


async def test_while_the_authority_is_away_an_allow_goes_on_for_its_time_and_nobody_else_is_let_in() -> None:
    door = Door()
    assert await door.ask(GOOD) is HTTPStatus.OK
    door.authority.is_away = True
    door.now += 59.5
    assert await door.ask(GOOD) is HTTPStatus.OK
    assert await door.ask("Bearer other") is HTTPStatus.INTERNAL_SERVER_ERROR
    door.now += 0.5
    assert await door.ask(GOOD) is HTTPStatus.INTERNAL_SERVER_ERROR
    door.authority.is_away = False
    assert await door.ask(GOOD) is HTTPStatus.OK  # at once, nothing was remembered of it


async def test_a_flood_of_wrong_tokens_is_a_few_reviews_and_keeps_no_scraper_out() -> None:
    door = Door()
    assert await door.ask(GOOD, "scraper") is HTTPStatus.OK
    for second in range(120):
        flood = [await door.ask(f"Bearer wrong-{second}-{number}", "flood") for number in range(50)]
        assert set(flood) <= {HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS}
        assert await door.ask(GOOD, "scraper") is HTTPStatus.OK
        door.now += 1.0
    asked = door.authority.asked
    assert asked.pop("good") == 2  # at 0 s and at 60 s
    assert asked.total() == PEER_BURST + 119
    door.authority.rights["renewed"] = HTTPStatus.OK
    assert await door.ask("Bearer renewed", "scraper") is HTTPStatus.OK


async def test_a_flood_from_everywhere_does_not_keep_a_known_scraper_out() -> None:
    """Its allow is over, and the authority answers nobody for a while."""
    door = Door()
    assert await door.ask(GOOD) is HTTPStatus.OK
    door.now += 60.0
    door.authority.speaks.clear()
    waiting = []
    for number in range(BURST + 50):
        waiting += await door.asking([f"Bearer wrong-{number}"], f"10.1.0.{number}")
    scraping = await door.asking([GOOD])
    door.authority.speaks.set()
    statuses = Counter(await asyncio.gather(*waiting))
    assert statuses == {HTTPStatus.UNAUTHORIZED: BURST, HTTPStatus.TOO_MANY_REQUESTS: 50}
    assert await scraping[0] is HTTPStatus.OK
    assert door.authority.most_under_way == BURST + 1


async def test_reviews_of_an_authority_that_hangs_do_not_pile_up() -> None:
    door = Door()
    door.authority.speaks.clear()
    waiting = []
    for second in range(10):
        waiting += await door.asking([f"Bearer wrong-{second}-{number}" for number in range(20)], f"10.1.0.{second}")
        door.now += 1.0
    assert door.authority.under_way == UNDER_WAY
    door.authority.speaks.set()
    assert Counter(await asyncio.gather(*waiting))[HTTPStatus.UNAUTHORIZED] == UNDER_WAY


async def test_those_who_wait_for_one_strangers_review_are_bounded() -> None:
    door = Door()
    door.authority.speaks.clear()
    waiting = await door.asking(["Bearer wrong"] * (WAITING + 30))
    scraping = await door.asking([GOOD], "10.0.0.2")
    door.authority.speaks.set()
    statuses = Counter(await asyncio.gather(*waiting))
    assert statuses == {HTTPStatus.UNAUTHORIZED: WAITING, HTTPStatus.TOO_MANY_REQUESTS: 30}
    assert await scraping[0] is HTTPStatus.OK


async def test_a_review_that_breaks_lets_nobody_in_and_is_not_remembered() -> None:
    async def review(token: str, verb: str, path: str) -> HTTPStatus:
        broken.append(token)
        raise RuntimeError("a mistake of our own")

    broken: list[str] = []
    guard = Guard(review, lambda: 0.0)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await guard.admit(GOOD, "get", "/metrics", "10.0.0.1")
    assert broken == ["good", "good"]
