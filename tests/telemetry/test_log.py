from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from epp.telemetry.log import Problems, level_of, set_up


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    root, ours = logging.getLogger(), logging.getLogger("epp")
    before = root.handlers[:], root.level, ours.level
    yield logging.getLogger("epp.test")
    root.handlers[:], root.level = before[:2]
    ours.setLevel(before[2])


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_json_line_has_the_keys_of_the_references_logger(logger: logging.Logger) -> None:
    stream = io.StringIO()
    set_up("json", 2, stream)
    logger.warning("endpoint %s does not answer", "10.0.0.1:8000")
    (line,) = lines(stream)
    told = json.loads(line)
    assert told.pop("ts").endswith("Z")
    assert told == {"level": "warning", "logger": "epp.test", "msg": "endpoint 10.0.0.1:8000 does not answer"}


@pytest.mark.parametrize("encoder", ["json", "console"])
def test_what_a_client_sent_cannot_break_a_line_or_colour_a_terminal(logger: logging.Logger, encoder: str) -> None:
    stream = io.StringIO()
    set_up(encoder, 2, stream)
    logger.warning("model %s", "a\nERROR all is lost\r\x1b[31m\x85\u2028")
    assert len(lines(stream)) == 1
    assert "\x1b" not in stream.getvalue()


def test_a_trace_on_the_console_is_indented_so_that_nothing_in_it_looks_like_a_line(logger: logging.Logger) -> None:
    stream = io.StringIO()
    set_up("console", 2, stream)
    try:
        raise ValueError("first\n2026-01-01T00:00:00.000Z  ERROR  epp  forged")
    except ValueError:
        logger.exception("broken")
    head, *rest = lines(stream)
    assert head.endswith("broken")
    assert all(line.startswith("    ") for line in rest)


def test_a_trace_in_json_stays_on_the_line(logger: logging.Logger) -> None:
    stream = io.StringIO()
    set_up("json", 2, stream)
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("broken")
    (line,) = lines(stream)
    assert json.loads(line)["stacktrace"].endswith("ValueError: no")


def test_a_long_message_is_cut(logger: logging.Logger) -> None:
    stream = io.StringIO()
    set_up("json", 2, stream)
    logger.warning("x" * 100_000)
    assert len(json.loads(stream.getvalue())["msg"]) == 4096


def test_verbosity_follows_the_references_levels(logger: logging.Logger) -> None:
    levels = [level_of(v) for v in (-1, 0, 1, 2, 3, 4, 5, 9)]
    assert levels == [logging.WARNING] * 2 + [logging.INFO] * 3 + [logging.DEBUG] * 3
    stream = io.StringIO()
    set_up("console", 2, stream)
    logger.debug("not told")
    logger.info("told")
    logging.getLogger("somebody.else").info("not told")
    assert len(lines(stream)) == 1


def test_an_unknown_encoder_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="'xml'; it must be one of json, console"):
        set_up("xml", 2)


# -- problems that repeat ----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_problem_that_repeats_is_one_line_and_then_one_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    problems = Problems(logging.getLogger("epp.test"), clock, every=60.0)
    for second in range(61):  # at 0 s told, at 1..59 s counted, at 60 s told with the count
        clock.now = float(second)
        problems.tell("down", "endpoint %s is down", "a")
    assert [record.getMessage() for record in caplog.records] == [
        "endpoint a is down",
        "endpoint a is down (and 59 times more in the 60 s before)",
    ]


def test_different_problems_do_not_hide_each_other(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems(logging.getLogger("epp.test"), Clock())
    problems.tell("a", "a is down")
    problems.tell("b", "b is down", level=logging.ERROR)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


def test_problems_are_remembered_up_to_a_number(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems(logging.getLogger("epp.test"), Clock(), remembered=2)
    for problem in ("a", "b", "c", "c", "a"):  # c pushes a out, so a is told again
        problems.tell(problem, problem)
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "c", "a"]
