"""The Celery tasks: from a message to a job, from its outcome to a result.

Owns what of Celery a job sees: arguments, retries, progress, the line in the log. Decides nothing
about grants, and knows of the database only whether its trouble passes.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeAlias

from celery import Task, states
from celery._state import _task_stack
from celery.app import trace
from celery.exceptions import Reject, Retry
from celery.utils.log import get_task_logger
from celery.utils.time import get_exponential_backoff_interval
from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    JOB_ID_RULE,
    PROGRESS,
    CreateInterviewAttemptRequest,
    GrantAccessRequest,
    GrantCohortAccessRequest,
    JobProgress,
    RequestedInterviews,
    describe,
    is_job_id,
    request_digest,
    unreadable_request_digest,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobCancelledException,
    JobExpiredException,
    JobFailedError,
    StorageUnavailableException,
    shortened,
)

from storage.dtos import AnswerDTO, JobDTO
from storage.interface import InterviewStorageInterface, StorageError, TransientStorageError
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tasks.interview_attempts import InterviewAttemptInteractor, InterviewAttemptJob
from tasks.ledger import Outcome, error_of, failure, result_of
from tasks.teller import Teller

logger = get_task_logger(__name__)

_PROGRESS_SECONDS = 0.5

Args = Sequence[object]
Kwargs = Mapping[str, object]


class Call(NamedTuple):
    """A message: its job's id, and the arguments as they came."""

    job_id: str
    args: Args
    kwargs: Kwargs


