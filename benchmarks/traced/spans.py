"""OpenTelemetry: a span for each job and each transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

import worker.celery

app = worker.celery.app


class _Discarding(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002 - the SDK's signature
        return SpanExportResult.SUCCESS


@worker_process_init.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _start(**_: Any) -> None:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_Discarding()))
    trace.set_tracer_provider(provider)
