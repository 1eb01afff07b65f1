"""Who may read the metrics port: what was said of a token a while ago, and how many strangers may ask.

In: digests of tokens, verdicts, peers, and `now`. Out: verdicts that still hold; whether one more review may be made.
Rules here:
- An allow and a deny are kept apart, each for its own time and each up to its own number: whoever sends wrong tokens
  pushes no right one out, and a right given later works seconds later.
- A token that was allowed is remembered when its time is over. It has to be reviewed again, but it is no stranger, and
  whatever strangers do keeps no known reader out.
- Strangers' reviews are counted by peer as well as in all: one peer that sends a thousand tokens a second uses up its
  own share, and a scraper whose token has just been renewed is a stranger who has a share of his own.
- Tokens never come here, only their SHA-256.
Source: controller-runtime, `pkg/metrics/filters` (a minute for tokens, 5 minutes and 30 seconds for rights; shorter
here, since it is what a revoked right goes on for).
"""

from __future__ import annotations

from collections import OrderedDict
from http import HTTPStatus
from typing import Final, TypeVar

import msgspec

Key = TypeVar("Key")
Value = TypeVar("Value")

ALLOW_LASTS: Final = 60.0
DENY_LASTS: Final = 10.0
ALLOWED: Final = 256
DENIED: Final = 1024
"""Verdicts remembered; of more the oldest are forgotten."""

PEER_RATE: Final = 1.0
"""Strangers' reviews a second for one peer."""
PEER_BURST: Final = 5
RATE: Final = 16.0
"""The same for all peers together: a flood from everywhere costs the API server no more than this."""
BURST: Final = 32
PEERS: Final = 1024


class Question(msgspec.Struct, frozen=True):
    """May whoever has this token do this?"""

    digest: bytes
    """SHA-256 of the token."""
    verb: str
    """The HTTP method in small letters."""
    path: str


class Verdicts:
    """What was answered, as long as it holds."""

    def __init__(self) -> None:
        self._allowed: OrderedDict[Question, float] = OrderedDict()
        """Until when; entries that are over tell who is no stranger."""
        self._denied: OrderedDict[Question, tuple[HTTPStatus, float]] = OrderedDict()

    def recall(self, question: Question, now: float) -> HTTPStatus | None:
        """The verdict; None: there is none, or its time is over."""
        if now < self._allowed.get(question, now):
            return HTTPStatus.OK
        verdict, until = self._denied.get(question, (None, now))
        return verdict if now < until else None

    def was_allowed(self, question: Question) -> bool:
        """Whether the last verdict was an allow, however old."""
        return question in self._allowed

    def learn(self, question: Question, verdict: HTTPStatus, now: float) -> None:
        """Remember a verdict: OK, UNAUTHORIZED or FORBIDDEN. Any other says that nobody could tell, and is not kept."""
        if verdict is HTTPStatus.OK:
            self._denied.pop(question, None)
            _put(self._allowed, question, now + ALLOW_LASTS, ALLOWED)
        elif verdict in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            self._allowed.pop(question, None)
            _put(self._denied, question, (verdict, now + DENY_LASTS), DENIED)

    def __len__(self) -> int:
        return len(self._allowed) + len(self._denied)


class Allowance:
    """Reviews that may be made for strangers."""

    def __init__(self) -> None:
        self._all = 0.0
        self._peers: OrderedDict[str, float] = OrderedDict()
        """When each will have its whole burst again; one that has it is as one who never asked."""

    def take(self, peer: str, now: float) -> bool:
        """Whether this peer may have one more review; then it is counted.

        Source: the generic cell rate algorithm (ITU-T I.371), the whole bucket in one number.
        """
        own, all_peers = max(now, self._peers.get(peer, now)), max(now, self._all)
        if own - now > (PEER_BURST - 1) / PEER_RATE or all_peers - now > (BURST - 1) / RATE:
            return False
        self._all = all_peers + 1 / RATE
        _put(self._peers, peer, own + 1 / PEER_RATE, PEERS)
        return True

    def __len__(self) -> int:
        return len(self._peers)


def _put(kept: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> None:
    """As the newest; the oldest makes room."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
