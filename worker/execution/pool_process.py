"""Executes a batch of deliveries in a pool process: the one way in which a job is executed.

It decodes the messages, settles their jobs through the ledger (in one transaction, and one by one
where that fails), stores the results, sends Celery's task signals and what a message has its job
followed by, and returns one disposition for each delivery.
"""

from __future__ import annotations

import base64
import logging
import os
import signal
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from celery import Celery, current_app, signals
from celery._state import _task_stack
from celery.app import trace
from celery.app.task import Context
from celery.canvas import Signature
from celery.utils.log import get_logger
from celery.utils.time import get_exponential_backoff_interval
from interview_access.contracts import describe, is_job_id, unreadable_request_digest
from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobExpiredException,
    JobFailedError,
    StorageUnavailableException,
    shortened,
)
from kombu.exceptions import OperationalError
from kombu.utils.encoding import safe_repr
from kombu.utils.json import loads
from redis.exceptions import RedisError

from storage.dtos import JobDTO
from storage.interface import JobBusyError, StorageError, is_outage
from tasks.celery_tasks import JobTask, TaskDependencies, log_outcome, shown
from tasks.ledger import Outcome, RejectedJob, result_of, settle_rejected
from tasks.started_reporter import StartedReporter
from worker.broker.claims import Action, Disposition
from worker.execution.request import Dispatched, Limits

logger = get_logger(__name__)

_NOT_STORED_SECONDS = 2.0  # until a job is delivered again whose result could not be stored
_UNREADABLE_DIGEST_BYTES = 4_096


class Settlement(NamedTuple):
    """How one delivery is settled, and the Celery events to send: each a type and its fields."""

    disposition: Disposition
    events: Sequence[tuple[str, Mapping[str, object]]]


class BatchReport(NamedTuple):
    """What a pool process reports of a batch.

    Attributes:
        settlements: Of each delivery, in step.
        outage: What no job can do without, if it was missing.
        has_success: Whether the ledger has recorded a job.
    """

    settlements: Sequence[Settlement]
    outage: str | None
    has_success: bool


class _Call(NamedTuple):
    """A decoded body: the task's arguments, and what Celery has a job followed by."""

    args: list[Any]
    kwargs: dict[str, Any]
    embedded: dict[str, Any]


_ENDED = (
    *(signals.task_success, signals.task_failure, signals.task_retry),
    *(signals.task_revoked, signals.task_postrun),
)
_STOPPING = (signal.SIGTERM, signal.SIGHUP)
_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")
_CANVAS = ("celery.group", "celery.chain", "celery.chord")
_HEADERS = (
    *("root_id", "parent_id", "correlation_id", "group", "group_index", "ignore_result", "origin"),
    *("stamps", "stamped_headers", "replaced_task_nesting", "eta", "expires", "timelimit"),
)
_NO_CALL = _Call([], {}, {})


@dataclass(slots=True)
class _Run:
    """One delivery on its way through a batch."""

    delivery: Dispatched
    task: JobTask | None
    call: _Call
    job: Any
    outcome: Outcome = field(default_factory=Outcome)
    result: dict[str, Any] | InterviewAccessError | None = None

    @property
    def has_poller(self) -> bool:
        """Whether its producer may poll the result."""
        return not self.delivery.headers.get("ignore_result")

    @property
    def is_retried(self) -> bool:
        """Whether its poller reads that it waits for a retry, and not that another executes it."""
        is_busy = isinstance(self.outcome.error, JobBusyError)
        return self.result is None and self.has_poller and not is_busy

    def is_missing_in(self, stored: Collection[str]) -> bool:
        """Whether its result is not among the stored ones, as it is to be."""
        has_result = self.result is not None and self.has_poller
        return has_result and self.delivery.job_id not in stored

    @property
    def request(self) -> Context:
        """As Celery's signals and callbacks expect it; a message's other headers are left out."""
        headers, embedded = self.delivery.headers, self.call.embedded
        return Context(
            {name: headers[name] for name in _HEADERS if name in headers},
            **{name: embedded.get(name) for name in _EMBEDDED},
            id=self.delivery.job_id,
            task=self.delivery.task,
            args=self.call.args,
            kwargs=self.call.kwargs,
            retries=self.delivery.retries,
            called_directly=False,
            delivery_info={},
        )


