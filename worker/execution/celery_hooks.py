"""What Celery adds to the execution of a task: signals, events, log lines, tasks that follow."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery, signals
from celery._state import _task_stack
from celery.app import trace
from celery.app.task import Context
from celery.canvas import Signature
from celery.utils.log import get_logger
from interview_access.contracts import is_job_id
from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobExpiredException,
)
from kombu.utils.encoding import safe_repr

from tasks.celery_tasks import JobTask, shown
from worker.execution.run import JobRun

logger = get_logger(__name__)

_FINAL_SIGNALS = (
    *(signals.task_success, signals.task_failure, signals.task_retry),
    *(signals.task_revoked, signals.task_postrun),
)
_CANVAS = ("celery.group", "celery.chain", "celery.chord")

Event = tuple[str, Mapping[str, object]]
"""A Celery event of a job: its type and its fields."""


class CallbackRefusedError(Exception):
    """A message's callback is one of Celery's own tasks, which the worker does not send."""


@contextmanager
def as_current(run: JobRun) -> Iterator[None]:
    """Make a job's task and request Celery's current ones, which log formatters read."""
    if run.task is None:
        yield
        return
    _task_stack.push(run.task)
    run.task.request_stack.push(run.request)
    try:
        yield
    finally:
        run.task.pop_request()
        _task_stack.pop()


def send_prerun(runs: Sequence[JobRun]) -> None:
    """Send ``task_prerun`` for each job of a known task, in the job's context."""
    for run in runs:
        run.is_begun = run.task is not None
        if run.is_begun and signals.task_prerun.receivers:
            run.context.run(_send_prerun, run)


def _send_prerun(run: JobRun) -> None:
    call = {"args": run.call.args, "kwargs": run.call.kwargs}
    with as_current(run):
        signals.task_prerun.send(
            sender=run.task, task_id=run.delivery.job_id, task=run.task, **call
        )


def send_final(runs: Sequence[JobRun], seconds: float) -> None:
    """Send the signal of each job's end and ``task_postrun``, in the job's context.

    The order is the reverse of :func:`send_prerun`'s: what receivers open and close is nested.

    Args:
        runs: The jobs of a batch. One without ``task_prerun`` has none of these signals.
        seconds: Time that the batch took.
    """
    if not any(one.receivers for one in _FINAL_SIGNALS):
        return
    for run in reversed(runs):
        if run.is_begun:
            run.is_begun = False
            try:
                run.context.run(_send_final, run, seconds)
            except Exception:  # the job is settled
                logger.exception("signals failed: job=%s", run.delivery.job_id)


def _send_final(run: JobRun, seconds: float) -> None:
    with as_current(run):
        state, value = _send_end(run, seconds)
        signals.task_postrun.send(
            sender=run.task,
            task_id=run.delivery.job_id,
            task=run.task,
            args=run.call.args,
            kwargs=run.call.kwargs,
            retval=value,
            state=state,
        )


def _send_end(run: JobRun, seconds: float) -> tuple[str, object]:
    """Send the signals of a job's end. Returns its state and its value."""
    error, failure = run.settled.error, run.failure
    if run.result is None:
        signals.task_retry.send(
            sender=run.task, request=run.request, reason=error, einfo=_exception_info(error)
        )
        return "RETRY", error
    if failure is None:
        signals.task_success.send(sender=run.task, result=run.result, runtime=seconds)
        return "SUCCESS", run.result
    if isinstance(failure, JobCancelledException | JobExpiredException):
        signals.task_revoked.send(
            sender=run.task,
            request=run.request,
            terminated=False,
            signum=None,
            expired=isinstance(failure, JobExpiredException),
        )
    einfo = _exception_info(failure)
    signals.task_failure.send(
        sender=run.task,
        task_id=run.delivery.job_id,
        exception=failure,
        args=run.call.args,
        kwargs=run.call.kwargs,
        traceback=failure.__traceback__,
        einfo=einfo,
    )
    return "FAILURE", failure


def _exception_info(error: Exception | None) -> ExceptionInfo:
    """Describe an exception, raised or not, as Celery's signals do."""
    error = error or RuntimeError("unknown error")
    if error.__traceback__ is None:  # billiard's class needs one
        with suppress(type(error)):
            raise error
    return ExceptionInfo((type(error), error, error.__traceback__))


def log_end(run: JobRun, seconds: float) -> None:
    """Log the line that Celery's tracer logs at the end of each task.

    Args:
        run: The job.
        seconds: Time that its batch took.
    """
    if not trace.logger.isEnabledFor(logging.INFO):
        return
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


def final_event(result: dict[str, Any] | InterviewAccessError, seconds: float) -> Event:
    """Build the event of a job's end; a cancelled or expired one is revoked, as in Celery.

    Args:
        result: What the job's poller reads.
        seconds: Time that its batch took.
    """
    if isinstance(result, dict):
        return "task-succeeded", {"result": safe_repr(result), "runtime": seconds}
    exception = safe_repr(result)
    if isinstance(result, JobCancelledException | JobExpiredException):
        is_expired = isinstance(result, JobExpiredException)
        fields = {"terminated": False, "signum": None, "expired": is_expired}
        return "task-revoked", {**fields, "exception": exception}
    return "task-failed", {"exception": exception, "traceback": ""}


def retried_event(error: Exception) -> Event:
    """Build the event of a job's retry.

    Args:
        error: Why, as others may read it.
    """
    return "task-retried", {"exception": safe_repr(error), "traceback": ""}


def send_followers(app: Celery, run: JobRun) -> None:
    """Send a job's callbacks, the next task of its chain and its part of a chord.

    At-least-once: a redelivery sends them again. The transport decides to which queues this process
    may publish, whatever the signatures name.

    Args:
        app: Sends the tasks.
        run: A job with a result.

    Raises:
        CallbackRefusedError: if a signature names one of Celery's own tasks.
        Exception: whatever a producer's signatures raise, and errors of Redis and the storage.
    """
    _refuse_builtin_tasks(run.call.embedded)
    request, result, job_id = run.request, run.result, run.delivery.job_id
    options = {"parent_id": job_id, "root_id": request.root_id}
    if not isinstance(result, dict):
        errbacks, request = request.errbacks or [], Context(vars(request), errbacks=[])
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
    """Yield the name and ID of each task of a chain that can be polled."""
    for one in signatures or ():
        task_id = one["options"].get("task_id")
        if is_job_id(task_id):
            yield str(one["task"]), task_id
        if one.get("subtask_type") == "chord":
            yield from _chained([one["kwargs"]["body"]])


def _refuse_builtin_tasks(embedded: Any) -> None:
    """Raise if a signature names one of Celery's own tasks, some of which run in this process."""
    if isinstance(embedded, dict):
        task = embedded.get("task")
        if isinstance(task, str) and task.startswith("celery.") and task not in _CANVAS:
            raise CallbackRefusedError(
                f"task: expected a task of an application, got {task[:100]!r}"
            )
    for one in embedded.values() if isinstance(embedded, dict) else embedded:
        if isinstance(one, dict | list):
            _refuse_builtin_tasks(one)
