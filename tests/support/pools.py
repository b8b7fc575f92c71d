"""A pool without processes: the test accepts, completes, fails or forgets each batch."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

from celery import Celery
from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
)

from worker.broker.claims import Action, Disposition
from worker.execution.pool_process import BatchReport, Settlement, execute
from worker.execution.request import Dispatched
from worker.execution.run import measurements


def tasks_app() -> Celery:
    """Create an app with the contract's tasks and Celery's built-in ones."""
    app = Celery("tests", set_as_current=False)

    def task() -> None:
        """Never called."""

    for name in (GRANT_ACCESS, GRANT_COHORT_ACCESS, CREATE_INTERVIEW_ATTEMPT):
        app.task(name=name, shared=False)(task)
    app.finalize()
    return app


class Failure(NamedTuple):
    """The argument of a pool's error callback."""

    exception: BaseException


class Process(NamedTuple):
    """A pool process."""

    pid: int


class Result:
    """The pool's result object of a batch, which it keeps until it has called a callback.

    Attributes:
        is_terminated: Whether the pool was told not to give the batch to another process.
    """

    def __init__(self, process: Process | None) -> None:
        self.is_terminated = False
        self._scheduled_for: Process | None = None
        self._write_to = process

    def terminate(self, signum: int) -> None:
        """Mark the batch as terminated."""
        assert signum == signal.SIGKILL
        self.is_terminated = True


class Work:
    """A batch that was passed to the pool."""

    def __init__(
        self, pool: SteppedPool, deliveries: Sequence[Dispatched], callbacks: dict[str, Any]
    ) -> None:
        self.deliveries = deliveries
        self.pid = next(pool.pids)
        self.result: Result | None = Result(None if pool.is_full else Process(self.pid))
        self._pool = pool
        self._callbacks = callbacks

    @property
    def job_ids(self) -> list[str]:
        """The IDs of the batch's jobs."""
        return [one.job_id for one in self.deliveries]

    def accept(self) -> None:
        """Report that a pool process has accepted the batch."""
        self._callbacks["accept_callback"](self.pid, time.monotonic())

    def complete(self, *settlements: Settlement, **report: Any) -> None:
        """Report that the batch is complete; without settlements all jobs are acknowledged."""
        report = {"outage": None, "has_success": True, "measurements": measurements(())} | report
        self._report("callback", BatchReport(settlements or self._acknowledged, **report))

    @property
    def _acknowledged(self) -> list[Settlement]:
        return [settled() for _ in self.deliveries]

    def _report(self, callback: str, outcome: object) -> None:
        self._pool.works.remove(self)
        try:
            self._callbacks[callback](outcome)
        finally:
            self.result = None

    def fail(self, error: BaseException) -> None:
        """Report that the pool process has ended, or that its report was lost."""
        self._report("error_callback", Failure(error))

    def forget(self) -> None:
        """Drop the batch without a callback."""
        self._pool.works.remove(self)
        self.result = None


class SteppedPool:
    """The part of Celery's prefork pool that executes batches.

    Attributes:
        works: Batches without a callback so far.
        killed: IDs of killed processes.
        error: Is raised by the next call, if set.
        is_full: Whether a batch waits for a free process.
    """

    def __init__(self, processes: int) -> None:
        self.num_processes = processes
        self.works: list[Work] = []
        self.killed: list[int] = []
        self.error: Exception | None = None
        self.is_full = False
        self.pids = count(1)

    def apply_async(
        self,
        target: Callable[..., object],
        args: tuple[Sequence[Dispatched], str],
        correlation_id: str,
        **callbacks: Callable[..., object],
    ) -> Result:
        """Accept a batch for execution."""
        assert target is execute
        if self.error:
            error, self.error = self.error, None
            raise error
        deliveries, _ = args
        assert correlation_id == deliveries[0].job_id
        work = Work(self, deliveries, callbacks)
        self.works.append(work)
        assert work.result
        return work.result

    def terminate_job(self, pid: int, signum: int) -> None:
        """Record a killed process; the test fails its batch."""
        assert signum == signal.SIGKILL
        self.killed.append(pid)

    def running(self, job_id: str) -> Work:
        """Return the batch with a job."""
        (work,) = [work for work in self.works if job_id in work.job_ids]
        return work


def settled(
    action: Action = Action.ACKNOWLEDGE, *events: tuple[str, dict[str, object]], **fields: Any
) -> Settlement:
    """Return a pool process's settlement of a delivery."""
    return Settlement(Disposition(action, **fields), events)
