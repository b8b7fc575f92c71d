"""Every job takes effect once and always has its first answer.

Owns the order of things around a job's own work: equal ids merged, jobs locked, the ledger read,
the work done for the jobs that are new, their answers recorded by the same transaction. What the
work is, it does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobIdReusedException,
)
from interview_access.stored_errors import from_record, to_record

from storage.dtos import AnswerDTO, FinishedJobDTO, JobDTO, RejectedIdsDTO
from storage.interface import (
    ChunkDone,
    InterviewStorageInterface,
    InterviewTransactionInterface,
    JobBusyError,
    LedgerConflictError,
    LedgerError,
    StorageError,
    is_outage,
)


class Job(Protocol):
    """What the ledger must know of a job.

    Attributes:
        entry: How the job stands in the ledger.
        fault: What is wrong with its request, where it cannot be read at all.
    """

    @property
    def entry(self) -> JobDTO: ...  # noqa: D102 - an attribute

    @property
    def fault(self) -> InterviewAccessError | None: ...  # noqa: D102 - an attribute


J = TypeVar("J", bound=Job)

ALONE_SECONDS = 60.0
"""Seconds in which a batch settles its jobs one by one, far less than a task's time limit."""

_ATTEMPTS = 3
"""Transactions of a job that was cancelled, or recorded by another transaction, while it ran."""

Work = Callable[[InterviewTransactionInterface, Sequence[J]], Mapping[str, AnswerDTO]]
"""Does the work of new jobs within a transaction and answers each, by its ID."""


