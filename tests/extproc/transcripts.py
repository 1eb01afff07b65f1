"""Transcripts: what goes into an exchange and what must come out, as readable files.

One line each: `>` an event goes in, `<` an action must come out, in order; `!` a ProtocolError whose message contains
the rest of the line; `#` why. The words are those of `epp.extproc.events` and `actions`; a few short names stand for
header lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from epp.errors import NoEndpoint
from epp.extproc import actions, events
from epp.extproc.actions import Action, AskDecision, Finished, Report, SendImmediateResponse
from epp.extproc.events import BodyMode, Event, Part
from epp.extproc.exchange import Limits
from epp.ticket import Outcome

FOLDER = Path(__file__).parent.parent / "transcripts"
LIMITS = Limits(max_body=200_000)


class Immediate(msgspec.Struct, frozen=True):
    """Stands for SendImmediateResponse in transcripts: its text and headers belong to the dialects' tests."""

    status: int


Inside = AskDecision | Report | Finished
"""Actions that Envoy does not see."""


class Step(msgspec.Struct, frozen=True):
    """One event and everything that must follow from it."""

    event: Event
    expected: tuple[Action | Immediate, ...]
    error: str | None
    line: int


class Transcript(msgspec.Struct, frozen=True):
    name: str
    steps: tuple[Step, ...]


WORDS: dict[str, Any] = {
    **{name: value for name, value in vars(events).items() if name[0].isupper()},
    **{name: value for name, value in vars(actions).items() if name[0].isupper()},
    **{mode.name: mode for mode in BodyMode},
    **{part.name: part for part in Part},
    **{outcome.name: outcome for outcome in Outcome},
    "NoEndpoint": NoEndpoint,
    "Immediate": Immediate,
    "POST": ((":method", b"POST"), (":path", b"/v1/completions"), ("content-type", b"application/json")),
    "UNKNOWN_PATH": ((":method", b"POST"), (":path", b"/unknown"), ("content-type", b"text/plain")),
    "GET": ((":method", b"GET"), (":path", b"/v1/models")),
    "WEBSOCKET": ((":method", b"GET"), (":path", b"/v1/realtime"), ("upgrade", b"websocket")),
    "OK": ((":status", b"200"), ("content-type", b"application/json")),
    "BAD": ((":status", b"400"), ("content-type", b"text/plain")),
    "UNAVAILABLE": ((":status", b"503"), ("content-type", b"text/plain")),
    "SWITCHING": ((":status", b"101"), ("upgrade", b"websocket")),
}


def load(path: Path) -> Transcript:
    """Read one transcript. Raises ValueError naming the line that is none."""
    steps: list[Step] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        kind, _, rest = line.partition(" ")
        if kind == ">":
            steps.append(Step(eval(rest, WORDS), (), None, number))
        elif kind == "<":
            last = steps[-1]
            steps[-1] = msgspec.structs.replace(last, expected=(*last.expected, eval(rest, WORDS)))
        elif kind == "!":
            steps[-1] = msgspec.structs.replace(steps[-1], error=rest)
        elif kind and kind != "#":
            raise ValueError(f"{path.name}:{number}: not a line of a transcript: {line}")
    return Transcript(path.stem, tuple(steps))


def seen(action: Action) -> Action | Immediate:
    """An action as transcripts write it."""
    return Immediate(action.status) if isinstance(action, SendImmediateResponse) else action


ALL = [load(path) for path in sorted(FOLDER.glob("*.txt"))]
