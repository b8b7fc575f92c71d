"""What Celery adds to the execution of a task: signals, log lines and the tasks that follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from celery import Celery, signals
from celery._state import _task_stack
from celery.app import trace
from celery.canvas import Signature
from interview_access.contracts import is_job_id
from interview_access.errors import JobCancelledException, JobExpiredException
from kombu.utils.encoding import safe_repr

from tasks.celery_tasks import JobTask, shown
from worker.execution.run import JobRun

_FINAL_SIGNALS = (
    *(signals.task_success, signals.task_failure, signals.task_retry),
    *(signals.task_revoked, signals.task_postrun),
)
_CANVAS = ("celery.group", "celery.chain", "celery.chord")


class CallbackRefusedError(Exception):
    """A message's callback is one of Celery's own tasks, which the worker does not send."""


@contextmanager
def as_current(run: JobRun) -> Iterator[None]:
    """Make a job's task and request Celery's current ones, which log formatters read."""
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


def send_prerun(runs: Sequence[JobRun]) -> None:
    """Send ``task_prerun`` for each job, if it has receivers."""
    if not signals.task_prerun.receivers:
        return
    for run in runs:
        with as_current(run):
            call = {"args": run.call.args, "kwargs": run.call.kwargs}
            signals.task_prerun.send(
                sender=run.task, task_id=run.delivery.job_id, task=run.task, **call
            )


def send_final(runs: Sequence[JobRun]) -> None:
    """Send the signal of each job's end and ``task_postrun``, if one of them has receivers.

    The order is the reverse of :func:`send_prerun`'s: what receivers open and close is nested.
    """
    if not any(one.receivers for one in _FINAL_SIGNALS):
        return
    for run in reversed(runs):
        with as_current(run):
            _send_final(run)


def _send_final(run: JobRun) -> None:
    job_id, result, error = run.delivery.job_id, run.result, run.settled.error
    call = {"args": run.call.args, "kwargs": run.call.kwargs}
    state: str
    value: object
    if result is None:
        state, value = "RETRY", error
        signals.task_retry.send(
            sender=run.task, request=run.request, reason=error, einfo=safe_repr(error)
        )
    elif isinstance(result, dict):
        state, value = "SUCCESS", result
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


def log_end(run: JobRun, seconds: float) -> None:
    """Log the line that Celery's tracer logs at the end of each task.

    Args:
        run: The job.
        seconds: Time that its batch took.
    """
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
