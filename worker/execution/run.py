"""The execution of deliveries in a pool process: the state of each, and who observes them."""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

from celery.app.task import Context
from celery.utils.log import get_logger
from interview_access.errors import InterviewAccessError, JobCancelledException

from storage.errors import JobBusyError, StorageError
from tasks.celery_tasks import JobTask
from tasks.ledger import JobResult, RejectedJob
from worker.execution.decoding import Call
from worker.execution.request import Dispatched

logger = get_logger(__name__)

_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")
_HEADERS = (
    *("root_id", "parent_id", "correlation_id", "group", "group_index", "ignore_result", "origin"),
    *("stamps", "stamped_headers", "replaced_task_nesting", "eta", "expires", "timelimit"),
)
_NOT_CUSTOM = {
    *(*dir(Context), "task", "lang", "argsrepr", "kwargsrepr", "compression"),
    *("enqueued_at", "requested_at"),
}
"""Headers of Celery's protocol, and names that would replace an attribute or a method."""

_TEXT_HEADER = 8_192
"""Characters; the specifications of trace context and baggage demand no longer ones."""

T = TypeVar("T")


@dataclass
class JobRun:
    """The execution of one delivery.

    Attributes:
        delivery: What the main process dispatched.
        hostname: The worker's name.
        task: Its task, unless the worker does not have it.
        call: The decoded body; empty if it was not decoded.
        job: The job that the ledger settles; None after a defect in reading it.
        settled: How this delivery ended in the ledger.
        result: What the job's poller reads; None while the job is to be retried.
        is_begun: Whether ``task_prerun`` has been sent, and ``task_postrun`` has not.
        context: The job's context variables, in which its signals are sent. What a receiver or an
            observer sets for one job of a batch is not set for another.
    """

    delivery: Dispatched
    hostname: str
    task: JobTask | None = field(repr=False)
    call: Call = field(repr=False)
    job: Any = field(repr=False)
    settled: JobResult = field(default_factory=JobResult, repr=False)
    result: dict[str, Any] | InterviewAccessError | None = field(default=None, repr=False)
    is_begun: bool = field(default=False, repr=False)
    context: contextvars.Context = field(default_factory=contextvars.copy_context, repr=False)

    @property
    def failure(self) -> InterviewAccessError | None:
        """Why the delivery failed; None if it succeeded or is to be retried."""
        if self.result is None:
            return None
        refusal = self.settled.refusal if self.delivery.body is not None else None
        return refusal or (None if isinstance(self.result, dict) else self.result)

    @property
    def is_unreadable(self) -> bool:
        """Whether the message cannot be read, and is not just left unread after its attempts."""
        failure = self.delivery.failure
        is_read_before = failure is not None and "attempts" in failure.details
        return isinstance(self.job, RejectedJob) and not is_read_before

    @property
    def has_poller(self) -> bool:
        """Whether the producer may poll the result."""
        return not self.delivery.headers.get("ignore_result")

    @property
    def is_retried(self) -> bool:
        """Whether the poller reads the state RETRY: nothing else executes the job now."""
        is_busy = isinstance(self.settled.error, JobBusyError)
        return self.result is None and self.has_poller and not is_busy

    @property
    def has_followers(self) -> bool:
        """Whether the message names tasks to be sent after the job."""
        return any(self.call.embedded.get(name) for name in _EMBEDDED)

    def is_missing_in(self, stored: Collection[str]) -> bool:
        """Report whether the result is not stored although the job has a poller.

        Args:
            stored: IDs of the jobs whose results are stored.
        """
        has_result = self.result is not None and self.has_poller
        return has_result and self.delivery.job_id not in stored

    @cached_property
    def request(self) -> Context:
        """The request that Celery's signals and callbacks expect.

        Custom headers are attributes, as in Celery's own, unless their names are reserved.
        """
        headers, embedded = self.delivery.headers, self.call.embedded
        custom = {name: value for name, value in headers.items() if name not in _NOT_CUSTOM}
        inner = headers.get("headers")
        return Context(
            {name: headers[name] for name in _HEADERS if name in headers} | custom,
            **{name: embedded.get(name) for name in _EMBEDDED},
            id=self.delivery.job_id,
            task=self.delivery.task,
            args=self.call.args,
            kwargs=self.call.kwargs,
            retries=self.delivery.retries,
            called_directly=False,
            headers=inner if isinstance(inner, dict) else custom,
            hostname=self.hostname,
            delivery_info={
                "exchange": "",
                "routing_key": self.delivery.queue,
                "redelivered": bool(self.delivery.attempts),
            },
        )

    @property
    def text_headers(self) -> dict[str, str]:
        """Custom headers that may carry a trace's context: texts that are not long."""
        headers = self.delivery.headers
        inner = headers.get("headers")
        return {
            name: value
            for name, value in {**(inner if isinstance(inner, dict) else {}), **headers}.items()
            if isinstance(value, str) and len(value) <= _TEXT_HEADER
        }


