"""Control requests: ask the workers for a job's status, or to cancel the job."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from redis.exceptions import RedisError

from interview_access.contracts import CANCEL_JOB, CONTROL_QUEUE, JOB_STATUS, JobStatus, reply_key
from interview_access.errors import NoAnswerInTimeError, QueueUnavailableError
from interview_access.protocol.commands import Commands, Exchange, Pause
from interview_access.protocol.messages import check_job_id, check_timeout, control_message
from interview_access.protocol.retrying import reason_of, replies_to
from interview_access.protocol.stored_results import poll_pauses, result_or_error

_CANCEL_PAUSE = 0.2  # seconds between two requests for a job that has not stopped yet


def status(job_id: str, *, timeout: float) -> Exchange[JobStatus]:
    """Request a job's status from the workers.

    Args:
        job_id: The job's ID.
        timeout: Seconds to wait for the reply.

    Returns:
        The status that a worker replied.

    Raises:
        ValueError: if `job_id` or `timeout` is invalid.
        InterviewAccessError: the error that a worker replied.
        NoAnswerInTimeError: if no worker replied.
        QueueUnavailableError: if Redis is unavailable.
    """
    check_job_id(job_id)
    check_timeout(timeout)
    return (yield from _request(JOB_STATUS, job_id, timeout))


def cancel(job_id: str, *, timeout: float) -> Exchange[JobStatus]:
    """Cancel a job, and wait until it has stopped or finished.

    Args:
        job_id: The job's ID.
        timeout: Seconds to wait, for the reply and for the job to stop.

    Returns:
        The last status that a worker replied.

    Raises:
        ValueError, InterviewAccessError, NoAnswerInTimeError, QueueUnavailableError: see
            :func:`status`.
    """
    check_job_id(job_id)
    check_timeout(timeout)
    deadline = time.monotonic() + timeout
    known = yield from _request(CANCEL_JOB, job_id, timeout)
    while known.state == "running" and deadline - time.monotonic() > _CANCEL_PAUSE:
        yield Pause(_CANCEL_PAUSE)
        try:
            known = yield from _request(CANCEL_JOB, job_id, max(deadline - time.monotonic(), 0))
        except NoAnswerInTimeError:
            break  # the cancellation is recorded all the same
    return known


def _request(task: str, job_id: str, timeout: float) -> Exchange[JobStatus]:
    deadline = time.monotonic() + timeout
    request_id = str(uuid4())
    message = control_message(
        task, request_id, job_id, expires_at=datetime.now(UTC) + timedelta(seconds=timeout)
    )
    read_reply = Commands((("GET", reply_key(request_id)),))
    try:
        yield from replies_to(Commands((("LPUSH", CONTROL_QUEUE, message),)), by=deadline)
        (reply,) = yield from replies_to(read_reply, by=deadline)
        for pause in poll_pauses(deadline):
            if reply is not None:
                break
            yield pause
            (reply,) = yield from replies_to(read_reply, by=deadline)
        if reply is not None:
            return JobStatus.model_validate(result_or_error(json.loads(reply)))
        yield from replies_to(Commands((("LREM", CONTROL_QUEUE, 0, message),)), by=deadline)
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"The control request for job {job_id} failed: {reason_of(error)}. "
            "Expected a Redis that can be reached and written to. Sending it again is safe.",
            {"job_id": job_id},
        ) from None
    raise NoAnswerInTimeError(
        f"No worker replied about job {job_id} within {timeout:g} s. Expected a worker that runs "
        "on this Redis: only a worker can report a job's state. Send the request again.",
        {"job_id": job_id},
    )
