"""OpenTelemetry: a CONSUMER span for each job, and a span for the transaction of each batch.

Names and attributes follow the semantic conventions for messaging. No attribute has a user ID or
an interview ID.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from threading import Thread

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer, TracerProvider
from opentelemetry.util.types import AttributeValue

from storage.errors import JobBusyError
from worker.execution.run import JobRun

_FLUSH_SECONDS = 2.0  # for the last spans, when a pool process ends


class JobSpans:
    """Creates the spans, if a tracer provider is set."""

    @property
    def is_active(self) -> bool:
        """Whether a tracer provider is set in this process."""
        provider = trace.get_tracer_provider()
        return not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)

    @contextmanager
    def job(self, run: JobRun) -> Iterator[None]:
        """Create the span of a job, below the one that sent the message.

        OpenTelemetry's own Celery instrumentation has a span for each job too. If it is active,
        this one is not created.

        Args:
            run: The job.
        """
        if _celery_is_instrumented():
            yield
            return
        parent = propagate.extract(run.text_headers, context=Context())
        token = context.attach(parent)
        try:
            with _tracer(trace.get_tracer_provider()).start_as_current_span(
                f"process {run.delivery.queue}",
                kind=SpanKind.CONSUMER,
                attributes={
                    **_messaging(run),
                    "messaging.message.id": run.delivery.job_id,
                    "interview_access.task": run.delivery.task,
                    "interview_access.retries": run.delivery.retries,
                },
            ) as span:
                yield
                _end(span, run)
        finally:
            context.detach(token)

    @contextmanager
    def transaction(self, runs: Sequence[JobRun]) -> Iterator[None]:
        """Create the span of a transaction, linked with the spans of its jobs.

        The span of a single job is the parent. A batch of several jobs begins a trace of its own.

        Args:
            runs: The jobs.
        """
        if len(runs) == 1:
            jobs = [trace.get_current_span()]
        else:
            jobs = [run.context.run(trace.get_current_span) for run in runs]
        contexts = [span.get_span_context() for span in jobs]
        with _tracer(trace.get_tracer_provider()).start_as_current_span(
            "settle jobs",
            links=[Link(one) for one in contexts if one.is_valid] if len(runs) > 1 else (),
            attributes={"messaging.batch.message_count": len(runs)},
        ) as span:
            for job in jobs:
                job.add_link(span.get_span_context())
            yield

    def flush(self) -> None:
        """Export the last spans before the process ends, for two seconds at most."""
        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush:
            # The SDK's own timeout does not interrupt an exporter that waits for its collector.
            thread = Thread(target=flush, daemon=True)
            thread.start()
            thread.join(_FLUSH_SECONDS)


def _celery_is_instrumented() -> bool:
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    return bool(module and module.CeleryInstrumentor().is_instrumented_by_opentelemetry)


@lru_cache(maxsize=1)
def _tracer(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("interview-access-worker", version("interview-access-worker"))


def _messaging(run: JobRun) -> Mapping[str, AttributeValue]:
    return {
        "messaging.system": "celery",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": run.delivery.queue,
    }


def _end(span: Span, run: JobRun) -> None:
    """Set what is known of a job at its end."""
    outcome, failure = run.settled.outcome, run.failure
    if outcome and outcome.figures and not failure:
        figures = outcome.figures
        span.set_attributes(
            {
                "interview_access.requested": figures.requested,
                "interview_access.created": figures.created,
                "interview_access.already_granted": figures.already_granted,
                "interview_access.repeated": figures.repeated,
            }
        )
    error = failure or (run.settled.error if run.result is None else None)
    state = "retried" if run.result is None else failure.state if failure else "succeeded"
    span.set_attribute("interview_access.state", state)
    if error:
        span.set_attribute("error.type", type(error).__name__)
    is_expected = isinstance(error, (JobBusyError, *(run.task.throws if run.task else ())))
    if error and not is_expected:
        span.set_status(StatusCode.ERROR)


OBSERVER = JobSpans()
