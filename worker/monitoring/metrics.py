"""What the dispatcher measures: counters and histograms, without files of several processes.

Pool processes report their measurements with each batch, so the main process has them all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from interview_access import errors
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from worker.broker.claims import Action
from worker.execution.pool_process import BatchReport
from worker.execution.request import JobRequest
from worker.monitoring import catalog
from worker.monitoring.catalog import Metric

_OTHER = "other"
_ERRORS = frozenset(
    name
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, errors.InterviewAccessError)
)
_FAILURES = (
    *(errors.InvalidGrantRequestException, errors.InvalidInterviewIdException),
    *(errors.StorageUnavailableException, errors.JobFailedError),
)
_ENDINGS = (
    ("succeeded", ""),
    *(("failed", one.__name__) for one in _FAILURES),
    ("cancelled", errors.JobCancelledException.__name__),
    ("expired", errors.JobExpiredException.__name__),
    ("refused", errors.JobIdReusedException.__name__),
)
_REASONS = ("crash", "time_limit", "revoked", "shutdown")

disable_created_metrics()  # type: ignore[no-untyped-call] # one more series for each counter and histogram


class JobMetrics:
    """The metrics of a worker's jobs: a :class:`worker.execution.dispatch.JobMonitor`.

    A label has few values, whatever a message contains: an unknown name is counted as ``other``.
    """

    def __init__(self, registry: CollectorRegistry, tasks: Collection[str]) -> None:
        """Register all metrics.

        Args:
            registry: Has no other metrics of these names.
            tasks: Names of the worker's tasks.
        """

        def counter(metric: Metric) -> Counter:
            return Counter(metric.name, metric.help, metric.labels, registry=registry)

        def histogram(metric: Metric) -> Histogram:
            return Histogram(
                metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry
            )

        self._tasks = frozenset(tasks)
        self._jobs = counter(catalog.JOBS)
        self._grants = [
            counter(one)
            for one in (
                *(catalog.REQUESTED, catalog.REPEATED),
                *(catalog.ALREADY_GRANTED, catalog.CREATED),
            )
        ]
        self._repeated = counter(catalog.REPEATED_DELIVERIES)
        self._retries = counter(catalog.RETRIES)
        self._dead_lettered = counter(catalog.DEAD_LETTERED)
        self._batch_seconds = histogram(catalog.BATCH_SECONDS)
        self._transaction_seconds = histogram(catalog.TRANSACTION_SECONDS)
        self._batch_jobs = histogram(catalog.BATCH_JOBS)
        self._job_grants = histogram(catalog.JOB_GRANTS)
        self._losses = counter(catalog.POOL_LOSSES)
        self._queue_seconds = lru_cache(maxsize=None)(histogram(catalog.QUEUE_SECONDS).labels)
        # A rate over a series that begins above 0 misses its first jobs.
        for task in (*tasks, _OTHER):
            for outcome, error in _ENDINGS:
                self._jobs.labels(task, outcome, error)
            self._dead_lettered.labels(task)
            for one in (*self._grants, self._repeated):
                one.labels(task)
        for reason in _REASONS:
            self._losses.labels(reason)

    def started(self, requests: Sequence[JobRequest]) -> None:
        """Measure a batch that is passed to a pool process."""
        for request in requests:
            seconds = request.queue_seconds
            if seconds is not None:
                self._queue_seconds(self._task(request.name)).observe(seconds)

    def settled(self, report: BatchReport) -> None:
        """Measure a batch that a pool process has reported."""
        measured = report.measurements
        self._batch_jobs.observe(len(report.settlements))
        self._batch_seconds.observe(measured.seconds)
        self._transaction_seconds.observe(measured.transaction_seconds)
        for (task, outcome, error), count in measured.jobs.items():
            known = error if error in _ERRORS or not error else _OTHER
            self._jobs.labels(self._task(task), outcome, known).inc(count)
        for task, sums in measured.grants.items():
            for metric, value in zip(self._grants, sums, strict=True):
                metric.labels(self._task(task)).inc(value)
        for requested in measured.requested:
            self._job_grants.observe(requested)
        for task, count in measured.repeated.items():
            self._repeated.labels(self._task(task)).inc(count)
        for (task, code), count in measured.retries.items():
            self._retries.labels(self._task(task), code).inc(count)
        for one in report.settlements:
            if one.disposition.action is Action.DEAD_LETTER:
                self._dead_lettered.labels(self._task(one.disposition.task)).inc()

    def failed(self, requests: Sequence[JobRequest]) -> None:
        """Measure messages that became dead letters without a pool process."""
        for request in requests:
            task = self._task(request.name)
            self._dead_lettered.labels(task).inc()
            ended = task if request.id else _OTHER  # without an ID the message cannot be read
            self._jobs.labels(ended, "failed", errors.JobFailedError.__name__).inc()

    def cancelled(self, task: str) -> None:
        """Measure a job whose outcome a control request has recorded."""
        error = errors.JobCancelledException.__name__
        self._jobs.labels(self._task(task), "cancelled", error).inc()

    def lost(self, reason: str) -> None:
        """Measure a pool process that ended during a batch; see the dispatcher's protocol."""
        self._losses.labels(reason).inc()

    def _task(self, name: str) -> str:
        return name if name in self._tasks else _OTHER