End: TypeAlias = dict[str, Any] | InterviewAccessError | Retry
"""How a delivery ended: with a result, a failure for cause, or that it asks for another try."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """What the tasks work with, decided where the worker is put together.

    Attributes:
        storage: This process's store.
        max_interview_ids: Grants that one job may ask for, ids as given.
        retry_limit: Tries after the first while the database is in trouble.
        retry_max_delay: Seconds between two tries at most.
    """

    storage: Callable[[], InterviewStorageInterface]
    max_interview_ids: int
    retry_limit: int
    retry_max_delay: int


class JobTask(Task):  # type: ignore[misc] # Celery ships no types
    """One task of the contract: reads its message, has the job settled, tells its outcome.

    What becomes of the message is told to the main process: a return, or a failure for cause, is
    final and stored; :class:`~celery.exceptions.Retry` asks for another try; and
    :class:`~celery.exceptions.Reject` sends it to the dead letters, with its reason.
    """

    abstract = True
    coalesces: ClassVar[bool] = True  # small messages are small jobs, and may be done together
    typing = False  # what is wrong with an argument is ours to say, with its name
    throws: ClassVar[tuple[type[Exception], ...]] = (
        InvalidGrantRequestException,
        InvalidInterviewIdException,
        JobCancelledException,
        JobExpiredException,
        JobFailedError,
    )  # for cause: a line in the log, no trace

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace

    @abstractmethod
    def read(self, job_id: str, args: Args, kwargs: Kwargs) -> Any:
        """The job that a message makes, of the task's own kind; with its fault, if it has one."""

    @abstractmethod
    def settle(self, jobs: Sequence[Any], *, singly: bool = True) -> list[Outcome]:
        """Have the jobs done, or failed for their faults; ``singly`` as the interactors have it."""

    def __call__(self, /, *args: object, **kwargs: object) -> dict[str, Any]:
        """Run; Celery's own would take a message's argument named ``self`` for this one."""
        return self.run(*args, **kwargs)

    def run(self, /, *args: object, **kwargs: object) -> dict[str, Any]:
        """Do one delivery of a job.

        Raises:
            InterviewAccessError: the job's failure, as the ledger holds it.
            Retry: the database was in trouble, and may not be by and by.
            Reject: the outcome is stored, and operators should look at the message.
        """
        job_id = self.request.id
        if not is_job_id(job_id):
            raise InvalidGrantRequestException.of([("job id", JOB_ID_RULE, describe(job_id))])
        started = time.monotonic()
        outcome = self._settled(job_id, args, kwargs)
        if outcome.answer is None:
            self._later(outcome.trouble)
        _log(job_id, args, kwargs, outcome, time.monotonic() - started)
        if outcome.refusal:
            logger.warning("job %s: refused: %s", job_id, outcome.refusal)
            self.send_event("job-refused", reason=outcome.refusal.sentence)
            self._bury(outcome.refusal, outcome.answer)
        try:
            result = result_of(outcome.answer)
        except JobFailedError as error:
            if not outcome.repeated:
                self._bury(error, outcome.answer)
            raise
        if self.request.callbacks or self.request.chain or self.request.chord:
            # Celery sends these first, and what cannot be sent would make it a failure.
            self.backend.store_result(job_id, result, states.SUCCESS, request=self.request)
        return result

    def run_together(self, calls: Sequence[Call], hostname: str) -> tuple[list[End | None], float]:
        """Do deliveries of jobs, each tried for the first time, in one transaction.

        Args:
            calls: Their ids and arguments.
            hostname: The worker's name, for pollers of those that have not ended soon.

        Returns:
            How each ended, in step: its result or its failure, both of them stored, or that it asks
            for another try. None for one that is to be run by itself, whatever became of it here.
            And the seconds that all of it took.
        """
        started = time.monotonic()
        tell_that_they_run = partial(
            self.backend.store_started,
            [call.job_id for call in calls],
            pid=os.getpid(),
            hostname=hostname,
        )
        try:
            with _teller().told(tell_that_they_run):
                jobs = [self.read(*call) for call in calls]
                outcomes = self.settle(jobs, singly=False)
        except MemoryError:
            raise  # it passes, in another child
        except Exception as error:  # noqa: BLE001 - one job's, most likely, and told where it is run
            logger.warning("%d jobs are done one by one: %s", len(calls), type(error).__name__)
            return [None] * len(calls), time.monotonic() - started
        ends = [self._end(outcome, alone=len(calls) == 1) for outcome in outcomes]
        again = [at for at, end in enumerate(ends) if isinstance(end, Retry)]
        if again:
            first, more = calls[again[0]].job_id, len(again) - 1
            others = f" and {more} others" if more else ""
            logger.warning("job %s%s: try 1 failed: %s", first, others, outcomes[again[0]].trouble)
        answers = {
            call.job_id: end
            for call, end in zip(calls, ends, strict=True)
            if isinstance(end, dict | InterviewAccessError)
        }
        stored = self.backend.store_answers(answers)
        seconds = time.monotonic() - started
        logs = logger.isEnabledFor(logging.INFO)
        for at, (call, outcome) in enumerate(zip(calls, outcomes, strict=True)):
            if call.job_id in stored and logs:
                with self._as(call.job_id):
                    _log(*call, outcome, seconds)
                    self._log_end(call, ends[at], seconds)
            elif call.job_id in answers and call.job_id not in stored:
                ends[at] = None
        return ends, seconds

    def _end(self, outcome: Outcome, *, alone: bool) -> End | None:
        """How a job of a batch ended, if it can be told from its outcome alone."""
        if outcome.answer is None:
            trouble = outcome.trouble
            passes = isinstance(trouble, TransientStorageError) and (alone or trouble.unreachable)
            if not passes or self.workplace.retry_limit < 1:
                return None
            return Retry(exc=trouble, when=self._delay(0))
        if outcome.refusal:
            return None
        try:
            return result_of(outcome.answer)
        except JobFailedError:
            return None
        except InterviewAccessError as error:
            return error

    def _log_end(self, call: Call, end: End | None, seconds: float) -> None:
        """The line that Celery writes of each task that it runs."""
        args, kwargs = shown(call.args, call.kwargs)
        told = {"id": call.job_id, "name": self.name, "args": args, "kwargs": kwargs}
        if isinstance(end, dict):
            trace.info(trace.LOG_SUCCESS, {**told, "return_value": repr(end), "runtime": seconds})
        else:
            expected = trace.log_policy_expected
            told |= {"description": expected.description, "exc": repr(end)}
            trace.info(expected.format, told)

    @contextmanager
    def _as(self, job_id: str) -> Iterator[None]:
        """Log as this job's run does."""
        _task_stack.push(self)
        self.push_request(id=job_id)
        try:
            yield
        finally:
            self.pop_request()
            _task_stack.pop()

    def _settled(self, job_id: str, args: Args, kwargs: Kwargs) -> Outcome:
        verdict = self.request.verdict
        fault = error_of(verdict) if verdict else None
        try:
            outcome = self._settled_with(fault, job_id, args, kwargs)
            if outcome.trouble and not isinstance(outcome.trouble, TransientStorageError):
                raise outcome.trouble  # noqa: TRY301 - to go the way of every other surprise
        except MemoryError:
            raise  # it passes, in another child
        except Exception as error:
            # Nobody's fault that we know of: told without the error's own words, which may hold
            # anything. The log has it whole.
            kind = type(error).__name__
            code = getattr(error, "sqlstate", None)
            sentence = f"The job failed for a cause of the worker's own: {kind} ({code})."
            logger.exception("job %s: %s", job_id, sentence)
            fault = JobFailedError(sentence, {"exc_type": kind, "sqlstate": code})
            try:
                outcome = self._settled_with(fault, job_id, args, kwargs)
            except Exception:  # noqa: BLE001 - the same again, most likely
                outcome = Outcome(trouble=StorageError(sentence))
            if outcome.trouble and not isinstance(outcome.trouble, TransientStorageError):
                self._bury(fault, failure(fault))
        return outcome

    def _settled_with(
        self, fault: InterviewAccessError | None, job_id: str, args: Args, kwargs: Kwargs
    ) -> Outcome:
        job = self.read(job_id, args, kwargs)
        (outcome,) = self.settle([replace(job, fault=job.fault or fault)])
        return outcome

    def _later(self, trouble: StorageError | None) -> NoReturn:
        """Ask for another try, or give it up."""
        tries = self.request.retries + 1
        if tries > self.workplace.retry_limit:
            error = StorageUnavailableException.of(tries, str(trouble))
            self._bury(error, failure(error))
        logger.warning("job %s: try %d failed: %s", self.request.id, tries, trouble)
        raise Retry(exc=trouble, when=self._delay(self.request.retries))

    def _delay(self, retries: int) -> float:
        return float(
            get_exponential_backoff_interval(
                factor=1,
                retries=retries,
                maximum=self.workplace.retry_max_delay,
                full_jitter=True,
            )
        )

    def _bury(self, error: InterviewAccessError, answer: AnswerDTO) -> NoReturn:
        """Store the answer, and have the message kept for the operators with the error."""
        try:
            self.backend.mark_as_done(self.request.id, result_of(answer), self.request)
        except InterviewAccessError as failed:
            self.backend.mark_as_failure(self.request.id, failed, request=self.request)
        raise Reject(f"{type(error).__name__}: {error}", requeue=False)


