"""Celery's remote control, where its own commands would reply that they had an effect."""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, nok


def register_commands() -> None:
    """Replace the commands in Celery's table, which each of its workers reads."""
    control_command(
        args=[("task_name", str), ("rate_limit", str)], signature="<task_name> <rate_limit>"
    )(rate_limit)
    control_command(
        args=[("task_name", str), ("soft", float), ("hard", float)],
        signature="<task_name> <soft_secs> [hard_secs]",
    )(time_limit)


def rate_limit(_state: Any, **_: Any) -> Any:
    """Refuse: jobs are claimed in batches."""
    return nok("rate limits are not supported; start fewer pool processes")


def time_limit(_state: Any, **_: Any) -> Any:
    """Refuse: a message or the worker's start sets a time limit."""
    return nok("time limits cannot be changed; set time_limit in a message, or --time-limit")
