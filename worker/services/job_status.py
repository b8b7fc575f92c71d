"""The job status service: reports and cancels jobs, for control requests and the command line.

The ledger is authoritative. Redis adds what the ledger does not have yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from interview_access.contracts import (
    CONTROL_QUEUE,
    PROGRESS,
    Announcement,
    JobFailure,
    JobProgress,
    JobStatus,
)
from interview_access.errors import error_class
from interview_access.stored_errors import from_record, record_of_result
from pydantic import ValidationError
from redis import Redis

from storage.dtos import AccessRequestDTO
from storage.interface import JobStorage
from tasks import ledger, outcomes
from tasks.audit import announced_job
from worker.operations.inspection import announcements
from worker.services.outbox_relay import message_of

_READ_BYTES = 65_536  # of a result, which producers may write


class JobStatusService:
    """Reports and cancels jobs. Every method raises StorageError and redis-py's errors."""

    def __init__(
        self,
        storage: Callable[[], JobStorage],
        results: RedisBackend,
        *,
        on_cancelled: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Connect at the first call.

        Args:
            storage: Returns this process's storage.
            results: The result backend.
            on_cancelled: Called with the task of each job whose outcome a cancellation records.
        """
        self._storage = storage
        self._results = results
        self._on_cancelled = on_cancelled

    def status(self, redis: Redis, job_id: str) -> JobStatus:
        """Report a job.

        Args:
            redis: Client of the queue's Redis.
            job_id: Any valid job ID.
        """
        storage = self._storage()
        if finished := storage.get_finished_job(job_id):
            return outcomes.status_of(finished)
        if pruned := storage.get_pruned_job(job_id):  # its announcement may have outlived it
            return outcomes.status_of_pruned(job_id, pruned)
        announced = announcements(redis, [job_id]).get(job_id) or _announcement(
            storage.get_request(job_id)
        )
        status = _unfinished(job_id, self._stored(job_id), announced)
        if status.final and (finished := storage.get_finished_job(job_id)):
            return outcomes.status_of(finished)  # finished between the two reads
        if not status.final and storage.is_cancelled(job_id):
            status.cancel_requested = True
        return status

    def cancel(self, redis: Redis, job_id: str) -> JobStatus:
        """Cancel a job and report it; see :func:`tasks.ledger.cancel`.

        Args:
            redis: Client of the queue's Redis.
            job_id: Any valid job ID.
        """
        request = self._storage().get_request(job_id)
        announced = announcements(redis, [job_id]).get(job_id) or _announcement(request)
        entry = announced_job(job_id, announced, request.requested_at if request else None)
        cancellation = ledger.cancel(self._storage(), job_id, entry)
        if entry and cancellation.is_recorded:
            self._on_cancelled(entry.task)
        status = self.status(redis, job_id)
        if status.state == "cancelled" and status.error:
            error = from_record(status.error.model_dump())
            # If Redis is unreachable, the job's delivery stores it.
            self._results.store_results({job_id: error})
        elif cancellation.is_running and not status.final:
            status.state = "running"
        return status

    def is_job(self, redis: Redis, job_id: str) -> bool:
        """Report whether a job with this ID is known."""
        return self.status(redis, job_id) != JobStatus(job_id=job_id, state="unknown")

    def _stored(self, job_id: str) -> dict[str, Any]:
        """Read the stored result; empty if there is none or it cannot be read."""
        key = self._results.get_key_for_task(job_id)
        text = self._results.client.getrange(key, 0, _READ_BYTES - 1)
        with suppress(ValueError, RecursionError):
            stored = json.loads(text)
            # A control request without reply_to has its reply under the key of a result.
            if isinstance(stored, dict) and stored.get("queue") != CONTROL_QUEUE:
                return stored
        return {}


def _announcement(request: AccessRequestDTO | None) -> Announcement | None:
    """Build the announcement of a job that waits in the outbox."""
    if request is None:
        return None
    announcement = message_of(request).announcement
    return announcement.model_copy(update={"sent_at": request.requested_at})


def _unfinished(job_id: str, stored: dict[str, Any], announced: Announcement | None) -> JobStatus:
    """Report a job that is not in the ledger: it has no final result there."""
    status = JobStatus(job_id=job_id, state="unknown")
    if announced:
        status.state, status.task = "queued", announced.task
        status.sent_at, status.eta = announced.sent_at, announced.eta
        status.expires_at = announced.expires_at
        status.actor, status.reason = announced.actor, announced.reason
    result = stored.get("result")
    match stored.get("status"):
        case states.STARTED:
            status.state = "running"
        case state if state == PROGRESS:
            status.state = "running"
            with suppress(ValidationError):  # of another application's task
                status.progress = JobProgress.model_validate(result)
        case states.RETRY:
            status.state = "queued"  # announced or not
        case states.SUCCESS if isinstance(result, dict):
            status.state, status.result = "succeeded", result
        case states.FAILURE | states.REVOKED if isinstance(result, dict):
            status.error = JobFailure.model_validate(record_of_result(result))
            status.state = error_class(status.error.type).state
    return status
