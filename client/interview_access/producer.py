"""The blocking client, for services that use threads or processes.

Owns the connections to Redis and their timeouts; :mod:`interview_access.protocol` decides which
commands are sent. IDs are sent unchecked: only the worker validates them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from redis import Connection, Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError, WatchError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from interview_access import protocol
from interview_access.contracts import GrantJob, JobProgress, JobStatus
from interview_access.protocol import (
    Commands,
    Conversation,
    GrantMessage,
    Pause,
    grant_messages,
)
from interview_access.redis_address import RedisAddress, masked

T = TypeVar("T")

ANSWER_SECONDS = 10.0
"""Seconds to wait for a worker's reply to a control request."""

CONNECT_SECONDS, SOCKET_SECONDS = 2.0, 3.0
# Seconds. With these a command that the protocol sends twice fails within 10 s.
MOST_CONNECTIONS = 100_000
"""One for each thread that executes a command; redis-py's own limit is 100 connections."""

CLIENT_NAME = "interview-access-client"
"""The name of a producer's connections in ``CLIENT LIST``."""

KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        getattr(socket, name): value
        for name, value in {
            "TCP_KEEPIDLE": 5,
            "TCP_KEEPINTVL": 2,
            "TCP_KEEPCNT": 3,
            "TCP_USER_TIMEOUT": 10_000,  # milliseconds, for data without a TCP acknowledgement
        }.items()
        if hasattr(socket, name)
    },
}
"""Options of redis-py's TCP connections: a host that is gone is detected within 11 s."""


class InterviewAccessClient:
    """Enqueues grant-access jobs, reports their state, and cancels them.

    One instance serves a whole process: it is safe for threads, and after a fork. While Redis is
    unreachable every call fails within 10 s, or within its own `timeout`, which a Redis that does
    not reply can exceed by the socket timeout of 3 s.
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
        self._queue = connect(queue, client_name=CLIENT_NAME)
        self._results = (
            self._queue if results == queue else connect(results, client_name=CLIENT_NAME)
        )

    def enqueue(
        self,
        user_id: str | UUID,
        interview_ids: Iterable[str | UUID],
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
    ) -> str:
        """Enqueue a job that grants one user access to interviews.

        Args:
            user_id: 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: 1 to 255 printable characters, unique to the request; by default a random UUID.
                Sending one request twice under one ID is safe: it takes effect once.
            countdown: Seconds before which no worker starts the job.
            expires: Seconds, or a datetime (UTC if naive), after which no worker starts the job.

        Returns:
            The job's ID, to poll it by.

        Raises:
            ValueError: if `job_id`, `countdown` or `expires` is invalid.
            InvalidGrantRequestException: if an argument cannot be encoded as JSON.
            JobIdReusedException: if another request has the ID; nothing was sent.
            QueueUnavailableError: if Redis did not accept the job in time.
        """
        message = GrantMessage.of(
            user_id, interview_ids, job_id=job_id, countdown=countdown, expires=expires
        )
        return self._hold(protocol.enqueue(message))

    def enqueue_cohort(
        self,
        user_ids: Iterable[str | UUID],
        interview_ids: Iterable[str | UUID],
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
    ) -> str:
        """Enqueue one job that grants each of the users access to each of the interviews.

        The job is atomic and has one count; :meth:`status` reports the count of each user.
        Arguments, return value and exceptions are those of :meth:`enqueue`.

        Args:
            user_ids: Each of 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: See :meth:`enqueue`.
            countdown: Likewise.
            expires: Likewise.
        """
        message = GrantMessage.of_cohort(
            user_ids, interview_ids, job_id=job_id, countdown=countdown, expires=expires
        )
        return self._hold(protocol.enqueue(message))

    def enqueue_many(self, jobs: Iterable[GrantJob]) -> list[str]:
        """Enqueue thousands of jobs in a few round trips.

        The jobs are sent in order, up to 500 in one MULTI. Before the first is sent, all are
        encoded (a job of 20 IDs takes about 3 KB of memory) and their IDs are looked up. A job that
        is given twice is sent once.

        Args:
            jobs: The arguments of :meth:`enqueue` for each job.

        Returns:
            The jobs' IDs, in the order of `jobs`.

        Raises:
            ValueError: as from :meth:`enqueue`, with the job's position; nothing was sent.
            InvalidGrantRequestException: likewise; or if two of these requests have one ID.
            JobIdReusedException: if other requests have some of the IDs; nothing was sent, unless
                another client used an ID during the call.
            QueueUnavailableError: if Redis did not accept all of them in time.

        The details of the last two list every ID once, in order, under ``sent``, ``perhaps_sent``
        (the reply was lost) or ``not_sent``.
        """
        return self._hold(protocol.enqueue_many(list(grant_messages(jobs))))

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
            on_progress: Called with each progress that was read.

        Returns:
            The result as the contract defines it.

        Raises:
            InterviewAccessError: if the job failed, in the class that its worker stored, or
                :class:`JobFailedError` if this package does not define that class.
            NoAnswerInTimeError: if the job has no result by the timeout.
            QueueUnavailableError: if the results cannot be read.
        """
        return self._hold(protocol.result(job_id, timeout=timeout, on_progress=on_progress))

    def status(self, job_id: str, *, timeout: float = ANSWER_SECONDS) -> JobStatus:
        """Report a job's state, whoever sent it and however long ago.

        Args:
            job_id: The job's ID.
            timeout: Seconds to wait for a worker's reply.

        Raises:
            NoAnswerInTimeError: if no worker replied.
            StorageUnavailableException: if a worker replied that it cannot read the ledger now.
            QueueUnavailableError: if Redis is unavailable.
        """
        return self._hold(protocol.status(job_id, timeout=timeout))

    def cancel(self, job_id: str, *, timeout: float = ANSWER_SECONDS) -> JobStatus:
        """Cancel a job: it does not start, or stops after its current chunk.

        Args:
            job_id: The job's ID.
            timeout: Seconds to wait for a worker's reply, and for a running job to stop.

        Returns:
            The job's state afterwards: ``cancelled``, or the final state that it already had. If it
            is ``running`` (the timeout passed) or ``unknown`` (the job was never announced),
            ``cancel_requested`` is true: the job will stop, or will not start.

        Raises:
            NoAnswerInTimeError: if no worker replied; the job might not have been cancelled.
            StorageUnavailableException: if a worker replied that it cannot reach the ledger now.
            QueueUnavailableError: if Redis is unavailable.
        """
        return self._hold(protocol.cancel(job_id, timeout=timeout))

    def close(self) -> None:
        """Close the connections; another call opens new ones."""
        self._queue.close()
        self._results.close()

    def _hold(self, conversation: Conversation[T]) -> T:
        """Execute the commands that the conversation yields until it returns."""
        replies: Any = None
        failed: Exception | None = None
        try:
            while True:
                step = conversation.throw(failed) if failed else conversation.send(replies)
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
        client = self._results if step.results else self._queue
        if len(step.commands) == 1 and not step.provided:
            return [client.execute_command(*step.commands[0])]  # type: ignore[no-untyped-call] # redis-py's
        with client.pipeline(transaction=True) as pipeline:
            if step.provided:
                pipeline.watch(*step.provided)  # type: ignore[no-untyped-call] # redis-py's
                if pipeline.mget(step.provided) != [*step.provided.values()]:
                    raise WatchError
                pipeline.multi()
            for command in step.commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call] # redis-py's
            return pipeline.execute()


