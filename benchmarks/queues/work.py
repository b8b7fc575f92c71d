"""The work of a job: the statements of the bare Celery task, in one transaction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg

Job = Mapping[str, Any]
"""A job_id, a user_id and interview_ids."""

DATABASE_URL: Final = os.environ["DATABASE_URL"]

_COUNT = "SELECT count(*) FROM interview_interview WHERE id = ANY (%s::uuid[])"
_INSERT = """
    INSERT INTO interview_userinterviewaccess (user_id, interview_id)
    SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING
"""


def grant_by(
    connection: psycopg.Connection[Any], user_id: str, interview_ids: Sequence[str]
) -> dict[str, Any]:
    """Grant a user access to interviews; the result is as ours."""
    wanted = sorted(set(interview_ids))
    with connection.transaction():
        known = connection.execute(_COUNT, [wanted]).fetchone()
        _see_that_all_are_known(known, wanted)
        created = connection.execute(_INSERT, [user_id, wanted]).rowcount
    return {"success": True, "created_access_count": created}


async def grant_by_async(
    connection: psycopg.AsyncConnection[Any], user_id: str, interview_ids: Sequence[str]
) -> dict[str, Any]:
    """Do the same in a coroutine."""
    wanted = sorted(set(interview_ids))
    async with connection.transaction():
        known = await (await connection.execute(_COUNT, [wanted])).fetchone()
        _see_that_all_are_known(known, wanted)
        created = (await connection.execute(_INSERT, [user_id, wanted])).rowcount
    return {"success": True, "created_access_count": created}


def _see_that_all_are_known(known: object, wanted: Sequence[str]) -> None:
    if known != (len(wanted),):
        raise ValueError(f"expected {len(wanted)} interviews, got {known}")
