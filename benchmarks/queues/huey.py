"""Huey on a Redis list.

It has no late acknowledgement: the job of a killed process is lost. Its results do not expire.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import psycopg
from huey import RedisHuey

from benchmarks.queues.work import DATABASE_URL, Job, grant_by

huey = RedisHuey("grants", url=os.environ["BROKER_URL"])


@lru_cache(maxsize=1)
def _connection() -> psycopg.Connection[Any]:
    """Return this process's connection, which is opened at its first job, after the fork."""
    return psycopg.connect(DATABASE_URL, autocommit=True)


@huey.task()  # type: ignore[untyped-decorator] # not installed for mypy
def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Grant a user access to interviews."""
    return grant_by(_connection(), user_id, interview_ids)


def enqueue(jobs: Sequence[Job]) -> None:
    """Enqueue jobs; the fields of their results are their IDs."""
    for job in jobs:
        huey.enqueue(
            grant.s(id=job["job_id"], user_id=job["user_id"], interview_ids=job["interview_ids"])
        )
