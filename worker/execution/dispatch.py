"""Dispatches claimed deliveries to pool processes in batches, and settles what they report.

A delivery is dispatched once. A pool process executes a batch and reports one disposition for each
delivery. If it ends without a report, its deliveries are isolated with an attempt counted, and each
is redelivered in a batch by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from typing import Any, Protocol

from billiard.common import human_status
from billiard.exceptions import Terminated
from celery import Celery, signals
from celery.app import trace
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from interview_access.contracts import is_job_id
from interview_access.errors import shortened

from worker.broker.claim_policy import SMALL_BYTES
from worker.broker.claims import Action, Disposition
from worker.broker.delivery import Delivery
from worker.broker.lease import Lease
from worker.execution.batch import Batch, partition
from worker.execution.decoding import Limits
from worker.execution.pool_process import BatchReport
from worker.execution.request import JobRequest

logger = get_logger(__name__)

_POOL_SECONDS = 2.0
"""Seconds until the redelivery of jobs whose pool process ended, or that the pool refused."""


class JobMonitor(Protocol):
    """Measures what the dispatcher does."""

    def started(self, requests: Sequence[JobRequest]) -> None:
        """Measure a batch that is passed to a pool process."""

    def settled(self, report: BatchReport) -> None:
        """Measure a batch that a pool process has reported."""

    def failed(self, requests: Sequence[JobRequest]) -> None:
        """Measure messages that became dead letters without a pool process."""

    def lost(self, reason: str) -> None:
        """Measure a pool process that ended during a batch.

        Args:
            reason: ``crash``, ``time_limit``, ``revoked`` or ``shutdown``.
        """


class Dispatcher:
    """Dispatches claimed deliveries to free pool processes."""

    def __init__(
        self,
        app: Celery,
        pool: Any,
        hostname: str,
        lease: Lease,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Dispatch nothing yet.

        Args:
            app: The tasks' app.
            pool: Celery's prefork pool.
            hostname: The worker's name.
            lease: Where deliveries are claimed and settled.
            limits: What a message is allowed.
            clock: Seconds of this process's monotonic clock.
        """
        self.send_event: Callable[..., object] = lambda *_, **__: None
        self.on_free: Callable[[], object] = lambda: None
        self.monitor: JobMonitor | None = None
        self._app = app
        self._pool = pool
        self._hostname = hostname
        self._lease = lease
        self._limits = limits
        self._clock = clock
        # One for each busy pool process, also after the lease has settled its deliveries.
        self._batches: dict[Batch, None] = {}

    @property
    def processes(self) -> int:
        """Pool processes, including busy ones."""
        return int(self._pool.num_processes)

    @property
    def free_processes(self) -> int:
        """Pool processes without a batch."""
        return self.processes - len(self._batches)

    @property
    def has_stuck_batch(self) -> bool:
        """Whether a batch is still here long after a time limit should have ended it."""
        now = self._clock()
        return any(batch.is_stuck(now) for batch in list(self._batches))

    def dispatch(self, deliveries: Sequence[Delivery]) -> None:
        """Partition deliveries among the free pool processes; settle what is not executed.

        Args:
            deliveries: Claimed and not yet dispatched.
        """
        settled: dict[str, Disposition] = {}
        failed: list[JobRequest] = []
        ready: list[JobRequest] = []
        for delivery in deliveries:
            request = JobRequest(delivery, self._app, self._limits)
            disposition = self._disposition(request)
            if disposition:
                settled[delivery.claim.tag] = disposition
                if disposition.action is Action.DEAD_LETTER:
                    failed.append(request)
                    self._send_dead_lettered(request, disposition)
            else:
                ready.append(request)
        if settled:
            self._lease.settle(settled)
        if failed and self.monitor:
            self.monitor.failed(failed)
        free = max(self.free_processes, 1)
        are_large = any(one.delivery.claim.size > SMALL_BYTES for one in ready)
        batches = partition(ready, 1 if are_large else free)
        for batch in batches[:free]:
            for request in batch:
                self._announce(request)
            self._start(Batch(batch, self._pool, self._hostname, self._clock()))
        if surplus := list(chain.from_iterable(batches[free:])):
            requeue = Disposition(Action.REQUEUE)
            self._lease.settle({one.delivery.claim.tag: requeue for one in surplus})

    def _disposition(self, request: JobRequest) -> Disposition | None:
        """Decide how a request is settled for which no pool process is needed."""
        if request.delay > 0 and not request.failure:
            self._send_received(request)  # with its ETA; again when it is due
            return Disposition(Action.DELAY, delay=request.delay)
        if request.failure and (not request.id or request.is_hopeless(self._limits)):
            reason, claim = request.failure.sentence, request.delivery.claim
            self._send_rejected(request)
            attempts = claim.attempts + claim.retries
            logger.error(
                "dead letter: job=%r task=%r attempts=%d reason=%s",
                *(request.id, request.name, attempts, reason),
            )
            return Disposition(
                Action.DEAD_LETTER,
                job_id=request.id,
                task=request.name,
                reason=reason,
                in_ledger=None if request.id else False,
                attempts=attempts,
            )
        return None

    def _announce(self, request: JobRequest) -> None:
        if request.task:
            worker_state.task_reserved(request)
        else:
            self._send_rejected(request)
        signals.task_received.send(sender=self, request=request)
        trace.info(trace.LOG_RECEIVED, {"name": request.name, "id": request.id})
        self._send_received(request)

    def _send_received(self, request: JobRequest) -> None:
        names = ("root_id", "parent_id", "eta", "expires")
        headers = {name: request.headers.get(name) for name in names}
        self.send_event(
            "task-received",
            uuid=request.id,
            name=request.name,
            **request.arguments,
            retries=request.delivery.claim.retries,
            **{name: value if is_job_id(value) else None for name, value in headers.items()},
        )

    def _send_rejected(self, request: JobRequest) -> None:
        """Send Celery's signal of a message that no task executes."""
        call = {"message": request, "exc": request.failure}
        if request.name and request.name not in self._app.tasks:
            signals.task_unknown.send(sender=self, name=request.name, id=request.id, **call)
        else:
            signals.task_rejected.send(sender=self, **call)

    def _start(self, batch: Batch) -> None:
        def on_accepted(pid: int, time_accepted: float) -> None:
            batch.accept(pid, self._clock())
            time_start = time.time() - (time.monotonic() - time_accepted)
            for request in batch.requests:
                request.worker_pid, request.time_start = pid, time_start
                if request.task:  # Celery keeps a count of each name
                    worker_state.task_accepted(request)
                self.send_event("task-started", uuid=request.id)

        try:
            batch.start(
                accept_callback=_logged(on_accepted),
                callback=_logged(lambda report: self._settle(batch, report)),
                error_callback=_logged(lambda error: self._settle_failed(batch, _cause(error))),
            )
        except Exception as error:  # of the pool: no job has failed
            logger.exception("pool refused a batch: jobs=%d", len(batch.requests))
            self._settle_unexecuted(batch, error, Disposition(Action.DELAY, delay=_POOL_SECONDS))
        else:
            self._batches[batch] = None
            if self.monitor:
                self.monitor.started(batch.requests)

    def _settle(self, batch: Batch, report: BatchReport) -> None:
        """Settle a batch that a pool process has executed."""
        dispositions = {
            request.delivery.claim.tag: settlement.disposition
            for request, settlement in zip(batch.requests, report.settlements, strict=True)
        }
        self._finish(batch, dispositions)
        if report.outage:
            self._lease.policy.breaker.record_failure(report.outage)
        elif report.has_success:
            self._lease.policy.breaker.record_success()
        if self.monitor:
            self.monitor.settled(report)
        for request, settlement in zip(batch.requests, report.settlements, strict=True):
            for kind, fields in settlement.events:
                self.send_event(kind, uuid=request.id, **fields)
            self._send_dead_lettered(request, settlement.disposition)

    def _send_dead_lettered(self, request: JobRequest, disposition: Disposition) -> None:
        """Send Celery's event of a message that is rejected without being requeued."""
        if request.id and disposition.action is Action.DEAD_LETTER:
            self.send_event(
                "task-rejected", uuid=request.id, requeue=False, exception=disposition.reason
            )

    def _settle_failed(self, batch: Batch, error: BaseException) -> None:
        """Settle a batch whose pool process has ended: the ledger knows which jobs committed."""
        reason = self._loss_reason(batch)
        if self.monitor:
            self.monitor.lost(reason)
        # No attempt is counted if an operator ended the process or stops the worker.
        if self._lease.is_draining or batch.is_revoked:
            disposition = Disposition(Action.REQUEUE)
        else:
            disposition = Disposition(Action.FAILED_ATTEMPT, delay=_POOL_SECONDS)
            for request in batch.requests:
                logger.error(
                    "pool process lost: job=%r task=%r attempt=%d pid=%s reason=%s error=%s",
                    *(request.id, request.name, request.attempt, request.worker_pid),
                    *(reason, shortened(str(error), quoted=False, at_most=500)),
                )
        self._settle_unexecuted(batch, error, disposition)

    def _loss_reason(self, batch: Batch) -> str:
        if batch.is_revoked:
            return "revoked"
        if batch.is_overdue:
            return "time_limit"
        return "shutdown" if self._lease.is_draining else "crash"

    def _settle_unexecuted(
        self, batch: Batch, error: BaseException, disposition: Disposition
    ) -> None:
        self._finish(batch, {one.delivery.claim.tag: disposition for one in batch.requests})
        for request in batch.requests:
            self.send_event("task-retried", uuid=request.id, exception=repr(error), traceback="")

    def _finish(self, batch: Batch, dispositions: dict[str, Disposition]) -> None:
        self._batches.pop(batch, None)
        try:
            self._lease.settle(dispositions)
        finally:
            for request in batch.requests:
                worker_state.task_ready(request)
            self.on_free()

    def on_heartbeat(self) -> None:
        """Enforce time limits, and drop batches that the pool has forgotten."""
        for batch in list(self._batches):
            batch.enforce_time_limit(self._clock())
            if batch.is_abandoned:
                self._batches.pop(batch, None)
                for request in batch.requests:
                    worker_state.task_ready(request)


def _cause(failure: Any) -> BaseException:
    """Return why a batch has no report, from the argument of the pool's error callback.

    billiard wraps the error. That of a process that was terminated has the signal's number only, of
    either sign.
    """
    error: BaseException = getattr(failure.exception, "exc", failure.exception)
    if isinstance(error, Terminated):
        error = Terminated(f"Worker terminated: {human_status(-abs(error.args[0]))}")
    return error


def _logged(callback: Callable[..., object]) -> Callable[..., object]:
    """Log exceptions of a callback, which billiard drops."""

    @wraps(callback)
    def logged(*args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            logger.exception("unexpected exception in a callback of the pool")
            raise

    return logged
