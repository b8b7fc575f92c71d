"""The Celery tasks of the contract: from a message's arguments to a job, from jobs to results.

Owns a job's arguments, its progress and its log line. A pool process executes the tasks in batches
(``worker/execution/pool_process.py``), not through Celery's tracer.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from celery import Task
from celery.utils.log import get_task_logger
from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    PROGRESS,
    CreateInterviewAttemptRequest,
    GrantAccessRequest,
    GrantCohortAccessRequest,
    JobProgress,
    RequestedInterviews,
    describe,
    request_digest,
    unreadable_request_digest,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    JobCancelledException,
    JobExpiredException,
    shortened,
)

from storage.dtos import JobDTO
from storage.interface import Storage
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tasks.interview_attempts import InterviewAttemptInteractor, InterviewAttemptJob
from tasks.ledger import JobResult

logger = get_task_logger(__name__)

_PROGRESS_SECONDS = 0.5

Args = Sequence[object]
Kwargs = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TaskDependencies:
    """What the tasks depend on, set by the application.

    Attributes:
        storage: Returns this process's storage.
        max_interview_ids: Largest number of grants that one job may request, duplicates included.
        retry_limit: Largest number of retries of a job.
        retry_max_delay: Longest delay before a retry, in seconds.
    """

    storage: Callable[[], Storage]
    max_interview_ids: int
    retry_limit: int
    retry_max_delay: int


class JobTask(Task):  # type: ignore[misc] # Celery ships no types
    """A task of the contract: parses messages into jobs and settles jobs in batches."""

    abstract = True
    throws = (JobCancelledException, JobExpiredException)  # not reported as errors
    typing = False  # invalid arguments fail with the contract's error, which names the argument

    def __init__(self, dependencies: TaskDependencies) -> None:
        self.dependencies = dependencies

    def read(
        self, job_id: str, args: Args, kwargs: Kwargs, failure: InterviewAccessError | None = None
    ) -> Any:
        """Parse a message into a job of this task's type.

        Args:
            job_id: The job's ID.
            args: Positional arguments.
            kwargs: Named arguments.
            failure: A predetermined failure, if the job is not to be executed.

        Returns:
            The job. Its ``failure`` is the validation error of its request if there is one, else
            the predetermined failure.
        """
        job = self._read(job_id, args, kwargs)
        return replace(job, failure=job.failure or failure) if failure else job

    @abstractmethod
    def _read(self, job_id: str, args: Args, kwargs: Kwargs) -> Any:
        """Parse a message into a job, with its validation error if it has one."""

    @abstractmethod
    def settle(self, jobs: Sequence[Any]) -> list[JobResult]:
        """Settle jobs of this task's type; see :func:`tasks.ledger.settle`.

        Args:
            jobs: Jobs in order, as :meth:`read` returns them.

        Returns:
            A result for each job, in order. Any error of a job is in its result.

        Raises:
            MemoryError: if this process is out of memory.
        """

    def run(self, *_: object, **__: object) -> NoReturn:
        """Refuse a direct call, as by ``task_always_eager``: only the worker executes jobs.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.name} is executed by `celery -A worker worker` only; got a direct call. "
            "Enqueue it on the queue interview-access."
        )


class GrantAccessTask(JobTask):
    """``interview_access.grant_access(user_id, interview_ids)``."""

    name = GRANT_ACCESS

    def _read(self, job_id: str, args: Args, kwargs: Kwargs) -> GrantAccessJob:
        limit = self.dependencies.max_interview_ids
        return grant_access_job(job_id, args, kwargs, max_interview_ids=limit)

    def settle(self, jobs: Sequence[GrantAccessJob]) -> list[JobResult]:
        """Create the grants. A single job reports its progress."""
        interactor = GrantAccessInteractor(self.dependencies.storage())
        on_chunk = _Progress(self, jobs[0].entry.job_id) if len(jobs) == 1 else None
        return interactor.grant_access(jobs, on_chunk)


class GrantCohortAccessTask(GrantAccessTask):
    """``interview_access.grant_cohort_access(user_ids, interview_ids)``."""

    name = GRANT_COHORT_ACCESS

    def _read(self, job_id: str, args: Args, kwargs: Kwargs) -> GrantAccessJob:
        limit = self.dependencies.max_interview_ids
        return grant_cohort_access_job(job_id, args, kwargs, max_interview_ids=limit)


class CreateInterviewAttemptTask(JobTask):
    """``interview_access.create_interview_attempt(interview_id, user_id)``."""

    name = CREATE_INTERVIEW_ATTEMPT

    def _read(self, job_id: str, args: Args, kwargs: Kwargs) -> InterviewAttemptJob:
        return interview_attempt_job(job_id, args, kwargs)

    def settle(self, jobs: Sequence[InterviewAttemptJob]) -> list[JobResult]:
        """Create the interview attempts."""
        interactor = InterviewAttemptInteractor(self.dependencies.storage())
        return interactor.create_interview_attempt(jobs)


def grant_access_job(
    job_id: str, args: Args, kwargs: Kwargs, *, max_interview_ids: int
) -> GrantAccessJob:
    """Parse a message of ``grant_access``.

    Args:
        job_id: The job's ID.
        args: Positional arguments.
        kwargs: Named arguments.
        max_interview_ids: Largest number of interview IDs, duplicates included.

    Returns:
        The job, with the validation error of its request as its failure if there is one.
    """
    try:
        request = GrantAccessRequest.read(args, kwargs, max_interview_ids=max_interview_ids)
    except InvalidGrantRequestException as error:
        return GrantAccessJob(_unreadable(job_id, GRANT_ACCESS, args, kwargs), failure=error)
    interviews = RequestedInterviews.among(request.interview_ids)
    digest = interviews.digest(GRANT_ACCESS, request.user_id)
    entry = JobDTO(job_id, GRANT_ACCESS, request.user_id, digest)
    return GrantAccessJob(entry, (request.user_id,), interviews)


