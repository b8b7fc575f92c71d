"""Every job takes effect once and always has its first answer.

Owns the order of things around a job's own work: equal ids merged, the ledger asked, the work
done for those jobs that are new, their answers written in the same transaction. What the work is,
it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from interview_access import errors
from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobIdReusedException,
)

from storage.dtos import AnswerDTO, FinishedJobDTO, JobDTO, RejectedIdsDTO
from storage.interface import (
    ChunkDone,
    InterviewStorageInterface,
    InterviewTransactionInterface,
    StorageError,
    TransientStorageError,
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

_LOCK_NOT_HAD = "55P03"  # PostgreSQL's code: one job's trouble, of a moment

Work = Callable[[InterviewTransactionInterface, Sequence[J]], Mapping[str, AnswerDTO]]
"""Does the work of new jobs within a transaction and answers each, by its id."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one delivery of a job ended: with an answer, or with trouble.

    Attributes:
        answer: The job id's final answer, this delivery's or an earlier one's.
        repeated: Whether the answer stood before this delivery.
        refusal: Set where this delivery's request is another than the one answered.
        trouble: What the database said where there is no answer; the job was not done.
    """

    answer: AnswerDTO | None = None
    repeated: bool = False
    refusal: JobIdReusedException | None = None
    trouble: StorageError | None = None


def settle(
    storage: InterviewStorageInterface, jobs: Sequence[J], work: Work[J], *, singly: bool = True
) -> list[Outcome]:
    """Give every job its one answer: all of them in one transaction where that can be.

    Where the database fails the whole, and for jobs that another transaction is at, they are done
    one by one, so that no job is held up or failed by another.

    Args:
        storage: Where the ledger is.
        jobs: In order: of equal ids the first is done, the others have its answer.
        work: What is to be done for the jobs that are new and can be read.
        singly: Whether to do one by one what cannot be done together; its outcome is trouble else.

    Returns:
        The outcome of each job, in step.
    """
    first = {job.entry.job_id: job for job in reversed(jobs)}
    firsts = [job for job in jobs if job is first[job.entry.job_id]]
    settled = _settle_distinct(storage, firsts, work, singly=singly)
    return [_outcome_of(job, settled[job.entry.job_id], first[job.entry.job_id]) for job in jobs]


@dataclass(frozen=True, slots=True)
class _Settled:
    finished: FinishedJobDTO
    repeated: bool


def _settle_distinct(
    storage: InterviewStorageInterface, jobs: Sequence[J], work: Work[J], *, singly: bool
) -> dict[str, _Settled | StorageError]:
    trouble: StorageError = TransientStorageError("others are at the job", _LOCK_NOT_HAD)
    together: dict[str, _Settled] = {}
    try:
        together = _settle_together(storage, jobs, work)
    except _CancelledMidwayError as error:
        if len(jobs) == 1:
            return _settle_distinct(storage, jobs, work, singly=singly)
        trouble = error
    except StorageError as error:
        trouble = error
    settled = {job.entry.job_id: together.get(job.entry.job_id, trouble) for job in jobs}
    if len(jobs) > 1 and singly and not _hopeless(trouble):
        for job in jobs:
            if job.entry.job_id not in together:
                settled.update(_settle_distinct(storage, [job], work, singly=True))
    return settled


def _hopeless(trouble: StorageError) -> bool:
    """Whether no job would fare better by itself."""
    return isinstance(trouble, TransientStorageError) and trouble.unreachable


def _settle_together(
    storage: InterviewStorageInterface, jobs: Sequence[J], work: Work[J]
) -> dict[str, _Settled]:
    """Settle those of the jobs that no other transaction is at; one alone is waited for."""
    with storage.transaction() as transaction:
        ours = transaction.lock_jobs([job.entry.job_id for job in jobs], wait=len(jobs) == 1)
        jobs = [job for job in jobs if job.entry.job_id in ours]
        known = transaction.open_jobs([job.entry for job in jobs])
        new = [job for job in jobs if job.entry.job_id not in known]
        answers = {job.entry.job_id: failure(job.fault) for job in new if job.fault}
        for job_id in transaction.find_cancelled_jobs([job.entry.job_id for job in new]):
            answers[job_id] = failure(JobCancelledException.of(job_id))
        answers.update(work(transaction, [job for job in new if job.entry.job_id not in answers]))
        finished = [FinishedJobDTO(job.entry, answers[job.entry.job_id]) for job in new]
        transaction.finish_jobs(finished)
    settled = {job_id: _Settled(job, repeated=True) for job_id, job in known.items()}
    settled.update((job.job.job_id, _Settled(job, repeated=False)) for job in finished)
    return settled


def _outcome_of(job: Job, settled: _Settled | StorageError, first: Job) -> Outcome:
    if isinstance(settled, StorageError):
        return Outcome(trouble=settled)
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


class _CancelledMidwayError(TransientStorageError):
    """A job is to be cancelled whose work has begun: nothing of this transaction is to be kept."""


def stopping_if_cancelled(
    transaction: InterviewTransactionInterface, jobs: Sequence[Job], on_chunk: ChunkDone | None
) -> ChunkDone:
    """What is to be called after each chunk of the jobs' work, so that a cancelled one stops.

    The settling begins anew then, and finds the job cancelled before any work is done for it.
    """
    job_ids = [job.entry.job_id for job in jobs]

    def chunk_done(done: int, total: int) -> None:
        if done < total and transaction.find_cancelled_jobs(job_ids):
            raise _CancelledMidwayError("a job is to be cancelled", _LOCK_NOT_HAD)
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
        if entry and not transaction.open_jobs([entry]):
            answer = failure(JobCancelledException.of(job_id))
            transaction.finish_jobs([FinishedJobDTO(entry, answer)])
    return False


def failure(error: InterviewAccessError, rejected: RejectedIdsDTO | None = None) -> AnswerDTO:
    """The answer of a job that ended for cause, with all ids that it rejected, if any."""
    return AnswerDTO(
        error.state,
        error={
            "type": type(error).__name__,
            "sentence": error.sentence,
            "details": error.details,
        },
        rejected=rejected,
    )


def error_of(told: Mapping[str, Any]) -> InterviewAccessError:
    """The error that an answer holds, in its own class."""
    kind: type[InterviewAccessError] = getattr(errors, told["type"])
    return kind(told["sentence"], told["details"])


def result_of(answer: AnswerDTO) -> dict[str, Any]:
    """The result that an answer holds.

    Raises:
        InterviewAccessError: the error that it holds instead, in its own class.
    """
    if answer.error:
        raise error_of(answer.error)
    return answer.result or {}
