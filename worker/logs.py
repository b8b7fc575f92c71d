"""Log formatters: one line for each record, without control characters.

Celery logs task names, IDs and exceptions of a message unescaped, so that a message could forge log
lines.
"""

from __future__ import annotations

import logging
from typing import Any

from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter
from interview_access.errors import shortened

_LINE, _TRACEBACK_LINE = 4_000, 1_000  # characters
_TRACEBACK_LINES = 200


class _Escaping(logging.Formatter):
    """Escapes and cuts lines. Lines of a traceback are indented: none begins like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return shortened(super().formatMessage(record), quoted=False, at_most=_LINE)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatStack(stack_info))


def _indented(traceback: str) -> str:
    lines = traceback.splitlines()[-_TRACEBACK_LINES:]
    return "\n".join(
        f"  {shortened(line, quoted=False, at_most=_TRACEBACK_LINE)}" for line in lines
    )


class LogFormatter(_Escaping, ColorFormatter):  # type: ignore[misc] # Celery ships no types
    """Formats the lines of the worker."""


class TaskLogFormatter(_Escaping, TaskFormatter):  # type: ignore[misc] # Celery ships no types
    """Formats the lines of tasks, with their name and ID."""


def escape_worker_lines(logger: logging.Logger, format: str, colorize: bool, **_: Any) -> None:  # noqa: A002 - Celery's names
    """Set the formatter of the worker's handlers: a hook of ``after_setup_logger``."""
    _set_formatter(logger, LogFormatter, format, use_color=colorize)


def escape_task_lines(logger: logging.Logger, format: str, colorize: bool, **_: Any) -> None:  # noqa: A002 - Celery's names
    """Set the formatter of the tasks' handlers: a hook of ``after_setup_task_logger``."""
    _set_formatter(logger, TaskLogFormatter, format, use_color=colorize)


def _set_formatter(logger: logging.Logger, kind: Any, text: str, *, use_color: bool) -> None:
    for handler in logger.handlers:
        dates = handler.formatter and handler.formatter.datefmt
        handler.setFormatter(kind(text, use_color=use_color, datefmt=dates))
