"""The use case of granting users access to interviews."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from interview_access.contracts import GrantAccessResult, InterviewId, RequestedInterviews
from interview_access.errors import InterviewAccessError, InvalidInterviewIdException

from storage.dtos import FiguresDTO, JobDTO, OutcomeDTO, RejectedIdsDTO, RequestedGrantsDTO
from storage.interface import ChunkDone, GrantStore, JobTransaction, Transactions
from tasks.ledger import JobResult, settle, stopping_if_cancelled
from tasks.outcomes import failed

NO_INTERVIEWS = RequestedInterviews.among([])


class GrantTransaction(JobTransaction, GrantStore, Protocol):
    """What this use case needs of a transaction."""


@dataclass(frozen=True, slots=True)
class GrantAccessJob:
    """A job that grants one user or a cohort access to interviews.

    Attributes:
        entry: The job as the ledger identifies it.
        user_ids: User IDs in the request's order, duplicates included.
        interviews: The interviews that every user is to be granted.
        failure: Why the job fails without being executed, if it does. After a validation error of
            the request there are no users and no interviews.
    """

    entry: JobDTO
    user_ids: tuple[str, ...] = field(default=(), repr=False)
    interviews: RequestedInterviews = field(default=NO_INTERVIEWS, repr=False)
    failure: InterviewAccessError | None = field(default=None, repr=False)

    @property
    def requested_grants(self) -> list[RequestedGrantsDTO]:
        """The requested grants of each distinct user."""
        users = dict.fromkeys(self.user_ids)
        return [
            RequestedGrantsDTO(user_id, self.interviews.wanted, self.entry.job_id)
            for user_id in users
        ]


class GrantAccessInteractor:
    """Executes grant jobs on a storage."""

    def __init__(self, storage: Transactions[GrantTransaction]) -> None:
        self._storage = storage

    def grant_access(
        self,
        jobs: Sequence[GrantAccessJob],
        on_chunk: ChunkDone | None = None,
    ) -> list[JobResult]:
        """Execute jobs, each atomically, and count exactly what each of them created.

        Args:
            jobs: Jobs in order. A grant that two of them request is created by the earlier one.
            on_chunk: Called with the progress, within the transaction.

        Returns:
            A result for each job, in order. Any error of a job is in its result.

        Raises:
            MemoryError: if this process is out of memory.
        """
        return settle(
            self._storage,
            jobs,
            lambda transaction, new: _grant(transaction, new, on_chunk),
        )


def _grant(
    transaction: GrantTransaction,
    jobs: Sequence[GrantAccessJob],
    on_chunk: ChunkDone | None,
) -> Mapping[str, OutcomeDTO]:
    wanted: Collection[InterviewId] = (
        jobs[0].interviews.wanted
        if len(jobs) == 1
        else dict.fromkeys(chain.from_iterable(job.interviews.wanted for job in jobs))
    )
    users = {user_id for job in jobs for user_id in job.user_ids}
    unknown = transaction.find_unknown_interviews(
        wanted, granted_to=users.pop() if len(users) == 1 else None
    )

    outcomes: dict[str, OutcomeDTO] = {}
    valid: list[GrantAccessJob] = []
    for job in jobs:
        malformed = job.interviews.malformed
        if malformed or not unknown.isdisjoint(job.interviews.wanted):
            missing = job.interviews.spelled(unknown)
            distinct = tuple(dict.fromkeys(missing.values()))
            error = InvalidInterviewIdException.of(malformed, distinct)
            outcomes[job.entry.job_id] = failed(error, RejectedIdsDTO(tuple(missing), malformed))
        else:
            valid.append(job)

    requested = [job.requested_grants for job in valid]
    counts = iter(
        transaction.bulk_create_user_access(
            [*chain.from_iterable(requested)], stopping_if_cancelled(transaction, valid, on_chunk)
        )
    )
    for job, grants in zip(valid, requested, strict=True):
        created_by_user = {one.user_id: next(counts) for one in grants}
        outcomes[job.entry.job_id] = _succeeded(job, created_by_user)
    return outcomes


def _succeeded(job: GrantAccessJob, created_by_user: Mapping[str, int]) -> OutcomeDTO:
    created = sum(created_by_user.values())
    requested = len(job.user_ids) * len(job.interviews.given)
    distinct = len(created_by_user) * len(job.interviews.wanted)
    return OutcomeDTO(
        "succeeded",
        result=GrantAccessResult(created_access_count=created).model_dump(),
        figures=FiguresDTO(
            requested=requested,
            repeated=requested - distinct,
            already_granted=distinct - created,
            created=created,
        ),
        created_by_user=None if job.entry.user_id else created_by_user,
    )
