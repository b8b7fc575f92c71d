"""Transactional outbox: request a job in a transaction of a service that shares the database.

The request is committed or rolled back with the transaction. After COMMIT a worker enqueues the
job, and enqueues it again until it is in the ledger, so that an outage or a loss of Redis loses no
request. The row is deleted when the job has a result.

Arguments are checked before anything is inserted, as the clients check them. The largest number of
IDs is ``GRANT_MAX_INTERVIEW_IDS`` of the environment, or 100,000. The caller's trace context is
kept in the row, and becomes headers of the message.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from interview_access.contracts import (
    DEFAULT_MAX_INTERVIEW_IDS,
    MAX_JOB_ID_LENGTH,
    GrantCohortJob,
    GrantJob,
    InterviewAttemptJob,
    Job,
    origin_headers,
)
from interview_access.contracts.jobs import or_new
from interview_access.errors import InvalidGrantRequestException, JobIdReusedException
from interview_access.protocol.messages import JobMessage
from interview_access.text import describe, shortened
from interview_access.tracing import inject_context

if TYPE_CHECKING:  # an optional dependency
    from sqlalchemy import Connection

_INSERT = """
    INSERT INTO grant_access_request
        (job_id, task, user_id, user_ids, interview_ids, eta, expires_at, digest, headers)
    VALUES (%(job_id)s, %(task)s, %(user_id)s, %(user_ids)s, %(interview_ids)s,
            %(eta)s, %(expires_at)s, %(digest)s, CAST(%(headers)s AS jsonb))
