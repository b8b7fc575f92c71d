"""Sentry: does for the jobs of a batch what its Celery integration does in Celery's tracer.

The integration wraps Celery's tracer, which executes a single job. This module does the same for
each job of a batch by Sentry's public interface, if the integration is active.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sentry_sdk
from sentry_sdk.tracing import Span
from sentry_sdk.utils import event_from_exception

from tasks.celery_tasks import shown
from worker.execution.run import JobRun

_ORIGIN = "auto.queue.celery"


class SentryJobs:
    """Reports errors of jobs, and a transaction for each job if traces are sampled."""

    @property
    def is_active(self) -> bool:
        """Whether Sentry's client has its Celery integration in this process."""
        return sentry_sdk.get_client().get_integration("celery") is not None

    @contextmanager
    def job(self, run: JobRun) -> Iterator[None]:
        """Trace a job in a scope of its own, and report its failure.

        Args:
            run: The job.
        """
        with sentry_sdk.isolation_scope() as scope:
            scope.clear_breadcrumbs()
            scope.set_tag("celery_task_id", run.delivery.job_id)
            scope.set_extra("celery-job", _description(run))
            scope.add_event_processor(lambda event, hint: _without_duplicate(run, event, hint))
            transaction = sentry_sdk.continue_trace(
                dict(run.text_headers),
                op="queue.task.celery",
                name=run.delivery.task,
                source="task",
                origin=_ORIGIN,
            )
            sampling = {"task": run.delivery.task, "args": run.call.args, "kwargs": run.call.kwargs}
            with (
                sentry_sdk.start_transaction(
                    transaction, custom_sampling_context={"celery_job": sampling}
                ) as root,
                sentry_sdk.start_span(
                    op="queue.process", name=run.delivery.task, origin=_ORIGIN
                ) as span,
            ):
                _describe(span, run)
                yield
                root.set_status(_status(run))
                if _is_reported(run):
                    _report(run)

    @contextmanager
    def transaction(self, runs: Sequence[JobRun]) -> Iterator[None]:  # noqa: ARG002 - Sentry has no spans of several traces
        """Add nothing: the SQL statements of a single job are below its transaction."""
        yield

    def flush(self) -> None:
        """Do nothing: Sentry's integration sends what is left when a pool process ends."""


def _description(run: JobRun) -> dict[str, object]:
    if not sentry_sdk.get_client().should_send_default_pii():
        return {"task_name": run.delivery.task}
    args, kwargs = shown(run.call.args, run.call.kwargs)
    return {"task_name": run.delivery.task, "args": args, "kwargs": kwargs}


def _describe(span: Span, run: JobRun) -> None:
    span.set_data("messaging.message.id", run.delivery.job_id)
    span.set_data("messaging.destination.name", run.delivery.queue)
    span.set_data("messaging.system", "redis")
    span.set_data("messaging.message.retry.count", run.delivery.retries)
    enqueued = (run.request.headers or {}).get("sentry-task-enqueued-time")
    if isinstance(enqueued, int | float) and 0 < enqueued < time.time():
        milliseconds = (time.time() - enqueued) * 1_000
        span.set_data("messaging.message.receive.latency", milliseconds)


def _status(run: JobRun) -> str:
    if run.result is None:
        return "aborted"
    return "internal_error" if run.failure else "ok"


def _is_reported(run: JobRun) -> bool:
    return run.failure is not None and not isinstance(
        run.failure, run.task.throws if run.task else ()
    )


def _report(run: JobRun) -> None:
    """Report a job's failure, with arguments only if Sentry may have personal data.

    The variables of our frames hold the arguments. The lines below the first of PostgreSQL's errors
    have IDs.
    """
    assert run.failure  # noqa: S101 - by _is_reported()
    client = sentry_sdk.get_client()
    options, is_private = client.options, not client.should_send_default_pii()
    event, hint = event_from_exception(
        run.failure,
        client_options={**options, "include_local_variables": False} if is_private else options,
        mechanism={"type": "celery", "handled": False},
    )
    for error in event["exception"]["values"] if is_private else ():
        error["value"] = str(error["value"]).partition("\n")[0]
    sentry_sdk.capture_event(event, hint=hint)


def _without_duplicate(run: JobRun, event: Any, hint: dict[str, Any]) -> Any:
    """Drop the worker's line of a dead letter whose cause is reported as the job's error."""
    record = hint.get("log_record")
    line = f" reason={type(run.failure).__name__}: "
    is_line = record is not None and not record.exc_info and line in record.getMessage()
    return None if is_line and _is_reported(run) else event


OBSERVER = SentryJobs()
