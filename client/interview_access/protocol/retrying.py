"""Lost connections: which errors they are, and the one retry that each command gets."""

from __future__ import annotations

import time
from math import inf
from typing import Any

from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import TimeoutError as NoReplyError

from interview_access.protocol.commands import Commands, Exchange

LOST_CONNECTION = LostConnectionError, NoReplyError, OSError
"""Errors after which Redis might have executed the commands."""

RETRY_WITHIN = 4.0
"""Seconds after which a command is not retried, so that the call ends within 10 s."""


def replies_to(step: Commands, *, by: float = inf) -> Exchange[list[Any]]:
    """Send idempotent commands, and retry once if the connection was lost.

    Args:
        step: The commands.
        by: Monotonic time in seconds after which they are not retried.

    Returns:
        The replies.

    Raises:
        RedisError, OSError: the error of the last attempt.
    """
    give_up = min(time.monotonic() + RETRY_WITHIN, by)
    try:
        return (yield step)  # type: ignore[no-any-return] # what is sent to an exchange
    except LOST_CONNECTION:
        if time.monotonic() > give_up:
            raise
    return (yield step)  # type: ignore[no-any-return] # what is sent to an exchange


def reason_of(error: BaseException) -> str:
    """Describe an error of redis-py without its final period."""
    return str(error).rstrip(".") or type(error).__name__
