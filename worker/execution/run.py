"""The state of one delivery while a pool process executes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from celery.app.task import Context
from interview_access.errors import InterviewAccessError

from storage.errors import JobBusyError
from tasks.celery_tasks import JobTask
from tasks.ledger import JobResult
from worker.execution.body import Call
from worker.execution.request import Dispatched

_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")
_HEADERS = (
    *("root_id", "parent_id", "correlation_id", "group", "group_index", "ignore_result", "origin"),
    *("stamps", "stamped_headers", "replaced_task_nesting", "eta", "expires", "timelimit"),
)


@dataclass(slots=True)
class JobRun:
    """The execution of one delivery.

    Attributes:
        delivery: What the main process dispatched.
        task: Its task, unless the worker does not have it.
        call: The decoded body; empty if it was not decoded.
        job: The job that the ledger settles; None after a defect in reading it.
        settled: How this delivery ended in the ledger.
        result: What the job's poller reads; None while the job is to be retried.
    """

    delivery: Dispatched
    task: JobTask | None
    call: Call
    job: Any
    settled: JobResult = field(default_factory=JobResult)
    result: dict[str, Any] | InterviewAccessError | None = None

    @property
    def has_poller(self) -> bool:
        """Whether the producer may poll the result."""
        return not self.delivery.headers.get("ignore_result")

    @property
    def is_retried(self) -> bool:
        """Whether the poller reads the state RETRY: nothing else executes the job now."""
        is_busy = isinstance(self.settled.error, JobBusyError)
        return self.result is None and self.has_poller and not is_busy

    @property
    def has_followers(self) -> bool:
        """Whether the message names tasks to be sent after the job."""
        return any(self.call.embedded.get(name) for name in _EMBEDDED)

    def is_missing_in(self, stored: Collection[str]) -> bool:
        """Report whether the result is not stored although the job has a poller.

        Args:
            stored: IDs of the jobs whose results are stored.
        """
        has_result = self.result is not None and self.has_poller
        return has_result and self.delivery.job_id not in stored

    @property
    def request(self) -> Context:
        """Build the request that Celery's signals and callbacks expect, without custom headers."""
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
