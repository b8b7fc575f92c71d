"""The Celery tasks: from a message to a job, from its outcome to a result.

Owns what of Celery a job sees: arguments, retries, progress, the line in the log. Decides nothing
about grants, and knows of the database only whether its trouble passes.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

from celery import Task
from celery.exceptions import Reject
from celery.utils.log import get_task_logger
from celery.utils.time import get_exponential_backoff_interval
from celery.worker.request import Request
from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    JOB_ID_RULE,
    PROGRESS,
    CreateInterviewAttemptRequest,
    GrantAccessRequest,
    JobProgress,
    RequestedInterviews,
    canonical_interview_id,
    describe,
    is_job_id,
    request_digest,
    unreadable_request_digest,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobFailedError,
    JobIdReusedException,
    StorageUnavailableException,
    shortened,
)

from storage.dtos import JobDTO
from storage.interface import InterviewStorageInterface, StorageError, TransientStorageError
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tasks.interview_attempts import InterviewAttemptInteractor, InterviewAttemptJob
from tasks.ledger import Outcome, result_of

logger = get_task_logger(__name__)

_PROGRESS_SECONDS = 0.5

Args = Sequence[object]
Kwargs = Mapping[str, object]


class DeadLetters(Protocol):
    """Where a message goes that could not be done, with its reason."""

    def bury(
        self, job_id: str, task: str, args: Args, kwargs: Kwargs, *, reason: str, attempts: int
    ) -> None:
        """Keep the message, so that an operator can look at it and send it again."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """What the tasks work with, decided where the worker is put together.

    Attributes:
        storage: This process's store.
        max_interview_ids: Ids as given that one job may hold.
        retry_limit: Tries after the first while the database is in trouble.
        retry_max_delay: Seconds between two tries at most.
    """

    storage: Callable[[], InterviewStorageInterface]
    dead_letters: DeadLetters
    max_interview_ids: int
    retry_limit: int
    retry_max_delay: int


class JobRequest(Request):  # type: ignore[misc] # Celery ships no types
    """A message as the worker's main process holds it, shown short.

    A producer's own representation of 100,000 ids would be the first thousand characters of them,
    in every event and in Flower; a plain ``LPUSH`` brings none at all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._argsrepr, self._kwargsrepr = _shown(self._args, self._kwargs)
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    @property
    def request_dict(self) -> dict[str, Any]:
        """What a child is told besides the body, in which it reads the arguments.

        Celery's own has them too, as objects: a list nested some hundred times in itself overflows
        the pickler then, which ends the whole worker.
        """
        told = self._request_dict.items()
        return {key: value for key, value in told if key not in {"args", "kwargs"}}

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Celery's own, without a trace in the event where the job failed for a known cause."""
        if isinstance(exc_info.exception, InterviewAccessError):
            exc_info.traceback = ""
        # Where a child died Celery sends the job again out of these.
        self._request_dict.update(args=self._args, kwargs=self._kwargs)
        return super().on_failure(exc_info, send_failed_event, return_ok)


class JobTask(Task):  # type: ignore[misc] # Celery ships no types
    """One task of the contract: reads its message, has the job settled, tells its outcome."""

    abstract = True
    typing = False  # what is wrong with an argument is ours to say, with its name
    Request = f"{__name__}:JobRequest"
    throws: ClassVar[tuple[type[Exception], ...]] = (
        InvalidGrantRequestException,
        InvalidInterviewIdException,
        StorageUnavailableException,
    )  # for cause: a line in the log, no trace
    default_retry_delay = 5  # seconds until a job whose child died runs again

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        self.max_retries = workplace.retry_limit

    @abstractmethod
    def settle(self, job_id: str, args: Args, kwargs: Kwargs) -> Outcome:
        """Make the message a job and have it done."""

    def __call__(self, /, *args: object, **kwargs: object) -> dict[str, Any]:
        """Run; Celery's own would take a message's argument named ``self`` for this one."""
        return self.run(*args, **kwargs)

    def run(self, /, *args: object, **kwargs: object) -> dict[str, Any]:
        """Do one delivery of a job.

        Raises:
            InterviewAccessError: the job's failure, as the ledger holds it, or
                :class:`StorageUnavailableException` when its tries are used up.
        """
        job_id = self.request.id
        if not is_job_id(job_id):
            raise InvalidGrantRequestException.of([("job id", JOB_ID_RULE, describe(job_id))])
        started = time.monotonic()
        outcome = self._settled(job_id, args, kwargs)
        if outcome.refusal:
            self._refuse(outcome.refusal, args, kwargs)
        if outcome.trouble or not outcome.answer:
            self._later(outcome.trouble, args, kwargs)
        logger.info(
            "job %s: %s: %s in %.2f s",
            job_id,
            _line(args, kwargs),
            _told(outcome),
            time.monotonic() - started,
        )
        return result_of(outcome.answer)

    def _settled(self, job_id: str, args: Args, kwargs: Kwargs) -> Outcome:
        try:
            outcome = self.settle(job_id, args, kwargs)
            if outcome.trouble and not isinstance(outcome.trouble, TransientStorageError):
                raise outcome.trouble  # noqa: TRY301 - to go the way of every other surprise
        except Exception as error:
            # Nobody's fault that we know of: kept for an operator, and told without the error's own
            # words, which may hold anything. The log has it whole.
            kind = type(error).__name__
            code = getattr(error, "sqlstate", None)
            sentence = f"The job failed for a cause of the worker's own: {kind} ({code})."
            self._bury(sentence, args, kwargs)
            raise JobFailedError(sentence, {"exc_type": kind, "sqlstate": code}) from error
        return outcome

    def _refuse(self, refusal: JobIdReusedException, args: Args, kwargs: Kwargs) -> None:
        """Tell operators; the job's poller is answered as the first time."""
        logger.warning("job %s: refused: %s", self.request.id, refusal)
        self.send_event("job-refused", reason=refusal.sentence)
        self._bury(f"{type(refusal).__name__}: {refusal}", args, kwargs)

    def _later(self, trouble: StorageError | None, args: Args, kwargs: Kwargs) -> NoReturn:
        """Put the job back for another try, or give it up."""
        tries = self.request.retries + 1
        if tries > self.workplace.retry_limit:
            error = StorageUnavailableException.of(tries, str(trouble))
            self._bury(f"{type(error).__name__}: {error}", args, kwargs)
            raise error from trouble
        argsrepr, kwargsrepr = _shown(args, kwargs)
        delay = get_exponential_backoff_interval(
            factor=1,
            retries=self.request.retries,
            maximum=self.workplace.retry_max_delay,
            full_jitter=True,
        )
        logger.warning("job %s: try %d failed: %s", self.request.id, tries, trouble)
        try:
            self.retry(exc=trouble, countdown=delay, argsrepr=argsrepr, kwargsrepr=kwargsrepr)
        except Reject as reject:
            # The try could not be put on the queue; Celery would throw the message away with it.
            raise Reject(reject.reason, requeue=True) from trouble
        raise AssertionError("Task.retry returned")

    def _bury(self, reason: str, args: Args, kwargs: Kwargs) -> None:
        try:
            self.workplace.dead_letters.bury(
                self.request.id,
                self.name,
                args,
                kwargs,
                reason=reason,
                attempts=self.request.retries + 1,
            )
        except Exception as error:
            # A message that is neither done nor kept must stay on the queue.
            raise Reject(error, requeue=True) from error


