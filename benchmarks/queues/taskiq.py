"""Taskiq on a Redis stream: a message is acknowledged after its result is stored.

The coroutines of a process share a pool of connections.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from psycopg_pool import AsyncConnectionPool
from taskiq import TaskiqEvents, TaskiqState
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.queues.work import DATABASE_URL, Job, grant_by_async

_CONNECTIONS = 4  # of a process; more are no faster on two cores
_RESULT_EXPIRES = 86_400  # seconds, as in Celery

_BROKER_URL = os.environ["BROKER_URL"]
_pool = AsyncConnectionPool(
    DATABASE_URL,
    min_size=_CONNECTIONS,
    max_size=_CONNECTIONS,
    kwargs={"autocommit": True},
    open=False,
)
broker = RedisStreamBroker(_BROKER_URL).with_result_backend(
    RedisAsyncResultBackend(
        _BROKER_URL, result_ex_time=_RESULT_EXPIRES, serializer=ORJSONSerializer()
    )
)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)  # type: ignore[untyped-decorator] # not installed for mypy
async def _open(_: TaskiqState) -> None:
    await _pool.open(wait=True)


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)  # type: ignore[untyped-decorator] # not installed for mypy
async def _close(_: TaskiqState) -> None:
    await _pool.close()


@broker.task(task_name="grant")  # type: ignore[untyped-decorator] # not installed for mypy
async def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Grant a user access to interviews."""
    async with _pool.connection() as connection:
        return await grant_by_async(connection, user_id, interview_ids)


def enqueue(jobs: Sequence[Job]) -> None:
    """Enqueue jobs; the keys of their results are their IDs."""
    asyncio.run(_enqueue(jobs))


async def _enqueue(jobs: Sequence[Job]) -> None:
    await broker.startup()
    for job in jobs:
        await (
            grant.kicker()
            .with_task_id(job["job_id"])
            .kiq(user_id=job["user_id"], interview_ids=job["interview_ids"])
        )
    await broker.shutdown()
