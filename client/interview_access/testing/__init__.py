"""Test kit for services that enqueue jobs: clients without Redis, PostgreSQL or a worker.

- :class:`FakeClient` and :class:`AsyncFakeClient` keep what was enqueued. A test states results.
- :class:`InlineClient` and :class:`AsyncInlineClient` execute each job at once with the worker's
  own code, in memory or on a database. The worker package must be installed.
- :func:`capture_enqueued` routes the calls of every client of the process to one of these.
- :func:`assert_requested` and :func:`requested_jobs` read the transactional outbox.

``docs/testing.md`` shows their use with pytest, unittest and Django.
"""

from __future__ import annotations

from interview_access.testing.clients import (
    AsyncFakeClient,
    AsyncInlineClient,
    FakeClient,
    InlineClient,
    capture_enqueued,
)
from interview_access.testing.jobs import EnqueuedJob
from interview_access.testing.outbox import assert_requested, requested_jobs

__all__ = [
    "AsyncFakeClient",
    "AsyncInlineClient",
    "EnqueuedJob",
    "FakeClient",
    "InlineClient",
    "assert_requested",
    "capture_enqueued",
    "requested_jobs",
]