class GrantAccessTask(JobTask):
    """``interview_access.grant_access(user_id, interview_ids)``."""

    name = GRANT_ACCESS

    def settle(self, job_id: str, args: Args, kwargs: Kwargs) -> Outcome:
        """Have the grants made."""
        interactor = GrantAccessInteractor(self.workplace.storage())
        job = grant_access_job(
            job_id, args, kwargs, max_interview_ids=self.workplace.max_interview_ids
        )
        (outcome,) = interactor.grant_access([job], _Progress(self))
        return outcome


class CreateInterviewAttemptTask(JobTask):
    """``interview_access.create_interview_attempt(interview_id, user_id)``."""

    name = CREATE_INTERVIEW_ATTEMPT

    def settle(self, job_id: str, args: Args, kwargs: Kwargs) -> Outcome:
        """Have the attempt made."""
        interactor = InterviewAttemptInteractor(self.workplace.storage())
        (outcome,) = interactor.create_interview_attempt(
            [interview_attempt_job(job_id, args, kwargs)]
        )
        return outcome


def grant_access_job(
    job_id: str, args: Args, kwargs: Kwargs, *, max_interview_ids: int
) -> GrantAccessJob:
    """The job that a message of ``grant_access`` makes, with its fault where it cannot be read."""
    try:
        request = GrantAccessRequest.read(args, kwargs, max_interview_ids=max_interview_ids)
    except InvalidGrantRequestException as fault:
        return GrantAccessJob(_unreadable(job_id, GRANT_ACCESS, args, kwargs), fault=fault)
    interviews = RequestedInterviews.among(request.interview_ids)
    digest = request_digest(
        GRANT_ACCESS, request.user_id, [*interviews.wanted, *interviews.malformed]
    )
    entry = JobDTO(job_id, GRANT_ACCESS, request.user_id, digest)
    return GrantAccessJob(entry, request.user_id, interviews)


def interview_attempt_job(job_id: str, args: Args, kwargs: Kwargs) -> InterviewAttemptJob:
    """The job that a message of ``create_interview_attempt`` makes, likewise."""
    try:
        request = CreateInterviewAttemptRequest.read(args, kwargs)
    except InvalidGrantRequestException as fault:
        entry = _unreadable(job_id, CREATE_INTERVIEW_ATTEMPT, args, kwargs)
        return InterviewAttemptJob(entry, fault=fault)
    interview_id = canonical_interview_id(request.interview_id) or request.interview_id
    digest = request_digest(CREATE_INTERVIEW_ATTEMPT, request.user_id, [interview_id])
    entry = JobDTO(job_id, CREATE_INTERVIEW_ATTEMPT, request.user_id, digest)
    return InterviewAttemptJob(entry, request.user_id, request.interview_id)


class _Progress:
    """Tells a running job's progress as its state, at most twice a second, as well as Redis allows.

    Progress is a courtesy: Redis away for a moment fails no job.
    """

    def __init__(self, task: JobTask) -> None:
        self._task = task
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now < self._next:
            return
        self._next = now + _PROGRESS_SECONDS
        meta = JobProgress(done=done, total=total).model_dump()
        try:
            self._task.update_state(state=PROGRESS, meta=meta)
        except self._task.backend.connection_errors as error:
            logger.warning("job %s: progress not told: %s", self._task.request.id, error)


def _unreadable(job_id: str, task: str, args: Args, kwargs: Kwargs) -> JobDTO:
    return JobDTO(job_id, task, None, unreadable_request_digest(task, args, kwargs))


def _shown(args: object, kwargs: object) -> tuple[str, str]:
    """A message's arguments for people: each in a few words, whatever its size."""
    positional = [_brief(value) for value in args] if isinstance(args, list | tuple) else []
    named = (
        [f"{shortened(str(key), quoted=False)}={_brief(value)}" for key, value in kwargs.items()]
        if isinstance(kwargs, Mapping)
        else []
    )
    return f"({_joined(positional)})", _joined(named)


def _line(args: Args, kwargs: Kwargs) -> str:
    positional, named = _shown(args, kwargs)
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
