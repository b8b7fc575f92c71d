"""Dramatiq on Redis: a message is acknowledged after its result is stored.

It has its default middleware, and that for results.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import dramatiq
import psycopg
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.queues.work import DATABASE_URL, Job, grant_by

_RESULT_EXPIRES = 86_400_000  # milliseconds, as in Celery

_BROKER_URL = os.environ["BROKER_URL"]
broker = RedisBroker(url=_BROKER_URL)
broker.add_middleware(
    Results(
        # The benchmark finds results by keys of this form.
        backend=RedisBackend(url=_BROKER_URL, use_namespace_prefix_keys=True),
        store_results=True,
        result_ttl=_RESULT_EXPIRES,
    )
)
dramatiq.set_broker(broker)


_own = threading.local()


def _connection() -> psycopg.Connection[Any]:
    """Return this thread's connection, which is opened at its first job."""
    if not hasattr(_own, "connection"):
        _own.connection = psycopg.connect(DATABASE_URL, autocommit=True)
    connection: psycopg.Connection[Any] = _own.connection
    return connection


@dramatiq.actor  # type: ignore[untyped-decorator] # not installed for mypy
def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Grant a user access to interviews."""
    return grant_by(_connection(), user_id, interview_ids)


def enqueue(jobs: Sequence[Job]) -> None:
    """Enqueue jobs; the keys of their results end with their IDs."""
    for job in jobs:
        message = grant.message(user_id=job["user_id"], interview_ids=job["interview_ids"])
        broker.enqueue(message.copy(message_id=job["job_id"]))