def execute(deliveries: list[Dispatched], hostname: str) -> BatchReport:
    """Execute a batch in this pool process.

    Args:
        deliveries: In the order of their claim; their job IDs may repeat. The list is emptied: the
            pool keeps it, and with it a large job's body, until the job has ended.
        hostname: The worker's name, for pollers of jobs that do not end at once.

    Returns:
        The report. Whatever goes wrong with a job is a disposition, not an exception; only
        MemoryError is raised, for another pool process may have more.
    """
    app = current_app
    with _uninterrupted():
        runs = [_prepared(app, deliveries.pop(0)) for _ in range(len(deliveries))]
        try:
            return _executed(app, runs, hostname)
        except MemoryError:
            raise
        except Exception as error:
            logger.exception("defect in the execution of a batch: jobs=%d", len(runs))
            settlements = [_settlement_of_defect(app, run, error) for run in runs]
            return BatchReport(settlements, None, has_success=False)


def _executed(app: Celery, runs: Sequence[_Run], hostname: str) -> BatchReport:
    started = time.monotonic()
    polled = [run.delivery.job_id for run in runs if run.has_poller]
    with _reporter().reporting(
        lambda: app.backend.store_started(polled, pid=os.getpid(), hostname=hostname)
    ):
        _send_before(runs)
        for run, outcome in zip(runs, _settled(app, runs), strict=True):
            run.outcome = outcome
    for run in runs:
        run.result = _result(run, app.task_dependencies)
    stored = app.backend.store_results(
        {run.delivery.job_id: run.result for run in runs if run.result and run.has_poller}
    )
    app.backend.store_retries(
        {run.delivery.job_id: _shown(run.outcome.error) for run in runs if run.is_retried}
    )
    seconds = time.monotonic() - started
    settlements = [_settlement(app, run, stored, seconds) for run in runs]
    _send_after(runs)
    outages = [str(run.outcome.error) for run in runs if is_outage(run.outcome.error)]
    if any(run.is_missing_in(stored) for run in runs):
        outages.append("results cannot be stored")
    return BatchReport(
        settlements,
        outages[0] if outages else None,
        any(run.outcome.answer for run in runs),
    )


# --- From message to job ------------------------------------------------------------------------


def _prepared(app: Celery, delivery: Dispatched) -> _Run:
    task = app.tasks.get(delivery.task)
    task = task if isinstance(task, JobTask) else None
    failure, call = delivery.failure, _NO_CALL
    if task and delivery.body is not None:
        try:
            call = _decoded(delivery.body, delivery.encoding, app.limits)
            # A large one takes as much memory as its IDs; a digest may need the beginning.
            delivery = delivery._replace(body=delivery.body[:_UNREADABLE_DIGEST_BYTES])
            job = task.read(delivery.job_id, call.args, call.kwargs, delivery.failure)
            return _Run(delivery, task, call, job)
        except (_UndecodableError, RecursionError) as error:
            failure = failure or JobFailedError(*_undecodable(error))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a defect, which must not fail other jobs
            return _Run(delivery, task, call, None, Outcome(error=error))
    failure = failure or JobFailedError("The job cannot be read.")
    body = {"body": (delivery.body or "")[:_UNREADABLE_DIGEST_BYTES]}
    digest = unreadable_request_digest(delivery.task, (), body)
    entry = JobDTO(delivery.job_id, delivery.task, None, digest)
    return _Run(delivery, task, call, RejectedJob(entry, failure))


class _UndecodableError(Exception):
    """A body is not a call in JSON."""


def _decoded(body: str, encoding: str, limits: Limits) -> _Call:
    try:
        text = _text(body, encoding, limits)
        limits.check(text)
        decoded = loads(text)
    except MemoryError:
        raise
    except Exception as error:
        raise _UndecodableError(f"{type(error).__name__}: {error}") from error
    match decoded:
        case [list(args), dict(kwargs), dict() | None as embedded]:
            return _Call(args, kwargs, embedded or {})
    raise _UndecodableError(f"expected [args, kwargs, embedded], got {describe(decoded)}")


