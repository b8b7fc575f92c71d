"""Stored results: their meaning, and the pauses between two polls for one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from interview_access.protocol.commands import Pause
from interview_access.stored_errors import from_result

_FIRST_SECONDS, _LONGEST_SECONDS = 0.005, 0.25
_GROWTH = 1.1  # adds at most a tenth to the time waited


def poll_pauses(deadline: float) -> Iterator[Pause]:
    """Yield growing pauses, the last of which ends at the deadline.

    Args:
        deadline: Monotonic time in seconds.
    """
    seconds = _FIRST_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        yield Pause(min(seconds, left))
        seconds = min(_GROWTH * seconds, _LONGEST_SECONDS)


def result_or_error(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a finished job or control request.

    Args:
        stored: The value of its key, in a final state.

    Raises:
        InterviewAccessError: the stored error.
    """
    if stored["status"] == "SUCCESS":
        return dict(stored["result"])
    raise from_result(stored["result"])
