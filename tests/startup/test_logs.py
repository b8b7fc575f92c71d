"""Log lines: values from messages cannot forge a line or control a terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.worker.consumer.consumer import CONNECTION_ERROR
from interview_access.errors import (
    InvalidGrantRequestException,
    JobFailedError,
    JobIdReusedException,
    StorageUnavailableException,
    error_class,
    shortened,
)

from tests.support.workers import ROOT
from worker.logs import JsonFormatter, LogFormatter, TaskLogFormatter

HOSTILE = (
    "x\x1b]0;owned\x07\x9b2J\u202e\n[2026-11-25 00:00:00,000: CRITICAL/Main] FORGED\r\x00\ud800"
)

CONVERSION = re.compile(r"%(\(\w+\))?[-#0 +\d.*]*[a-zA-Z]")
UNNAMED = {
    "The worker cannot start: %s",  # one sentence, which docs/running.md promises as `detail`
    "job settled: job=%s seconds=%.2f attempt=%d outcome=%s %s",  # has its fields beside the text
}


def logged(kind: type[logging.Formatter], error: Exception | None = None) -> str:
    """Return what a logger with this formatter writes for hostile values and an error."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(kind("%(levelname)s %(task_id)s %(message)s"))
    logger = logging.Logger("test")  # noqa: LOG001 - without parents and their handlers
    logger.addHandler(handler)
    logger.error("job %s", HOSTILE, exc_info=error, extra={"task_id": HOSTILE})
    return stream.getvalue()


@pytest.mark.parametrize("kind", [LogFormatter, TaskLogFormatter])
def test_a_record_is_one_line(kind: type[logging.Formatter]) -> None:
    """Control characters of the message and of extra fields are escaped."""
    (line,) = logged(kind).splitlines()
    assert "\\x1b]0;owned" in line
    assert "\\n[2026" in line
    assert line.removeprefix("\x1b[1;31m").removesuffix("\x1b[0m").isprintable()


def test_a_traceback_forges_no_line() -> None:
    """Each line of a traceback is indented, and its control characters are escaped."""
    first, *more = logged(LogFormatter, ValueError(HOSTILE)).splitlines()
    assert first.startswith(("\x1b[1;31mERROR", "ERROR"))
    assert any("FORGED" in line for line in more)
    assert all(line.startswith("  ") for line in more)
    assert all(line.removesuffix("\x1b[0m").isprintable() for line in more)


def test_a_stack_forges_no_line() -> None:
    """Each line of a stack is indented, and its control characters are escaped."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "stack", None, None, sinfo=HOSTILE)
    first, *more = LogFormatter("%(message)s").format(record).splitlines()
    assert first == "stack"
    assert any("FORGED" in line for line in more)
    assert all(line.startswith("  ") and line.isprintable() for line in more)


def test_huge_values_are_truncated() -> None:
    """A message or an error of megabytes is truncated."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "y" * 5_000_000, None, None)
    assert len(LogFormatter("%(message)s").format(record)) < 5_000
    error = ValueError("z\n" * 1_000_000 + "z" * 5_000_000)
    assert len(logged(LogFormatter, error)) < 300_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [('it\'s a "\\"', 'it\'s a "\\"'), ("a\nb\x9b", "a\\nb\\x9b"), ("x" * 99, "x" * 80 + "…")],
)
def test_only_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    """Quotes and backslashes are unchanged; unprintable characters are escaped."""
    assert shortened(text, quoted=False) == shown


@pytest.mark.parametrize(
    "name", ["Any", "Sequence", "Details", "__name__", "No", None, ["x"], "x\n"]
)
def test_an_unknown_error_name_has_a_default_class(name: object) -> None:
    """A stored class name that is not an error's is read as JobFailedError."""
    assert error_class(name).__name__ == "JobFailedError"


@pytest.mark.parametrize(
    "error",
    [
        JobFailedError(HOSTILE),
        JobIdReusedException.of(HOSTILE, "first", "digest"),
        StorageUnavailableException.of(17, HOSTILE),
        InvalidGrantRequestException.of([(HOSTILE, "a value", HOSTILE)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_errors_sentence_is_one_line(error: Exception) -> None:
    """An error's sentence is printable, whatever values it contains."""
    assert str(error).isprintable()
    assert "owned" in str(error)
    assert error.args[0] == str(error)


def templates() -> Iterator[tuple[Path, str]]:
    """Yield each text with conversions in a module that logs, whether a call names it or not."""
    for folder in ("worker", "tasks", "storage"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if "logger" in source.lower():
                yield from ((path, text) for text in texts(source) if CONVERSION.search(text))


def texts(source: str) -> Iterator[str]:
    """Yield each text of a module that is not documentation."""
    nodes = list(ast.walk(ast.parse(source)))
    documentation = {one.value for one in nodes if isinstance(one, ast.Expr)}
    for one in nodes:
        if isinstance(one, ast.Constant) and one not in documentation:
            yield from [one.value] if isinstance(one.value, str) else []


def in_json(template: str, *args: object) -> dict[str, object]:
    """Return the JSON object of a record."""
    record = logging.LogRecord("x", logging.INFO, "", 0, template, args, None)
    return dict(json.loads(JsonFormatter().format(record)))


def test_every_value_of_a_line_has_a_name() -> None:
    """In JSON each value of the project's own lines is a field; none is in the event."""
    found = {template for _, template in templates()}
    assert found >= UNNAMED
    assert len(found) > 40
    before = in_json("an event").keys()
    for path, template in templates():
        if template not in UNNAMED:
            conversions = list(CONVERSION.finditer(template))
            line = in_json(template, *range(len(conversions)))
            fields = line.keys() - before
            assert len(fields) == len(conversions), (path, template)
            assert "detail" not in fields, (path, template)
            assert line["event"] == template.partition(": ")[0], (path, template)


def test_a_text_is_quoted_once() -> None:
    """A text that a line quotes has no quotes of its own in JSON, so that job IDs can be joined."""
    line = in_json("dead letter: job=%r reason=%s", "a\x9b", "because")
    assert (line["event"], line["job_id"], line["reason"]) == ("dead letter", "a\\x9b", "because")


def test_an_outage_of_the_broker_can_be_counted() -> None:
    """The event of Celery's own line on Redis has no value, which is the detail."""
    line = in_json(CONNECTION_ERROR, "redis://host", "refused", "Trying again")
    assert line["event"] == "consumer: Cannot connect to"
    assert line["detail"] == "redis://host: refused.\\nTrying again\\n"