def _text(body: str, encoding: str, limits: Limits) -> str:
    if not encoding:
        body.encode()  # raises for lone surrogates
        return body
    content = base64.b64decode(body, validate=True)
    if encoding == "gzip":
        content = zlib.decompressobj().decompress(content, limits.message_bytes)
    return content.decode()


def _undecodable(error: Exception) -> tuple[str, dict[str, Any]]:
    reason = shortened(str(error), quoted=False, at_most=300)
    return f"The body cannot be decoded: {reason}.", {"total": 1, "reason": reason}


# --- Through the ledger -------------------------------------------------------------------------


def _settled(app: Celery, runs: Sequence[_Run]) -> list[Outcome]:
    """Settle the jobs of each task together."""
    outcomes: dict[int, Outcome] = {}

    def kind(at: int) -> str:
        run = runs[at]
        return "" if isinstance(run.job, RejectedJob) or run.task is None else run.task.name

    for name, grouped in groupby(
        sorted((at for at, run in enumerate(runs) if run.job), key=kind), key=kind
    ):
        at = list(grouped)
        jobs = [runs[one].job for one in at]
        storage = app.task_dependencies.storage
        settled = app.tasks[name].settle(jobs) if name else settle_rejected(storage(), jobs)
        outcomes.update(zip(at, settled, strict=True))
    return [outcomes.get(at, run.outcome) for at, run in enumerate(runs)]


def _result(
    run: _Run, dependencies: TaskDependencies
) -> dict[str, Any] | InterviewAccessError | None:
    """What the job's poller reads, where that is known."""
    outcome = run.outcome
    if outcome.answer:
        try:
            return result_of(outcome.answer)
        except InterviewAccessError as error:
            return error
    if run.delivery.retries < dependencies.retry_limit:
        return None
    return StorageUnavailableException.of(run.delivery.retries + 1, _reason(outcome.error))


def _reason(error: Exception | None) -> str:
    """The error for a producer; the text of an unexpected one may contain anything."""
    return str(error) if isinstance(error, StorageError) else type(error).__name__


def _shown(error: Exception | None) -> StorageError:
    return StorageError(_reason(error))


# --- To the disposition -------------------------------------------------------------------------


def _settlement(app: Celery, run: _Run, stored: Collection[str], seconds: float) -> Settlement:
    """How a delivery is settled; after a defect in the settling itself it is delivered again."""
    try:
        return _finished(app, run, stored, seconds)
    except MemoryError:
        raise
    except Exception as error:
        logger.exception("defect after the transaction of a job: job=%s", run.delivery.job_id)
        return _settlement_of_defect(app, run, error)


def _settlement_of_defect(app: Celery, run: _Run, error: Exception) -> Settlement:
    if run.delivery.retries < app.task_dependencies.retry_limit:
        delay = _back_off(run.delivery, app.task_dependencies)
        return Settlement(Disposition(Action.RETRY, delay=delay), ())
    return Settlement(_dead_letter(run, f"A defect: {type(error).__name__}"), ())


def _finished(app: Celery, run: _Run, stored: Collection[str], seconds: float) -> Settlement:
    outcome, result, job_id = run.outcome, run.result, run.delivery.job_id
    if result is None:
        return _retried(run, app.task_dependencies)
    if run.is_missing_in(stored):
        return Settlement(Disposition(Action.DELAY, delay=_NOT_STORED_SECONDS), ())
    if logger.isEnabledFor(logging.INFO):
        with _as_current(run):
            log_outcome(job_id, run.call.args, run.call.kwargs, outcome, seconds)
            _log_as_celery(run, seconds)
    if outcome.refusal and run.delivery.body is not None:
        return Settlement(
            _dead_letter(run, f"{type(outcome.refusal).__name__}: {outcome.refusal}"),
            [("job-refused", {"reason": outcome.refusal.sentence}), ("task-rejected", {})],
        )
    disposition = _followed(app, run)
    is_kept = isinstance(result, StorageUnavailableException | JobFailedError)
    if is_kept and disposition.action is not Action.RETRY:
        disposition = _dead_letter(run, f"{type(result).__name__}: {result}")
    return Settlement(disposition, [_final_event(result, seconds)])


