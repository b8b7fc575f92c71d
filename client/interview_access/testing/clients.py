"""The clients of the test kit, and the context manager that routes real clients to one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from threading import Lock
from typing import Any, TypeVar, overload
from unittest import mock

from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import JobProgress
from interview_access.producer import InterviewAccessClient
from interview_access.protocol.commands import Commands
from interview_access.protocol.limits import LimitsReader
from interview_access.protocol.messages import check_timeout
from interview_access.testing.inline import InlineResults
from interview_access.testing.queue import InMemoryQueue
from interview_access.testing.stated import StatedResults

Q = TypeVar("Q", bound=InMemoryQueue)
T = TypeVar("T")

_UNUSED = "redis://unused.invalid"  # the address of a client that never connects


class _Blocking(InMemoryQueue, InterviewAccessClient):
    """The blocking client on an in-memory queue."""

    def __init__(self) -> None:
        InMemoryQueue.__init__(self)
        InterviewAccessClient.__init__(self, _UNUSED)

    def wait(
        self,
        job_id: str,
        *,
        timeout: float,
        on_progress: Callable[[JobProgress], None] | None = None,
    ) -> dict[str, Any]:
        """Return the job's result, or raise at once; see :class:`.InterviewAccessClient`."""
        return super().wait(job_id, timeout=_no_time(timeout), on_progress=on_progress)

    def _execute(self, step: Commands) -> list[Any]:
        return self.execute(step)


class _Asyncio(InMemoryQueue, AsyncInterviewAccessClient):
    """The asyncio client on an in-memory queue."""

    def __init__(self) -> None:
        InMemoryQueue.__init__(self)
        AsyncInterviewAccessClient.__init__(self, _UNUSED)

    async def wait(
        self,
        job_id: str,
        *,
        timeout: float,
        on_progress: Callable[[JobProgress], None] | None = None,
    ) -> dict[str, Any]:
        """Return the job's result, or raise at once; see :class:`.InterviewAccessClient`."""
        return await super().wait(job_id, timeout=_no_time(timeout), on_progress=on_progress)

    def _check_loop(self) -> None:
        """Accept every event loop: test runners use several, and there are no connections."""

    async def _execute(self, step: Commands) -> list[Any]:
        return self.execute(step)


class FakeClient(StatedResults, _Blocking):
    """An :class:`.InterviewAccessClient` that keeps what was enqueued, and sends nothing.

    It validates arguments and refuses a reused job ID as the real client does. A job stays queued
    until the test calls :meth:`set_result`, :meth:`set_failure` or `cancel`. `wait` never
    sleeps: without a result it raises NoAnswerInTimeError at once.
    """


class AsyncFakeClient(StatedResults, _Asyncio):
    """:class:`FakeClient` for asyncio; its assertions and setters are not coroutines."""


class InlineClient(InlineResults, _Blocking):
    """An :class:`.InterviewAccessClient` that executes jobs at once, with the worker's own code.

    IDs are validated against the interviews that exist, counts are exact, a repeated job ID has its
    first result, and failures are raised by `wait`. A job with a countdown is executed at once; one
    whose expiry has passed, or passes before its ETA, fails with JobExpiredException.

    If the database is unavailable, the job fails with StorageUnavailableException without retries.
    If it lacks the worker's tables or a privilege, the call raises a ValueError with the remedy.

    Args:
        interviews: IDs of the interviews that exist, if no database is given.
        database_url: URL of a PostgreSQL database with the worker's tables, in which the interviews
            are committed rows. By default jobs are executed in memory.

    Raises:
        ImportError: if the worker package is not installed, or if a module of the service named
            ``tasks`` or ``storage`` is imported in its place.
        ValueError: if an interview ID is not a UUID, `database_url` is not a PostgreSQL URL, or
            both arguments are given.
    """

    def close(self) -> None:
        """Close the connections; another call opens new ones."""
        super().close()
        self._close_database()


class AsyncInlineClient(InlineResults, _Asyncio):
    """:class:`InlineClient` for asyncio; a job is executed in the event loop's thread."""

    async def close(self) -> None:
        """Close the connections; another call opens new ones."""
        await super().close()
        self._close_database()


@overload
def capture_enqueued() -> AbstractContextManager[FakeClient]: ...


@overload
def capture_enqueued(into: Q) -> AbstractContextManager[Q]: ...


def capture_enqueued(
    into: InMemoryQueue | None = None,
) -> AbstractContextManager[InMemoryQueue]:
    """Route the calls of every client of this process to one client of the test kit.

    Within the block no :class:`.InterviewAccessClient` and no :class:`.AsyncInterviewAccessClient`
    connects to Redis, whichever thread uses it and whenever it was created. The code under test
    needs no change. Blocks nest: the innermost receives the calls.

    Args:
        into: The client that receives the calls; by default a new :class:`FakeClient`.

    Returns:
        A context manager whose value is the client that receives the calls.
    """
    return _captured_by(FakeClient() if into is None else into)


_capturing: list[InMemoryQueue] = []
"""The clients that receive calls, the current one last. Blocks of threads may end in any order."""

_capturing_lock = Lock()


@contextmanager
def _captured_by(queue: Q) -> Iterator[Q]:
    with _capturing_lock:
        if not _capturing:
            _patches.enter_context(_patched_clients())
        _capturing.append(queue)
    try:
        yield queue
    finally:
        with _capturing_lock:
            _capturing.remove(queue)
            if not _capturing:
                _patches.close()


_patches = ExitStack()


@contextmanager
def _patched_clients() -> Iterator[None]:
    """Route the calls of every client to the current one of those that capture."""
    limits = LimitsReader()  # so that no client remembers the limits of the test kit

    def execute(_client: InterviewAccessClient, step: Commands) -> list[Any]:
        return _capturing[-1].execute(step)

    async def execute_async(_client: AsyncInterviewAccessClient, step: Commands) -> list[Any]:
        return _capturing[-1].execute(step)

    def accept_every_loop(_client: AsyncInterviewAccessClient) -> None: ...

    def without_waiting(wait: Callable[..., T]) -> Callable[..., T]:
        @wraps(wait)
        def at_once(client: object, job_id: str, *, timeout: float, on_progress: Any = None) -> T:
            return wait(client, job_id, timeout=_no_time(timeout), on_progress=on_progress)

        return at_once

    with (
        mock.patch.object(LimitsReader, "check", partial(LimitsReader.check, limits)),
        mock.patch.multiple(
            InterviewAccessClient,
            _execute=execute,
            wait=without_waiting(InterviewAccessClient.wait),
        ),
        mock.patch.multiple(
            AsyncInterviewAccessClient,
            _execute=execute_async,
            _check_loop=accept_every_loop,
            wait=without_waiting(AsyncInterviewAccessClient.wait),
        ),
    ):
        yield


def _no_time(timeout: float) -> float:
    """Check a timeout, and return 0 instead: no result is stored while a test waits."""
    check_timeout(timeout)
    return 0
