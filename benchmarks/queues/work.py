"""The work of a job: the statements of the bare Celery task in one transaction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg

Job = Mapping[str, Any]
"""A job with job_id, user_id and interview_ids."""

DATABASE_URL: Final = os.environ["DATABASE_URL"]

_COUNT = "SELECT count(*) FROM interview_interview WHERE id = ANY (%s::uuid[])"
_INSERT = """
    INSERT INTO interview_userinterviewaccess (user_id, interview_id)
    SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING
"""


def grant_by(
    connection: psycopg.Connection[Any], user_id: str, interview_ids: Sequence[str]
) -> dict[str, Any]:
    """Grant a user access to interviews, and return a result of the contract's shape."""
    requested = sorted(set(interview_ids))
    with connection.transaction():
        known = connection.execute(_COUNT, [requested]).fetchone()
        _check_all_known(known, requested)
        created = connection.execute(_INSERT, [user_id, requested]).rowcount
    return {"success": True, "created_access_count": created}


async def grant_by_async(
    connection: psycopg.AsyncConnection[Any], user_id: str, interview_ids: Sequence[str]
) -> dict[str, Any]:
    """Grant a user access to interviews in a coroutine; see :func:`grant_by`."""
    requested = sorted(set(interview_ids))
    async with connection.transaction():
        known = await (await connection.execute(_COUNT, [requested])).fetchone()
        _check_all_known(known, requested)
        created = (await connection.execute(_INSERT, [user_id, requested])).rowcount
    return {"success": True, "created_access_count": created}


def _check_all_known(known: object, requested: Sequence[str]) -> None:
    if known != (len(requested),):
        raise ValueError(f"expected {len(requested)} interviews, got {known}")