class GrantAccessTask(JobTask):
    """``interview_access.grant_access(user_id, interview_ids)``."""

    name = GRANT_ACCESS

    def read(self, job_id: str, args: Args, kwargs: Kwargs) -> GrantAccessJob:
        """The job that a message makes."""
        limit = self.workplace.max_interview_ids
        return grant_access_job(job_id, args, kwargs, max_interview_ids=limit)

    def settle(self, jobs: Sequence[GrantAccessJob], *, singly: bool = True) -> list[Outcome]:
        """Have the grants made; one job alone tells its progress."""
        interactor = GrantAccessInteractor(self.workplace.storage())
        on_chunk = _Progress(self, jobs[0].entry.job_id) if len(jobs) == 1 else None
        return interactor.grant_access(jobs, on_chunk, singly=singly)


class GrantCohortAccessTask(GrantAccessTask):
    """``interview_access.grant_cohort_access(user_ids, interview_ids)``."""

    name = GRANT_COHORT_ACCESS
    coalesces = False  # a hundred users and a hundred interviews are a small message

    def read(self, job_id: str, args: Args, kwargs: Kwargs) -> GrantAccessJob:
        """The job that a message makes."""
        limit = self.workplace.max_interview_ids
        return grant_cohort_access_job(job_id, args, kwargs, max_interview_ids=limit)


class CreateInterviewAttemptTask(JobTask):
    """``interview_access.create_interview_attempt(interview_id, user_id)``."""

    name = CREATE_INTERVIEW_ATTEMPT

    def read(self, job_id: str, args: Args, kwargs: Kwargs) -> InterviewAttemptJob:
        """The job that a message makes."""
        return interview_attempt_job(job_id, args, kwargs)

    def settle(self, jobs: Sequence[InterviewAttemptJob], *, singly: bool = True) -> list[Outcome]:
        """Have the attempts made."""
        interactor = InterviewAttemptInteractor(self.workplace.storage())
        return interactor.create_interview_attempt(jobs, singly=singly)


