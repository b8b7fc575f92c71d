"""Log formatters: one line for each record, as text or JSON, without control characters.

Celery logs task names, IDs and exceptions of a message unescaped, so that a message could forge log
lines. An event phrase and named values (``job retried: job=%s attempt=%d``) become fields in JSON.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from celery._state import get_current_task
from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter, get_multiprocessing_logger
from interview_access.errors import shortened

_LINE, _TRACEBACK_LINE = 4_000, 1_000  # characters
_TRACEBACK_LINES = 200
_TRACEBACK = 8_000  # characters of a traceback in JSON; container runtimes split lines of 16 KB
_VALUE = re.compile(r"(\w+)=%[\d.]*([drsf])")
_FIELDS = {"job": "job_id"}
"""Fields in JSON whose name in text differs."""


class _Escaping(logging.Formatter):
    """Escapes and cuts lines. Lines of a traceback are indented: none begins like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return shortened(super().formatMessage(record), quoted=False, at_most=_LINE)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatStack(stack_info))


def _indented(traceback: str) -> str:
    return "\n".join(f"  {line}" for line in _escaped_lines(traceback))


def _escaped_lines(traceback: str) -> Iterator[str]:
    for line in traceback.splitlines()[-_TRACEBACK_LINES:]:
        yield shortened(line, quoted=False, at_most=_TRACEBACK_LINE)


class LogFormatter(_Escaping, ColorFormatter):  # type: ignore[misc] # Celery ships no types
    """Formats the lines of the worker."""


class TaskLogFormatter(_Escaping, TaskFormatter):  # type: ignore[misc] # Celery ships no types
    """Formats the lines of tasks, with their name and ID."""


class JsonFormatter(logging.Formatter):
    """Formats each record as a JSON object in one line of ASCII.

    Its fields are the record's attribute ``fields``, or else the named values of the message. All
    texts are escaped like lines of text, so that a program which prints one controls no terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        event, fields = _event_and_fields(record)
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "timestamp": at.removesuffix("+00:00") + "Z",
            "level": record.levelname,
            "logger": record.name,
            "event": event,
            "process": record.processName,
        }
        if record.threadName != "MainThread":
            line["thread"] = record.threadName
        task = get_current_task()
        if task and task.request:
            line |= {"job_id": task.request.id, "task": task.name}
        line = {name: _plain(value) for name, value in {**line, **fields, **line}.items()}
        if record.exc_info and record.exc_info[0]:
            line["error_type"] = record.exc_info[0].__name__
            line["exception"] = _last_lines(self.formatException(record.exc_info))
        if record.stack_info:
            line["stack"] = _last_lines(record.stack_info)
        return json.dumps(line)


def _event_and_fields(record: logging.LogRecord) -> tuple[str, Mapping[str, object]]:
    """Split a message such as ``job retried: job=%s attempt=%d`` into its phrase and its values.

    Values without names are one field, ``detail``: all from the first of them on. A message that
    begins with a value, as Celery's do, is the event as a whole.
    """
    args, fields = record.args, getattr(record, "fields", None)
    # Without values a message is a library's, of any length: it is not kept in the cache.
    if not (args and isinstance(args, tuple) and isinstance(record.msg, str)):
        return record.getMessage(), {}
    event, values, names = _parsed(record.msg)
    if not event:
        return record.getMessage(), {}
    if isinstance(fields, Mapping):
        return event, fields
    if len(names) != len(args):
        return event, {"detail": values % args}
    return event, {
        _FIELDS.get(name, name): _quoted(value) if conversion == "r" else value
        for (name, conversion), value in zip(names, args, strict=True)
    }


@lru_cache(maxsize=1_000)
def _parsed(template: str) -> tuple[str, str, Sequence[tuple[str, str]]]:
    """Return a message's constant words, its values' part, and their names and conversions."""
    event, _, values = template.partition(": ")
    names = _VALUE.findall(values)
    if "%" in event:
        return "", "", ()
    if not names:
        words, _, _ = values.partition("%")
        event, values = f"{event}: {words}".rstrip(": "), values.removeprefix(words)
    return event, values, names


def _quoted(value: object) -> object:
    """Return the field of a value that is quoted in text; in JSON every text is."""
    return value if isinstance(value, str) else repr(value)


def _plain(value: object) -> object:
    """Return a value that every JSON reader takes: numbers as they are, all else as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return round(value, 6)
    return shortened(str(value), quoted=False, at_most=_LINE)


def _last_lines(traceback: str) -> str:
    return "\n".join(_escaped_lines(traceback))[-_TRACEBACK:]


def is_json() -> bool:
    """Report whether the environment requests JSON, also before the settings are validated."""
    return os.environ.get("LOG_FORMAT") == "json"


def log_json_from_the_start() -> None:
    """Log JSON before Celery sets logging up, warnings included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(capture=True)


def refused_start(reason: object) -> SystemExit:
    """Return the exit of a worker that must not start; it prints, or has logged, one sentence.

    Args:
        reason: What was received and what was expected.
    """
    if not is_json():
        return SystemExit(f"The worker cannot start: {reason}")
    logging.getLogger("worker").critical("The worker cannot start: %s", reason)
    return SystemExit(1)


def format_worker_lines(logger: logging.Logger, format: str, colorize: bool, **_: Any) -> None:  # noqa: A002 - Celery's names
    """Set the formatter of the worker's handlers: a hook of ``after_setup_logger``."""
    for one in (logger, get_multiprocessing_logger()):
        _set_formatter(one, LogFormatter, format, use_color=colorize)


def format_task_lines(logger: logging.Logger, format: str, colorize: bool, **_: Any) -> None:  # noqa: A002 - Celery's names
    """Set the formatter of the tasks' handlers: a hook of ``after_setup_task_logger``.

    In JSON the line of a settled job has the values of Celery's lines, which are for text.
    """
    _set_formatter(logger, TaskLogFormatter, format, use_color=colorize)
    if is_json():
        logging.getLogger("celery.app.trace").setLevel(logging.WARNING)


def _set_formatter(logger: logging.Logger, kind: Any, text: str, *, use_color: bool) -> None:
    for handler in logger.handlers:
        dates = handler.formatter and handler.formatter.datefmt
        in_text = kind(text, use_color=use_color, datefmt=dates)
        handler.setFormatter(JsonFormatter() if is_json() else in_text)
