"""The use case: a user starts an interview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from interview_access.contracts import InterviewAttemptResult, canonical_interview_id
from interview_access.errors import InterviewAccessError, InvalidInterviewIdException

from storage.dtos import AnswerDTO, InterviewAttemptDTO, InterviewDTO, JobDTO
from storage.interface import InterviewStorageInterface, InterviewTransactionInterface
from tasks.ledger import Outcome, failure, settle


@dataclass(frozen=True, slots=True)
class InterviewAttemptJob:
    """One job: its entry in the ledger, and the user and the interview of a request that reads.

    Attributes:
        interview_id: As given; it may be no UUID.
        fault: What is wrong with the request, where it cannot be read; the rest is then empty.
    """

    entry: JobDTO
    user_id: str = ""
    interview_id: str = ""
    fault: InterviewAccessError | None = None


class InterviewAttemptInteractor:
    """Starts attempts on any store that keeps the interface's obligations."""

    def __init__(self, storage: InterviewStorageInterface) -> None:
        self._storage = storage

    def create_interview_attempt(self, jobs: Sequence[InterviewAttemptJob]) -> list[Outcome]:
        """Make one attempt for each job, starting now.

        Args:
            jobs: In order.

        Returns:
            The outcome of each job, in step. An error of the database is an outcome, no exception.
        """
        return settle(self._storage, jobs, _start)


def _start(
    transaction: InterviewTransactionInterface, jobs: Sequence[InterviewAttemptJob]
) -> Mapping[str, AnswerDTO]:
    asked = {job.entry.job_id: canonical_interview_id(job.interview_id) for job in jobs}
    found = transaction.get_interview_details({one for one in asked.values() if one})
    interviews = {interview.id: interview for interview in found}

    answers: dict[str, AnswerDTO] = {}
    attempts: list[InterviewAttemptDTO] = []
    for job in jobs:
        interview_id = asked[job.entry.job_id]
        if interview_id is None:
            error = InvalidInterviewIdException.of([job.interview_id], [])
            answers[job.entry.job_id] = failure(error)
        elif interview_id not in interviews:
            error = InvalidInterviewIdException.of([], [interview_id])
            answers[job.entry.job_id] = failure(error)
        else:
            attempt = _attempt(job.user_id, interviews[interview_id])
            attempts.append(attempt)
            result = InterviewAttemptResult(interview_attempt_id=attempt.id)
            answers[job.entry.job_id] = AnswerDTO("succeeded", result.model_dump())
    transaction.create_interview_attempt(attempts)
    return answers


def _attempt(user_id: str, interview: InterviewDTO) -> InterviewAttemptDTO:
    start = datetime.now(UTC)
    ends = interview.should_end_interview_after_duration
    return InterviewAttemptDTO(
        id=str(uuid4()),
        interview_id=interview.id,
        user_id=user_id,
        start_datetime=start,
        scheduled_end_datetime=start + interview.duration if ends else None,
    )
