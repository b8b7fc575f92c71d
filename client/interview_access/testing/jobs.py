"""Jobs as a test compares them, and the sentences of failed assertions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import EllipsisType
from typing import Any, Self
from uuid import UUID

from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    RequestedInterviews,
)
from interview_access.contracts.identifiers import as_text, as_texts
from interview_access.text import describe, shortened

_TASKS = (GRANT_ACCESS, GRANT_COHORT_ACCESS, CREATE_INTERVIEW_ATTEMPT)
_LISTED_JOBS, _LISTED_IDS = 20, 3  # in a failed assertion's text


@dataclass(frozen=True, slots=True)
class EnqueuedJob:
    """A job that was enqueued, or requested in the outbox.

    Attributes:
        job_id: The job's ID.
        task: Name of the job's task.
        user_ids: User IDs as given; of a job for one user this one.
        interview_ids: Interview IDs as given; of an attempt this one.
        sent_at: When the job was enqueued or requested.
        eta: Time before which no worker starts the job.
        expires_at: Time after which no worker starts the job.
        actor: Who requested the job.
        reason: Why.
    """

    job_id: str
    task: str
    user_ids: tuple[str, ...]
    interview_ids: tuple[str, ...]
    sent_at: datetime
    eta: datetime | None = None
    expires_at: datetime | None = None
    actor: str | None = None
    reason: str | None = None

    @classmethod
    def of_arguments(
        cls,
        job_id: str,
        task: str,
        arguments: Mapping[str, Any],
        *,
        sent_at: datetime,
        eta: datetime | None,
        expires_at: datetime | None,
        actor: str | None,
        reason: str | None,
    ) -> Self:
        """Build a job from its task's named arguments."""
        users, interviews = (
            tuple(arguments[several]) if several in arguments else (arguments[one],)
            for one, several in (("user_id", "user_ids"), ("interview_id", "interview_ids"))
        )
        return cls(job_id, task, users, interviews, sent_at, eta, expires_at, actor, reason)

    @property
    def user_id(self) -> str | None:
        """The user; None for a cohort."""
        return None if self.task == GRANT_COHORT_ACCESS else self.user_ids[0]

    @property
    def countdown(self) -> float | None:
        """Seconds before which no worker starts the job, counted from `sent_at`."""
        return (self.eta - self.sent_at).total_seconds() if self.eta else None

    def __str__(self) -> str:
        is_cohort = self.user_id is None
        users = f"user_ids={_ids(self.user_ids)}" if is_cohort else f"user_id={self.user_id!r}"
        timing = "".join(
            f", {name}={when.isoformat()}"
            for name, when in (("eta", self.eta), ("expires_at", self.expires_at))
            if when
        )
        return (
            f"{self.task} {shortened(self.job_id)}: {users}, "
            f"interview_ids={_ids(self.interview_ids)}{timing}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What an assertion expects of a job; an ellipsis accepts any value."""

    task: str | EllipsisType = ...
    job_id: str | EllipsisType = ...
    user_id: str | UUID | EllipsisType = ...
    user_ids: Iterable[str | UUID] | EllipsisType = ...
    interview_ids: Iterable[str | UUID] | EllipsisType = ...

    def assert_among(
        self, jobs: Sequence[EnqueuedJob], *, count: int | None, listed_as: str
    ) -> list[EnqueuedJob]:
        """Assert that some of the jobs are as expected.

        Args:
            jobs: All jobs, in order.
            count: Number of jobs that are expected; None for at least one.
            listed_as: What happened to the jobs, for the sentence.

        Returns:
            The jobs that are as expected, in order.

        Raises:
            AssertionError: if their number differs from `count`; it lists all jobs.
            TypeError: if an ID is neither a string nor a UUID, or `user_ids` or `interview_ids`
                is not an iterable.
            ValueError: if `task` is not the name of a task.
        """
        __tracebackhide__ = True
        wanted = self._comparable()
        found = [job for job in jobs if wanted.items() <= _comparable(job).items()]
        if len(found) == count or (count is None and found):
            return found
        number = "at least 1 job" if count is None else f"{count} job{'s' * (count != 1)}"
        given = ", ".join(f"{name}={_shown(value)}" for name, value in self._given().items())
        lines = [f"\n  {at}. {job}" for at, job in enumerate(jobs[:_LISTED_JOBS], start=1)]
        if len(jobs) > _LISTED_JOBS:
            lines.append(f"\n  and {len(jobs) - _LISTED_JOBS} more")
        raise AssertionError(
            f"Expected {number}{' with ' * bool(given)}{given}, got {len(found)}. "
            f"{listed_as}: {len(jobs)}{':' * bool(jobs)}{''.join(lines)}"
        )

    def _given(self) -> dict[str, Any]:
        values = {
            "task": self.task,
            "job_id": self.job_id,
            "user_id": as_text(self.user_id),
            "user_ids": as_texts(self.user_ids),
            "interview_ids": as_texts(self.interview_ids),
        }
        return {name: value for name, value in values.items() if value is not ...}

    def _comparable(self) -> dict[str, object]:
        given = self._given()
        for name in {"user_ids", "interview_ids"} & given.keys():
            if not isinstance(given[name], list):
                raise TypeError(f"{name}: expected a list of IDs, got {describe(given[name])}")
            for at, one in enumerate(given[name]):
                _check_string(f"{name}[{at}]", one)
        # No job has another type of ID: `count=0` would always hold.
        for name in {"task", "job_id", "user_id"} & given.keys():
            _check_string(name, given[name])
        if self.task is not ... and self.task not in _TASKS:
            raise ValueError(f"task: expected {' or '.join(_TASKS)}, got {describe(self.task)}")
        return _compared(given)


def _check_string(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {describe(value)}")


def _comparable(job: EnqueuedJob) -> dict[str, object]:
    return _compared(
        {
            "task": job.task,
            "job_id": job.job_id,
            "user_id": job.user_id,
            "user_ids": job.user_ids,
            "interview_ids": job.interview_ids,
        }
    )


def _compared(values: Mapping[str, Any]) -> dict[str, object]:
    """Remove what makes no difference: order, duplicates, and the spelling of UUIDs."""
    compared: dict[str, object] = {**values}
    if "user_ids" in values:
        compared["user_ids"] = frozenset(values["user_ids"])
    if "interview_ids" in values:
        interviews = RequestedInterviews.among(values["interview_ids"])
        compared["interview_ids"] = frozenset((*interviews.wanted, *interviews.malformed))
    return compared


def _shown(value: object) -> str:
    return _ids(value) if isinstance(value, list) else repr(value)


def _ids(values: Sequence[str]) -> str:
    listed = ", ".join(map(repr, values[:_LISTED_IDS]))
    more = len(values) - _LISTED_IDS
    return f"[{listed}{f', and {more} more' if more > 0 else ''}]"
