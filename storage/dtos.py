"""Values that use cases and storages exchange, independent of any database or message.

Interview IDs are canonical UUID strings (lower case, 8-4-4-4-12). UUID objects for 100,000 IDs
would cost more time than sending them to PostgreSQL does. Representations, which error reports
contain, have no IDs of users and interviews where a job is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import datetime, timedelta
from typing import Any

DEFAULT_REQUEST_TASK = "interview_access.grant_access"
"""Task of an outbox request that names none."""

WORKER_LENGTH, ACTOR_LENGTH, REASON_LENGTH = 255, 255, 1_000
"""Largest numbers of characters in :class:`AuditDTO`."""


@dataclass(frozen=True, slots=True)
class InterviewDTO:
    """An interview with its configuration, or the default configuration if it has none."""

    id: str
    title: str
    description: str | None
    duration: timedelta
    is_default_access_allowed: bool
    should_end_interview_after_duration: bool


@dataclass(frozen=True, slots=True)
class InterviewAttemptDTO:
    """One user's attempt at one interview. The datetimes are timezone-aware."""

    id: str
    interview_id: str
    user_id: str
    start_datetime: datetime
    end_datetime: datetime | None = None
    scheduled_end_datetime: datetime | None = None


@dataclass(frozen=True, slots=True)
class UserInterviewAccessDTO:
    """A grant: one user's access to one interview."""

    user_id: str
    interview_id: str


@dataclass(frozen=True, slots=True)
class GrantOriginDTO:
    """What the storage holds about one user's access to one interview.

    Attributes:
        is_interview: Whether the interview exists.
        is_granted: Whether the user has access to it.
        job_id: The job that created the grant; None if the grant names none, or does not exist.
    """

    is_interview: bool
    is_granted: bool
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class RequestedGrantsDTO:
    """The grants requested for one user.

    Attributes:
        interview_ids: Distinct IDs in any order.
        job_id: The job that requests them; None if no job does.
    """

    user_id: str
    interview_ids: tuple[str, ...]
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class AuditDTO:
    """Who requested a job, when, and which attempt recorded its outcome. Times are timezone-aware.

    Attributes:
        requested_at: When the job was requested in the outbox.
        enqueued_at: When its message was enqueued, by the producer's clock.
        started_at: When the attempt began. None if the outcome was recorded without one.
        attempts: Number of attempts, this one included. None likewise.
        worker: Node name of the attempt's worker. None likewise.
        actor: Who requested the job, by its producer. Printable.
        reason: Why, likewise.
    """

    requested_at: datetime | None = None
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    attempts: int | None = None
    worker: str | None = None
    actor: str | None = field(default=None, repr=False)
    reason: str | None = field(default=None, repr=False)


NO_AUDIT = AuditDTO()


