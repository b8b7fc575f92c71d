"""A service that requests a job within a span, and prints the span's ``traceparent``."""

from __future__ import annotations

import os
import sys

from interview_access.outbox import enqueue_in_sqlalchemy
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import create_engine


def main() -> None:
    """Request the job, and commit."""
    trace.set_tracer_provider(TracerProvider())
    headers: dict[str, str] = {}
    with (
        trace.get_tracer("service").start_as_current_span("request"),
        create_engine(os.environ["DATABASE_URL"]).begin() as connection,
    ):
        enqueue_in_sqlalchemy(connection, "ann", [])
        propagate.inject(headers)
    sys.stdout.write(headers["traceparent"])


if __name__ == "__main__":
    main()
