"""The use case: give users access to interviews, many jobs at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from interview_access.contracts import GrantAccessResult, RequestedInterviews
from interview_access.errors import InterviewAccessError, InvalidInterviewIdException

from storage.dtos import AccessOrderDTO, AnswerDTO, FiguresDTO, JobDTO, RejectedIdsDTO
from storage.interface import (
    ChunkDone,
    InterviewStorageInterface,
    InterviewTransactionInterface,
)
from tasks.ledger import Outcome, failure, settle, stopping_if_cancelled

NO_INTERVIEWS = RequestedInterviews.among([])


@dataclass(frozen=True, slots=True)
class GrantAccessJob:
    """One job: its entry in the ledger, and the user and the interviews of a request that reads.

    Attributes:
        fault: What is wrong with the request, where it cannot be read; the rest is then empty.
    """

    entry: JobDTO
    user_id: str = ""
    interviews: RequestedInterviews = NO_INTERVIEWS
    fault: InterviewAccessError | None = None


class GrantAccessInteractor:
    """Grants access on any store that keeps the interface's obligations."""

    def __init__(self, storage: InterviewStorageInterface) -> None:
        self._storage = storage

    def grant_access(
        self,
        jobs: Sequence[GrantAccessJob],
        on_chunk: ChunkDone | None = None,
        *,
        singly: bool = True,
    ) -> list[Outcome]:
        """Do the jobs, each all or nothing, and count exactly what each of them created.

        Args:
            jobs: In order: a grant that two of them ask for is created by the earlier one.
            on_chunk: Told of the grants done, within the transaction.
            singly: Whether to do one by one what cannot be done together; its outcome is trouble
                else.

        Returns:
            The outcome of each job, in step. Trouble in the database is an outcome, no exception.
        """
        return settle(
            self._storage,
            jobs,
            lambda transaction, new: _grant(transaction, new, on_chunk),
            singly=singly,
        )


def _grant(
    transaction: InterviewTransactionInterface,
    jobs: Sequence[GrantAccessJob],
    on_chunk: ChunkDone | None,
) -> Mapping[str, AnswerDTO]:
    wanted = dict.fromkeys(chain.from_iterable(job.interviews.wanted for job in jobs))
    unknown = transaction.find_unknown_interviews(wanted)

    answers: dict[str, AnswerDTO] = {}
    granted: list[GrantAccessJob] = []
    for job in jobs:
        malformed = job.interviews.malformed
        if malformed or not unknown.isdisjoint(job.interviews.wanted):
            missing = job.interviews.spelled(unknown)
            distinct = tuple(dict.fromkeys(missing.values()))
            error = InvalidInterviewIdException.of(malformed, distinct)
            answers[job.entry.job_id] = failure(error, RejectedIdsDTO(tuple(missing), malformed))
        else:
            granted.append(job)

    created = transaction.bulk_create_user_access(
        [AccessOrderDTO(job.entry.job_id, job.user_id, job.interviews.wanted) for job in granted],
        stopping_if_cancelled(transaction, granted, on_chunk),
    )
    for job in granted:
        answers[job.entry.job_id] = _success(job, created[job.entry.job_id])
    return answers


def _success(job: GrantAccessJob, created: int) -> AnswerDTO:
    return AnswerDTO(
        "succeeded",
        result=GrantAccessResult(created_access_count=created).model_dump(),
        figures=FiguresDTO(
            requested=len(job.interviews.given),
            repeated=job.interviews.repeated,
            already_granted=len(job.interviews.wanted) - created,
            created=created,
        ),
    )
