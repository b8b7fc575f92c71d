"""A pool without processes: the test begins, completes, fails or forgets each batch."""

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


def tasks_app() -> Celery:
    """An app with the contract's tasks and, as every app, Celery's own."""
    app = Celery("tests", set_as_current=False)

    def task() -> None:
        """Never called."""

    for name in (GRANT_ACCESS, GRANT_COHORT_ACCESS, CREATE_INTERVIEW_ATTEMPT):
        app.task(name=name, shared=False)(task)
    app.finalize()
    return app


class Failure(NamedTuple):
    """What a pool calls an error callback with."""

    exception: BaseException


class Process(NamedTuple):
    """A pool process."""

    pid: int


class Result:
    """What a pool returns for a batch and keeps until it has called a callback.

    Attributes:
        is_terminated: Whether the pool gives the batch to no other process if this one ends.
    """

    def __init__(self, process: Process | None) -> None:
        self.is_terminated = False
        self._scheduled_for: Process | None = None
        self._write_to = process

    def terminate(self, signum: int) -> None:
        """Give the batch to no other process."""
        assert signum == signal.SIGKILL
        self.is_terminated = True


class Work:
    """A batch in a pool process."""

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
        """Its jobs' IDs."""
        return [one.job_id for one in self.deliveries]

    def accept(self) -> None:
        """A pool process begins."""
        self._callbacks["accept_callback"](self.pid, time.monotonic())

    def complete(self, *settlements: Settlement, **report: Any) -> None:
        """A pool process reports; it acknowledges all deliveries unless told otherwise."""
        report = {"outage": None, "has_success": True} | report
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
        """The pool process has ended, or could not return its report."""
        self._report("error_callback", Failure(error))

    def forget(self) -> None:
        """The pool drops the batch without a callback."""
        self._pool.works.remove(self)
        self.result = None


class SteppedPool:
    """Celery's prefork pool, as far as batches are handed to it.

    Attributes:
        works: Batches that no callback was called for.
        killed: Processes that were ended.
        error: Raised by the next call, if set.
        is_full: Whether the pool keeps a batch for the next process that is free.
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
        """Take a batch."""
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
        """Kill a process; its batch fails when the test says so."""
        assert signum == signal.SIGKILL
        self.killed.append(pid)

    def running(self, job_id: str) -> Work:
        """The batch with that job."""
        (work,) = [work for work in self.works if job_id in work.job_ids]
        return work


def settled(
    action: Action = Action.ACKNOWLEDGE, *events: tuple[str, dict[str, object]], **fields: Any
) -> Settlement:
    """How a pool process settles a delivery."""
    return Settlement(Disposition(action, **fields), events)
