"""What is known of a job: the ledger first, then the results, then the queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

from celery import states
from interview_access.contracts import PROGRESS, QUEUE, JobProgress
from pydantic import BaseModel

from storage.dtos import FinishedJobDTO
from storage.postgres import PostgresStorage
from worker.celery import app
from worker.claims import PREFIX
from worker.dead_letters import DeadLetter, DeadLetters
from worker.settings import Settings

_STATES: dict[str, Literal["queued", "running", "succeeded", "failed", "cancelled"]] = {
    states.STARTED: "running",
    PROGRESS: "running",
    states.RETRY: "queued",
    states.SUCCESS: "succeeded",
    states.FAILURE: "failed",
    states.REVOKED: "cancelled",
}
_PAGE = 100  # messages looked at in one round trip; each may hold 100,000 ids


class JobStatus(BaseModel):
    """One job as an operator sees it; what is not known is left out of its JSON.

    Attributes:
        state: ``unknown`` where neither ledger, results, queue nor dead letters have the job.
    """

    job_id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled", "unknown"]
    task: str | None = None
    user_id: str | None = None
    requested: int | None = None
    repeated: int | None = None
    already_granted: int | None = None
    created: int | None = None
    progress: JobProgress | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    finished_at: datetime | None = None


def job_status(settings: Settings, job_id: str) -> JobStatus:
    """The job's status; raises what the servers raise where one of them is away."""
    storage = PostgresStorage(settings.database_url)
    try:
        finished = storage.get_finished_job(job_id)
    finally:
        storage.close()
    if finished:
        return _of_ledger(finished)
    meta = app.backend.get_task_meta(job_id)
    state = _STATES.get(meta["status"]) or ("queued" if _is_queued(job_id) else "unknown")
    status = JobStatus(job_id=job_id, state=state)
    if state == "unknown" and (letter := _dead_letter(job_id)):
        status.state, status.error = "failed", {"type": "DeadLetter", "sentence": letter.reason}
    if meta["status"] == PROGRESS:
        status.progress = JobProgress.model_validate(meta["result"])
    elif state == "failed":
        error = meta["result"]
        status.error = {"type": type(error).__name__, "sentence": str(error)}
    elif state == "succeeded":
        status.result = meta["result"]
    return status


def _of_ledger(finished: FinishedJobDTO) -> JobStatus:
    job, answer = finished.job, finished.answer
    figures = answer.figures
    return JobStatus(
        job_id=job.job_id,
        state="failed" if answer.error else "succeeded",
        task=job.task,
        user_id=job.user_id,
        requested=figures and figures.requested,
        repeated=figures and figures.repeated,
        already_granted=figures and figures.already_granted,
        created=figures and figures.created,
        result=answer.result,
        error=answer.error,
        finished_at=finished.finished_at,
    )


def _is_queued(job_id: str) -> bool:
    """Whether a message of the job waits, or is held by a worker that has not begun it."""
    with app.connection_for_read() as connection:
        return any(_is_of(message, job_id) for message in _messages(connection.default_channel))


def _dead_letter(job_id: str) -> DeadLetter | None:
    with app.connection_for_read() as connection:
        letters = DeadLetters(connection.default_channel.client)
        return next((letter for letter in letters if letter.job_id == job_id), None)


def _messages(channel: Any) -> Iterator[bytes]:
    """Every message of the queue in all of its priorities, held by a worker, or deferred."""
    client = channel.client
    for priority in channel.priority_steps:
        key = channel._q_for_pri(QUEUE, priority)  # noqa: SLF001 - kombu names a queue's lists so
        start = 0
        while page := client.lrange(key, start, start + _PAGE - 1):
            yield from page
            start += _PAGE
    for places in f"{PREFIX}held:*", f"{PREFIX}deferred":
        for place in client.scan_iter(places):
            for _, held in client.hscan_iter(place, count=_PAGE):
                yield held.partition(b"\0")[2]


def _is_of(message: bytes, job_id: str) -> bool:
    try:
        return bool(json.loads(message)["headers"]["id"] == job_id)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False  # no message of the contract
