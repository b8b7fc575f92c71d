"""The Celery task that one would write with psycopg: two statements, no ledger.

Acknowledged late, so that a killed worker's job is not lost; what it counts is lost all the same
where the worker dies after its commit.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import psycopg
from celery import Celery

from benchmarks.baselines import plain_url

app = Celery(
    "bare", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BROKER_URL"]
)
app.conf.task_acks_late = True

_COUNT = "SELECT count(*) FROM interview_interview WHERE id = ANY (%s::uuid[])"
_INSERT = """
    INSERT INTO interview_userinterviewaccess (user_id, interview_id)
    SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING
"""


@lru_cache(maxsize=1)
def connection() -> psycopg.Connection[Any]:
    """This child's connection, made at its first job: none survives a fork."""
    return psycopg.connect(plain_url(os.environ["DATABASE_URL"]), autocommit=True)


@app.task(name="grant")  # type: ignore[untyped-decorator] # Celery ships no types
def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Grant a user access to interviews; the result is as ours."""
    wanted = sorted(set(interview_ids))  # sorted, so that racing jobs wait and never in a circle
    with connection().transaction():
        known = connection().execute(_COUNT, [wanted]).fetchone()
        if known != (len(wanted),):
            raise ValueError(f"expected {len(wanted)} interviews, got {known}")
        created = connection().execute(_INSERT, [user_id, wanted]).rowcount
    return {"success": True, "created_access_count": created}