@dataclass(frozen=True, slots=True)
class JobDTO:
    """A job as the ledger identifies it.

    Attributes:
        user_id: None for a cohort, and if the request has no valid user ID.
        request_digest: 64 hex digits that identify the request.
        audit: Who requested and executed it, which does not identify it.
    """

    job_id: str
    task: str
    user_id: str | None = field(repr=False)
    request_digest: str
    audit: AuditDTO = field(default=NO_AUDIT, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class FiguresDTO:
    """Numbers of grants of one job: requested = repeated + already_granted + created."""

    requested: int
    repeated: int
    already_granted: int
    created: int


@dataclass(frozen=True, slots=True)
class RejectedIdsDTO:
    """All interview IDs for which a job failed, as the request spelled them, each once."""

    unknown: tuple[str, ...]
    malformed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OutcomeDTO:
    """The final outcome of a job: a result or an error, never both.

    Attributes:
        state: ``succeeded`` with a result; ``failed``, ``cancelled`` or ``expired`` with an error.
        result: The result that the producer polls.
        error: ``{"type": class name, "sentence": text, "details": {...}}``.
        figures: Set if a grant job succeeded.
        created_by_user: Number of grants created by user ID, if a cohort job succeeded. Like
            ``rejected``, it is read only by :meth:`storage.readers.JobReader.get_finished_job`.
        rejected: Set if the job failed because of its interview IDs.
    """

    state: str
    result: dict[str, Any] | None = field(default=None, repr=False)
    error: dict[str, Any] | None = field(default=None, repr=False)
    figures: FiguresDTO | None = None
    created_by_user: Mapping[str, int] | None = field(default=None, compare=False, repr=False)
    rejected: RejectedIdsDTO | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class FinishedJobDTO:
    """A ledger row: a job and its outcome.

    Attributes:
        finished_at: Time of recording, timezone-aware; set by the storage.
    """

    job: JobDTO
    outcome: OutcomeDTO
    finished_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class FinishedJobFilterDTO:
    """Selects finished jobs; a field that is None selects all.

    Attributes:
        user_id: Jobs for this user alone, and others that created a grant of this user which still
            exists: those of cohorts.
        interview_id: Jobs that created a grant of this interview which still exists. With
            ``user_id``, the job that created this one grant.
        actor: Jobs that this actor requested.
        state: ``succeeded``, ``failed``, ``cancelled`` or ``expired``.
        since: Jobs that finished at this time or later, timezone-aware.
        until: Jobs that finished before, timezone-aware.
    """

    user_id: str | None = None
    interview_id: str | None = None
    actor: str | None = None
    state: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class PrunedJobDTO:
    """A tombstone: what is kept of a job after its retention.

    Attributes:
        digest_prefix: The first 8 hex digits of the request's digest. None for a job that was
            cancelled and never delivered: its ID stands for any request.
        created: Number of grants created, if a grant job succeeded.
        result: The result, if another job succeeded.
        error_type: Name of the error's class, if the job did not succeed.
    """

    digest_prefix: str | None
    created: int | None = None
    result: dict[str, Any] | None = None
    error_type: str | None = None


@dataclass(frozen=True, slots=True)
class FoundJobsDTO:
    """What the storage holds about some jobs.

    Attributes:
        finished: Finished jobs by job ID.
        cancelled: IDs of the jobs whose cancellation was requested, finished or not.
        pruned: Tombstones by job ID.
    """

    finished: Mapping[str, FinishedJobDTO]
    cancelled: frozenset[str]
    pruned: Mapping[str, PrunedJobDTO] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PruneCountsDTO:
    """Numbers of rows that are pruned, by table.

    Attributes:
        jobs: Ledger rows, each replaced by a tombstone.
        rejections: Lists of rejected IDs of these jobs.
        cohorts: Counts by user of these jobs.
        cancellations: Cancellation requests. That of a job without a ledger row is replaced by a
            tombstone.
        requests: Outbox requests of these jobs.
    """

    jobs: int = 0
    rejections: int = 0
    cohorts: int = 0
    cancellations: int = 0
    requests: int = 0

    def __add__(self, other: PruneCountsDTO) -> PruneCountsDTO:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return PruneCountsDTO(*(one + more for one, more in pairs))


@dataclass(frozen=True, slots=True)
class PrunedBatchDTO:
    """What one transaction has pruned.

    Attributes:
        last: Time at which the last job of the batch finished, and the next batch begins; None if
            no more can be pruned now.
    """

    counts: PruneCountsDTO
    last: datetime | None


@dataclass(frozen=True, slots=True)
class JobPageDTO:
    """The jobs of one page of the ledger that name a user.

    Attributes:
        jobs: The jobs with all details.
        last: ID of the page's last job, after which the next page begins; None at the end.
    """

    jobs: Sequence[FinishedJobDTO]
    last: str | None


@dataclass(frozen=True, slots=True)
class NamingRequestDTO:
    """A request in the outbox that is for a user, or whose actor or reason contains its ID.

    Attributes:
        job_id: ID of its job.
        is_for_user: Whether it is for the user, alone or in a cohort.
        actor: Who requests it, by its headers.
        reason: Why, likewise.
    """

    job_id: str
    is_for_user: bool
    actor: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class LedgerTotalsDTO:
    """The ledger in numbers.

    Attributes:
        rows: Number of finished jobs, estimated: counting them would take seconds.
        size: Bytes on disk, with the indexes.
        oldest_at: When the oldest job finished, timezone-aware; None without one.
    """

    rows: int
    size: int
    oldest_at: datetime | None


@dataclass(frozen=True, slots=True)
class OutboxTotalsDTO:
    """The outbox in numbers.

    Attributes:
        unsent: Number of requests that were never enqueued.
        oldest_unsent_at: When the oldest of them was requested, timezone-aware; None without one.
        sent: Number of requests that were enqueued and whose job may not have finished.
    """

    unsent: int
    oldest_unsent_at: datetime | None
    sent: int


@dataclass(frozen=True, slots=True)
class AccessRequestDTO:
    """An outbox request: a job that a service requested in a transaction of its own.

    Attributes:
        user_id: None for a cohort.
        interview_ids: Unvalidated elements of a text array, which may be None or nested lists.
        requested_at: Timezone-aware. A value outside the last hundred years is clamped to them.
        sent_at: When the request was last enqueued, clamped likewise; None before the first time.
        is_too_large: Whether the user IDs and the interview IDs were too large to be read; they are
            empty then.
        task: The task's name.
        user_ids: The users of a cohort, unvalidated like ``interview_ids``; None for one user.
        eta: Time before which the job does not start, at most a hundred years from now.
        expires_at: Time after which the job does not start, clamped likewise.
        headers: Headers for the message as the text of a JSON object of strings. A value that is
            not a string is null. Empty if they are not an object, or too large.
    """

    job_id: str
    user_id: str | None = field(repr=False)
    interview_ids: tuple[Any, ...] = field(repr=False)
    requested_at: datetime
    sent_at: datetime | None = None
    is_too_large: bool = False
    task: str = DEFAULT_REQUEST_TASK
    user_ids: tuple[Any, ...] | None = field(default=None, repr=False)
    eta: datetime | None = None
    expires_at: datetime | None = None
    headers: str | None = field(default=None, repr=False)
