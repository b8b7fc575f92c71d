"""Procrastinate, whose jobs are rows in PostgreSQL, and are finished after their task.

It stores no results. Its workers delete succeeded jobs, an option that it documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool

from benchmarks.queues.work import DATABASE_URL, Job, grant_by_async

_CONNECTIONS = 4  # of a process for jobs, and as many for the queue; more are no faster
_LATER = 86_400  # seconds

app = App(
    connector=PsycopgConnector(conninfo=DATABASE_URL, min_size=_CONNECTIONS, max_size=_CONNECTIONS)
)
_pool = AsyncConnectionPool(
    DATABASE_URL,
    min_size=_CONNECTIONS,
    max_size=_CONNECTIONS,
    kwargs={"autocommit": True},
    open=False,
)


@app.task(name="grant")  # type: ignore[untyped-decorator] # not installed for mypy
async def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Grant a user access to interviews."""
    if _pool.closed:
        await _pool.open()
    async with _pool.connection() as connection:
        return await grant_by_async(connection, user_id, interview_ids)


def enqueue(jobs: Sequence[Job]) -> None:
    """Schedule jobs for the next day."""
    with app.open():
        grant.configure(schedule_in={"seconds": _LATER}).batch_defer(
            *({name: job[name] for name in ("user_id", "interview_ids")} for job in jobs)
        )
