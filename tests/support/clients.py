"""Both clients behind one blocking interface."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import Job, JobStatus
from interview_access.producer import InterviewAccessClient

T = TypeVar("T")


class Client(Protocol):
    """The methods of both clients; see :class:`InterviewAccessClient`."""

    @property
    def enqueue(self) -> Callable[..., str]:
        """Send a job, and return its ID."""

    @property
    def enqueue_cohort(self) -> Callable[..., str]:
        """Send a job for several users, and return its ID."""

    @property
    def enqueue_attempt(self) -> Callable[..., str]:
        """Send a job that creates an attempt, and return its ID."""

    @property
    def enqueue_many(self) -> Callable[[Iterable[Job]], list[str]]:
        """Send several jobs, and return their IDs."""

    @property
    def wait(self) -> Callable[..., dict[str, Any]]:
        """Wait for a job, and return its result."""

    @property
    def status(self) -> Callable[..., JobStatus]:
        """Return a job's status."""

    @property
    def cancel(self) -> Callable[..., JobStatus]:
        """Cancel a job, and return its status."""

    def close(self) -> None:
        """Close the connections."""


class Awaited:
    """The asyncio client on a separate event loop, for one thread at a time."""

    def __init__(self, broker_url: str | None = None, result_backend: str | None = None) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncInterviewAccessClient(broker_url, result_backend)

    def enqueue(self, user_id: Any, interview_ids: Any, **options: Any) -> str:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.enqueue(user_id, interview_ids, **options))

    def enqueue_cohort(self, user_ids: Any, interview_ids: Any, **options: Any) -> str:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.enqueue_cohort(user_ids, interview_ids, **options))

    def enqueue_attempt(self, interview_id: Any, user_id: Any, **options: Any) -> str:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.enqueue_attempt(interview_id, user_id, **options))

    def enqueue_many(self, jobs: Iterable[Job]) -> list[str]:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.enqueue_many(jobs))

    def wait(self, job_id: str, **options: Any) -> dict[str, Any]:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.wait(job_id, **options))

    def status(self, job_id: str, *, timeout: float) -> JobStatus:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.status(job_id, timeout=timeout))

    def cancel(self, job_id: str, *, timeout: float) -> JobStatus:
        """See :class:`InterviewAccessClient`."""
        return self._runner.run(self._client.cancel(job_id, timeout=timeout))

    def close(self) -> None:
        """Close the connections and the loop."""
        self._runner.run(self._client.close())
        self._runner.close()


CLIENTS: dict[str, Callable[..., Client]] = {"blocking": InterviewAccessClient, "asyncio": Awaited}


async def longest_gap(call: Coroutine[Any, Any, T]) -> tuple[float, T | BaseException]:
    """Measure how long a call blocks its event loop at most.

    Returns:
        The longest interval in seconds, and the call's result or exception.
    """
    longest, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(call)
    while not task.done():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest, task.exception() or task.result()
