"""Jobs that stay queued, unless a test states how they end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_COHORT_ACCESS,
    GrantAccessResult,
    InterviewAttemptResult,
    JobFailure,
    JobStatus,
    RequestedInterviews,
    describe,
)
from interview_access.errors import InterviewAccessError, JobCancelledException
from interview_access.stored_errors import to_record
from interview_access.testing.jobs import EnqueuedJob
from interview_access.testing.queue import InMemoryQueue


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a test has stated that a job ends."""

    error: InterviewAccessError | None = None
    created: int | None = None
    created_by_user: Mapping[str, int] | None = None
    interview_attempt_id: str | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


class StatedResults(InMemoryQueue):
    """Jobs stay queued, unless the test states how they end."""

    def __init__(self) -> None:
        super().__init__()
        self._outcomes: dict[str | None, _Outcome] = {}
        self._cancelled: set[str] = set()

    def clear(self) -> None:
        """Forget the jobs that were enqueued, their IDs, and the results that were set."""
        with self._lock:
            super().clear()
            self._outcomes.clear()
            self._cancelled.clear()

    def set_result(
        self,
        job_id: str | None = None,
        *,
        created: int | None = None,
        created_by_user: Mapping[str, int] | None = None,
        interview_attempt_id: str | None = None,
    ) -> None:
        """Have a job succeed.

        Args:
            job_id: The job's ID, enqueued or not. None: every enqueued job without an outcome of
                its own.
            created: Number of grants that it created; by default all that it requested.
            created_by_user: The numbers for each user of a cohort, instead of `created`; by default
                all that were requested, unless `created` is given.
            interview_attempt_id: ID of the attempt that it created; by default a UUID.

        Raises:
            ValueError: if the job was enqueued, and no worker can return such a result for it.
        """
        if created_by_user is not None:
            created = sum(created_by_user.values())
        outcome = _Outcome(None, created, created_by_user, interview_attempt_id)
        for job in self.jobs if job_id is None else filter(None, [self._jobs.get(job_id)]):
            _check_result(job, outcome)
        self._outcomes[job_id] = outcome

    def set_failure(self, job_id: str | None, error: InterviewAccessError) -> None:
        """Have a job fail.

        Args:
            job_id: The job's ID, enqueued or not. None: every enqueued job without an outcome of
                its own.
            error: An error of :mod:`interview_access.errors`, which ``wait`` raises.

        Raises:
            TypeError: if `error` is not such an error.
        """
        if not isinstance(error, InterviewAccessError):
            raise TypeError(
                "error: expected an exception of interview_access.errors, such as "
                f"InvalidInterviewIdException.of([], [interview_id]); got {describe(error)}"
            )
        self._outcomes[job_id] = _Outcome(error)

    def _deliver(self, job: EnqueuedJob, arguments: Mapping[str, Any]) -> None:  # noqa: ARG002 - the job is not executed
        if job.job_id in self._cancelled:
            self._cancel(job.job_id)

    def _status(self, job_id: str) -> JobStatus:
        job = self._jobs.get(job_id)
        outcome = self._outcomes.get(job_id) or (self._outcomes.get(None) if job else None)
        if outcome:
            return _finished(job_id, job, outcome)
        return self._unfinished(job_id, cancel_requested=job_id in self._cancelled)

    def _cancel(self, job_id: str) -> None:
        if self._status(job_id).final:
            return
        self._cancelled.add(job_id)
        if job_id in self._jobs:
            self._outcomes[job_id] = _Outcome(JobCancelledException.of(job_id))

    def _forget_result(self, job_id: str) -> None:
        self._outcomes.pop(job_id, None)


def _check_result(job: EnqueuedJob, outcome: _Outcome) -> None:
    """Refuse a result that no worker returns for the job."""
    is_attempt = job.task == CREATE_INTERVIEW_ATTEMPT
    if is_attempt and outcome.created is not None:
        raise ValueError(f"created: expected none for an attempt, got {outcome.created}")
    if not is_attempt and outcome.interview_attempt_id is not None:
        given = describe(outcome.interview_attempt_id)
        raise ValueError(f"interview_attempt_id: expected none for {job.task}, got {given}")
    most = _distinct_grants(job)
    if outcome.created is not None and not 0 <= outcome.created <= most:
        raise ValueError(f"created: expected 0 to {most} for the job, got {outcome.created}")


def _distinct_grants(job: EnqueuedJob) -> int:
    return len(set(job.user_ids)) * len(RequestedInterviews.among(job.interview_ids).wanted)


def _finished(job_id: str, job: EnqueuedJob | None, outcome: _Outcome) -> JobStatus:
    has_started = not isinstance(outcome.error, JobCancelledException)
    status = JobStatus(
        job_id=job_id,
        state=outcome.error.state if outcome.error else "succeeded",
        task=job.task if job else None,
        user_id=job.user_id if job and has_started else None,
        finished_at=max(outcome.at, job.sent_at) if job else outcome.at,
        enqueued_at=job.sent_at if job else None,
        actor=job.actor if job else None,
        reason=job.reason if job else None,
    )
    if outcome.error:
        rejected: dict[str, list[str]] = {"unknown": [], "malformed": []}
        for one in outcome.error.details.get("interview_ids", ()):
            rejected[one["reason"]].append(one["value"])
        status.error = JobFailure.model_validate(to_record(outcome.error))
        status.unknown_interview_ids = rejected["unknown"] or None
        status.malformed_interview_ids = rejected["malformed"] or None
    elif outcome.interview_attempt_id or (job and job.task == CREATE_INTERVIEW_ATTEMPT):
        attempt_id = outcome.interview_attempt_id or str(uuid5(NAMESPACE_OID, job_id))
        status.result = InterviewAttemptResult(interview_attempt_id=attempt_id).model_dump()
    else:
        _add_counts(status, job, outcome)
    return status


def _add_counts(status: JobStatus, job: EnqueuedJob | None, outcome: _Outcome) -> None:
    """Add the numbers of grants to the status of a job that created grants."""
    created = outcome.created
    if job:
        users, each = set(job.user_ids), len(RequestedInterviews.among(job.interview_ids).wanted)
        distinct = len(users) * each
        created = distinct if created is None else created
        status.requested = len(job.user_ids) * len(job.interview_ids)
        status.repeated = status.requested - distinct
        status.already_granted = distinct - created
        if job.task == GRANT_COHORT_ACCESS:
            all_created = dict.fromkeys(job.user_ids, each) if outcome.created is None else None
            status.created_by_user = dict(outcome.created_by_user or {}) or all_created
    status.created = created or 0
    status.result = GrantAccessResult(created_access_count=status.created).model_dump()
