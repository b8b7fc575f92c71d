"""The outbox relay: a background service that enqueues the jobs requested in the database.

The relays of all workers share the requests: each takes rows that no other has locked. PostgreSQL
notifies them of new requests. A periodic query finds requests whose notification was lost, and
those to be sent again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

from celery import Celery
from celery.utils.log import get_logger
from interview_access.contracts import (
    GrantCohortJob,
    GrantJob,
    InterviewAttemptJob,
    Job,
    announcement_key,
    describe,
)
from interview_access.errors import shortened
from interview_access.protocol.messages import JobMessage, enqueue_commands
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from storage.dtos import AccessRequestDTO
from storage.interface import MAX_HEADERS_BYTES, Storage
from tasks.relay import relay
from worker.broker.claims import PREFIX
from worker.services.background import BackgroundService

logger = get_logger(__name__)

_QUERY_SECONDS = 4.0  # between two queries without a notification
_PAUSE_SECONDS = 0.5  # between two queries if PostgreSQL cannot notify, as through a pooler
_SEEN_SECONDS = 2.0  # between two checks of Redis
_SEEN = f"{PREFIX}relay"  # missing if Redis was emptied or replaced
_TOO_LARGE = "invalid bulk length"  # beyond proto-max-bulk-len
_RESERVED = frozenset(  # headers by which Celery changes how a message is read or executed
    {
        *("compression", "ignore_result", "shadow", "group_index", "groups"),
        *("stamps", "stamped_headers", "replaced_task_nesting"),
    }
)


class OutboxRelay(BackgroundService):
    """Enqueues requests from the outbox table."""

    def __init__(self, app: Celery, new_storage: Callable[[], Storage]) -> None:
        """Connect to nothing before :meth:`start`.

        Args:
            app: Connects to the queue.
            new_storage: Makes the storage of this service alone, which waits on its connection.
        """
        super().__init__(app)
        self._storage = lru_cache(maxsize=1)(new_storage)
        self._query_at = 0.0

    def run_once(self, redis: Redis) -> None:
        """Enqueue one page of requests, or wait for one."""
        storage = self._storage()
        if not redis.exists(_SEEN):
            storage.schedule_all_requests_now()
            redis.set(_SEEN, 1)
            self._query_at = 0.0
        if time.monotonic() >= self._query_at:
            if storage.has_due_requests():
                if not relay(storage, partial(_announced, redis), partial(_send, redis)):
                    self.pause(_PAUSE_SECONDS)  # others have locked what is due
                return
            self._query_at = time.monotonic() + _QUERY_SECONDS
        until_query = max(self._query_at - time.monotonic(), 0.0)
        is_added = storage.wait_for_requests(min(_SEEN_SECONDS, until_query), self.wakeup)
        if is_added is None:
            self.pause(_PAUSE_SECONDS)
        if is_added is not False:
            self._query_at = 0.0


def message_of(request: AccessRequestDTO) -> JobMessage:
    """Build the message of a request's job, whose arguments the worker validates.

    It has the headers of the request that are no headers of Celery, and the time of the request.

    Args:
        request: The request.

    Raises:
        ValueError: if no such job exists: its task is unknown, say.
    """
    users: Any
    interviews: Any
    users, interviews = request.user_id, request.interview_ids
    countdown = (request.eta - datetime.now(UTC)).total_seconds() if request.eta else None
    options = (request.job_id, countdown, request.expires_at)
    job: Job
    match request.task:
        case GrantJob.task:
            job = GrantJob(users, interviews, *options)
        case GrantCohortJob.task:
            job = GrantCohortJob(request.user_ids or (), interviews, *options)
        case InterviewAttemptJob.task:
            (interview_id,) = interviews
            job = InterviewAttemptJob(interview_id, users, *options)
        case _:
            raise ValueError(f"task: expected one of the contract, got {describe(request.task)}")
    given, ignored = _headers(request)
    usable = {name: one for name, one in given.items() if one is not None and name not in ignored}
    return JobMessage.of(job, headers=usable | {"requested_at": request.requested_at.isoformat()})


def _headers(request: AccessRequestDTO) -> tuple[Mapping[str, str | None], Collection[str]]:
    """Return the headers of a request, and the names of those that its message does not get."""
    given: dict[str, str | None] = json.loads(request.headers or "{}")
    return given, [name for name, one in given.items() if one is None or name in _RESERVED]


def _log_ignored_headers(request: AccessRequestDTO) -> None:
    _, ignored = _headers(request)
    if ignored or request.headers == "":
        logger.warning(
            "outbox headers ignored: job=%r headers=%s expected=%s",
            request.job_id,
            shortened(", ".join(ignored) or "all"),
            f"an object of strings in {MAX_HEADERS_BYTES:,} bytes without headers of Celery",
        )


def _announced(redis: Redis, job_ids: Sequence[str]) -> Collection[str]:
    """Return the jobs that have an announcement in Redis."""
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.exists(announcement_key(job_id))
        found = pipeline.execute()
    return [job_id for job_id, exists in zip(job_ids, found, strict=True) if exists]


def _send(redis: Redis, request: AccessRequestDTO) -> bool:
    """Enqueue a request's job. Returns False if only this one cannot be enqueued.

    Raises:
        RedisError: if no request could be enqueued now.
    """
    try:
        _log_ignored_headers(request)
        commands = enqueue_commands([message_of(request)])
        with redis.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call] # redis-py's
            pipeline.execute()
    except Exception as error:
        if isinstance(error, ResponseError) and not str(error).endswith(_TOO_LARGE):
            raise  # Redis refuses every write: a permission, its memory, its replicas
        if isinstance(error, RedisError | OSError):
            redis.ping()
        logger.warning(
            "outbox request cannot be sent, will retry: job=%r error_type=%s error=%s",
            request.job_id,
            type(error).__name__,
            shortened(str(error), quoted=False, at_most=500),
        )
        return False
    return True
