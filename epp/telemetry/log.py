"""What the operator reads: one line a problem, none a request.

In: records of the standard library's logging. Out: JSON lines or console lines on standard error.
Rules here:
- A problem that repeats is one line, and then one with a count.
- A line is one line: what a client or a server sent cannot break it into two, or colour a terminal.
- Nothing of a body, of a credential or of a certificate's key is ever handed to a logger.
Keys of the JSON lines are those of the reference's logger (zap): level, ts, logger, msg, stacktrace.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TextIO

ROOT: Final = "epp"
LONGEST: Final = 4096
"""Characters of one message; what follows is cut."""
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def set_up(encoder: str, verbosity: int, stream: TextIO | None = None) -> None:
    """Send everything logged to `stream`, standard error when None. Calling it again replaces what was set up.

    Args:
        encoder: "json" or "console" (`--zap-encoder`).
        verbosity: `-v`; see `level_of`.

    Raises:
        ValueError: no such encoder.
    """
    if encoder not in FORMATTERS:
        raise ValueError(f"--zap-encoder is {encoder!r}; it must be one of {', '.join(FORMATTERS)}")
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(FORMATTERS[encoder]())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(ROOT).setLevel(level_of(verbosity))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a warning for each broken form that a client sends


def level_of(verbosity: int) -> int:
    """Level for `-v`: 0 and less warnings, 1 to 3 information, 4 and more debugging (the reference's V-levels)."""
    if verbosity <= 0:
        return logging.WARNING
    return logging.INFO if verbosity < 4 else logging.DEBUG


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "level": record.levelname.lower(),
            "ts": _iso(record.created),
            "logger": record.name,
            "msg": record.getMessage()[:LONGEST],
        }
        if record.exc_info:
            line["stacktrace"] = self.formatException(record.exc_info)
        return json.dumps(line)


class ConsoleFormatter(logging.Formatter):
    """Time, level, logger and message; a mistake of our own is followed by its trace, in lines that are indented."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()[:LONGEST].translate(_CONTROL)
        lines = [f"{_iso(record.created)}  {record.levelname:7}  {record.name}  {message}"]
        if record.exc_info:
            lines += (line.translate(_CONTROL) for line in self.formatException(record.exc_info).split("\n"))
        return "\n    ".join(lines)


FORMATTERS: Final[dict[str, type[logging.Formatter]]] = {"json": JsonFormatter, "console": ConsoleFormatter}


class Problems:
    """Tells a problem once, and then again at most every `every` seconds, with how often it was seen meanwhile."""

    def __init__(
        self,
        logger: logging.Logger,
        now: Callable[[], float] = time.monotonic,
        every: float = 60.0,
        remembered: int = 256,
    ) -> None:
        """
        Args:
            now: seconds, monotonic.
            remembered: different problems; the one not told for longest is forgotten first.
        """
        self._logger = logger
        self._now = now
        self._every = every
        self._remembered = remembered
        self._told: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """By problem: when it was told last, and how often it was seen since."""

    def tell(
        self, problem: str, message: str, *args: object, level: int = logging.WARNING, error: Exception | None = None
    ) -> None:
        """Log the message, or count it when the same problem was told a short while ago.

        Args:
            problem: what makes two lines the same one.
            message: %-format for `args`, as everywhere in logging.
            error: a mistake of our own, whose trace is worth its lines.
        """
        now = self._now()
        told_at, held = self._told.get(problem, (None, 0))
        if told_at is not None and now - told_at < self._every:
            self._told[problem] = told_at, held + 1
            return
        self._told[problem] = now, 0
        self._told.move_to_end(problem)
        if len(self._told) > self._remembered:
            self._told.popitem(last=False)
        if held and told_at is not None:
            message, args = f"{message} (and %d times more in the %.0f s before)", (*args, held, now - told_at)
        self._logger.log(level, message, *args, exc_info=error)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
