"""Tracing of calls that enqueue: OpenTelemetry's spans, and the context that a message carries.

Nothing is imported or created unless the process has set up OpenTelemetry's SDK or Sentry. Their
exceptions are logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from interview_access.contracts import QUEUE, Job
from interview_access.redis_address import RedisAddress

if TYPE_CHECKING:  # an optional dependency
    from opentelemetry.trace import Span, Tracer, TracerProvider

logger = logging.getLogger(__name__)

_DISTRIBUTION = "interview-access-client"


@dataclass(frozen=True, slots=True)
class Sending:
    """A call that enqueues jobs.

    Attributes:
        headers: Headers that carry the call's context; empty if nothing is traced.
        span: The call's span, if there is one.
    """

    headers: Mapping[str, str]
    span: Span | None = None

    def count(self, messages: int) -> None:
        """Set the number of messages of a call that enqueues many."""
        if self.span:
            self.span.set_attribute("messaging.batch.message_count", messages)


def inject_context() -> dict[str, str]:
    """Return the message headers that carry the current context.

    They are those of OpenTelemetry's global propagator, and of Sentry. There are none if the
    process has set up neither.
    """
    return _headers(None)


@contextmanager
def sending(server: RedisAddress, job: Job | None = None) -> Iterator[Sending]:
    """Trace a call that enqueues, within the block.

    Args:
        server: The server of the queue.
        job: The job, if it is a single one.
    """
    span: Span | None = None
    with _logged():
        span = _start(server, job)
    try:
        yield Sending(_headers(span), span)
    except BaseException as error:
        if span:
            with _logged():
                _fail(span, error)
        raise
    finally:
        if span:
            with _logged():
                span.end()


@contextmanager
def _logged() -> Iterator[None]:
    """Log exceptions of tracing libraries: none may prevent a job from being enqueued."""
    try:
        yield
    except Exception:
        logger.exception("tracing failed")


def _start(server: RedisAddress, job: Job | None) -> Span | None:
    """Start the span of a call, if OpenTelemetry's SDK is set up."""
    tracer = _tracer()
    if tracer is None:
        return None
    from opentelemetry import trace  # noqa: PLC0415 - see TYPE_CHECKING

    attributes: dict[str, str | int] = {
        "messaging.system": "celery",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": QUEUE,
        **_address(server),
    }
    if job:
        attributes |= {"messaging.message.id": str(job.job_id), "interview_access.task": job.task}
    # Not made the current span: that would outlast each step of an exchange, which is a generator.
    return tracer.start_span(f"send {QUEUE}", kind=trace.SpanKind.PRODUCER, attributes=attributes)


def _fail(span: Span, error: BaseException) -> None:
    from opentelemetry import trace  # noqa: PLC0415 - see TYPE_CHECKING

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(trace.StatusCode.ERROR)


def _headers(span: Span | None) -> dict[str, str]:
    """Return the headers of a span's context, or of the current one."""
    headers: dict[str, str] = {}
    with _logged():
        if _tracer():
            from opentelemetry import propagate, trace  # noqa: PLC0415 - see TYPE_CHECKING

            context = trace.set_span_in_context(span) if span else None
            propagate.inject(headers, context=context)
    with _logged():
        sentry = sys.modules.get("sentry_sdk")
        if sentry and sentry.is_initialized():
            headers["sentry-trace"] = sentry.get_traceparent() or ""
            baggage = (headers.get("baggage"), sentry.get_baggage())
            headers["baggage"] = ",".join(one for one in baggage if one)
    return {name: value for name, value in headers.items() if value}


def _tracer() -> Tracer | None:
    """Return the tracer, if OpenTelemetry's SDK is set up."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace  # noqa: PLC0415 - see TYPE_CHECKING

    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return _tracer_of(provider)


@lru_cache(maxsize=1)
def _tracer_of(provider: TracerProvider) -> Tracer:
    return provider.get_tracer(_DISTRIBUTION, version(_DISTRIBUTION))


def _address(server: RedisAddress) -> Mapping[str, str | int]:
    """Return the attributes of a server; those of the first Sentinel, if there are Sentinels."""
    if server.path:
        return {"server.address": server.path}
    host, port = server.hosts[0]
    return {"server.address": host, "server.port": port}
