"""Stored results: their meaning, and the pauses between two polls for one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from interview_access.errors import JobFailedError
from interview_access.protocol.commands import Pause
from interview_access.stored_errors import from_result
from interview_access.text import describe

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


def decoded(value: bytes) -> dict[str, Any] | None:
    """Decode the value of a result key; None if it is not an object with a state.

    Args:
        value: Any bytes: other programs can write the key.
    """
    with suppress(ValueError, RecursionError):
        stored = json.loads(value)
        if isinstance(stored, dict) and isinstance(stored.get("status"), str):
            return stored
    return None


def result_or_error(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a finished job or control request.

    Args:
        stored: The value of its key, in a final state.

    Raises:
        InterviewAccessError: the stored error; JobFailedError if what is stored is malformed.
    """
    result = stored.get("result")
    if stored["status"] != "SUCCESS":
        raise from_result(result)
    if not isinstance(result, dict):
        raise JobFailedError(
            f"The stored result is malformed: expected an object, got {describe(result)}. "
            "The job might have taken effect: request its status."
        )
    return result