@dataclass(frozen=True, slots=True)
class RejectedJob:
    """A job that fails without being executed: all that is known of it is its failure."""

    entry: JobDTO
    fault: InterviewAccessError


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one delivery of a job ended: with an answer, or with an error that a retry may mend.

    Attributes:
        answer: The job ID's final answer, this delivery's or an earlier one's.
        repeated: Whether the ledger held the answer before this delivery.
        refusal: Set if this delivery's request is another than the one answered.
        error: Why there is no answer; nothing of the job was kept.
    """

    answer: AnswerDTO | None = None
    repeated: bool = False
    refusal: JobIdReusedException | None = None
    error: Exception | None = None


def settle(
    storage: InterviewStorageInterface,
    jobs: Sequence[J],
    work: Work[J],
    *,
    alone_seconds: float = ALONE_SECONDS,
) -> list[Outcome]:
    """Give every job its one answer: all of them in one transaction if possible.

    If the transaction fails, and for jobs whose lock another transaction holds, they are settled
    one by one, so that no job fails another. Once one of them has failed, the others do not block
    on locks.

    Args:
        storage: Where the ledger is.
        jobs: In order: of equal IDs the first is done, the others get its answer.
        work: What is done for the jobs that are new and valid.
        alone_seconds: Time in which jobs are settled one by one. The jobs that are left then are
            not attempted; their error is an outage.

    Returns:
        The outcome of each job, in step.

    Raises:
        MemoryError: another process may have more.
    """
    first = {job.entry.job_id: job for job in reversed(jobs)}
    firsts = [job for job in jobs if job is first[job.entry.job_id]]
    settled = _settle_distinct(storage, firsts, work, alone_seconds)
    return [_outcome_of(job, settled[job.entry.job_id], first[job.entry.job_id]) for job in jobs]


def settle_rejected(
    storage: InterviewStorageInterface, jobs: Sequence[RejectedJob]
) -> list[Outcome]:
    """Record the failures of jobs that are not executed; see :func:`settle`."""
    return settle(storage, jobs, lambda _, __: {})


@dataclass(frozen=True, slots=True)
class _Settled:
    finished: FinishedJobDTO
    repeated: bool


def _settle_distinct(
    storage: InterviewStorageInterface, jobs: Sequence[J], work: Work[J], alone_seconds: float
) -> dict[str, _Settled | Exception]:
    if len(jobs) == 1:
        return {jobs[0].entry.job_id: _settle_alone(storage, jobs[0], work, wait=True)}
    settled: dict[str, _Settled | Exception] = {}
    outage: Exception | None = None
    try:
        settled.update(_settle_together(storage, jobs, work, wait=False))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - one job's defect must not fail the others
        outage = error if is_outage(error) else None
    wait, deadline = True, time.monotonic() + alone_seconds
    for job in jobs:
        if job.entry.job_id in settled:
            continue
        if time.monotonic() >= deadline:
            outage = outage or StorageError(
                f"not attempted: the batch's other jobs took {alone_seconds:.0f} s one by one"
            )
        result = outage or _settle_alone(storage, job, work, wait=wait)
        settled[job.entry.job_id] = result
        if isinstance(result, Exception):
            wait = False  # each wait for a lock would delay the jobs that are left
            outage = result if is_outage(result) else None
    return settled


def _settle_alone(
    storage: InterviewStorageInterface,
    job: J,
    work: Work[J],
    *,
    wait: bool,
    attempts: int = _ATTEMPTS,
) -> _Settled | Exception:
    try:
        settled = _settle_together(storage, [job], work, wait=wait)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - likewise
        if attempts > 1 and isinstance(error, _CancelledMidwayError | LedgerConflictError):
            return _settle_alone(storage, job, work, wait=wait, attempts=attempts - 1)
        return error
    busy = JobBusyError("another transaction holds the job's lock")
    return settled.get(job.entry.job_id, busy)


def _settle_together(
    storage: InterviewStorageInterface, jobs: Sequence[J], work: Work[J], *, wait: bool
) -> dict[str, _Settled]:
    """Settle the jobs whose locks are free; block on the locks if ``wait``."""
    with storage.transaction() as transaction:
        locked = transaction.lock_jobs([job.entry.job_id for job in jobs], wait=wait)
        found = transaction.find_jobs(locked)
        new = [job for job in jobs if job.entry.job_id in locked - found.finished.keys()]
        answers = {job.entry.job_id: failure(job.fault) for job in new if job.fault}
        for job in new:
            if job.entry.job_id in found.cancelled:
                answers[job.entry.job_id] = failure(JobCancelledException.of(job.entry.job_id))
        answers.update(work(transaction, [job for job in new if job.entry.job_id not in answers]))
        recorded = [FinishedJobDTO(job.entry, answers[job.entry.job_id]) for job in new]
        transaction.record_jobs(recorded)
    settled = {job_id: _Settled(job, repeated=True) for job_id, job in found.finished.items()}
    settled.update((job.job.job_id, _Settled(job, repeated=False)) for job in recorded)
    return settled


def _outcome_of(job: Job, settled: _Settled | Exception, first: Job) -> Outcome:
    if isinstance(settled, Exception):
        return Outcome(error=settled)
    answered, asked = settled.finished.job, job.entry
    refusal = (
        JobIdReusedException.of(asked.job_id, answered.request_digest, asked.request_digest)
        if answered.request_digest != asked.request_digest
        else None
    )
    return Outcome(
        answer=settled.finished.answer,
        repeated=settled.repeated or job is not first,
        refusal=refusal,
    )


class _CancelledMidwayError(LedgerError):
    """A job whose work has begun is to be cancelled: nothing of this transaction is kept."""


def stopping_if_cancelled(
    transaction: InterviewTransactionInterface, jobs: Sequence[Job], on_chunk: ChunkDone | None
) -> ChunkDone:
    """What is to be called after each chunk of the jobs' work, so that a cancelled one stops.

    The settling begins anew then, and finds the job cancelled before any work is done for it.
    """
    job_ids = [job.entry.job_id for job in jobs]

    def chunk_done(done: int, total: int) -> None:
        if done < total and transaction.find_cancelled_jobs(job_ids):
            raise _CancelledMidwayError("a job is to be cancelled")
        if on_chunk:
            on_chunk(done, total)

    return chunk_done


def cancel(storage: InterviewStorageInterface, job_id: str, entry: JobDTO | None) -> bool:
    """Have a job cancelled: unless it has ended, it never begins, or it stops at its next chunk.

    Args:
        storage: Where the ledger is.
        job_id: The job's id.
        entry: How the job stands in the ledger; None where nothing but its id is known, and then
            its message, when it comes, has it settled as cancelled.

    Returns:
        Whether another transaction is at the job now. If not, and it is known, the ledger has its
        answer.

    Raises:
        StorageError: it is not known to be cancelled.
    """
    with storage.transaction() as transaction:
        transaction.request_cancellation(job_id)
        if not transaction.lock_jobs([job_id], wait=False):
            return True
        if entry and not transaction.find_jobs([job_id]).finished:
            answer = failure(JobCancelledException.of(job_id))
            transaction.record_jobs([FinishedJobDTO(entry, answer)])
    return False


def failure(error: InterviewAccessError, rejected: RejectedIdsDTO | None = None) -> AnswerDTO:
    """The answer of a job that ended for cause, with all ids that it rejected, if any."""
    return AnswerDTO(
        error.state,
        error=to_record(error),
        rejected=rejected,
    )


def result_of(answer: AnswerDTO) -> dict[str, Any]:
    """The result that an answer holds.

    Raises:
        InterviewAccessError: the error that it holds instead, in its own class.
    """
    if answer.error:
        raise from_record(answer.error)
    return answer.result or {}
