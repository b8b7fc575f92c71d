"""The asyncio client, which sends the same commands as the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from itertools import islice
from typing import Any, Self, TypeVar
from uuid import UUID

from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError, WatchError

from interview_access.connections import (
    CLIENT_NAME,
    CONNECT_SECONDS,
    KEEPALIVE,
    SOCKET_SECONDS,
    redis_addresses,
    sentinel_options,
)
from interview_access.contracts import (
    GrantCohortJob,
    GrantJob,
    InterviewAttemptJob,
    Job,
    JobProgress,
    JobStatus,
)
from interview_access.contracts.jobs import or_new
from interview_access.errors import InterviewAccessError, InvalidGrantRequestException
from interview_access.producer import REPLY_SECONDS
from interview_access.protocol import control_requests, enqueueing, polling
from interview_access.protocol.commands import Commands, Exchange, Pause
from interview_access.protocol.limits import LimitsReader
from interview_access.protocol.messages import JobMessage, checked_message, checked_messages
from interview_access.redis_address import RedisAddress
from interview_access.tracing import sending

T = TypeVar("T")

MAX_ASYNC_CONNECTIONS = 50
"""Connections to a server; more tasks than that wait for one another."""

_SLICE_JOBS = 100  # encoded in one turn of a thread: 3 ms for jobs of 20 IDs


class AsyncInterviewAccessClient:
    """:class:`~interview_access.producer.InterviewAccessClient` for asyncio.

    Its methods have the arguments, return values and exceptions of the methods of that class.
    Create one client for each event loop: connections belong to the loop that opened them, and a
    call in another loop raises RuntimeError. ``async with`` closes them.
    """

    def __init__(self, broker_url: str | None = None, result_backend: str | None = None) -> None:
        """Connect at the first call.

        Args:
            broker_url: See :class:`~interview_access.producer.InterviewAccessClient`.
            result_backend: Likewise.

        Raises:
            ValueError: if no broker is given, or a URL is invalid.
        """
        self._addresses = redis_addresses(broker_url, result_backend)
        self._limits = LimitsReader()
        self._open()

    def _open(self) -> None:
        """Create the connection pools, which belong to the event loop that uses them first."""
        queue, results = self._addresses
        self._queue = _connect(queue)
        self._results = self._queue if results == queue else _connect(results)
        self._turns = asyncio.Semaphore(MAX_ASYNC_CONNECTIONS)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def enqueue(
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
        """Enqueue a job; see :meth:`~.producer.InterviewAccessClient.enqueue`."""
        job = GrantJob(user_id, interview_ids, or_new(job_id), countdown, expires, actor, reason)
        return await self._enqueue(job, is_new_id=job_id is None)

    async def enqueue_cohort(
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
        """Enqueue a cohort job; see :meth:`~.producer.InterviewAccessClient.enqueue_cohort`."""
        job = GrantCohortJob(
            user_ids, interview_ids, or_new(job_id), countdown, expires, actor, reason
        )
        return await self._enqueue(job, is_new_id=job_id is None)

    async def enqueue_attempt(
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
        """Enqueue an attempt; see :meth:`~.producer.InterviewAccessClient.enqueue_attempt`."""
        job = InterviewAttemptJob(
            interview_id, user_id, or_new(job_id), countdown, expires, actor, reason
        )
        return await self._enqueue(job, is_new_id=job_id is None)

    async def enqueue_many(self, jobs: Iterable[Job]) -> list[str]:
        """Enqueue many jobs; see :meth:`~.producer.InterviewAccessClient.enqueue_many`.

        The jobs, also those of a generator, are encoded in other threads.
        """
        messages: list[JobMessage] = []
        with sending(self._addresses[0]) as call:
            encoding = checked_messages(jobs, call.headers)
            # In slices: a thread that encodes many jobs in a row rarely releases the GIL.
            while part := await asyncio.to_thread(list, islice(encoding, _SLICE_JOBS)):
                messages += part
            call.count(len(messages))
            return await self._run(enqueueing.enqueue_many(messages, self._limits))

    async def wait(
        self,
        job_id: str,
        *,
        timeout: float,
        on_progress: Callable[[JobProgress], None] | None = None,
    ) -> dict[str, Any]:
        """Wait for a job's result; see :meth:`~.producer.InterviewAccessClient.wait`."""
        poll = polling.result(job_id, timeout=timeout, on_progress=on_progress)
        return await self._run(poll)

    async def status(self, job_id: str, *, timeout: float = REPLY_SECONDS) -> JobStatus:
        """Report a job's status; see :meth:`~.producer.InterviewAccessClient.status`."""
        return await self._run(control_requests.status(job_id, timeout=timeout))

    async def cancel(self, job_id: str, *, timeout: float = REPLY_SECONDS) -> JobStatus:
        """Cancel a job; see :meth:`~.producer.InterviewAccessClient.cancel`."""
        return await self._run(control_requests.cancel(job_id, timeout=timeout))

    async def close(self) -> None:
        """Close the connections; another call, in any event loop, opens new ones.

        The connections of an event loop that has ended are abandoned.
        """
        queue, results, loop = self._queue, self._results, self._loop
        if loop and not loop.is_closed():
            self._check_loop()
        self._open()
        if loop and loop.is_closed():
            return
        await queue.aclose()
        if results is not queue:
            await results.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _enqueue(self, job: Job, *, is_new_id: bool) -> str:
        with sending(self._addresses[0], job) as call:
            # In a thread, because encoding 100,000 IDs would block the loop.
            try:
                message = await asyncio.to_thread(checked_message, job, call.headers)
            except InvalidGrantRequestException as error:
                raise error.with_traceback(None) from None
            return await self._run(enqueueing.enqueue(message, self._limits, is_new_id=is_new_id))

    def _check_loop(self) -> None:
        """Refuse an event loop other than the one to which the connections belong."""
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            state = "which is closed" if self._loop.is_closed() else "which is another one"
            raise RuntimeError(
                f"Got an AsyncInterviewAccessClient of an earlier event loop, {state}; expected "
                "one client per event loop. Create it inside the function given to asyncio.run, "
                "or await its close() before that loop ends."
            )

    async def _run(self, exchange: Exchange[T]) -> T:
        """Execute the steps that the exchange yields until it returns."""
        self._check_loop()
        try:
            return await self._result(exchange)
        except InterviewAccessError as error:
            # Without the frames of the exchange, of which the caller knows nothing.
            raise error.with_traceback(None) from None

    async def _result(self, exchange: Exchange[T]) -> T:
        replies: Any = None
        failed: Exception | None = None
        cancelled_before = _cancellations()
        try:
            while True:
                step = exchange.throw(failed) if failed else exchange.send(replies)
                replies, failed = None, None
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    continue
                try:
                    async with self._turns:  # waiting for a connection is not an outage
                        replies = await self._execute(step)
                except (RedisError, OSError) as error:
                    failed = error
                if _cancellations() > cancelled_before:
                    # Before Python 3.12 asyncio.wait_for, in which redis-py writes, can swallow a
                    # cancellation.
                    raise asyncio.CancelledError
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return] # a generator's return value

    async def _execute(self, step: Commands) -> list[Any]:
        """Execute the round trips of a step on one connection."""
        pool = (self._results if step.results else self._queue).connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call] # redis-py's
        round_trips = step.round_trips()
        try:
            commands = next(round_trips)
            while True:
                await connection.send_packed_command(connection.pack_commands(commands))
                commands = round_trips.send([await _reply(connection) for _ in commands])
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return] # a generator's return value
        except (ResponseError, WatchError):
            raise  # all replies have been read
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def _cancellations() -> int:
    """Count the cancellation requests of the current task."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def _connect(address: RedisAddress) -> Redis:
    once = {"retry": Retry(NoBackoff(), 0)}
    options: dict[str, Any] = {
        **address.connection_options,
        **once,
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": SOCKET_SECONDS,
        "redis_connect_func": _set_client_name,
    }
    if address.master_name:
        # This pool does not block; the semaphore limits the tasks that use it at once.
        sentinels = Sentinel(  # type: ignore[no-untyped-call] # redis-py's
            address.hosts,
            sentinel_kwargs={**sentinel_options(address, SOCKET_SECONDS), **once},
            **options,
            **KEEPALIVE,
        )
        client: Redis = sentinels.master_for(
            address.master_name, connection_pool_class=_SentinelPool
        )
        return client
    kind: type[AbstractConnection] = SSLConnection if options.pop("ssl", False) else Connection
    if address.path:
        kind = UnixDomainSocketConnection
        options["path"] = address.path
    else:
        ((options["host"], options["port"]),) = address.hosts
        options |= KEEPALIVE
    # Tasks wait for a connection; redis-py's default pool would raise an error instead.
    return Redis.from_pool(
        BlockingConnectionPool(
            connection_class=kind,
            max_connections=MAX_ASYNC_CONNECTIONS,
            timeout=SOCKET_SECONDS,
            **options,
        )
    )


class _SentinelPool(SentinelConnectionPool):
    """A pool that also closes its connections to the Sentinels."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await self.sentinel_manager.aclose()


async def _set_client_name(connection: AbstractConnection) -> None:
    await connection.on_connect()
    with suppress(ResponseError):  # without the permission connections have no name
        await connection.send_command("CLIENT", "SETNAME", CLIENT_NAME)
        await connection.read_response()
