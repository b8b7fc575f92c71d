"""Ask for a job inside a database transaction of one's own, for services that share the database.

The row is kept with whatever else the transaction writes, or not at all. After its COMMIT a worker
puts the job on the queue, and again until it has taken effect, once; a Redis that is away or is
emptied meanwhile loses nothing. The row goes when the job has its answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from interview_access.contracts import GrantAccessRequest, as_texts, describe

if TYPE_CHECKING:  # none of this is needed by whoever does not use it
    from sqlalchemy import Connection

INSERT = """
    INSERT INTO grant_access_request (job_id, user_id, interview_ids)
    VALUES (%(job_id)s, %(user_id)s, %(interview_ids)s)
"""
"""What to run; ``job_id`` may be left out, and is then a new UUID. Parameters are psycopg's."""

_JOB_ID = re.compile("[ -~]{1,255}")


def enqueue_in_django(
    user_id: str | UUID,
    interview_ids: Iterable[str | UUID],
    *,
    job_id: str | None = None,
    using: str | None = None,
) -> str:
    """Ask for one user's access to interviews in the current transaction of Django.

    Args:
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: 1 to 255 printable ASCII characters, one for each request; a random UUID without.
        using: The name of the database; Django's default without one.

    Returns:
        The job's id, to poll it by when the transaction is committed.

    Raises:
        ValueError: the job id is none.
        InvalidGrantRequestException: the user or the interviews are of another type; how many
            interviews one job may hold, the worker says.
        django.db.IntegrityError: the job id stands for a request already.
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
    """Ask for one user's access to interviews in a transaction of SQLAlchemy, with psycopg.

    Args:
        connection: The transaction's; of a session, ``session.connection()``.
        user_id: As for :func:`enqueue_in_django`, like all that follow.
        interview_ids: Likewise.
        job_id: Likewise.

    Returns:
        The job's id, to poll it by when the transaction is committed.

    Raises:
        ValueError: the job id is none.
        InvalidGrantRequestException: the user or the interviews are of another type; how many
            interviews one job may hold, the worker says.
        sqlalchemy.exc.IntegrityError: the job id stands for a request already.
    """
    row = _row(user_id, interview_ids, job_id)
    connection.exec_driver_sql(INSERT, row)
    return str(row["job_id"])


def _row(
    user_id: str | UUID, interview_ids: Iterable[str | UUID], job_id: str | None
) -> dict[str, object]:
    job_id = str(uuid4()) if job_id is None else job_id
    if not _JOB_ID.fullmatch(job_id):
        raise ValueError(
            f"job id: expected 1 to 255 printable ASCII characters, got {describe(job_id)}"
        )
    given = {"user_id": user_id, "interview_ids": as_texts(interview_ids)}
    request = GrantAccessRequest.read((), given, max_interview_ids=sys.maxsize)
    return {
        "job_id": job_id,
        "user_id": request.user_id,
        "interview_ids": list(request.interview_ids),
    }
