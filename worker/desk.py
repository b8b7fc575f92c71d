"""Where questions about jobs come in: tasks of their own, on the control queue.

They are done in a thread of the main process, so that a worker with all children busy answers
them all the same. A question is not kept: whoever has no answer by the deadline asks again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from celery.utils.log import get_logger
from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    JOB_ID_RULE,
    JOB_STATUS,
    JobStatus,
    describe,
    is_job_id,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    StorageUnavailableException,
)
from redis import Redis

from storage.interface import InterviewStorageInterface, StorageError
from worker.inquiries import Inquiries
from worker.rounds import Rounds

logger = get_logger(__name__)

_WAIT_SECONDS = 1  # for a question, before the thread looks whether it is to stop
_KEPT_SECONDS = 60  # an answer that nobody fetches


class Desk(Rounds):
    """Answers questions about jobs, one after another."""

    def __init__(self, app: Celery, storage: Callable[[], InterviewStorageInterface]) -> None:
        """Nothing is connected before it starts."""
        super().__init__(app)
        inquiries = Inquiries(storage, app.backend)
        self._tasks: dict[str, Callable[[Redis, str], JobStatus]] = {
            JOB_STATUS: inquiries.status,
            CANCEL_JOB: inquiries.cancel,
        }

    def round(self, redis: Redis) -> None:
        """Wait for a question, and answer it."""
        popped: Any = redis.brpop([CONTROL_QUEUE], timeout=_WAIT_SECONDS)
        if popped is None:
            return
        try:
            question, task, arguments, expires = _read(popped[1])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("a question cannot be read: %s: %s", type(error).__name__, error)
            return
        if expires is None or datetime.now(UTC) < expires:
            self._answer(redis, question, task, arguments)

    def _answer(self, redis: Redis, question: str, task: str, arguments: dict[str, Any]) -> None:
        results = self._app.backend
        try:
            try:
                status = self._done(redis, task, arguments)
            except InterviewAccessError as error:
                results.mark_as_failure(question, error)
            else:
                results.mark_as_done(question, status.model_dump(mode="json", exclude_none=True))
            results.client.expire(results.get_key_for_task(question), _KEPT_SECONDS)
        except Reject as rejected:
            logger.warning("a question about a job is not answered: %s", rejected.reason)

    def _done(self, redis: Redis, task: str, arguments: dict[str, Any]) -> JobStatus:
        job_id = arguments.get("job_id")
        if task not in self._tasks:
            known = " or ".join(self._tasks)
            raise InvalidGrantRequestException.of([("task", known, describe(task))])
        if not isinstance(job_id, str) or not is_job_id(job_id) or len(arguments) > 1:
            raise InvalidGrantRequestException.of(
                [("job_id", f"{JOB_ID_RULE}, and nothing else", describe(job_id))]
            )
        try:
            return self._tasks[task](redis, job_id)
        except StorageError as error:
            raise StorageUnavailableException(
                f"The ledger cannot be read now: {error}. Nothing is known of the job; ask again.",
                {"total": 1, "reason": str(error)},
            ) from error


def _read(message: bytes) -> tuple[str, str, dict[str, Any], datetime | None]:
    """The question's id, its task, its named arguments, and when nobody waits for it any more."""
    envelope = json.loads(message)
    headers, body = envelope["headers"], envelope["body"]
    if envelope["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    args, kwargs, _ = json.loads(body)
    question, expires = headers["id"], headers.get("expires")
    if not is_job_id(question):
        raise ValueError(f"its id: expected {JOB_ID_RULE}, got {describe(question)}")
    until = datetime.fromisoformat(expires) if expires else None
    if until and not until.tzinfo:
        until = until.replace(tzinfo=UTC)
    positional = {"job_id" if at == 0 else str(at): value for at, value in enumerate(args)}
    return question, str(headers["task"]), {**positional, **kwargs}, until
