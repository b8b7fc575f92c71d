"""The blocking client, for services that use threads or processes.

:mod:`interview_access.protocol` decides which commands are sent. The types and lengths of arguments
are checked before anything is sent; interview IDs are checked by the workers, which know them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Self, TypeVar
from uuid import UUID

from redis.connection import ConnectionInterface
from redis.exceptions import RedisError, ResponseError, WatchError

from interview_access.connections import CLIENT_NAME, connect, redis_addresses
from interview_access.contracts import (
    GrantCohortJob,
    GrantJob,
    InterviewAttemptJob,
    Job,
    JobProgress,
    JobStatus,
)
from interview_access.contracts.jobs import or_new
from interview_access.errors import InterviewAccessError
from interview_access.protocol import control_requests, enqueueing, polling
from interview_access.protocol.commands import Commands, Exchange, Pause
from interview_access.protocol.limits import LimitsReader
from interview_access.protocol.messages import checked_message, checked_messages
from interview_access.tracing import sending

T = TypeVar("T")

REPLY_SECONDS = 10.0
"""Default time in seconds to wait for a worker's reply to a control request."""


class InterviewAccessClient:
    """Enqueues grant-access jobs, reports their state, and cancels them.

    One instance serves a whole process: it is safe for threads, and after a fork. If Redis is
    unreachable, a call fails within 10 s. A call with `timeout` fails by then, or 3 s later (the
    socket timeout) if Redis does not reply. As a context manager it closes its connections.
    """

    def __init__(self, broker_url: str | None = None, result_backend: str | None = None) -> None:
        """Connect at the first call.

        Args:
            broker_url: ``redis://``, ``rediss://``, ``redis+socket://`` or ``sentinel://``;
                by default ``CELERY_BROKER_URL`` of the environment. The password of Sentinels
                comes from ``REDIS_SENTINEL_PASSWORD``.
            result_backend: Likewise, from ``CELERY_RESULT_BACKEND``; by default the broker's.

        Raises:
            ValueError: if no broker is given, or a URL is invalid.
        """
        queue, results = redis_addresses(broker_url, result_backend)
        self._server = queue
        self._queue = connect(queue, client_name=CLIENT_NAME)
        self._results = (
            self._queue if results == queue else connect(results, client_name=CLIENT_NAME)
        )
        self._limits = LimitsReader()

    def enqueue(
        self,
        user_id: str | UUID,
        interview_ids: Iterable[str | UUID],
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
        actor: str | UUID | None = None,
        reason: str | None = None,
    ) -> str:
        """Enqueue a job that grants one user access to interviews.

        Args:
            user_id: 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: 1 to 255 printable characters, unique to the request; by default a random UUID.
                Sending one request twice under one ID is safe: it takes effect once.
            countdown: Seconds before which no worker starts the job.
            expires: Seconds, or a datetime (UTC if naive), after which no worker starts the job.
            actor: Who requests the job, 1 to 255 printable characters. It is kept in the ledger.
            reason: Why, 1 to 1,000 printable characters. Likewise.

        Returns:
            The job's ID, to poll it by.

        Raises:
            ValueError: if `job_id`, `countdown`, `expires`, `actor` or `reason` is invalid.
            InvalidGrantRequestException: if an argument has an invalid type or length, or the job
                has more IDs than the workers' GRANT_MAX_INTERVIEW_IDS; nothing was sent. Malformed
                and unknown interview IDs fail the job instead.
            JobIdReusedException: if another request has the ID; nothing was sent.
            QueueUnavailableError: if Redis did not accept the job in time.
        """
        job = GrantJob(user_id, interview_ids, or_new(job_id), countdown, expires, actor, reason)
        return self._run(self._enqueue(job, is_new_id=job_id is None))

    def enqueue_cohort(
        self,
        user_ids: Iterable[str | UUID],
        interview_ids: Iterable[str | UUID],
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
        actor: str | UUID | None = None,
        reason: str | None = None,
    ) -> str:
        """Enqueue one job that grants each of the users access to each of the interviews.

        The job is atomic and has one count; :meth:`status` reports the count of each user.

        Args:
            user_ids: Each of 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: See :meth:`enqueue`.
            countdown: Likewise.
            expires: Likewise.
            actor: Likewise.
            reason: Likewise.

        Returns:
            The job's ID, to poll it by.

        Raises:
            ValueError, InvalidGrantRequestException, JobIdReusedException, QueueUnavailableError:
                see :meth:`enqueue`.
        """
        job = GrantCohortJob(
            user_ids, interview_ids, or_new(job_id), countdown, expires, actor, reason
        )
        return self._run(self._enqueue(job, is_new_id=job_id is None))

    def enqueue_attempt(
        self,
        interview_id: str | UUID,
        user_id: str | UUID,
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
        actor: str | UUID | None = None,
        reason: str | None = None,
    ) -> str:
        """Enqueue a job that creates an interview attempt, which starts when the job is executed.

        The job's result has the attempt's ID: ``{"success": True, "interview_attempt_id": "…"}``.

        Args:
            interview_id: A UUID.
            user_id: 1 to 36 characters.
            job_id: See :meth:`enqueue`.
            countdown: Likewise.
            expires: Likewise.
            actor: Likewise.
            reason: Likewise.

        Returns:
            The job's ID, to poll it by.

        Raises:
            ValueError, InvalidGrantRequestException, JobIdReusedException, QueueUnavailableError:
                see :meth:`enqueue`.
        """
        job = InterviewAttemptJob(
            interview_id, user_id, or_new(job_id), countdown, expires, actor, reason
        )
        return self._run(self._enqueue(job, is_new_id=job_id is None))

    def enqueue_many(self, jobs: Iterable[Job]) -> list[str]:
        """Enqueue thousands of jobs, of any kind, in a few round trips.

        The jobs are sent in order, up to 500 in one MULTI. Before the first is sent, all are
        encoded (a job of 20 IDs takes about 3 KB of memory) and their IDs are looked up. A job that
        is given twice is sent once.

        Args:
            jobs: :class:`~interview_access.contracts.GrantJob`,
                :class:`~interview_access.contracts.GrantCohortJob` and
                :class:`~interview_access.contracts.InterviewAttemptJob` objects.

        Returns:
            The jobs' IDs, in the order of `jobs`.

        Raises:
            ValueError: as from :meth:`enqueue`, with the job's position; nothing was sent.
            InvalidGrantRequestException: likewise; or if two of these requests have one ID.
            JobIdReusedException: if other requests have some of the IDs; nothing was sent, unless
                another client used an ID during the call.
            QueueUnavailableError: if Redis did not accept all of them in time. Its details, like
                those of JobIdReusedException, list every ID once, in order, under ``sent``,
                ``perhaps_sent`` (the reply was lost) or ``not_sent``.
        """
        return self._run(self._enqueue_many(jobs))

    def wait(
        self,
        job_id: str,
        *,
        timeout: float,
        on_progress: Callable[[JobProgress], None] | None = None,
    ) -> dict[str, Any]:
        """Wait for the job's result.

        Args:
            job_id: The job's ID.
            timeout: Seconds to wait at most.
            on_progress: Called with each progress that is read. Its exceptions end the call.

        Returns:
            ``{"success": True, "created_access_count": N}`` for a grant-access job.

        Raises:
            ValueError: if `job_id` or `timeout` is invalid.
            InterviewAccessError: if the job failed, in the class that its worker stored, or
                :class:`~interview_access.errors.JobFailedError` if this package does not define it.
            NoAnswerInTimeError: if the job has no result by the timeout.
            QueueUnavailableError: if the results cannot be read.
        """
        return self._run(polling.result(job_id, timeout=timeout, on_progress=on_progress))

    def status(self, job_id: str, *, timeout: float = REPLY_SECONDS) -> JobStatus:
        """Report a job's state, of any producer and any age.

        Args:
            job_id: The job's ID.
            timeout: Seconds to wait for a worker's reply.

        Returns:
            The job's status. The state ``unknown`` is not an error.

        Raises:
            ValueError: if `job_id` or `timeout` is invalid.
            NoAnswerInTimeError: if no worker replied.
            StorageUnavailableException: if a worker replied that it cannot read the ledger now.
            QueueUnavailableError: if Redis is unavailable.
        """
        return self._run(control_requests.status(job_id, timeout=timeout))

    def cancel(self, job_id: str, *, timeout: float = REPLY_SECONDS) -> JobStatus:
        """Cancel a job: it does not start, or stops after its current chunk.

        Args:
            job_id: The job's ID.
            timeout: Seconds to wait for a worker's reply, and for a running job to stop.

        Returns:
            The job's state afterwards, ``cancelled`` or the final state that it already had. If it
            is ``running`` (the timeout passed) or ``unknown`` (the job was never announced),
            ``cancel_requested`` is true: the job will stop, or will not start.

        Raises:
            ValueError: if `job_id` or `timeout` is invalid.
            NoAnswerInTimeError: if no worker replied; the job might not have been cancelled.
            StorageUnavailableException: if a worker replied that it cannot reach the ledger now.
            QueueUnavailableError: if Redis is unavailable.
        """
        return self._run(control_requests.cancel(job_id, timeout=timeout))

    def close(self) -> None:
        """Close the connections; another call opens new ones."""
        self._queue.close()
        self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enqueue(self, job: Job, *, is_new_id: bool) -> Exchange[str]:
        with sending(self._server, job) as call:
            message = checked_message(job, call.headers)
            return (yield from enqueueing.enqueue(message, self._limits, is_new_id=is_new_id))

    def _enqueue_many(self, jobs: Iterable[Job]) -> Exchange[list[str]]:
        with sending(self._server) as call:
            messages = list(checked_messages(jobs, call.headers))
            call.count(len(messages))
            return (yield from enqueueing.enqueue_many(messages, self._limits))

    def _run(self, exchange: Exchange[T]) -> T:
        """Execute the steps that the exchange yields until it returns."""
        try:
            return self._result(exchange)
        except InterviewAccessError as error:
            # Without the frames of the exchange, of which the caller knows nothing.
            raise error.with_traceback(None) from None

    def _result(self, exchange: Exchange[T]) -> T:
        replies: Any = None
        failed: Exception | None = None
        try:
            while True:
                step = exchange.throw(failed) if failed else exchange.send(replies)
                replies, failed = None, None
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    continue
                try:
                    replies = self._execute(step)
                except (RedisError, OSError) as error:
                    failed = error
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return] # a generator's return value

    def _execute(self, step: Commands) -> list[Any]:
        """Execute the round trips of a step on one connection."""
        pool = (self._results if step.results else self._queue).connection_pool
        connection = pool.get_connection()
        round_trips = step.round_trips()
        try:
            commands = next(round_trips)
            while True:
                packed = connection.pack_commands(commands)  # type: ignore[no-untyped-call] # redis-py's
                connection.send_packed_command(packed)  # type: ignore[no-untyped-call] # likewise
                commands = round_trips.send([_reply(connection) for _ in commands])
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return] # a generator's return value
        except (ResponseError, WatchError):
            raise  # all replies have been read
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call] # likewise
            raise
        finally:
            pool.release(connection)


def _reply(connection: ConnectionInterface) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error
