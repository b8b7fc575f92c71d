"""What passes between the business and the data: values, of no database and no message.

Interview ids are canonical UUID text (lower case, 8-4-4-4-12) throughout: a job of 100,000 of them
would pay more for UUID objects than for its whole insert's network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any


@dataclass(frozen=True, slots=True)
class InterviewDTO:
    """An interview with its configuration, the defaults where it has none."""

    id: str
    title: str
    description: str | None
    duration: timedelta
    is_default_access_allowed: bool
    should_end_interview_after_duration: bool


@dataclass(frozen=True, slots=True)
class InterviewAttemptDTO:
    """One user's start of one interview; the datetimes are aware."""

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
class AccessOrderDTO:
    """What one user is to be granted.

    Attributes:
        interview_ids: Each once, in any order.
    """

    user_id: str
    interview_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobDTO:
    """A job as the ledger identifies it.

    Attributes:
        user_id: None where the request has none that a table can hold.
        request_digest: 64 hex digits: what tells one request from another.
    """

    job_id: str
    task: str
    user_id: str | None
    request_digest: str


@dataclass(frozen=True, slots=True)
class FiguresDTO:
    """How a job's ids add up: requested = repeated + already_granted + created."""

    requested: int
    repeated: int
    already_granted: int
    created: int


@dataclass(frozen=True, slots=True)
class RejectedIdsDTO:
    """All ids for which a job failed, as they were given, each spelling once."""

    unknown: tuple[str, ...]
    malformed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnswerDTO:
    """A job's final answer: a result or an error, never both.

    Attributes:
        state: ``succeeded`` with a result; ``failed``, ``cancelled`` or ``expired`` with an error.
        result: The result as its producer reads it.
        error: ``{"type": class name, "sentence": …, "details": {…}}``.
        figures: Where the job was one of grants and succeeded.
        created_by_user: How many of the grants each user had, where the job was one for several.
            This and what follows is not read with other jobs' answers, only by
            :meth:`~storage.interface.InterviewStorageInterface.get_finished_job`.
        rejected: Where it failed for its ids.
    """

    state: str
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    figures: FiguresDTO | None = None
    created_by_user: Mapping[str, int] | None = field(default=None, compare=False)
    rejected: RejectedIdsDTO | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class FinishedJobDTO:
    """A row of the ledger: a job and its answer.

    Attributes:
        finished_at: Set by the store when the job is recorded; aware.
    """

    job: JobDTO
    answer: AnswerDTO
    finished_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class FoundJobsDTO:
    """What the store holds of some jobs.

    Attributes:
        finished: Those in the ledger, by ID.
        cancelled: IDs of those that are to be cancelled.
    """

    finished: Mapping[str, FinishedJobDTO]
    cancelled: frozenset[str]


@dataclass(frozen=True, slots=True)
class AccessRequestDTO:
    """A job that a service asked for in a transaction of its own.

    Attributes:
        interview_ids: As given; it may hold what a text array can besides, such as None or arrays.
        requested_at: Aware, in the last hundred years: a service may have written any, which is
            read as the nearest of these.
        sent_at: When it was last put on the queue, likewise; None before the first time.
        is_too_large: Whether the user ID and the interview IDs were too large to be read; they are
            empty then.
    """

    job_id: str
    user_id: str
    interview_ids: tuple[Any, ...]
    requested_at: datetime
    sent_at: datetime | None = None
    is_too_large: bool = False
