"""What is known of a job, and having it cancelled: for the client, by the desk, and the command.

The ledger has the first word and the last; Redis tells of what the ledger does not have yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from interview_access import errors
from interview_access.contracts import (
    PROGRESS,
    Announcement,
    JobFailure,
    JobProgress,
    JobState,
    JobStatus,
)
from interview_access.errors import InterviewAccessError
from interview_access.protocol import announcement_key
from pydantic import ValidationError
from redis import Redis

from storage.dtos import FinishedJobDTO, JobDTO
from storage.interface import InterviewStorageInterface
from tasks import ledger
from worker.relay import message_of


class Inquiries:
    """Answers about jobs. Every method raises what the servers raise where one of them is away."""

    def __init__(
        self, storage: Callable[[], InterviewStorageInterface], results: RedisBackend
    ) -> None:
        """Connects at the first call.

        Args:
            storage: This process's store.
            results: Where results go.
        """
        self._storage = storage
        self._results = results

    def status(self, redis: Redis, job_id: str) -> JobStatus:
        """What is known of a job.

        Args:
            redis: The server of the queue.
            job_id: The job's id, which may be anybody's.
        """
        storage = self._storage()
        if finished := storage.get_finished_job(job_id):
            return _finished(finished)
        announced = _announced(redis, job_id) or self._requested(job_id)
        status = _unfinished(job_id, self._stored(job_id), announced)
        if status.final and (finished := storage.get_finished_job(job_id)):
            return _finished(finished)  # meanwhile
        if not status.final and storage.is_cancelled(job_id):
            status.cancel_requested = True
        return status

    def cancel(self, redis: Redis, job_id: str) -> JobStatus:
        """Have a job cancelled, and tell what is known of it then; see :func:`ledger.cancel`."""
        announced = _announced(redis, job_id) or self._requested(job_id)
        entry = (
            JobDTO(job_id, announced.task, None, announced.digest)
            if announced and announced.digest
            else None
        )
        is_running = ledger.cancel(self._storage(), job_id, entry)
        status = self.status(redis, job_id)
        if status.state == "cancelled" and status.error:
            error = ledger.error_of(status.error.model_dump())
            self._results.store_failure(job_id, error)  # for those who poll it
        elif is_running and not status.final:
            status.state = "running"
        return status

    def _requested(self, job_id: str) -> Announcement | None:
        """A job that a service asked for in the database, as it will be announced."""
        request = self._storage().get_request(job_id)
        if request is None:
            return None
        announcement = message_of(request).announcement
        return announcement.model_copy(update={"sent_at": request.requested_at})

    def _stored(self, job_id: str) -> dict[str, Any]:
        """What pollers read; an empty object where nothing is stored."""
        stored = self._results.get(self._results.get_key_for_task(job_id))
        return dict(json.loads(stored)) if stored else {}


def _announced(redis: Redis, job_id: str) -> Announcement | None:
    written: Any = redis.get(announcement_key(job_id))
    try:
        return Announcement.model_validate_json(written) if written else None
    except ValidationError:
        return None  # a foreign producer's, and none of the contract's


def _finished(finished: FinishedJobDTO) -> JobStatus:
    job, answer = finished.job, finished.answer
    figures, rejected = answer.figures, answer.rejected
    return JobStatus.model_validate(
        {
            "job_id": job.job_id,
            "state": answer.state,
            "task": job.task,
            "user_id": job.user_id,
            "requested": figures and figures.requested,
            "repeated": figures and figures.repeated,
            "already_granted": figures and figures.already_granted,
            "created": figures and figures.created,
            "result": answer.result,
            "error": answer.error,
            "created_by_user": answer.created_by_user,
            "unknown_interview_ids": rejected and rejected.unknown,
            "malformed_interview_ids": rejected and rejected.malformed,
            "finished_at": finished.finished_at,
        }
    )


def _unfinished(job_id: str, stored: dict[str, Any], announced: Announcement | None) -> JobStatus:
    """A job that the ledger does not have: its answer is not final, or was pruned."""
    status = JobStatus(job_id=job_id, state="unknown")
    if announced:
        status.state, status.task = "queued", announced.task
        status.sent_at, status.eta = announced.sent_at, announced.eta
        status.expires_at = announced.expires_at
    match stored.get("status"):
        case states.STARTED:
            status.state = "running"
        case state if state == PROGRESS:
            status.state = "running"
            with suppress(ValidationError):  # of a task that is none of ours
                status.progress = JobProgress.model_validate(stored["result"])
        case states.RETRY:
            status.state = "queued"  # also where nobody announced it
        case states.SUCCESS:
            status.state, status.result = "succeeded", stored["result"]
        case states.FAILURE | states.REVOKED:
            status.state, status.error = _failed(stored["result"])
    return status


def _failed(stored: dict[str, Any]) -> tuple[JobState, JobFailure]:
    kind = str(stored.get("exc_type"))
    known = getattr(errors, kind, InterviewAccessError)
    match stored.get("exc_message"):
        case [str(sentence), dict(details)]:
            return known.state, JobFailure(type=kind, sentence=sentence, details=details)
        case said:
            return "failed", JobFailure(type=kind, sentence=f"The job failed: {said}")
