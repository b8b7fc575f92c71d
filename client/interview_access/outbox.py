"""Transactional outbox: request a job in a transaction of a service that shares the database.

The request is committed or rolled back with the transaction. After COMMIT a worker enqueues the
job, and enqueues it again until it is in the ledger, so that an outage or a loss of Redis loses no
request. The row is deleted when the job has a result.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from interview_access.contracts import MAX_JOB_ID_LENGTH, GrantAccessRequest
from interview_access.contracts.identifiers import as_texts
from interview_access.text import describe

if TYPE_CHECKING:  # an optional dependency
    from sqlalchemy import Connection

INSERT = """
    INSERT INTO grant_access_request (job_id, user_id, interview_ids)
    VALUES (%(job_id)s, %(user_id)s, %(interview_ids)s)
"""
"""The INSERT, with parameters of psycopg. The column ``job_id`` defaults to a random UUID."""

_JOB_ID = re.compile(f"[ -~]{{1,{MAX_JOB_ID_LENGTH}}}")


def enqueue_in_django(
    user_id: str | UUID,
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
    using: str | None = None,
) -> str:
    """Request a grant-access job in the current transaction of Django.

    Args:
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: 1 to 255 printable ASCII characters, unique to the request; by default a UUID.
        using: The name of the database; by default Django's default.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError: if `job_id` is invalid.
        InvalidGrantRequestException: if `user_id` is not 1 to 36 characters, or an argument has
            another type. The IDs and their number are checked by the worker.
        django.db.IntegrityError: if another request has the job ID.
    """
    from django.db import DEFAULT_DB_ALIAS, connections  # noqa: PLC0415 - see TYPE_CHECKING

    row = _row(user_id, interview_ids, job_id)
    with connections[using or DEFAULT_DB_ALIAS].cursor() as cursor:
        cursor.execute(INSERT, row)
    return str(row["job_id"])


def enqueue_in_sqlalchemy(
    connection: Connection,
    user_id: str | UUID,
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
) -> str:
    """Request a grant-access job in a transaction of SQLAlchemy, with psycopg.

    Args:
        connection: The connection of the transaction; of a session, ``session.connection()``.
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: 1 to 255 printable ASCII characters, unique to the request; by default a UUID.

    Returns:
        The job's ID, with which it can be polled after the commit.

    Raises:
        ValueError: if `job_id` is invalid.
        InvalidGrantRequestException: if `user_id` is not 1 to 36 characters, or an argument has
            another type. The IDs and their number are checked by the worker.
        sqlalchemy.exc.IntegrityError: if another request has the job ID.
    """
    row = _row(user_id, interview_ids, job_id)
    connection.exec_driver_sql(INSERT, row)
    return str(row["job_id"])


def _row(
    user_id: str | UUID, interview_ids: Iterable[str | UUID], job_id: str | None
) -> dict[str, object]:
    job_id = str(uuid4()) if job_id is None else job_id
    _check_job_id(job_id)
    given = {"user_id": user_id, "interview_ids": as_texts(interview_ids)}
    request = GrantAccessRequest.read((), given, max_interview_ids=sys.maxsize)
    return {
        "job_id": job_id,
        "user_id": request.user_id,
        "interview_ids": list(request.interview_ids),
    }


def _check_job_id(job_id: object) -> None:
    if not (isinstance(job_id, str) and _JOB_ID.fullmatch(job_id)):
        raise ValueError(
            f"job ID: expected 1 to {MAX_JOB_ID_LENGTH} printable ASCII characters, "
            f"got {describe(job_id)}"
        )
