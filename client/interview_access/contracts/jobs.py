"""Jobs of a producer: the arguments of one task, and the options that all jobs have."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, TypedDict
from uuid import UUID, uuid4

from interview_access.contracts.identifiers import as_text, as_texts
from interview_access.contracts.names import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
)
from interview_access.contracts.requests import (
    CreateInterviewAttemptRequest,
    GrantAccessRequest,
    GrantCohortAccessRequest,
    Request,
)


class JobOptions(TypedDict):
    """The options of a job, named as the arguments of the clients' methods; see :class:`Job`."""

    job_id: str | None
    countdown: float | None
    expires: float | datetime | None
    actor: str | UUID | None
    reason: str | None


class Job:
    """A job for a producer's client: the arguments of one task, and options.

    Attributes:
        task: The task's name.
        request: The model that validates the task's arguments.
        job_id: 1 to 255 printable characters, unique to the request; by default a random UUID. With
            it the job can be polled, and sent again.
        countdown: Seconds before which no worker starts the job.
        expires: Seconds, or a datetime (UTC if naive), after which no worker starts the job.
        actor: Who requests the job, 1 to 255 printable characters. It is kept in the ledger.
        reason: Why, 1 to 1,000 printable characters. Likewise.
    """

    __slots__ = ()

    task: ClassVar[str]
    request: ClassVar[type[Request]]
    job_id: str
    countdown: float | None
    expires: float | datetime | None
    actor: str | UUID | None
    reason: str | None

    @property
    def arguments(self) -> dict[str, object]:
        """Named arguments of the task, with UUIDs as strings and any iterable as a list."""
        return {name: as_text(getattr(self, name)) for name in self.request.parameters()}

    @property
    def options(self) -> JobOptions:
        """The options, by the names of the arguments of the clients' methods."""
        return {
            "job_id": self.job_id,
            "countdown": self.countdown,
            "expires": self.expires,
            "actor": self.actor,
            "reason": self.reason,
        }

    @property
    def requested(self) -> int:
        """Number of grants requested, duplicates included; 1 for a job without a list of IDs."""
        return 1

    def check(self, *, max_interview_ids: int | None = None) -> None:
        """Validate the arguments as a worker does, but neither interview IDs nor options.

        Args:
            max_interview_ids: Grants that one job may request; None for any number.

        Raises:
            InvalidGrantRequestException: if an argument is invalid; it names each such argument.
        """
        self.request.read((), self.arguments, max_interview_ids=max_interview_ids, in_python=True)


def or_new(job_id: str | None) -> str:
    """Return the job ID, or a new random one if there is none."""
    return str(uuid4()) if job_id is None else job_id


def _random_id() -> str:
    return or_new(None)


def _length(values: object) -> int:
    return len(values) if isinstance(values, Sized) else 0


@dataclass(frozen=True, slots=True)
class GrantJob(Job):
    """A job that grants one user access to interviews.

    Attributes:
        user_id: 1 to 36 characters.
        interview_ids: UUIDs. An iterable is read once, when the job is created.
        job_id: See :class:`Job`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
    """

    task: ClassVar[str] = GRANT_ACCESS
    request: ClassVar[type[Request]] = GrantAccessRequest

    user_id: str | UUID
    interview_ids: Iterable[str | UUID]
    job_id: str = field(default_factory=_random_id)
    countdown: float | None = None
    expires: float | datetime | None = None
    actor: str | UUID | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        # A generator would be empty when the job is sent again.
        object.__setattr__(self, "interview_ids", as_texts(self.interview_ids))

    @property
    def requested(self) -> int:
        """Number of interview IDs as given."""
        return _length(self.interview_ids)


@dataclass(frozen=True, slots=True)
class GrantCohortJob(Job):
    """A job that grants each of many users access to each of many interviews.

    Attributes:
        user_ids: Each of 1 to 36 characters. An iterable is read once, when the job is created.
        interview_ids: UUIDs; likewise.
        job_id: See :class:`Job`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
    """

    task: ClassVar[str] = GRANT_COHORT_ACCESS
    request: ClassVar[type[Request]] = GrantCohortAccessRequest

    user_ids: Iterable[str | UUID]
    interview_ids: Iterable[str | UUID]
    job_id: str = field(default_factory=_random_id)
    countdown: float | None = None
    expires: float | datetime | None = None
    actor: str | UUID | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "user_ids", as_texts(self.user_ids))
        object.__setattr__(self, "interview_ids", as_texts(self.interview_ids))

    @property
    def requested(self) -> int:
        """Number of user IDs times that of interview IDs, both as given."""
        return _length(self.user_ids) * _length(self.interview_ids)


@dataclass(frozen=True, slots=True)
class InterviewAttemptJob(Job):
    """A job that creates an interview attempt, which starts when the job is executed.

    Attributes:
        interview_id: A UUID.
        user_id: 1 to 36 characters.
        job_id: See :class:`Job`.
        countdown: Likewise.
        expires: Likewise.
        actor: Likewise.
        reason: Likewise.
    """

    task: ClassVar[str] = CREATE_INTERVIEW_ATTEMPT
    request: ClassVar[type[Request]] = CreateInterviewAttemptRequest

    interview_id: str | UUID
    user_id: str | UUID
    job_id: str = field(default_factory=_random_id)
    countdown: float | None = None
    expires: float | datetime | None = None
    actor: str | UUID | None = None
    reason: str | None = None
