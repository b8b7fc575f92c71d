"""What the ledger keeps of who requested a job, when, and which attempt recorded its outcome.

A producer chooses the headers from which it is read: no value may fail or delay the job.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from interview_access.contracts import (
    ORIGIN_LENGTHS,
    Announcement,
    describe,
    readable_origin,
)
from interview_access.text import shortened

from storage.dtos import WORKER_LENGTH, AccessRequestDTO, AuditDTO, JobDTO

logger = logging.getLogger(__name__)


def audit_of_attempt(
    job_id: str, headers: Mapping[str, Any], *, attempts: int, worker: str
) -> AuditDTO:
    """Read the origin of a job from its message's headers, for an attempt that begins now.

    An actor or a reason that does not print is escaped, and one that is too long is cut; the log
    has a warning of it. A header of another type, and one that is not a time, is ignored.

    Args:
        job_id: The job's ID, for the log.
        headers: The headers, with any values.
        attempts: Number of attempts, this one included.
        worker: Node name of the worker.
    """
    actor, reason = _origin(job_id, headers)
    return AuditDTO(
        requested_at=read_time(headers.get("requested_at")),
        enqueued_at=read_time(headers.get("enqueued_at")),
        started_at=datetime.now(UTC),
        attempts=attempts,
        worker=shortened(worker, quoted=False, at_most=WORKER_LENGTH)[:WORKER_LENGTH],
        actor=actor,
        reason=reason,
    )


def audit_of_request(request: AccessRequestDTO) -> AuditDTO:
    """Read the origin of a job that was requested in the outbox, and never enqueued."""
    actor, reason = _origin(request.job_id, json.loads(request.headers or "{}"))
    return AuditDTO(requested_at=request.requested_at, actor=actor, reason=reason)


def announced_job(
    job_id: str, announced: Announcement | None, requested_at: datetime | None = None
) -> JobDTO | None:
    """Build a job as the ledger identifies it; None if its request is not known.

    Args:
        job_id: The job's ID.
        announced: Its announcement, if there is one.
        requested_at: When it was requested in the outbox. The announcement of a request that has
            not been enqueued has the same time.
    """
    if announced is None or announced.digest is None:
        return None
    sent_at = announced.sent_at
    audit = AuditDTO(
        requested_at=requested_at,
        enqueued_at=None if sent_at == requested_at else sent_at,
        actor=announced.actor,
        reason=announced.reason,
    )
    return JobDTO(job_id, announced.task, None, announced.digest, audit)


def read_time(value: object) -> datetime | None:
    """Read a time in ISO 8601, which is UTC if it has no zone; None if the value is not one."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _origin(job_id: str, headers: Mapping[str, Any]) -> tuple[str | None, str | None]:
    actor, reason = (_readable(job_id, name, headers.get(name)) for name in ("actor", "reason"))
    return actor, reason


def _readable(job_id: str, name: str, value: object) -> str | None:
    text = readable_origin(name, value)
    if value is not None and value != text:
        logger.warning(
            "message header not kept unchanged: job=%r header=%s expected=%s got=%s",
            job_id,
            name,
            f"1 to {ORIGIN_LENGTHS[name]:,} printable characters",
            describe(value),
        )
    return text