def _followed(app: Celery, run: _Run) -> Disposition:
    """Send what the message has its job followed by; acknowledge it if that was possible."""
    delivery, dependencies = run.delivery, app.task_dependencies
    if not any(run.call.embedded.get(name) for name in _EMBEDDED):
        return Disposition(Action.ACKNOWLEDGE, job_id=delivery.job_id)
    try:
        with _as_current(run):
            _send_following(app, run)
    except Exception as error:  # noqa: BLE001 - a producer's signatures can raise anything
        reason = shortened(f"{type(error).__name__}: {error}", quoted=False, at_most=300)
        is_transient = isinstance(error, OperationalError | RedisError | StorageError | OSError)
        if is_transient and delivery.retries < dependencies.retry_limit:
            logger.warning("callbacks delayed: job=%s error=%s", delivery.job_id, reason)
            return Disposition(Action.RETRY, delay=_back_off(delivery, dependencies))
        return _dead_letter(run, f"Its callbacks cannot be sent: {reason}")
    return Disposition(Action.ACKNOWLEDGE, job_id=delivery.job_id)


def _dead_letter(run: _Run, reason: str) -> Disposition:
    delivery, reason = run.delivery, shortened(reason, quoted=False, at_most=500)
    logger.error("dead letter: job=%s task=%s reason=%s", delivery.job_id, delivery.task, reason)
    return Disposition(
        Action.DEAD_LETTER,
        job_id=delivery.job_id,
        task=delivery.task,
        reason=reason,
        in_ledger=run.outcome.answer is not None,
        attempts=delivery.attempts + delivery.retries + (delivery.failure is None),
    )


def _retried(run: _Run, dependencies: TaskDependencies) -> Settlement:
    error, retries = run.outcome.error, run.delivery.retries
    delay = _back_off(run.delivery, dependencies)
    logger.warning(
        "job retried: job=%s attempt=%d delay_seconds=%d error=%s",
        *(run.delivery.job_id, retries + 1, delay, error),
        exc_info=None if isinstance(error, StorageError) else error,
    )
    events = [("task-retried", {"exception": safe_repr(_shown(error)), "traceback": ""})]
    return Settlement(Disposition(Action.RETRY, delay=delay), events)


def _back_off(delivery: Dispatched, dependencies: TaskDependencies) -> float:
    """Seconds until the next attempt, exponential and with jitter."""
    return float(
        get_exponential_backoff_interval(
            factor=1,
            retries=delivery.retries,
            maximum=dependencies.retry_max_delay,
            full_jitter=True,
        )
    )


def _final_event(
    result: dict[str, Any] | InterviewAccessError | None, seconds: float
) -> tuple[str, Mapping[str, object]]:
    if isinstance(result, dict):
        return "task-succeeded", {"result": safe_repr(result), "runtime": seconds}
    return "task-failed", {"exception": safe_repr(result), "traceback": ""}


# --- What Celery adds to a job ------------------------------------------------------------------


def _send_before(runs: Sequence[_Run]) -> None:
    if signals.task_prerun.receivers:
        for run in runs:
            with _as_current(run):
                call = {"args": run.call.args, "kwargs": run.call.kwargs}
                signals.task_prerun.send(
                    sender=run.task, task_id=run.delivery.job_id, task=run.task, **call
                )


def _send_after(runs: Sequence[_Run]) -> None:
    """The signals of how each job ended; in reverse, so that what listeners opened is nested."""
    if any(one.receivers for one in _ENDED):
        for run in reversed(runs):
            with _as_current(run):
                _send_ended(run)


def _send_ended(run: _Run) -> None:
    job_id, result, error = run.delivery.job_id, run.result, run.outcome.error
    call = {"args": run.call.args, "kwargs": run.call.kwargs}
    if result is None:
        state, value = "RETRY", error
        signals.task_retry.send(
            sender=run.task, request=run.request, reason=error, einfo=safe_repr(error)
        )
    elif isinstance(result, dict):
        state, value = "SUCCESS", result  # type: ignore[assignment] # what listeners are given
        signals.task_success.send(sender=run.task, result=result)
    else:
        state, value = "FAILURE", result
        if isinstance(result, JobCancelledException | JobExpiredException):
            is_expired = isinstance(result, JobExpiredException)
            signals.task_revoked.send(
                sender=run.task,
                request=run.request,
                terminated=False,
                signum=None,
                expired=is_expired,
            )
        signals.task_failure.send(
            sender=run.task, task_id=job_id, exception=result, traceback=None, einfo=None, **call
        )
    signals.task_postrun.send(
        sender=run.task, task_id=job_id, task=run.task, retval=value, state=state, **call
    )