class Measurements(NamedTuple):
    """What a batch adds to the metrics.

    Attributes:
        seconds: Duration of the batch.
        transaction_seconds: The part of it in which the ledger settled its jobs.
        jobs: Number of jobs that ended, by task, outcome and class of the error. The task is empty
            if the message cannot be read or names an unknown one.
        grants: Grants of these jobs by task: requested, repeated, already granted and created.
        requested: Grants that each of these jobs requested.
        repeated: Number of deliveries by task whose job had ended before.
        retries: Number of retries by task and class of the database's error.
    """

    seconds: float
    transaction_seconds: float
    jobs: Mapping[tuple[str, str, str], int]
    grants: Mapping[str, Sequence[int]]
    requested: Sequence[int]
    repeated: Mapping[str, int]
    retries: Mapping[tuple[str, str], int]


def measurements(
    runs: Sequence[JobRun], seconds: float = 0.0, transaction_seconds: float = 0.0
) -> Measurements:
    """Sum up a batch for the metrics.

    A job counts at the first delivery that reports its outcome. If the pool process ended after
    the commit, that is the next one, unless the job was cancelled: then a control request may
    have recorded and counted it between the two.

    Args:
        runs: The jobs of the batch, with their results.
        seconds: See :class:`Measurements`.
        transaction_seconds: Likewise.
    """
    jobs: Counter[tuple[str, str, str]] = Counter()
    repeated: Counter[str] = Counter()
    retries: Counter[tuple[str, str]] = Counter()
    grants: dict[str, list[int]] = {}
    requested: list[int] = []
    for run in runs:
        settled, failure = run.settled, run.failure
        task = run.task.name if run.task and not run.is_unreadable else ""
        if run.result is None:
            error = settled.error
            code = error.code_class if isinstance(error, StorageError) else "other"
            retries[task, code] += 1
        elif failure is settled.refusal and failure:
            jobs[task, "refused", type(failure).__name__] += 1
        elif settled.repeated and (
            not run.delivery.attempts or isinstance(failure, JobCancelledException)
        ):
            repeated[task] += 1
        elif failure:
            jobs[task, failure.state, type(failure).__name__] += 1
        else:
            jobs[task, "succeeded", ""] += 1
            if settled.outcome and (figures := settled.outcome.figures):
                sums = grants.setdefault(task, [0, 0, 0, 0])
                for at, value in enumerate(astuple(figures)):
                    sums[at] += value
                requested.append(figures.requested)
    return Measurements(seconds, transaction_seconds, jobs, grants, requested, repeated, retries)


class JobObserver(Protocol):
    """Traces jobs. Its exceptions are logged and affect no job."""

    @property
    def is_active(self) -> bool:
        """Whether this process is set up to trace."""

    def job(self, run: JobRun) -> AbstractContextManager[None]:
        """Trace a job, from before ``task_prerun`` until after ``task_postrun``.

        Args:
            run: The job; has its result at the end. Its context is the current one.
        """

    def transaction(self, runs: Sequence[JobRun]) -> AbstractContextManager[None]:
        """Trace the transaction of a batch.

        Args:
            runs: The jobs; ``task_prerun`` has been sent. The context of a single job is the
                current one; that of several jobs is their batch's own.
        """

    def flush(self) -> None:
        """Send what is left before the process ends."""


@contextmanager
def observed(runs: Sequence[JobRun], observers: Sequence[JobObserver]) -> Iterator[None]:
    """Trace jobs within the block, each in its own context.

    Args:
        runs: The jobs of a batch. One whose task is unknown is not traced.
        observers: Those that are active.
    """
    entered: list[tuple[JobRun, _Logged]] = []
    try:
        for run in runs if observers else ():
            for observer in observers if run.task else ():
                entered.append((run, _Logged(observer.job(run))))
                run.context.run(entered[-1][1].__enter__)
        yield
    finally:
        for run, scope in reversed(entered):
            run.context.run(scope.__exit__, None, None, None)


def in_transaction(
    runs: Sequence[JobRun], observers: Sequence[JobObserver], settle: Callable[[], T]
) -> T:
    """Settle jobs, traced, in the context of a single job or in one of the batch.

    Args:
        runs: The jobs of a batch.
        observers: Those that are active.
        settle: Settles the jobs.

    Returns:
        What ``settle`` returns.
    """

    def settle_observed() -> T:
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(_Logged(observer.transaction(runs)))
            return settle()

    context = runs[0].context if len(runs) == 1 else contextvars.copy_context()
    return context.run(settle_observed)


class _Logged(AbstractContextManager[None]):
    """A context manager whose exceptions are logged."""

    def __init__(self, inner: AbstractContextManager[None]) -> None:
        self._inner = inner
        self._is_entered = False

    def __enter__(self) -> None:
        try:
            self._inner.__enter__()
            self._is_entered = True
        except Exception:
            logger.exception("tracing failed")

    def __exit__(self, *_: object) -> None:
        try:
            if self._is_entered:
                self._inner.__exit__(None, None, None)
        except Exception:
            logger.exception("tracing failed")
