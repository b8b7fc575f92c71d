"""What a message says cannot forge a line of the log."""

from __future__ import annotations

import io
import logging

import pytest
from interview_access.errors import (
    InvalidGrantRequestException,
    JobFailedError,
    JobIdReusedException,
    StorageUnavailableException,
    error_class,
    shortened,
)

from worker.logs import LogFormatter, TaskLogFormatter

HOSTILE = (
    "x\x1b]0;owned\x07\x9b2J\u202e\n[2026-11-25 00:00:00,000: CRITICAL/Main] FORGED\r\x00\ud800"
)


def logged(kind: type[logging.Formatter], error: Exception | None = None) -> str:
    """What a logger of such a formatter writes of hostile values, and of an error."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(kind("%(levelname)s %(task_id)s %(message)s"))
    logger = logging.Logger("test")  # noqa: LOG001 - of no hierarchy
    logger.addHandler(handler)
    logger.error("job %s", HOSTILE, exc_info=error, extra={"task_id": HOSTILE})
    return stream.getvalue()


@pytest.mark.parametrize("kind", [LogFormatter, TaskLogFormatter])
def test_a_record_is_one_line(kind: type[logging.Formatter]) -> None:
    """Control characters of the message and of the fields beside it are escaped."""
    (line,) = logged(kind).splitlines()
    assert "\\x1b]0;owned" in line
    assert "\\n[2026" in line
    assert line.removeprefix("\x1b[1;31m").removesuffix("\x1b[0m").isprintable()


def test_a_traceback_forges_no_line() -> None:
    """Each line of a traceback is indented, its control characters escaped."""
    first, *more = logged(LogFormatter, ValueError(HOSTILE)).splitlines()
    assert first.startswith(("\x1b[1;31mERROR", "ERROR"))
    assert any("FORGED" in line for line in more)
    assert all(line.startswith("  ") for line in more)
    assert all(line.removesuffix("\x1b[0m").isprintable() for line in more)


def test_a_stack_forges_no_line() -> None:
    """Each line of a record's stack is indented, its control characters escaped."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "stack", None, None, sinfo=HOSTILE)
    first, *more = LogFormatter("%(message)s").format(record).splitlines()
    assert first == "stack"
    assert any("FORGED" in line for line in more)
    assert all(line.startswith("  ") and line.isprintable() for line in more)


def test_giant_values_are_cut() -> None:
    """Neither a message nor an error of megabytes is written whole."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "y" * 5_000_000, None, None)
    assert len(LogFormatter("%(message)s").format(record)) < 5_000
    error = ValueError("z\n" * 1_000_000 + "z" * 5_000_000)
    assert len(logged(LogFormatter, error)) < 300_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [('it\'s a "\\"', 'it\'s a "\\"'), ("a\nb\x9b", "a\\nb\\x9b"), ("x" * 99, "x" * 80 + "…")],
)
def test_a_text_is_only_escaped_where_it_does_not_print(text: str, shown: str) -> None:
    """Quotes and backslashes of a text stay; what does not print is escaped."""
    assert shortened(text, quoted=False) == shown


@pytest.mark.parametrize(
    "name", ["Any", "Sequence", "Details", "__name__", "No", None, ["x"], "x\n"]
)
def test_a_name_that_is_no_errors(name: object) -> None:
    """Whatever a stored result names as its class, it is an error's."""
    assert error_class(name).__name__ == "JobFailedError"


@pytest.mark.parametrize(
    "error",
    [
        JobFailedError(HOSTILE),
        JobIdReusedException.of("job", HOSTILE, "digest"),
        StorageUnavailableException.of(17, HOSTILE),
        InvalidGrantRequestException.of([(HOSTILE, "a value", HOSTILE)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_errors_sentence_is_one_line(error: Exception) -> None:
    """Whatever values an error names, its sentence can be logged and printed."""
    assert str(error).isprintable()
    assert "owned" in str(error)
    assert error.args[0] == str(error)