def _send_following(app: Celery, run: _Run) -> None:
    """Send the callbacks, the next task of a chain and the part of a chord.

    At least once: a delivery that is repeated sends them again. To which queues is decided by the
    transport, whatever the signatures hold.
    """
    _refuse_builtin_tasks(run.call.embedded)
    request, result, job_id = run.request, run.result, run.delivery.job_id
    options = {"parent_id": job_id, "root_id": request.root_id}
    if not isinstance(result, dict):
        errbacks, request.errbacks = request.errbacks or [], []
        app.backend.mark_as_failure(job_id, result, request=request, store_result=False)
        storage = app.task_dependencies.storage()
        for task, task_id in _chained(request.chain):
            is_job = isinstance(app.tasks.get(task), JobTask)
            if not (is_job and storage.get_finished_job(task_id)):
                app.backend.store_chain_failure(task_id, result)
        for one in errbacks:
            Signature.from_dict(one, app=app).apply_async((job_id,), **options)
        return
    for one in request.callbacks or []:
        Signature.from_dict(one, app=app).apply_async((result,), **options)
    if request.chain:
        *chain, following = request.chain
        Signature.from_dict(following, app=app).apply_async((result,), chain=chain, **options)
    app.backend.mark_as_done(job_id, result, request, store_result=False)


def _chained(signatures: Iterable[Any] | None) -> Iterator[tuple[str, str]]:
    """The names and IDs of a chain's tasks, as far as pollers can have the IDs."""
    for one in signatures or ():
        task_id = one["options"].get("task_id")
        if is_job_id(task_id):
            yield str(one["task"]), task_id
        if one.get("subtask_type") == "chord":
            yield from _chained([one["kwargs"]["body"]])


class _CallbackRefusedError(Exception):
    """A message's callback is not one that the worker may send."""


def _refuse_builtin_tasks(embedded: Any) -> None:
    """Raise if a signature names one of Celery's own tasks, which may run in this process."""
    if isinstance(embedded, dict):
        task = embedded.get("task")
        if isinstance(task, str) and task.startswith("celery.") and task not in _CANVAS:
            raise _CallbackRefusedError(f"task: expected a task of yours, got {task[:100]!r}")
    for one in embedded.values() if isinstance(embedded, dict) else embedded:
        if isinstance(one, dict | list):
            _refuse_builtin_tasks(one)


@contextmanager
def _as_current(run: _Run) -> Iterator[None]:
    """Make a job's task and request Celery's current ones, as log formatters expect."""
    if run.task is None:
        yield
        return
    _task_stack.push(run.task)
    run.task.push_request(**vars(run.request))
    try:
        yield
    finally:
        run.task.pop_request()
        _task_stack.pop()


def _log_as_celery(run: _Run, seconds: float) -> None:
    """The line that Celery's own tracer logs for each task."""
    args, kwargs = shown(run.call.args, run.call.kwargs)
    fields = {"id": run.delivery.job_id, "name": run.delivery.task, "args": args, "kwargs": kwargs}
    if isinstance(run.result, dict):
        trace.info(
            trace.LOG_SUCCESS, {**fields, "return_value": repr(run.result), "runtime": seconds}
        )
    else:
        policy = trace.log_policy_expected
        trace.info(
            policy.format, {**fields, "description": policy.description, "exc": repr(run.result)}
        )


# --- This process -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _reporter() -> StartedReporter:
    """This process's: made after the fork, which threads do not survive."""
    return StartedReporter()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore the signals by which all processes of a service are stopped at once, as by systemd.

    The main process gives running jobs their grace, and ends with SIGKILL what is left. An idle
    pool process keeps billiard's handlers, which are installed after Celery's hooks.
    """
    handlers = {one: signal.signal(one, signal.SIG_IGN) for one in _STOPPING}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
