"""Idempotency: every job takes effect once and always has its first outcome.

Owns the steps around a job's own work: merge equal job IDs, lock the jobs, read the ledger, do the
work of the new jobs, and record their outcomes in the same transaction. The work itself is passed
in by the use case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobIdReusedException,
)

from storage.dtos import FinishedJobDTO, JobDTO, OutcomeDTO
from storage.errors import (
    JobBusyError,
    LedgerConflictError,
    LedgerError,
    StorageError,
    is_outage,
)
from storage.interface import ChunkDone, JobTransaction, Ledger, Transactions
from tasks.outcomes import failed, from_tombstone


class Job(Protocol):
    """What the ledger needs to know about a job.

    Attributes:
        entry: The job as the ledger identifies it.
        failure: Why the job fails without being executed, if it does: a validation error of its
            request or a predetermined failure.
    """

    @property
    def entry(self) -> JobDTO: ...  # noqa: D102 - an attribute

    @property
    def failure(self) -> InterviewAccessError | None: ...  # noqa: D102 - an attribute


J = TypeVar("J", bound=Job)
T = TypeVar("T", bound=JobTransaction)

INDIVIDUAL_SECONDS = 60.0
"""Time limit for settling a batch's jobs one by one, far below a task's time limit."""

_ATTEMPTS = 3
"""Transactions for a job that is cancelled or recorded by another transaction while it runs."""

Work = Callable[[T, Sequence[J]], Mapping[str, OutcomeDTO]]
"""Does the work of new jobs within a transaction. Returns an outcome for each job ID."""


@dataclass(frozen=True, slots=True)
class RejectedJob:
    """A job that fails without being executed."""

    entry: JobDTO
    failure: InterviewAccessError = field(repr=False)


@dataclass(frozen=True, slots=True)
class JobResult:
    """The result of one delivery of a job: an outcome, or an error that a retry may resolve.

    Attributes:
        outcome: The job's outcome in the ledger, from this delivery or an earlier one.
        repeated: Whether the ledger had the outcome before this delivery.
        refusal: Set if this delivery's request differs from the request that has the outcome.
        error: Why the outcome is unknown. A retry reads the ledger first.
    """

    outcome: OutcomeDTO | None = None
    repeated: bool = False
    refusal: JobIdReusedException | None = None
    error: Exception | None = None


def settle(
    storage: Transactions[T],
    jobs: Sequence[J],
    work: Work[T, J],
    *,
    individual_seconds: float = INDIVIDUAL_SECONDS,
) -> list[JobResult]:
    """Give every job its one outcome, in one transaction if possible.

    If that transaction fails, the jobs are settled one by one, so that no job fails another. So
    are jobs whose lock another transaction holds. Once one of them has failed, the others do not
    block on locks.

    Args:
        storage: The storage with the ledger.
        jobs: Jobs in order. Of equal job IDs the first is executed; the others get its outcome.
        work: Does the work of the jobs that are new and valid.
        individual_seconds: Time limit for settling jobs one by one. The remaining jobs are not
            attempted; their error is an outage.

    Returns:
        A result for each job, in order. Any error of a job is in its result.

    Raises:
        MemoryError: if this process is out of memory; another process may have more.
    """
    first = {job.entry.job_id: job for job in reversed(jobs)}
    distinct = [job for job in jobs if job is first[job.entry.job_id]]
    settled = _settle_distinct(storage, distinct, work, individual_seconds)
    return [_result(job, settled[job.entry.job_id], first[job.entry.job_id]) for job in jobs]


def settle_rejected(
    storage: Transactions[JobTransaction], jobs: Sequence[RejectedJob]
) -> list[JobResult]:
    """Record the failures of jobs that are not executed.

    Args:
        storage: The storage with the ledger.
        jobs: The jobs in order. One that the ledger has already keeps its outcome.

    Returns:
        A result for each job, in order; see :func:`settle`.

    Raises:
        MemoryError: if this process is out of memory.
    """
    return settle(storage, jobs, lambda _, __: {})


@dataclass(frozen=True, slots=True)
class _Settled:
    finished: FinishedJobDTO
    repeated: bool


def _settle_distinct(
    storage: Transactions[T], jobs: Sequence[J], work: Work[T, J], individual_seconds: float
) -> dict[str, _Settled | Exception]:
    if len(jobs) == 1:
        return {jobs[0].entry.job_id: _settle_one(storage, jobs[0], work, wait=True)}
    settled: dict[str, _Settled | Exception] = {}
    outage: Exception | None = None
    try:
        settled.update(_settle_in_one_transaction(storage, jobs, work, wait=False))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - one job's defect must not fail the others
        outage = error if is_outage(error) else None
    wait, deadline = True, time.monotonic() + individual_seconds
    for job in jobs:
        if job.entry.job_id in settled:
            continue
        if time.monotonic() >= deadline:
            outage = outage or StorageError(
                f"not attempted: other jobs of the batch took {individual_seconds:.0f} s one by one"
            )
        result = outage or _settle_one(storage, job, work, wait=wait)
        settled[job.entry.job_id] = result
        if isinstance(result, Exception):
            wait = False  # each wait for a lock would delay the remaining jobs
            outage = result if is_outage(result) else None
    return settled


def _settle_one(
    storage: Transactions[T],
    job: J,
    work: Work[T, J],
    *,
    wait: bool,
    attempts: int = _ATTEMPTS,
) -> _Settled | Exception:
    try:
        settled = _settle_in_one_transaction(storage, [job], work, wait=wait)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - likewise
        if attempts > 1 and isinstance(error, _CancelledMidwayError | LedgerConflictError):
            return _settle_one(storage, job, work, wait=wait, attempts=attempts - 1)
        return error
    return settled.get(job.entry.job_id) or JobBusyError()


def _settle_in_one_transaction(
    storage: Transactions[T], jobs: Sequence[J], work: Work[T, J], *, wait: bool
) -> dict[str, _Settled]:
    """Settle the jobs whose locks are free. Block on the locks if ``wait``."""
    with storage.transaction() as transaction:
        locked = transaction.lock_jobs([job.entry.job_id for job in jobs], wait=wait)
        found = transaction.find_jobs(locked)
        entries = {job.entry.job_id: job.entry for job in jobs}
        finished = {
            **{
                job_id: from_tombstone(entries[job_id], one) for job_id, one in found.pruned.items()
            },
            **found.finished,
        }
        new = [job for job in jobs if job.entry.job_id in locked - finished.keys()]
        outcomes = {job.entry.job_id: failed(job.failure) for job in new if job.failure}
        for job in new:
            if job.entry.job_id in found.cancelled:
                outcomes[job.entry.job_id] = failed(JobCancelledException.of(job.entry.job_id))
        outcomes.update(work(transaction, [job for job in new if job.entry.job_id not in outcomes]))
        recorded = [FinishedJobDTO(job.entry, outcomes[job.entry.job_id]) for job in new]
        transaction.record_jobs(recorded)
    settled = {job_id: _Settled(job, repeated=True) for job_id, job in finished.items()}
    settled.update((job.job.job_id, _Settled(job, repeated=False)) for job in recorded)
    return settled


def _result(job: Job, settled: _Settled | Exception, first: Job) -> JobResult:
    if isinstance(settled, Exception):
        return JobResult(error=settled)
    recorded, requested = settled.finished.job, job.entry
    refusal = (
        JobIdReusedException.of(requested.job_id, recorded.request_digest, requested.request_digest)
        if recorded.request_digest != requested.request_digest
        else None
    )
    return JobResult(
        outcome=settled.finished.outcome,
        repeated=settled.repeated or job is not first,
        refusal=refusal,
    )


class _CancelledMidwayError(LedgerError):
    """Cancellation was requested while the job runs. The transaction is rolled back."""


def stopping_if_cancelled(
    transaction: Ledger, jobs: Sequence[Job], on_chunk: ChunkDone | None
) -> ChunkDone:
    """Return a callback that stops the jobs' work after a chunk if one of them is cancelled.

    The jobs are then settled again, and the cancelled one fails before any work is done for it.

    Args:
        transaction: The transaction of the work.
        jobs: The jobs whose work it is.
        on_chunk: Called after each chunk if no job is cancelled.
    """
    job_ids = [job.entry.job_id for job in jobs]

    def chunk_done(done: int, total: int) -> None:
        if done < total and transaction.find_cancelled_jobs(job_ids):
            raise _CancelledMidwayError("cancellation of a job was requested while it ran")
        if on_chunk:
            on_chunk(done, total)

    return chunk_done


class Cancellation(NamedTuple):
    """What a request for cancellation found.

    Attributes:
        is_running: Whether another transaction is executing the job.
        is_recorded: Whether this request has recorded the job's outcome.
    """

    is_running: bool
    is_recorded: bool


def cancel(
    storage: Transactions[JobTransaction], job_id: str, entry: JobDTO | None
) -> Cancellation:
    """Request cancellation of a job.

    It does not start, or stops after its current chunk unless that is its last. A finished job is
    not affected.

    Args:
        storage: The storage with the ledger.
        job_id: The job's ID.
        entry: The job as the ledger identifies it, to record its outcome now. None if only the ID
            is known; the job then fails as cancelled when its message is delivered.

    Returns:
        What the request found. If no other transaction is executing the job and ``entry`` is given,
        the ledger has the job's outcome.

    Raises:
        StorageError: if the request is not known to be recorded.
    """
    with storage.transaction() as transaction:
        transaction.request_cancellation(job_id)
        if not transaction.lock_jobs([job_id], wait=False):
            return Cancellation(is_running=True, is_recorded=False)
        found = transaction.find_jobs([job_id])
        if not entry or found.finished or found.pruned:
            return Cancellation(is_running=False, is_recorded=False)
        outcome = failed(JobCancelledException.of(job_id))
        transaction.record_jobs([FinishedJobDTO(entry, outcome)])
    return Cancellation(is_running=False, is_recorded=True)