def grant_cohort_access_job(
    job_id: str, args: Args, kwargs: Kwargs, *, max_interview_ids: int
) -> GrantAccessJob:
    """Parse a message of ``grant_cohort_access``; see :func:`grant_access_job`.

    ``max_interview_ids`` limits the number of users times interviews.
    """
    try:
        request = GrantCohortAccessRequest.read(args, kwargs, max_interview_ids=max_interview_ids)
    except InvalidGrantRequestException as error:
        return GrantAccessJob(_unreadable(job_id, GRANT_COHORT_ACCESS, args, kwargs), failure=error)
    interviews = RequestedInterviews.among(request.interview_ids)
    digest = interviews.digest(GRANT_COHORT_ACCESS, request.user_ids)
    entry = JobDTO(job_id, GRANT_COHORT_ACCESS, None, digest)
    return GrantAccessJob(entry, request.user_ids, interviews)


def interview_attempt_job(job_id: str, args: Args, kwargs: Kwargs) -> InterviewAttemptJob:
    """Parse a message of ``create_interview_attempt``; see :func:`grant_access_job`."""
    try:
        request = CreateInterviewAttemptRequest.read(args, kwargs)
    except InvalidGrantRequestException as error:
        entry = _unreadable(job_id, CREATE_INTERVIEW_ATTEMPT, args, kwargs)
        return InterviewAttemptJob(entry, failure=error)
    digest = request_digest(CREATE_INTERVIEW_ATTEMPT, request.user_id, [request.interview_id])
    entry = JobDTO(job_id, CREATE_INTERVIEW_ATTEMPT, request.user_id, digest)
    return InterviewAttemptJob(entry, request.user_id, request.interview_id)


class _Progress:
    """Stores a running job's progress as its state, at most twice a second.

    Stops after the first failure: each store can block the open transaction for a Redis timeout.
    """

    def __init__(self, task: JobTask, job_id: str) -> None:
        self._task = task
        self._job_id = job_id
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now < self._next:
            return
        self._next = now + _PROGRESS_SECONDS
        meta = JobProgress(done=done, total=total).model_dump()
        if not self._task.backend.store_progress(self._job_id, PROGRESS, meta):
            self._next = math.inf


def _unreadable(job_id: str, task: str, args: Args, kwargs: Kwargs) -> JobDTO:
    return JobDTO(job_id, task, None, unreadable_request_digest(task, args, kwargs))


def shown(args: object, kwargs: object) -> tuple[str, str]:
    """Abbreviate a message's arguments for logs, whatever their types and sizes.

    At most four positional and four named arguments are shown, and the number of the others. A
    string is shown by its first 80 characters, another value by a description.

    Args:
        args: Positional arguments; shown as none unless a list or a tuple.
        kwargs: Named arguments; shown as none unless a mapping.

    Returns:
        The positional and the named arguments as text.
    """
    positional = [_brief(value) for value in args] if isinstance(args, list | tuple) else []
    named = (
        [f"{shortened(str(key), quoted=False)}={_brief(value)}" for key, value in kwargs.items()]
        if isinstance(kwargs, Mapping)
        else []
    )
    return f"({_joined(positional)})", _joined(named)


def log_outcome(
    task: str,
    job_id: str,
    arguments: tuple[Args, Kwargs],
    result: JobResult,
    failure: InterviewAccessError | None,
    *,
    attempt: int,
    seconds: float,
) -> None:
    """Log the line of a settled job: in text with its arguments, in JSON with its figures.

    JSON has no ID of a person: the job's ID leads to the job's row of the ledger.

    Args:
        task: The job's task.
        job_id: The job's ID.
        arguments: Positional and named arguments.
        result: The job's result.
        failure: Why the job failed, if it did.
        attempt: Number of this execution, from 1.
        seconds: Duration of its batch.
    """
    outcome = result.outcome
    state = outcome.state if outcome else "failed"
    fields: dict[str, object] = {
        "job_id": job_id,
        "task": task,
        "attempt": attempt,
        "seconds": seconds,
        "outcome": "refused" if failure and failure is result.refusal else state,
        "already_finished": result.repeated,
    }
    if failure:
        fields |= {"error_type": type(failure).__name__, "error": failure.sentence}
    elif outcome and outcome.figures:
        fields |= asdict(outcome.figures)
    logger.info(
        "job settled: job=%s seconds=%.2f attempt=%d outcome=%s %s",
        *(job_id, seconds, attempt, _summary(result), _line(*arguments)),
        extra={"fields": fields},
    )


def _line(args: Args, kwargs: Kwargs) -> str:
    positional, named = shown(args, kwargs)
    return named if positional == "()" else f"{positional} {named}".strip()


def _brief(value: object) -> str:
    return shortened(value) if isinstance(value, str) else f"<{describe(value)}>"


def _joined(parts: list[str], at_most: int = 4) -> str:
    return ", ".join(parts[:at_most] + [f"{len(parts) - at_most} more"] * (len(parts) > at_most))


def _summary(result: JobResult) -> str:
    outcome = result.outcome
    if outcome is None or outcome.error:
        summary = outcome.error["sentence"] if outcome and outcome.error else "no result"
    elif outcome.figures:
        figures = outcome.figures
        summary = (
            f"{figures.created:,} created, {figures.already_granted:,} already granted, "
            f"{figures.repeated:,} repeated"
        )
    else:
        summary = "done"
    return f"{summary} (already finished)" if result.repeated else summary
