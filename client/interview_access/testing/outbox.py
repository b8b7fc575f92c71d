"""The transactional outbox in tests: what a service requested in its own transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import EllipsisType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from interview_access.contracts import GRANT_ACCESS
from interview_access.outbox import django_connection
from interview_access.testing.jobs import EnqueuedJob, Expected

if TYPE_CHECKING:  # an optional dependency
    from sqlalchemy import Connection

_SELECT = "SELECT * FROM grant_access_request ORDER BY requested_at, job_id"


def requested_jobs(
    connection: Connection | None = None, *, using: str | None = None
) -> list[EnqueuedJob]:
    """Read the jobs in the outbox, also those that the current transaction requested.

    No worker runs in a test, so that requests stay in the table.

    Args:
        connection: A connection of SQLAlchemy; by default Django's.
        using: Name of Django's database; by default that into which
            :func:`.enqueue_in_django` inserts.

    Returns:
        The jobs by the time of their transaction; those of one transaction by ID.
    """
    return [_job(row) for row in _rows(connection, using)]


def assert_requested(
    connection: Connection | None = None,
    *,
    task: str | EllipsisType = ...,
    job_id: str | EllipsisType = ...,
    user_id: str | UUID | EllipsisType = ...,
    user_ids: Iterable[str | UUID] | EllipsisType = ...,
    interview_ids: Iterable[str | UUID] | EllipsisType = ...,
    count: int | None = None,
    using: str | None = None,
) -> list[EnqueuedJob]:
    """Assert that jobs are in the outbox. An argument that is not given accepts any value.

    Args:
        connection: A connection of SQLAlchemy; by default Django's.
        task: See :meth:`FakeClient.assert_enqueued`.
        job_id: Likewise.
        user_id: Likewise.
        user_ids: Likewise.
        interview_ids: Likewise.
        count: Number of jobs that are expected; by default at least one.
        using: Name of Django's database; by default that into which
            :func:`.enqueue_in_django` inserts.

    Returns:
        The jobs that are as expected, as :func:`requested_jobs` orders them.

    Raises:
        AssertionError: if their number differs; it lists what was requested.
        TypeError: if an ID is neither a string nor a UUID, or `user_ids` or `interview_ids`
            is not an iterable.
        ValueError: if `task` is not the name of a task.
    """
    __tracebackhide__ = True
    expected = Expected(
        task=task, job_id=job_id, user_id=user_id, user_ids=user_ids, interview_ids=interview_ids
    )
    jobs = requested_jobs(connection, using=using)
    return expected.assert_among(jobs, count=count, listed_as="Requested")


def _rows(connection: Connection | None, using: str | None) -> list[dict[str, Any]]:
    if connection is not None:
        return [dict(row) for row in connection.exec_driver_sql(_SELECT).mappings()]
    with django_connection(using).cursor() as cursor:
        cursor.execute(_SELECT)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


def _job(row: dict[str, Any]) -> EnqueuedJob:
    arguments = {
        name: row[name]
        for name in ("user_id", "user_ids", "interview_ids")
        if row.get(name) is not None
    }
    headers = row.get("headers") or {}  # text in Django, whose psycopg does not decode it
    headers = json.loads(headers) if isinstance(headers, str) else headers
    return EnqueuedJob.of_arguments(
        row["job_id"],
        row.get("task", GRANT_ACCESS),
        arguments,
        sent_at=row["requested_at"],
        eta=row.get("eta"),
        expires_at=row.get("expires_at"),
        actor=headers.get("actor"),
        reason=headers.get("reason"),
    )
