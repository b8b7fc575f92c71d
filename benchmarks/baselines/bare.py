"""A plain Celery task with psycopg: two statements, no ledger.

It acknowledges late, so that a killed worker's job is redelivered; but a job that is redelivered
after its COMMIT counts 0.
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
    """Return this pool process's connection, which is opened at its first job, after the fork."""
    return psycopg.connect(plain_url(os.environ["DATABASE_URL"]), autocommit=True)


@app.task(name="grant")  # type: ignore[untyped-decorator] # Celery ships no types
def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Grant a user access to interviews, and return a result of the contract's shape."""
    requested = sorted(set(interview_ids))  # sorted, to avoid deadlocks of racing jobs
    with connection().transaction():
        known = connection().execute(_COUNT, [requested]).fetchone()
        if known != (len(requested),):
            raise ValueError(f"expected {len(requested)} interviews, got {known}")
        created = connection().execute(_INSERT, [user_id, requested]).rowcount
    return {"success": True, "created_access_count": created}