def grant_access_job(
    job_id: str, args: Args, kwargs: Kwargs, *, max_interview_ids: int
) -> GrantAccessJob:
    """The job that a message of ``grant_access`` makes, with its fault where it cannot be read."""
    try:
        request = GrantAccessRequest.read(args, kwargs, max_interview_ids=max_interview_ids)
    except InvalidGrantRequestException as fault:
        return GrantAccessJob(_unreadable(job_id, GRANT_ACCESS, args, kwargs), fault=fault)
    interviews = RequestedInterviews.among(request.interview_ids)
    digest = interviews.digest(GRANT_ACCESS, request.user_id)
    entry = JobDTO(job_id, GRANT_ACCESS, request.user_id, digest)
    return GrantAccessJob(entry, (request.user_id,), interviews)


def grant_cohort_access_job(
    job_id: str, args: Args, kwargs: Kwargs, *, max_interview_ids: int
) -> GrantAccessJob:
    """The job that a message of ``grant_cohort_access`` makes, likewise."""
    try:
        request = GrantCohortAccessRequest.read(args, kwargs, max_interview_ids=max_interview_ids)
    except InvalidGrantRequestException as fault:
        return GrantAccessJob(_unreadable(job_id, GRANT_COHORT_ACCESS, args, kwargs), fault=fault)
    interviews = RequestedInterviews.among(request.interview_ids)
    digest = interviews.digest(GRANT_COHORT_ACCESS, request.user_ids)
    entry = JobDTO(job_id, GRANT_COHORT_ACCESS, None, digest)
    return GrantAccessJob(entry, request.user_ids, interviews)


def interview_attempt_job(job_id: str, args: Args, kwargs: Kwargs) -> InterviewAttemptJob:
    """The job that a message of ``create_interview_attempt`` makes, likewise."""
    try:
        request = CreateInterviewAttemptRequest.read(args, kwargs)
    except InvalidGrantRequestException as fault:
        entry = _unreadable(job_id, CREATE_INTERVIEW_ATTEMPT, args, kwargs)
        return InterviewAttemptJob(entry, fault=fault)
    digest = request_digest(CREATE_INTERVIEW_ATTEMPT, request.user_id, [request.interview_id])
    entry = JobDTO(job_id, CREATE_INTERVIEW_ATTEMPT, request.user_id, digest)
    return InterviewAttemptJob(entry, request.user_id, request.interview_id)


@lru_cache(maxsize=1)
def _teller() -> Teller:
    """This child's: only there a batch is done."""
    return Teller()


class _Progress:
    """Tells a running job's progress as its state, at most twice a second."""

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
        self._task.update_state(self._job_id, PROGRESS, meta)


def _unreadable(job_id: str, task: str, args: Args, kwargs: Kwargs) -> JobDTO:
    return JobDTO(job_id, task, None, unreadable_request_digest(task, args, kwargs))


def shown(args: object, kwargs: object) -> tuple[str, str]:
    """A message's arguments for people: each in a few words, whatever its size."""
    positional = [_brief(value) for value in args] if isinstance(args, list | tuple) else []
    named = (
        [f"{shortened(str(key), quoted=False)}={_brief(value)}" for key, value in kwargs.items()]
        if isinstance(kwargs, Mapping)
        else []
    )
    return f"({_joined(positional)})", _joined(named)


def _log(job_id: str, args: Args, kwargs: Kwargs, outcome: Outcome, seconds: float) -> None:
    line = _line(args, kwargs)
    logger.info("job %s: %s: %s in %.2f s", job_id, line, _told(outcome), seconds)


def _line(args: Args, kwargs: Kwargs) -> str:
    positional, named = shown(args, kwargs)
    return named if positional == "()" else f"{positional} {named}".strip()


def _brief(value: object) -> str:
    return shortened(value) if isinstance(value, str) else f"<{describe(value)}>"


def _joined(parts: list[str], at_most: int = 4) -> str:
    return ", ".join(parts[:at_most] + [f"{len(parts) - at_most} more"] * (len(parts) > at_most))


def _told(outcome: Outcome) -> str:
    answer = outcome.answer
    if answer is None or answer.error:
        told = answer.error["sentence"] if answer and answer.error else "no answer"
    elif answer.figures:
        figures = answer.figures
        told = (
            f"{figures.created:,} created, {figures.already_granted:,} already granted, "
            f"{figures.repeated:,} repeated"
        )
    else:
        told = "done"
    return f"{told} (answered before)" if outcome.repeated else told
