"""Celery's remote control, where its own commands would reply that they had an effect.

Imported for its side effect: Celery's worker finds commands in a table of its own.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, nok


@control_command(  # type: ignore[untyped-decorator] # Celery ships no types
    args=[("task_name", str), ("rate_limit", str)], signature="<task_name> <rate_limit>"
)
def rate_limit(_state: Any, **_: Any) -> Any:
    """Refuse: jobs are claimed in batches."""
    return nok("rate limits are not supported; start fewer pool processes")


@control_command(  # type: ignore[untyped-decorator] # Celery ships no types
    args=[("task_name", str), ("soft", float), ("hard", float)],
    signature="<task_name> <soft_secs> [hard_secs]",
)
def time_limit(_state: Any, **_: Any) -> Any:
    """Refuse: a message or the worker's start sets a time limit."""
    return nok("time limits cannot be changed; set time_limit in a message, or --time-limit")
