"""The client for services that block: threads, processes, web servers of the ordinary kind.

Owns the connections to Redis and their bounds in time; what is said on them is
:mod:`interview_access.protocol`'s. Ids go to the worker unchecked: the worker is the judge.
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
"""For how long workers are waited for that were asked about a job."""

CONNECT_SECONDS, SOCKET_SECONDS = 2.0, 3.0
# What the protocol tries twice ends with 10 s by these.
MOST_CONNECTIONS = 100_000
"""Of threads: each has one while it speaks. redis-py's own limit would fail the 101st."""

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
            "TCP_USER_TIMEOUT": 10_000,  # milliseconds, for what was sent without an answer
        }.items()
        if hasattr(socket, name)
    },
}
"""Options of redis-py's TCP connections: a host that vanished is noticed within 11 s."""


class InterviewAccessClient:
    """Enqueues grant-access jobs, tells what became of them, and cancels them.

    One for a whole process: safe in threads, and in processes forked off later. Every call ends
    within 10 s when Redis is away, but for those with a timeout of their own: that is a deadline,
    kept to the 3 s for which a Redis that says nothing is listened to.
    """

    def __init__(self, broker_url: str | None = None, result_backend: str | None = None) -> None:
        """Connects at the first call.

        Args:
            broker_url: ``redis://``, ``rediss://``, ``redis+socket://`` or ``sentinel://``;
                ``CELERY_BROKER_URL`` of the environment without one. The password of Sentinels
                comes from ``REDIS_SENTINEL_PASSWORD``.
            result_backend: Likewise, from ``CELERY_RESULT_BACKEND``; the broker's without one.

        Raises:
            ValueError: if no broker is given, or a URL names no Redis.
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
        """Ask for one user's access to interviews.

        Args:
            user_id: 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: 1 to 255 printable characters, one for each request; a random UUID without one.
                Sending one request twice under one id is safe: it takes effect once.
            countdown: Seconds before which no worker begins it.
            expires: Seconds, or a datetime (UTC where it has no zone), after which none does.

        Returns:
            The job's id, to poll it by.

        Raises:
            ValueError: the job id, the countdown or the expiry is none.
            InvalidGrantRequestException: an argument cannot be sent at all.
            JobIdReusedException: the id is known of another request; nothing was sent.
            QueueUnavailableError: Redis did not take the job in time.
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
        """Ask for every one of these users' access to every one of these interviews: one job.

        All or nothing, with one count; :meth:`status` tells the count of each user. The arguments,
        what is returned and what is raised are as of :meth:`enqueue`.

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
        """Ask for many users' access: thousands of jobs in a few round trips.

        They are sent in their order, up to 500 at a time, of which Redis takes all or none. Before
        the first is sent, all are written down (a job of 20 ids takes about 3 KB of memory) and
        their ids looked up. A job that is given twice is sent once.

        Args:
            jobs: What :meth:`enqueue` takes, with an id for each.

        Returns:
            The jobs' ids, in step with them.

        Raises:
            ValueError: as from :meth:`enqueue`, with the job's position; nothing was sent.
            InvalidGrantRequestException: likewise; or two requests here have one id.
            JobIdReusedException: ids are known of other requests; nothing was sent, unless another
                took one meanwhile.
            QueueUnavailableError: Redis did not take all of them in time.

        The details of the last two name every id once, in order: those ``sent``, those
        ``perhaps_sent`` (when an answer did not come) and those ``not_sent``.
        """
        return self._hold(protocol.enqueue_many(list(grant_messages(jobs))))

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
        return self._hold(protocol.result(job_id, timeout=timeout, on_progress=on_progress))

    def status(self, job_id: str, *, timeout: float = ANSWER_SECONDS) -> JobStatus:
        """What is known of a job, whoever sent it and however long ago.

        Args:
            job_id: The job's id.
            timeout: Seconds to wait for a worker's answer.

        Raises:
            NoAnswerInTimeError: no worker answered.
            StorageUnavailableException: one did, but cannot reach the ledger now.
            QueueUnavailableError: Redis is away.
        """
        return self._hold(protocol.status(job_id, timeout=timeout))

    def cancel(self, job_id: str, *, timeout: float = ANSWER_SECONDS) -> JobStatus:
        """Have a job cancelled: not begun, it never will be; running, it stops at its next chunk.

        Args:
            job_id: The job's id.
            timeout: Seconds to wait for a worker's answer, and for a running job to stop.

        Returns:
            What is known of the job then: ``cancelled``, or as it had ended before. Still
            ``running`` when the time is over, or ``unknown`` where nobody has announced such a job:
            ``cancel_requested`` tells that it stops as soon as it can, or will not begin.

        Raises:
            NoAnswerInTimeError: no worker answered, and the job may not be cancelled.
            StorageUnavailableException: one did, but cannot reach the ledger now.
            QueueUnavailableError: Redis is away.
        """
        return self._hold(protocol.cancel(job_id, timeout=timeout))

    def close(self) -> None:
        """Close the connections; another call opens new ones."""
        self._queue.close()
        self._results.close()

    def _hold(self, conversation: Conversation[T]) -> T:
        """Do what the conversation asks for until it returns."""
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
    """The servers of queue and results, from the arguments or else from the environment.

    Raises:
        ValueError: if no broker is given, or a URL names no Redis. No part of a password is shown.
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
        **address.sentinel_options,
        **KEEPALIVE,
        "socket_connect_timeout": each,
        "socket_timeout": each,
        "retry": Retry(NoBackoff(), 0),  # the next Sentinel is asked instead
    }
