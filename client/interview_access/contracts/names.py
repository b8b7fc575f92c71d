"""Names and limits of the contract: queues, tasks, keys in Redis, states."""

from __future__ import annotations

QUEUE = "interview-access"
"""The list on which producers push jobs."""

GRANT_ACCESS = "interview_access.grant_access"
GRANT_COHORT_ACCESS = "interview_access.grant_cohort_access"
CREATE_INTERVIEW_ATTEMPT = "interview_access.create_interview_attempt"

CONTROL_QUEUE = "interview-access-control"
"""The list on which clients push control requests."""

JOB_STATUS = "interview_access.job_status"
"""Control request for the status of a job, by its ID. A worker replies at once, however busy its
pool is, with a :class:`~interview_access.contracts.JobStatus`."""

CANCEL_JOB = "interview_access.cancel_job"
"""Control request to cancel a job, by its ID. The reply is that of :data:`JOB_STATUS`."""

PROGRESS = "PROGRESS"
"""State of a running job of several chunks. Its result is then a
:class:`~interview_access.contracts.JobProgress`."""

DEFAULT_MAX_INTERVIEW_IDS = 100_000
"""Default of the worker's ``GRANT_MAX_INTERVIEW_IDS``: grants that one job may request, which are
its interview IDs as given, times its user IDs as given."""

MAX_JOB_ID_LENGTH = 255
"""Maximum number of characters of a job ID."""

MAX_USER_ID_LENGTH = 36
"""Maximum number of characters of a user ID."""

DIGEST_LENGTH = 64
"""Characters of a request digest in hexadecimal."""

REPLY_BYTES = 256 * 1024
"""Approximate size of the reply to a control request above which entries of lists are omitted."""

ANNOUNCEMENT_DAYS = 30
"""Retention of a job's announcement in days, counted from its ETA or its sending."""

KEY_PREFIX = "interview-access:"
"""Prefix of all keys in Redis but the queues, the results and Celery's own."""

LIMITS_KEY = f"{KEY_PREFIX}limits"
"""Key of the limits that the workers state, on the server of the queue. Its value is a
:class:`~interview_access.contracts.WorkerLimits`. It expires soon after the last worker stops."""


def announcement_key(job_id: str) -> str:
    """Name the key of a job's announcement, on the server of the queue."""
    return f"{KEY_PREFIX}job:{job_id}"


def result_key(job_id: str) -> str:
    """Name the key of a job's state and result, as Celery does."""
    return f"celery-task-meta-{job_id}"


def reply_key(request_id: str) -> str:
    """Name the key of the reply to a control request, on the server of the queue."""
    return f"{KEY_PREFIX}reply:{request_id}"