def redis_addresses(
    broker_url: str | None, result_backend: str | None
) -> tuple[RedisAddress, RedisAddress]:
    """Parse the addresses of queue and results, from the arguments or else the environment.

    Raises:
        ValueError: if no broker is given, or a URL is invalid; passwords are masked.
    """
    broker = _address(broker_url, "broker_url", "CELERY_BROKER_URL")
    results = _address(result_backend, "result_backend", "CELERY_RESULT_BACKEND")
    if broker is None:
        raise ValueError(
            "No broker: expected a URL as the argument broker_url or in CELERY_BROKER_URL, "
            "such as redis://localhost:6379/0."
        )
    return broker, results or broker


def _address(url: str | None, argument: str, variable: str) -> RedisAddress | None:
    name = argument if url else variable
    url = url or os.environ.get(variable)
    if not url:
        return None
    try:
        return RedisAddress.parse(
            url, sentinel_password=os.environ.get("REDIS_SENTINEL_PASSWORD") or None
        )
    except ValueError as error:
        raise ValueError(f"{name}: got {masked(url)}, expected {error}.") from None


def connect(
    address: RedisAddress,
    *,
    client_name: str,
    connect_timeout: float = CONNECT_SECONDS,
    timeout: float = SOCKET_SECONDS,
    max_connections: int = MOST_CONNECTIONS,
) -> Redis:
    """Make a client; it connects at its first command, and retries nothing.

    Args:
        address: The server, or the Sentinels that name it.
        client_name: The connections' name in ``CLIENT LIST``, where the Redis user may set one.
        connect_timeout: Seconds.
        timeout: Seconds for a reply, and for those of all Sentinels together.
        max_connections: Connections in use at once.
    """

    def introduce(connection: Connection) -> None:
        connection.on_connect()  # type: ignore[no-untyped-call] # redis-py's
        with suppress(ResponseError):  # without the permission connections have no name
            connection.send_command("CLIENT", "SETNAME", client_name)  # type: ignore[no-untyped-call] # likewise
            connection.read_response()

    options: dict[str, Any] = {
        **address.connection_options,
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "redis_connect_func": introduce,
        "max_connections": max_connections,
    }
    if address.path:
        return Redis(unix_socket_path=address.path, **options)
    options |= KEEPALIVE
    if not address.master_name:
        ((host, port),) = address.hosts
        return Redis(host, port, **options)
    sentinels = Sentinel(  # type: ignore[no-untyped-call] # likewise
        address.hosts, sentinel_kwargs=sentinel_options(address, timeout), **options
    )
    client: Redis = sentinels.master_for(  # type: ignore[no-untyped-call] # likewise
        address.master_name, connection_pool_class=_SentinelPool
    )
    return client


class _SentinelPool(SentinelConnectionPool):
    """Closes its connections to the Sentinels as well."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:
            self.sentinel_manager.close()


def sentinel_options(address: RedisAddress, timeout: float) -> dict[str, Any]:
    """Arguments of redis-py's clients of the Sentinels: all of them are asked within the timeout.

    Args:
        address: With Sentinels.
        timeout: Seconds.
    """
    each = timeout / len(address.hosts)
    return {
        **address.sentinel_credentials,
        **KEEPALIVE,
        "socket_connect_timeout": each,
        "socket_timeout": each,
        "retry": Retry(NoBackoff(), 0),  # the next Sentinel is asked instead
    }
