"""Poll a job's result.

While nothing is stored, the workers are asked for the job's status: a result that has expired in
Redis is in the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from redis.exceptions import RedisError, ResponseError

from interview_access.contracts import (
    CONTROL_QUEUE,
    PROGRESS,
    JobProgress,
    JobStatus,
    announcement_key,
    result_key,
)
from interview_access.errors import (
    InterviewAccessError,
    NoAnswerInTimeError,
    QueueUnavailableError,
)
from interview_access.protocol import control_requests
from interview_access.protocol.commands import Commands, Exchange
from interview_access.protocol.messages import check_job_id, check_timeout
from interview_access.protocol.retrying import reason_of, replies_to
from interview_access.protocol.stored_results import decoded, poll_pauses, result_or_error
from interview_access.stored_errors import from_record

_FINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})  # states of Celery
_STATUS_SECONDS = 5.0  # between two control requests
_REPLY_SECONDS = 2.0  # for the reply to one, in which the result is not polled
_LAST_STATUS_SECONDS = 1.0  # before the deadline, if no control request was sent before


def result(
    job_id: str, *, timeout: float, on_progress: Callable[[JobProgress], None] | None
) -> Exchange[dict[str, Any]]:
    """Poll a job's result until it is final, or until the deadline.

    Args:
        job_id: The job's ID.
        timeout: Seconds to wait.
        on_progress: Called with each progress that is read.

    Returns:
        The result.

    Raises:
        ValueError: if `job_id` or `timeout` is invalid.
        InterviewAccessError: the error with which the job ended.
        NoAnswerInTimeError: if the job has no result by the deadline.
        QueueUnavailableError: if Redis is unavailable.
    """
    check_job_id(job_id)
    check_timeout(timeout)
    deadline = time.monotonic() + timeout
    pauses = poll_pauses(deadline)
    ask_at: float | None = None
    while True:
        stored, announced = yield from _read(job_id, by=deadline)
        if stored and stored["status"] in _FINAL:
            return result_or_error(stored)
        if stored and stored["status"] == PROGRESS and on_progress:
            with suppress(ValidationError):  # of another application's task
                on_progress(JobProgress.model_validate(stored.get("result")))
        now = time.monotonic()
        if ask_at is None and not stored:
            # An announced job is most often about to have its result; any other might be unknown.
            later = max(min(now + _STATUS_SECONDS, deadline - _LAST_STATUS_SECONDS), now)
            ask_at = later if announced else now
        if not stored and ask_at is not None and ask_at <= now < deadline:
            ask_at = now + _STATUS_SECONDS
            known = yield from _status(job_id, timeout=min(deadline - now, _REPLY_SECONDS))
            if known and known.final:
                return _result_in(known)
        pause = next(pauses, None)
        if pause is None:
            raise _no_result(job_id, timeout, stored["status"] if stored else None, announced)
        yield pause


def _no_result(
    job_id: str, timeout: float, state: str | None, announced: bool
) -> NoAnswerInTimeError:
    unstored = "it is queued" if announced else "nothing is stored of it"
    so_far = f"its state is {state}" if state else unstored
    return NoAnswerInTimeError(
        f"Job {job_id} had no result within {timeout:g} s ({so_far}). "
        "It might still run: poll it again by its ID.",
        {"job_id": job_id, "state": state or "PENDING"},
    )


def _read(job_id: str, *, by: float) -> Exchange[tuple[dict[str, Any] | None, bool]]:
    """Read a job's stored result, and whether the job is announced."""
    read_result = Commands((("GET", result_key(job_id)),), results=True)
    read_announcement = Commands((("EXISTS", announcement_key(job_id)),))
    try:
        (value,) = yield from replies_to(read_result, by=by)
        stored = decoded(value or b"")
        if stored and stored.get("queue") != CONTROL_QUEUE:  # else the reply to a control request
            return stored, True
        (announced,) = yield from replies_to(read_announcement, by=by)
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"The result of job {job_id} cannot be read from Redis ({reason_of(error)}). "
            "The job itself is not affected: poll it again.",
            {"job_id": job_id},
        ) from None
    return None, bool(announced)


def _status(job_id: str, *, timeout: float) -> Exchange[JobStatus | None]:
    """Request a job's status; None if no worker replies, or Redis refuses the request.

    A full Redis refuses control requests, but still stores results.
    """
    try:
        return (yield from control_requests.status(job_id, timeout=timeout))
    except QueueUnavailableError as error:
        if not isinstance(error.__context__, ResponseError):
            raise  # another attempt would take as long again
    except InterviewAccessError:
        pass
    return None


def _result_in(known: JobStatus) -> dict[str, Any]:
    """Return the result in a status, or raise its error."""
    if known.error:
        raise from_record(known.error.model_dump())
    return known.result or {}
