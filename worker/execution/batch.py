"""Batches: requests that one pool process executes together."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from celery.utils.log import get_logger
from interview_access.errors import shortened

from worker.execution.pool_process import execute
from worker.execution.request import JobRequest

logger = get_logger(__name__)

_ACCEPT_SECONDS = 30.0
"""Seconds in which a pool process must accept a batch; a new one takes less to start."""

_STUCK_SECONDS = 60.0
"""Seconds after a time limit in which the pool must have ended the batch."""


class Batch:
    """Requests that one pool process executes together, until it reports."""

    def __init__(
        self, requests: Sequence[JobRequest], pool: Any, hostname: str, now: float
    ) -> None:
        self.requests = requests
        self.hostname = hostname
        self.is_revoked = False
        self._pid: int | None = None
        self._pool = pool
        self._time_limit = requests[0].time_limit
        self._deadline = now + _ACCEPT_SECONDS
        self._is_terminated = False
        self._overdue_since: float | None = None
        self._result: Callable[[], Any] = lambda: None
        for request in requests:
            request.batch = self
            request.delivery.dispatch(self)

    def start(self, **callbacks: Callable[..., object]) -> None:
        """Pass the requests to the pool.

        Args:
            callbacks: billiard's, called when a pool process accepts or ends the batch.
        """
        result = self._pool.apply_async(
            execute,
            args=([one.dispatched for one in self.requests], self.hostname),
            correlation_id=self.requests[0].id,
            **callbacks,
        )
        self._result = ref(result)

    @property
    def is_abandoned(self) -> bool:
        """Whether the pool has forgotten the batch and will call no callback."""
        return self._result() is None

    def accept(self, pid: int, now: float) -> None:
        """Record that a pool process has begun: the time limit counts from now."""
        self._pid, self._deadline = pid, now + self._time_limit
        if self.is_revoked:
            self.terminate()

    def enforce_time_limit(self, now: float) -> None:
        """End a pool process that exceeds the time limit or has not accepted the batch in time."""
        if now < self._deadline or self._is_terminated:
            return
        reason = "time limit exceeded" if self._pid else "not accepted by a pool process"
        seconds = self._time_limit if self._pid else _ACCEPT_SECONDS
        self._overdue_since = self._overdue_since or now
        self.terminate()
        ids = ", ".join(shortened(one.id, quoted=False) for one in self.requests[:5])
        logger.error(
            "batch overdue: reason=%s seconds=%s pid=%s jobs=%d job_ids=%s",
            *(reason, seconds, self._pid, len(self.requests), ids),
        )
        self._deadline = now + _ACCEPT_SECONDS

    @property
    def is_overdue(self) -> bool:
        """Whether a time limit has ended the pool process, or was to end it."""
        return self._overdue_since is not None

    def is_stuck(self, now: float) -> bool:
        """Report whether the batch is still here long after a time limit should have ended it.

        Args:
            now: Seconds of the dispatcher's clock.
        """
        return now > (self._overdue_since or self._deadline) + _STUCK_SECONDS

    def revoke(self) -> None:
        """End the pool process for an operator, without counting an attempt."""
        self.is_revoked = True
        self.terminate()

    def terminate(self) -> None:
        """End the pool process by SIGKILL: it ignores SIGTERM, which may be sent to its group.

        The pool may have written an unaccepted batch to a process that is frozen.
        """
        result = self._result()
        if self._is_terminated or result is None:
            return
        if not self._pid:
            process = result._write_to or result._scheduled_for  # noqa: SLF001 - billiard names it nowhere else
            if not process:
                return
            result.terminate(signal.SIGKILL)  # the pool must not pass it to another process
            self._pid = process.pid
        self._is_terminated = True
        self._pool.terminate_job(self._pid, signal.SIGKILL)


def partition(requests: Sequence[JobRequest], processes: int) -> list[Sequence[JobRequest]]:
    """Share requests out among free pool processes, about as many bytes to each.

    Requests with different time limits are in different batches, because a limit ends a whole
    batch; so there may be more batches than processes.

    Args:
        requests: The oldest first.
        processes: Free pool processes.

    Returns:
        The batches; the first ones hold the oldest requests.
    """
    batches: dict[tuple[float, int], list[JobRequest]] = {}
    total, before = sum(one.delivery.claim.size for one in requests), 0
    for request in requests:
        process = before * processes // total
        batches.setdefault((request.time_limit, process), []).append(request)
        before += request.delivery.claim.size
    return list(batches.values())
