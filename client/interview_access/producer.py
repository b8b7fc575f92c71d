"""Enqueue jobs and read their results: what a service needs of Celery, and no more of it.

Owns the connection to Redis and its bounds in time. Ids go to the worker unchecked: the worker is
the judge of a request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

from celery import Celery, states
from celery.backends.redis import RedisBackend
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from redis.exceptions import RedisError

from interview_access.contracts import (
    GRANT_ACCESS,
    JOB_ID_RULE,
    PROGRESS,
    QUEUE,
    JobProgress,
    describe,
    is_job_id,
)
from interview_access.errors import (
    InterviewAccessError,
    JobFailedError,
    NoAnswerInTimeError,
    QueueUnavailableError,
    shortened,
)

_CONNECT_SECONDS = 2.0
_SOCKET_SECONDS = 3.0
_TRIES = 2
_RETRIES = {"max_retries": 1, "interval_start": 0.0, "interval_step": 0.2, "interval_max": 0.2}
# Two tries of connecting and of answering: 2 * (2 s + 3 s) is the longest that Redis can hold us.

_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.01, 0.25


class PolledResults(RedisBackend):  # type: ignore[misc] # Celery ships no types
    """Celery's result backend without its subscription.

    Celery subscribes a producer to the channel of every job that it sends, and keeps the
    subscription until the result was fetched; whoever only polls would leave one behind for each.
    """

    def on_task_call(self, producer: object, task_id: str) -> dict[str, object]:  # noqa: ARG002 - Celery's signature
        """Subscribe to nothing."""
        return {}


def job_queue() -> Queue:
    """The queue of the contract: the default exchange, one Redis list of that name."""
    return Queue(QUEUE, Exchange("", type="direct"), routing_key=QUEUE)


class InterviewAccessClient:
    """Enqueues grant-access jobs and reads their results.

    Every call ends within 10 s when Redis is away, but for :meth:`wait`, which has a deadline.
    """

    def __init__(self, broker_url: str | None = None, result_backend: str | None = None) -> None:
        """Connects at the first call.

        Args:
            broker_url: As Celery takes it; ``CELERY_BROKER_URL`` of the environment without one.
            result_backend: Likewise, from ``CELERY_RESULT_BACKEND``; the broker's without one.

        Raises:
            ValueError: where no broker is given.
        """
        broker_url = broker_url or os.environ.get("CELERY_BROKER_URL")
        if not broker_url:
            raise ValueError(
                "No broker: expected a URL as an argument or in CELERY_BROKER_URL, "
                "such as redis://localhost:6379/0."
            )
        results = result_backend or os.environ.get("CELERY_RESULT_BACKEND") or broker_url
        self._broker = maybe_sanitize_url(broker_url)
        self._app = Celery("interview_access", set_as_current=False)
        self._app.loader.override_backends = dict.fromkeys(
            ("redis", "rediss"), f"{__name__}:PolledResults"
        )
        self._app.conf.update(
            broker_url=broker_url,
            result_backend=results,
            task_queues=[job_queue()],
            task_default_queue=QUEUE,
            broker_connection_timeout=_CONNECT_SECONDS,
            broker_transport_options={
                "socket_connect_timeout": _CONNECT_SECONDS,
                "socket_timeout": _SOCKET_SECONDS,
                "max_retries": 0,
            },
            redis_socket_connect_timeout=_CONNECT_SECONDS,
            redis_socket_timeout=_SOCKET_SECONDS,
            result_backend_transport_options={"retry_policy": _RETRIES},
        )

    def enqueue(
        self, user_id: str | UUID, interview_ids: Sequence[str | UUID], *, job_id: str | None = None
    ) -> str:
        """Ask for one user's access to interviews.

        Args:
            user_id: 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: 1 to 255 printable characters, new for each request; a random UUID without one.
                Sending one request twice under one id is safe: it takes effect once.

        Returns:
            The job's id, to poll its result by.

        Raises:
            ValueError: when the job id is none.
            QueueUnavailableError: when Redis did not take the job in time.
        """
        job_id = str(uuid4()) if job_id is None else job_id
        if not is_job_id(job_id):
            raise ValueError(f"job id: expected {JOB_ID_RULE}, got {describe(job_id)}")
        try:
            self._send(job_id, user_id, interview_ids)
        except (OperationalError, RedisError, OSError) as error:
            raise QueueUnavailableError(
                f"Job {job_id} may not be queued: Redis at {self._broker} did not take it "
                f"({_reason(error)}). Expected a Redis that can be reached and written to. "
                "Sending the job again under the same id is safe.",
                {"job_id": job_id},
            ) from error
        return job_id

    def wait(
        self,
        job_id: str,
        *,
        timeout: float,
        on_progress: Callable[[JobProgress], None] | None = None,
    ) -> dict[str, Any]:
        """The job's result, as soon as it stands.

        Args:
            job_id: The job's id.
            timeout: Seconds to wait at most.
            on_progress: Called with each progress that was seen.

        Returns:
            The result as the contract has it.

        Raises:
            InterviewAccessError: the job's own failure, in the class that its worker stored;
                :class:`JobFailedError` where that class is none of ours.
            NoAnswerInTimeError: when the time is over.
            QueueUnavailableError: when the results cannot be read.
        """
        deadline = time.monotonic() + timeout
        pause = _FIRST_POLL_SECONDS
        while True:
            answer = self._look(job_id)
            match answer["status"]:
                case states.SUCCESS:
                    return dict(answer["result"])
                case states.FAILURE | states.REVOKED:
                    raise _failure(answer["result"])
                case state if state == PROGRESS and on_progress:
                    on_progress(JobProgress.model_validate(answer["result"]))
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoAnswerInTimeError(
                    f"Job {job_id} had no answer within {timeout:g} s (its state is "
                    f"{answer['status']}). It may still run: poll it again by its id.",
                    {"job_id": job_id, "state": answer["status"]},
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)

    def _send(self, job_id: str, user_id: str | UUID, interview_ids: Sequence[str | UUID]) -> None:
        """Send the job, on a new connection where the one at hand has failed.

        kombu's own way of trying again keeps a channel that it closed, and ends in AttributeError.
        """
        for tries_left in reversed(range(_TRIES)):
            connection = self._app.pool.acquire(block=True)
            try:
                self._app.send_task(
                    GRANT_ACCESS,
                    kwargs={"user_id": user_id, "interview_ids": interview_ids},
                    task_id=job_id,
                    queue=QUEUE,
                    connection=connection,
                    retry=False,
                    # Celery's own would carry the first thousand characters of ids everywhere.
                    argsrepr="()",
                    kwargsrepr=f"user_id={shortened(str(user_id))}, "
                    f"interview_ids=<{describe(interview_ids)}>",
                )
            except (OperationalError, RedisError, OSError):
                connection.close()
                if not tries_left:
                    raise
            else:
                return
            finally:
                connection.release()

    def _look(self, job_id: str) -> dict[str, Any]:
        try:
            meta: dict[str, Any] = self._app.backend.get_task_meta(job_id, cache=False)
        except (OperationalError, RedisError, OSError) as error:
            raise QueueUnavailableError(
                f"The result of job {job_id} cannot be read from Redis ({_reason(error)}). "
                "The job itself is not touched by this: poll it again.",
                {"job_id": job_id},
            ) from error
        return meta


def _failure(error: object) -> InterviewAccessError:
    if isinstance(error, InterviewAccessError):
        return error
    kind = type(error).__name__
    return JobFailedError(f"The job failed: {kind}: {error}", {"exc_type": kind})


def _reason(error: BaseException) -> str:
    """What went wrong, without Celery's wrapping."""
    return str(error.__cause__ or error) or type(error).__name__