"""
_INSERT_UNLESS_IN_USE = f"{_INSERT} ON CONFLICT (job_id) DO NOTHING"
_FIND_DIGEST = "SELECT digest FROM grant_access_request WHERE job_id = %(job_id)s"
_ATTEMPTS = 3  # a row that is deleted between the two statements belonged to a finished job

_LIMIT = "GRANT_MAX_INTERVIEW_IDS"
_JOB_ID = re.compile(f"[ -~]{{1,{MAX_JOB_ID_LENGTH}}}")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

_Execute = Callable[[str, dict[str, Any]], Any]
"""Executes a statement. Returns an object with ``rowcount`` and ``fetchone()``."""


def enqueue_in_django(
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
    """Request a job in a transaction of Django: one user's access to interviews.

    Args:
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: 1 to 255 printable ASCII characters, unique to the request; by default a UUID.
            Repeating a request under its ID is safe: it takes effect once.
        countdown: Seconds from now before which no worker starts the job.
        expires: Seconds from now, or a datetime (UTC if naive), after which no worker starts it.
        actor: Who requests the job, 1 to 255 printable characters. It is kept in the ledger.
        reason: Why, 1 to 1,000 printable characters. Likewise.
        using: The name of the database; by default that to which the database routers direct the
            app ``interview_access.django``, and without the app Django's default.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError: if `job_id`, `countdown`, `expires`, `actor` or `reason` is invalid.
        InvalidGrantRequestException: if another argument is invalid.
        JobIdReusedException: if the outbox has another request with the job ID, or one that was
            inserted without a digest. The transaction can continue.
        django.db.Error: if the database failed.
    """
    job = GrantJob(user_id, interview_ids, _checked(job_id), countdown, expires, actor, reason)
    return _insert_in_django(job, using, is_new=job_id is None)


def enqueue_cohort_in_django(
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
    """Request one job in a transaction of Django: each user's access to each interview.

    Args:
        user_ids: Each of 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: See :func:`enqueue_in_django`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
        using: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError, InvalidGrantRequestException, JobIdReusedException: see
            :func:`enqueue_in_django`.
        django.db.Error: if the database failed.
    """
    job = GrantCohortJob(
        user_ids, interview_ids, _checked(job_id), countdown, expires, actor, reason
    )
    return _insert_in_django(job, using, is_new=job_id is None)


def enqueue_attempt_in_django(
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
    """Request a job in a transaction of Django: an interview attempt of a user.

    Args:
        interview_id: A UUID.
        user_id: 1 to 36 characters.
        job_id: See :func:`enqueue_in_django`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
        using: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError, InvalidGrantRequestException, JobIdReusedException: see
            :func:`enqueue_in_django`.
        django.db.Error: if the database failed.
    """
    job = InterviewAttemptJob(
        interview_id, user_id, _checked(job_id), countdown, expires, actor, reason
    )
    return _insert_in_django(job, using, is_new=job_id is None)


def enqueue_in_sqlalchemy(
    connection: Connection,
    user_id: str | UUID,
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
    countdown: float | None = None,
    expires: float | datetime | None = None,
    actor: str | UUID | None = None,
    reason: str | None = None,
) -> str:
    """Request a job in a transaction of SQLAlchemy: one user's access to interviews.

    Args:
        connection: The connection of the transaction, with psycopg; of a session,
            ``session.connection()``.
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: See :func:`enqueue_in_django`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError, InvalidGrantRequestException, JobIdReusedException: see
            :func:`enqueue_in_django`.
        sqlalchemy.exc.DBAPIError: if the database failed.
    """
    job = GrantJob(user_id, interview_ids, _checked(job_id), countdown, expires, actor, reason)
    return _insert(connection.exec_driver_sql, job, is_new=job_id is None)


def enqueue_cohort_in_sqlalchemy(
    connection: Connection,
    user_ids: Iterable[str | UUID],
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
    countdown: float | None = None,
    expires: float | datetime | None = None,
    actor: str | UUID | None = None,
    reason: str | None = None,
) -> str:
    """Request one job in a transaction of SQLAlchemy: each user's access to each interview.

    Args:
        connection: The connection of the transaction, with psycopg; of a session,
            ``session.connection()``.
        user_ids: Each of 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: See :func:`enqueue_in_django`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError, InvalidGrantRequestException, JobIdReusedException: see
            :func:`enqueue_in_django`.
        sqlalchemy.exc.DBAPIError: if the database failed.
    """
    job = GrantCohortJob(
        user_ids, interview_ids, _checked(job_id), countdown, expires, actor, reason
    )
    return _insert(connection.exec_driver_sql, job, is_new=job_id is None)


def enqueue_attempt_in_sqlalchemy(
    connection: Connection,
    interview_id: str | UUID,
    user_id: str | UUID,
    *,
    job_id: str | None = None,
    countdown: float | None = None,
    expires: float | datetime | None = None,
    actor: str | UUID | None = None,
    reason: str | None = None,
) -> str:
    """Request a job in a transaction of SQLAlchemy: an interview attempt of a user.

    Args:
        connection: The connection of the transaction, with psycopg; of a session,
            ``session.connection()``.
        interview_id: A UUID.
        user_id: 1 to 36 characters.
        job_id: See :func:`enqueue_in_django`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError, InvalidGrantRequestException, JobIdReusedException: see
            :func:`enqueue_in_django`.
        sqlalchemy.exc.DBAPIError: if the database failed.
    """
    job = InterviewAttemptJob(
        interview_id, user_id, _checked(job_id), countdown, expires, actor, reason
    )
    return _insert(connection.exec_driver_sql, job, is_new=job_id is None)


def django_connection(using: str | None) -> Any:
    """Return Django's connection to the database with the outbox.

    Args:
        using: The name of the database; None for that to which the database routers direct the app
            ``interview_access.django``, and without the app Django's default.
    """
    from django.apps import apps  # noqa: PLC0415 - see TYPE_CHECKING
    from django.db import DEFAULT_DB_ALIAS, connections, router  # noqa: PLC0415 - likewise

    if using is None and apps.models_ready and apps.is_installed("interview_access.django"):
        using = router.db_for_write(apps.get_model("interview_access", "OutboxRequest"))
    return connections[using or DEFAULT_DB_ALIAS]


def _insert_in_django(job: Job, using: str | None, *, is_new: bool) -> str:
    with django_connection(using).cursor() as cursor:

        def execute(statement: str, values: dict[str, Any]) -> Any:
            cursor.execute(statement, values)
            return cursor

        return _insert(execute, job, is_new=is_new)


def _insert(execute: _Execute, job: Job, *, is_new: bool) -> str:
    """Insert a request, unless the outbox has it already.

    Args:
        execute: Executes a statement in the service's transaction.
        job: The job.
        is_new: Whether its ID was generated, so that no other request can have it.
    """
    row = _row(job)
    if is_new:
        execute(_INSERT, row)
        return job.job_id
    for _ in range(_ATTEMPTS):
        if execute(_INSERT_UNLESS_IN_USE, row).rowcount:
            return job.job_id
        found = execute(_FIND_DIGEST, row).fetchone()
        if found:
            break
    else:
        found = (None,)  # a row-level policy hides the row
    (first_digest,) = found
    if first_digest is None:
        raise JobIdReusedException(
            f"Send this request under a job ID of its own: the outbox has {shortened(job.job_id)} "
            "in a row without a digest, which may be another request.",
            {"total": 1, "job_id": job.job_id, "digest": row["digest"]},
        )
    if first_digest != row["digest"]:
        raise JobIdReusedException.of(job.job_id, first_digest, row["digest"])
    return job.job_id


def _row(job: Job) -> dict[str, Any]:
    """Check a job as the clients do, and return its row."""
    job.check(max_interview_ids=_limit())
    given: dict[str, Any] = job.arguments
    named = (
        {"interview_id": given["interview_id"]}
        if "interview_id" in given
        else {f"interview_ids[{at}]": text for at, text in enumerate(given["interview_ids"])}
    )
    interview_ids = list(named.values())
    wrong = [
        (name, "a UUID as a string", describe(text))
        for name, text in named.items()
        if _UNSTORABLE.search(text)
    ]
    if wrong:
        raise InvalidGrantRequestException.of(wrong)
    known = JobMessage.of(job).announcement
    # The context of the service's request, whose trace leads to the job.
    headers = {**inject_context(), **origin_headers(job.actor, job.reason)}
    return {
        "job_id": job.job_id,
        "task": job.task,
        "user_id": given.get("user_id"),
        "user_ids": given.get("user_ids"),
        "interview_ids": interview_ids,
        "eta": known.eta,
        "expires_at": known.expires_at,
        "digest": known.digest,
        "headers": json.dumps(headers) if headers else None,
    }


def _limit() -> int:
    text = os.environ.get(_LIMIT, "")
    if text and not text.isdecimal():
        raise ValueError(f"{_LIMIT}: expected a number of IDs, got {describe(text)}")
    return int(text or DEFAULT_MAX_INTERVIEW_IDS)


def _checked(job_id: str | None) -> str:
    chosen: object = or_new(job_id)
    if isinstance(chosen, str) and _JOB_ID.fullmatch(chosen):
        return chosen
    raise ValueError(
        f"job ID: expected 1 to {MAX_JOB_ID_LENGTH} printable ASCII characters, "
        f"got {describe(job_id)}"
    )
