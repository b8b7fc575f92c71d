"""The use case: give users access to interviews, one user or a cohort a job, many jobs at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from interview_access.contracts import GrantAccessResult, InterviewId, RequestedInterviews
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
    """One job: its entry in the ledger, and the users and the interviews of a request that reads.

    Attributes:
        entry: Names the user where the job is for one; a cohort's has none.
        user_ids: As given; one given again counts once.
        interviews: What every one of the users is to be granted.
        fault: What is wrong with the request, where it cannot be read; the rest is then empty.
    """

    entry: JobDTO
    user_ids: tuple[str, ...] = ()
    interviews: RequestedInterviews = NO_INTERVIEWS
    fault: InterviewAccessError | None = None

    @property
    def orders(self) -> list[AccessOrderDTO]:
        """What each of its users is to be granted."""
        users = dict.fromkeys(self.user_ids)
        return [AccessOrderDTO(user_id, self.interviews.wanted) for user_id in users]


class GrantAccessInteractor:
    """Grants access on any store that keeps the interface's obligations."""

    def __init__(self, storage: InterviewStorageInterface) -> None:
        self._storage = storage

    def grant_access(
        self,
        jobs: Sequence[GrantAccessJob],
        on_chunk: ChunkDone | None = None,
    ) -> list[Outcome]:
        """Do the jobs, each all or nothing, and count exactly what each of them created.

        Args:
            jobs: In order: a grant that two of them ask for is created by the earlier one.
            on_chunk: Told of the grants done, within the transaction.

        Returns:
            The outcome of each job, in step. An error of the database is an outcome, no exception.
        """
        return settle(
            self._storage,
            jobs,
            lambda transaction, new: _grant(transaction, new, on_chunk),
        )


def _grant(
    transaction: InterviewTransactionInterface,
    jobs: Sequence[GrantAccessJob],
    on_chunk: ChunkDone | None,
) -> Mapping[str, AnswerDTO]:
    wanted: Collection[InterviewId] = (
        jobs[0].interviews.wanted
        if len(jobs) == 1
        else dict.fromkeys(chain.from_iterable(job.interviews.wanted for job in jobs))
    )
    users = {user_id for job in jobs for user_id in job.user_ids}
    unknown = transaction.find_unknown_interviews(
        wanted, granted_to=users.pop() if len(users) == 1 else None
    )

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

    orders = [job.orders for job in granted]
    counts = iter(
        transaction.bulk_create_user_access(
            [*chain.from_iterable(orders)], stopping_if_cancelled(transaction, granted, on_chunk)
        )
    )
    for job, ordered in zip(granted, orders, strict=True):
        by_user = {order.user_id: next(counts) for order in ordered}
        answers[job.entry.job_id] = _success(job, by_user)
    return answers


def _success(job: GrantAccessJob, by_user: Mapping[str, int]) -> AnswerDTO:
    created = sum(by_user.values())
    requested = len(job.user_ids) * len(job.interviews.given)
    distinct = len(by_user) * len(job.interviews.wanted)
    return AnswerDTO(
        "succeeded",
        result=GrantAccessResult(created_access_count=created).model_dump(),
        figures=FiguresDTO(
            requested=requested,
            repeated=requested - distinct,
            already_granted=distinct - created,
            created=created,
        ),
        created_by_user=None if job.entry.user_id else by_user,
    )
