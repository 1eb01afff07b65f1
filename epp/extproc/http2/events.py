"""What a connection tells: calls, in the order in which they happened. A call is named by its stream's number.

For each `CallStarted` there is, unless the owner `end`s the call first, exactly one `CallLost`. Nothing follows it.
"""

from __future__ import annotations

import msgspec


class CallStarted(msgspec.Struct, frozen=True, gc=False):
    stream: int
    path: str
    """"/package.Service/Method"."""


class MessageReceived(msgspec.Struct, frozen=True, gc=False):
    stream: int
    data: bytes


class CallEnded(msgspec.Struct, frozen=True, gc=False):
    """The peer has said all that it will say, and waits for the rest of the answer."""

    stream: int


class CallLost(msgspec.Struct, frozen=True, gc=False):
    """Nobody waits for an answer any more: the peer reset the stream, broke a rule, ran out of time, or is gone."""

    stream: int


Event = CallStarted | MessageReceived | CallEnded | CallLost
