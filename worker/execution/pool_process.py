"""The part in a pool process: execute a batch of deliveries, the only way to execute a job.

It decodes the messages, settles their jobs through the ledger (in one transaction, or one by one if
that fails), stores the results, sends Celery's signals and the tasks that follow a job, and returns
one disposition for each delivery.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from celery import Celery, current_app
from celery.utils.log import get_logger
from celery.utils.time import get_exponential_backoff_interval
from interview_access.contracts import unreadable_request_digest
from interview_access.errors import (
    InterviewAccessError,
    JobFailedError,
    StorageUnavailableException,
    shortened,
)
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from storage.dtos import JobDTO
from storage.errors import StorageError, is_outage
from tasks.audit import audit_of_attempt
from tasks.celery_tasks import JobTask, TaskDependencies, log_outcome
from tasks.ledger import JobResult, RejectedJob, settle_rejected
from tasks.outcomes import result_of
from tasks.started_reporter import StartedReporter
from worker.broker.claims import Action, Disposition
from worker.execution.celery_hooks import (
    Event,
    as_current,
    final_event,
    log_end,
    retried_event,
    send_final,
    send_followers,
    send_prerun,
)
from worker.execution.decoding import NO_CALL, UndecodableBodyError, decode
from worker.execution.request import Dispatched
from worker.execution.run import JobRun, Measurements, in_transaction, measurements, observed

logger = get_logger(__name__)

_NOT_STORED_SECONDS = 2.0  # until the redelivery of a job whose result could not be stored
_UNREADABLE_DIGEST_BYTES = 4_096
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Settlement(NamedTuple):
    """How one delivery is settled, and the Celery events to send."""

    disposition: Disposition
    events: Sequence[Event]


class BatchReport(NamedTuple):
    """What a pool process reports of a batch.

    Attributes:
        settlements: One for each delivery, in the order of the deliveries.
        outage: The reason why no job can succeed now, or None.
        has_success: Whether the ledger has recorded a job.
        measurements: What it adds to the metrics.
    """

    settlements: Sequence[Settlement]
    outage: str | None
    has_success: bool
    measurements: Measurements


def execute(deliveries: list[Dispatched], hostname: str) -> BatchReport:
    """Execute a batch in this pool process.

    Args:
        deliveries: In the order of their claim; their job IDs may repeat. The list is emptied: the
            pool keeps it, and with it a large job's body, until the job has ended.
        hostname: The worker's name, which pollers read in the state STARTED.

    Returns:
        The report. Every failure of a job is a disposition, not an exception.

    Raises:
        MemoryError: if this process has too little memory; another may have more.
    """
    app = current_app
    with _without_stop_signals():
        runs = [prepare(app, deliveries.pop(0), hostname) for _ in range(len(deliveries))]
        try:
            return _execute(app, runs, hostname)
        except MemoryError:
            raise
        except Exception as error:
            logger.exception("unexpected exception in a batch: jobs=%d", len(runs))
            for run in runs:
                run.settled, run.result = JobResult(error=error), None
            send_final(runs, 0.0)  # receivers pair it with task_prerun
            settlements = [_settlement_of_defect(app, run, error) for run in runs]
            return BatchReport(
                settlements, None, has_success=False, measurements=measurements(runs)
            )


def _execute(app: Celery, runs: Sequence[JobRun], hostname: str) -> BatchReport:
    observers = app.active_observers()
    with observed(runs, observers):
        started = time.monotonic()
        polled = [run.delivery.job_id for run in runs if run.has_poller]
        with _reporter().reporting(
            lambda: app.backend.store_started(polled, pid=os.getpid(), hostname=hostname)
        ):
            send_prerun(runs)
            began = time.monotonic()
            results = in_transaction(runs, observers, lambda: _settle_jobs(app, runs))
            transaction_seconds = time.monotonic() - began
        for run, settled in zip(runs, results, strict=True):
            run.settled = settled
            run.result = _result(run, app.task_dependencies)
        stored = app.backend.store_results(
            {run.delivery.job_id: run.result for run in runs if run.result and run.has_poller}
        )
        app.backend.store_retries(
            {run.delivery.job_id: _as_shown(run.settled.error) for run in runs if run.is_retried}
        )
        seconds = time.monotonic() - started
        settlements = [run.context.run(_settlement, app, run, stored, seconds) for run in runs]
        send_final(runs, seconds)
    outages = [str(run.settled.error) for run in runs if is_outage(run.settled.error)]
    if any(run.is_missing_in(stored) for run in runs):
        outages.append("results cannot be stored")
    return BatchReport(
        settlements,
        outages[0] if outages else None,
        any(run.settled.outcome for run in runs),
        measurements(runs, seconds, transaction_seconds),
    )


# --- From message to job ------------------------------------------------------------------------


def prepare(app: Celery, delivery: Dispatched, hostname: str) -> JobRun:
    """Decode a message and build its job; one that cannot be executed is a rejected job.

    Args:
        app: The app with the tasks.
        delivery: What the main process dispatched.
        hostname: The worker's name.
    """
    task = app.tasks.get(delivery.task)
    task = task if isinstance(task, JobTask) else None
    failure, call = delivery.failure, NO_CALL
    audit = audit_of_attempt(
        delivery.job_id, delivery.headers, attempts=delivery.attempt, worker=hostname
    )
    if task and delivery.body is not None:
        try:
            call = decode(delivery.body, delivery.encoding, app.limits)
            # A large body takes as much memory as its IDs; a digest may need its beginning.
            delivery = replace(delivery, body=delivery.body[:_UNREADABLE_DIGEST_BYTES])
            job = task.read(delivery.job_id, call.args, call.kwargs, delivery.failure)
            job = replace(job, entry=replace(job.entry, audit=audit))
            return JobRun(delivery, hostname, task, call, job)
        except (UndecodableBodyError, RecursionError) as error:
            failure = failure or _undecodable(error)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a defect, which must not fail other jobs
            return JobRun(delivery, hostname, task, call, None, JobResult(error=error))
    failure = failure or JobFailedError("The job cannot be read.")
    body = {"body": (delivery.body or "")[:_UNREADABLE_DIGEST_BYTES]}
    digest = unreadable_request_digest(delivery.task, (), body)
    entry = JobDTO(delivery.job_id, delivery.task, None, digest, audit)
    return JobRun(delivery, hostname, task, call, RejectedJob(entry, failure))


def _undecodable(error: Exception) -> JobFailedError:
    reason = shortened(str(error), quoted=False, at_most=300)
    return JobFailedError(f"The body cannot be decoded: {reason}.", {"total": 1, "reason": reason})


# --- Through the ledger -------------------------------------------------------------------------


def _settle_jobs(app: Celery, runs: Sequence[JobRun]) -> list[JobResult]:
    """Settle the jobs of each task together. Returns their results in the order of the runs."""
    results: dict[int, JobResult] = {}

    def task_name(at: int) -> str:
        run = runs[at]
        return "" if isinstance(run.job, RejectedJob) or run.task is None else run.task.name

    for name, grouped in groupby(
        sorted((at for at, run in enumerate(runs) if run.job), key=task_name), key=task_name
    ):
        positions = list(grouped)
        jobs = [runs[at].job for at in positions]
        storage = app.task_dependencies.storage
        settled = app.tasks[name].settle(jobs) if name else settle_rejected(storage(), jobs)
        results.update(zip(positions, settled, strict=True))
    return [results.get(at, run.settled) for at, run in enumerate(runs)]


def _result(
    run: JobRun, dependencies: TaskDependencies
) -> dict[str, Any] | InterviewAccessError | None:
    """Build what the poller reads; None if the job is to be retried."""
    settled = run.settled
    if settled.outcome:
        try:
            return result_of(settled.outcome)
        except InterviewAccessError as error:
            return error
    if run.delivery.retries < dependencies.retry_limit:
        return None
    failure = StorageUnavailableException.of(run.delivery.retries + 1, _reason(settled.error))
    failure.__cause__ = settled.error
    return failure


def _reason(error: Exception | None) -> str:
    """Describe an error to a producer; the message of an unexpected one may contain anything."""
    return str(error) if isinstance(error, StorageError) else type(error).__name__


def _as_shown(error: Exception | None) -> StorageError:
    return StorageError(_reason(error))


# --- To the disposition -------------------------------------------------------------------------


def _settlement(app: Celery, run: JobRun, stored: Collection[str], seconds: float) -> Settlement:
    """Decide how a delivery is settled; a defect in deciding has it redelivered."""
    try:
        return _settlement_of_end(app, run, stored, seconds)
    except MemoryError:
        raise
    except Exception as error:
        logger.exception(
            "unexpected exception after a job's transaction: job=%s", run.delivery.job_id
        )
        return _settlement_of_defect(app, run, error)


def _settlement_of_defect(app: Celery, run: JobRun, error: Exception) -> Settlement:
    if run.delivery.retries < app.task_dependencies.retry_limit:
        delay = _back_off(run.delivery, app.task_dependencies)
        return Settlement(Disposition(Action.RETRY, delay=delay), [retried_event(_as_shown(error))])
    return Settlement(_dead_letter(run, f"Unexpected error: {type(error).__name__}"), ())


def _settlement_of_end(
    app: Celery, run: JobRun, stored: Collection[str], seconds: float
) -> Settlement:
    settled, result, job_id = run.settled, run.result, run.delivery.job_id
    if result is None:
        return _retry(run, app.task_dependencies, seconds)
    if run.is_missing_in(stored):
        return Settlement(Disposition(Action.DELAY, delay=_NOT_STORED_SECONDS), ())
    if logger.isEnabledFor(logging.INFO):
        with as_current(run):
            log_outcome(
                run.delivery.task,
                job_id,
                (run.call.args, run.call.kwargs),
                settled,
                run.failure,
                attempt=run.delivery.attempt,
                seconds=seconds,
            )
            log_end(run, seconds)
    if settled.refusal and run.delivery.body is not None:
        return Settlement(
            _dead_letter(run, f"{type(settled.refusal).__name__}: {settled.refusal}"),
            [("job-refused", {"reason": settled.refusal.sentence})],
        )
    disposition = _send_followers(app, run)
    is_kept = isinstance(result, StorageUnavailableException | JobFailedError)
    if is_kept and disposition.action is not Action.RETRY:
        disposition = _dead_letter(run, f"{type(result).__name__}: {result}")
    return Settlement(disposition, [final_event(result, seconds)])


def _send_followers(app: Celery, run: JobRun) -> Disposition:
    """Send the tasks that follow a job. Returns how its delivery is settled after that."""
    delivery, dependencies = run.delivery, app.task_dependencies
    if not run.has_followers:
        return Disposition(Action.ACKNOWLEDGE, job_id=delivery.job_id)
    try:
        with as_current(run):
            send_followers(app, run)
    except Exception as error:  # noqa: BLE001 - a producer's signatures can raise anything
        reason = shortened(f"{type(error).__name__}: {error}", quoted=False, at_most=300)
        is_transient = isinstance(error, OperationalError | RedisError | StorageError | OSError)
        if is_transient and delivery.retries < dependencies.retry_limit:
            logger.warning("callbacks delayed: job=%s error=%s", delivery.job_id, reason)
            return Disposition(Action.RETRY, delay=_back_off(delivery, dependencies))
        return _dead_letter(run, f"Its callbacks cannot be sent: {reason}")
    return Disposition(Action.ACKNOWLEDGE, job_id=delivery.job_id)


def _dead_letter(run: JobRun, reason: str) -> Disposition:
    delivery, reason = run.delivery, shortened(reason, quoted=False, at_most=500)
    logger.error("dead letter: job=%s task=%s reason=%s", delivery.job_id, delivery.task, reason)
    return Disposition(
        Action.DEAD_LETTER,
        job_id=delivery.job_id,
        task=delivery.task,
        reason=reason,
        in_ledger=run.settled.outcome is not None,
        attempts=delivery.attempts + delivery.retries + (delivery.failure is None),
    )


def _retry(run: JobRun, dependencies: TaskDependencies, seconds: float) -> Settlement:
    error, delivery = run.settled.error, run.delivery
    delay = _back_off(delivery, dependencies)
    error_class = error.code_class if isinstance(error, StorageError) else type(error).__name__
    logger.warning(
        "job retried: job=%s task=%s attempt=%d seconds=%.2f delay_seconds=%d error_class=%s "
        "error=%s",
        *(delivery.job_id, delivery.task, delivery.attempt, seconds, delay, error_class, error),
        exc_info=None if isinstance(error, StorageError) else error,
    )
    return Settlement(Disposition(Action.RETRY, delay=delay), [retried_event(_as_shown(error))])


def _back_off(delivery: Dispatched, dependencies: TaskDependencies) -> float:
    """Return the seconds until the next attempt: exponential back-off with jitter."""
    return float(
        get_exponential_backoff_interval(
            factor=1,
            retries=delivery.retries,
            maximum=dependencies.retry_max_delay,
            full_jitter=True,
        )
    )


# --- This process -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _reporter() -> StartedReporter:
    """Return this process's reporter, made after the fork, which threads do not survive."""
    return StartedReporter()


@contextmanager
def _without_stop_signals() -> Iterator[None]:
    """Ignore the signals that a service manager such as systemd sends to a whole process group.

    The main process gives running jobs their grace, and ends what is left by SIGKILL. An idle pool
    process keeps billiard's handlers, which are installed after Celery's hooks.
    """
    handlers = {one: signal.signal(one, signal.SIG_IGN) for one in _STOP_SIGNALS}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
