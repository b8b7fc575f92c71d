"""Redis and the workers, as far as the clients see them, in memory.

The exchanges of :mod:`interview_access.protocol` run unchanged, so that a test's client validates,
refuses and reports as the real one does.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import RLock
from types import EllipsisType
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid5

from redis.exceptions import ConnectionError as NoConnectionError
from redis.exceptions import WatchError

from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    CREATE_INTERVIEW_ATTEMPT,
    DEFAULT_MAX_INTERVIEW_IDS,
    GRANT_COHORT_ACCESS,
    LIMITS_KEY,
    QUEUE,
    Announcement,
    GrantAccessResult,
    InterviewAttemptResult,
    JobFailure,
    JobStatus,
    RequestedInterviews,
    WorkerLimits,
    announcement_key,
    describe,
    result_key,
)
from interview_access.errors import InterviewAccessError, JobCancelledException
from interview_access.protocol.commands import Commands
from interview_access.stored_errors import from_record, to_record, to_result
from interview_access.testing.jobs import EnqueuedJob, Expected

_RESULTS = result_key("")
_LIMITS = WorkerLimits(max_interview_ids=DEFAULT_MAX_INTERVIEW_IDS).model_dump_json().encode()


class InMemoryQueue(ABC):
    """The jobs that a test's clients enqueued, and assertions about them.

    Safe for threads.

    Attributes:
        is_available: Whether Redis can be reached. Set it to False to test what a service does if
            a call raises QueueUnavailableError.
    """

    def __init__(self) -> None:
        self.is_available = True
        self._lock = RLock()
        self._keys: dict[str, bytes] = {}
        self._jobs: dict[str, EnqueuedJob] = {}

    @property
    def jobs(self) -> list[EnqueuedJob]:
        """The jobs that were enqueued, in order. One that was sent again is listed once."""
        return [*self._jobs.values()]

    def clear(self) -> None:
        """Forget the jobs that were enqueued, and their IDs."""
        with self._lock:
            self._keys.clear()
            self._jobs.clear()

    def assert_enqueued(
        self,
        *,
        task: str | EllipsisType = ...,
        job_id: str | EllipsisType = ...,
        user_id: str | UUID | EllipsisType = ...,
        user_ids: Iterable[str | UUID] | EllipsisType = ...,
        interview_ids: Iterable[str | UUID] | EllipsisType = ...,
        count: int | None = None,
    ) -> list[EnqueuedJob]:
        """Assert that jobs were enqueued. An argument that is not given accepts any value.

        Args:
            task: Name of the task, as ``interview_access.contracts.GRANT_ACCESS``.
            job_id: The job's ID.
            user_id: The only user of the job.
            user_ids: All users of the job, in any order; duplicates do not count.
            interview_ids: All interviews of the job, likewise and in any spelling; of an attempt
                its one interview.
            count: Number of jobs that are expected; by default at least one.

        Returns:
            The jobs that are as expected, in order.

        Raises:
            AssertionError: if their number differs; it lists what was enqueued.
            TypeError: if an ID is neither a string nor a UUID, or `user_ids` or `interview_ids`
                is not an iterable.
            ValueError: if `task` is not the name of a task.
        """
        __tracebackhide__ = True
        expected = Expected(
            task=task,
            job_id=job_id,
            user_id=user_id,
            user_ids=user_ids,
            interview_ids=interview_ids,
        )
        return expected.assert_among(self.jobs, count=count, listed_as="Enqueued")

    def assert_nothing_enqueued(self) -> None:
        """Assert that no job was enqueued.

        Raises:
            AssertionError: if a job was; it lists what was enqueued.
        """
        __tracebackhide__ = True
        self.assert_enqueued(count=0)

    def execute(self, step: Commands) -> list[Any]:
        """Execute Redis commands of a client.

        Args:
            step: The commands.

        Returns:
            The replies.

        Raises:
            redis.exceptions.RedisError: as from Redis.
        """
        with self._lock:
            if not self.is_available:
                raise NoConnectionError("the test has set is_available to False")
            if any(self._value(key) != value for key, value in step.expected.items()):
                raise WatchError("a watched key has another value than expected")
            return [self._reply(command) for command in step.commands]

    def _reply(self, command: tuple[Any, ...]) -> Any:
        match command:
            case "SET", key, value, "NX", "EX", _:
                return self._keys.setdefault(key, value) is value
            case "LPUSH", list_key, *messages:
                for message in messages:
                    self._push(list_key, json.loads(message))
                return len(messages)
            case "GET", key:
                return self._value(key)
            case "MGET", *keys:
                return [self._value(key) for key in keys]
            case "EXISTS", key:
                return int(self._value(key) is not None)
            case "DEL", key:
                self._forget_result(key.removeprefix(_RESULTS))
                return 1
        raise NotImplementedError(f"{command[0]}: the test kit does not execute this command")

    def _push(self, list_key: str, message: Mapping[str, Any]) -> None:
        headers, (_, arguments, _) = message["headers"], json.loads(message["body"])
        if list_key == CONTROL_QUEUE:
            reply = self._control_reply(headers["task"], arguments["job_id"])
            self._keys[message["properties"]["reply_to"]] = json.dumps(reply).encode()
            return
        if list_key != QUEUE:
            raise NotImplementedError(f"{list_key}: the test kit has no such list")
        announced = Announcement.model_validate_json(self._keys[announcement_key(headers["id"])])
        job = EnqueuedJob.of_arguments(
            headers["id"],
            headers["task"],
            arguments,
            sent_at=announced.sent_at,
            eta=announced.eta,
            expires_at=announced.expires_at,
            actor=announced.actor,
            reason=announced.reason,
        )
        self._jobs.setdefault(job.job_id, job)
        self._deliver(job, arguments)

    def _control_reply(self, task: str, job_id: str) -> dict[str, Any]:
        try:
            if task == CANCEL_JOB:
                self._cancel(job_id)
            status = self._status(job_id)
        except InterviewAccessError as error:
            return {"status": "FAILURE", "result": to_result(error)}
        return {"status": "SUCCESS", "result": status.model_dump(mode="json", exclude_none=True)}

    def _value(self, key: str) -> bytes | None:
        if key == LIMITS_KEY:
            return _LIMITS
        if not key.startswith(_RESULTS):
            return self._keys.get(key)
        status = self._status(key.removeprefix(_RESULTS))
        if not status.final:
            return None
        if status.error:
            error = from_record(status.error.model_dump())
            return json.dumps({"status": "FAILURE", "result": to_result(error)}).encode()
        return json.dumps({"status": "SUCCESS", "result": status.result}).encode()

    def _announcement(self, job_id: str) -> Announcement | None:
        text = self._keys.get(announcement_key(job_id))
        return Announcement.model_validate_json(text) if text else None

    def _unfinished(self, job_id: str, *, cancel_requested: bool) -> JobStatus:
        """Build the status of a job that has no outcome."""
        announcement = self._announcement(job_id)
        known = announcement.model_dump(exclude={"digest"}) if announcement else {}
        return JobStatus(
            job_id=job_id,
            state="queued" if announcement else "unknown",
            cancel_requested=True if cancel_requested else None,
            **known,
        )

    @abstractmethod
    def _deliver(self, job: EnqueuedJob, arguments: Mapping[str, Any]) -> None:
        """Do what a worker does with a job that was enqueued, perhaps once more."""

    @abstractmethod
    def _status(self, job_id: str) -> JobStatus:
        """Report a job as a worker does."""

    @abstractmethod
    def _cancel(self, job_id: str) -> None:
        """Cancel a job unless it has finished."""

    @abstractmethod
    def _forget_result(self, job_id: str) -> None:
        """Delete a result that is not final, because the job is sent again."""


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
