"""Enqueueing after the commit, for a service whose database is not that of the workers.

If Redis is unavailable at that moment, the job is lost unless the caller sends it again: prefer
:mod:`interview_access.outbox` where the service shares the workers' database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from uuid import UUID

from django.db import transaction

from interview_access.contracts import GrantCohortJob, GrantJob, InterviewAttemptJob, Job
from interview_access.contracts.jobs import or_new
from interview_access.producer import InterviewAccessClient
from interview_access.protocol.messages import checked_message


def enqueue_on_commit(
    client: InterviewAccessClient,
    user_id: str | UUID,
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
    countdown: float | None = None,
    expires: float | datetime | None = None,
    actor: str | UUID | None = None,
    reason: str | None = None,
    using: str | None = None,
) -> str:
    """Enqueue a job after the commit of the current transaction: one user's access to interviews.

    Outside a transaction the job is enqueued at once. After a rollback nothing is enqueued.

    Args:
        client: Sends the job.
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: 1 to 255 printable characters, unique to the request; by default a random UUID.
            Sending one request twice under one ID is safe: it takes effect once.
        countdown: Seconds from the commit before which no worker starts the job.
        expires: Seconds from the commit, or a datetime (UTC if naive), after which no worker starts
            the job.
        actor: Who requests the job, 1 to 255 printable characters. It is kept in the ledger.
        reason: Why, 1 to 1,000 printable characters. Likewise.
        using: The name of the database; by default Django's default.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        TypeError: if `client` is another object, such as an asyncio client.
        ValueError: if `job_id`, `countdown`, `expires`, `actor` or `reason` is invalid.
        InvalidGrantRequestException: if an argument has an invalid type or length.
        QueueUnavailableError: from the end of the transaction, which is committed then: Redis did
            not accept the job in time. Send it again under its ID.
        JobIdReusedException: likewise, if another request has the ID; nothing was sent.
    """
    job = GrantJob(user_id, interview_ids, or_new(job_id), countdown, expires, actor, reason)

    def send() -> None:
        client.enqueue(job.user_id, job.interview_ids, **job.options)

    return _after_commit(client, job, send, using)


def enqueue_cohort_on_commit(
    client: InterviewAccessClient,
    user_ids: Iterable[str | UUID],
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
    countdown: float | None = None,
    expires: float | datetime | None = None,
    actor: str | UUID | None = None,
    reason: str | None = None,
    using: str | None = None,
) -> str:
    """Enqueue one job after the commit: each user's access to each interview.

    Args:
        client: Sends the job.
        user_ids: Each of 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: See :func:`enqueue_on_commit`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
        using: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        TypeError, ValueError, InvalidGrantRequestException, QueueUnavailableError,
            JobIdReusedException: see :func:`enqueue_on_commit`.
    """
    job = GrantCohortJob(user_ids, interview_ids, or_new(job_id), countdown, expires, actor, reason)

    def send() -> None:
        client.enqueue_cohort(job.user_ids, job.interview_ids, **job.options)

    return _after_commit(client, job, send, using)


def enqueue_attempt_on_commit(
    client: InterviewAccessClient,
    interview_id: str | UUID,
    user_id: str | UUID,
    *,
    job_id: str | None = None,
    countdown: float | None = None,
    expires: float | datetime | None = None,
    actor: str | UUID | None = None,
    reason: str | None = None,
    using: str | None = None,
) -> str:
    """Enqueue a job after the commit that creates an interview attempt of a user.

    Args:
        client: Sends the job.
        interview_id: A UUID.
        user_id: 1 to 36 characters.
        job_id: See :func:`enqueue_on_commit`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
        using: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        TypeError, ValueError, InvalidGrantRequestException, QueueUnavailableError,
            JobIdReusedException: see :func:`enqueue_on_commit`.
    """
    job = InterviewAttemptJob(
        interview_id, user_id, or_new(job_id), countdown, expires, actor, reason
    )

    def send() -> None:
        client.enqueue_attempt(job.interview_id, job.user_id, **job.options)

    return _after_commit(client, job, send, using)


def _after_commit(client: object, job: Job, send: Callable[[], None], using: str | None) -> str:
    if not isinstance(client, InterviewAccessClient):
        raise TypeError(
            f"client: expected an InterviewAccessClient, got {type(client).__name__}; Django does "
            "not await callbacks of a commit: use a blocking client, also in async views"
        )
    checked_message(job)
    transaction.on_commit(send, using=using)
    return job.job_id
