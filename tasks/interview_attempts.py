"""The use case of creating interview attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol
from uuid import uuid4

from interview_access.contracts import InterviewAttemptResult, canonical_interview_id
from interview_access.errors import InterviewAccessError, InvalidInterviewIdException

from storage.dtos import InterviewAttemptDTO, InterviewDTO, JobDTO, OutcomeDTO
from storage.interface import InterviewStore, JobTransaction, Transactions
from tasks.ledger import JobResult, settle
from tasks.outcomes import failed


class AttemptTransaction(JobTransaction, InterviewStore, Protocol):
    """What this use case needs of a transaction."""


@dataclass(frozen=True, slots=True)
class InterviewAttemptJob:
    """A job that creates an attempt of one user at one interview.

    Attributes:
        entry: The job as the ledger identifies it.
        user_id: Empty after a validation error.
        interview_id: Any string, as the request spells it; empty after a validation error.
        failure: Why the job fails without being executed, if it does.
    """

    entry: JobDTO
    user_id: str = field(default="", repr=False)
    interview_id: str = field(default="", repr=False)
    failure: InterviewAccessError | None = field(default=None, repr=False)


class InterviewAttemptInteractor:
    """Executes attempt jobs on a storage."""

    def __init__(self, storage: Transactions[AttemptTransaction]) -> None:
        self._storage = storage

    def create_interview_attempt(self, jobs: Sequence[InterviewAttemptJob]) -> list[JobResult]:
        """Create one attempt for each job, which starts now.

        Args:
            jobs: Jobs in order.

        Returns:
            A result for each job, in order. Any error of a job is in its result.

        Raises:
            MemoryError: if this process is out of memory.
        """
        return settle(self._storage, jobs, _create_attempts)


def _create_attempts(
    transaction: AttemptTransaction, jobs: Sequence[InterviewAttemptJob]
) -> Mapping[str, OutcomeDTO]:
    requested = {job.entry.job_id: canonical_interview_id(job.interview_id) for job in jobs}
    found = transaction.get_interview_details({one for one in requested.values() if one})
    interviews = {interview.id: interview for interview in found}

    outcomes: dict[str, OutcomeDTO] = {}
    attempts: list[InterviewAttemptDTO] = []
    for job in jobs:
        interview_id = requested[job.entry.job_id]
        if interview_id is None:
            error = InvalidInterviewIdException.of([job.interview_id], [])
            outcomes[job.entry.job_id] = failed(error)
        elif interview_id not in interviews:
            error = InvalidInterviewIdException.of([], [interview_id])
            outcomes[job.entry.job_id] = failed(error)
        else:
            attempt = _attempt(job.user_id, interviews[interview_id])
            attempts.append(attempt)
            result = InterviewAttemptResult(interview_attempt_id=attempt.id)
            outcomes[job.entry.job_id] = OutcomeDTO("succeeded", result.model_dump())
    transaction.create_interview_attempt(attempts)
    return outcomes


def _attempt(user_id: str, interview: InterviewDTO) -> InterviewAttemptDTO:
    start = datetime.now(UTC)
    has_end = interview.should_end_interview_after_duration
    return InterviewAttemptDTO(
        id=str(uuid4()),
        interview_id=interview.id,
        user_id=user_id,
        start_datetime=start,
        scheduled_end_datetime=start + interview.duration if has_end else None,
    )
