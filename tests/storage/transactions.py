"""Records to store, and transactions on them, for the tests of a storage."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from storage.dtos import (
    AccessRequestDTO,
    FiguresDTO,
    FinishedJobDTO,
    InterviewAttemptDTO,
    JobDTO,
    OutcomeDTO,
    RequestedGrantsDTO,
)
from storage.errors import JobBusyError, StorageError
from storage.interface import Storage, Transaction

DIGEST, OTHER_DIGEST = "d" * 64, "e" * 64


def ledger_entry(job_id: str, digest: str = DIGEST) -> JobDTO:
    """Return a job as the ledger identifies it."""
    return JobDTO(job_id, "interview_access.grant_access", "ann", digest)


def finished(job_id: str, created: int = 0, digest: str = DIGEST) -> FinishedJobDTO:
    """Return a job with a successful outcome."""
    outcome = OutcomeDTO(
        "succeeded",
        result={"success": True, "created_access_count": created},
        figures=FiguresDTO(created + 5, 2, 3, created),
    )
    return FinishedJobDTO(ledger_entry(job_id, digest), outcome)


def a_request(job_id: str) -> AccessRequestDTO:
    """Return a request as a service makes it now."""
    return AccessRequestDTO(job_id, "ann", ("one", "two"), datetime.now(UTC))


def a_cohort_request(job_id: str) -> AccessRequestDTO:
    """Return a request of a cohort with every option."""
    now = datetime.now(UTC)
    return AccessRequestDTO(
        job_id,
        None,
        ("one", "two"),
        now,
        task="interview_access.grant_cohort_access",
        user_ids=("ann", "bob"),
        eta=now + timedelta(hours=1),
        expires_at=now + timedelta(hours=2),
        headers='{"traceparent": "00-1-2-01"}',
    )


def an_attempt(interview_id: str) -> InterviewAttemptDTO:
    """Return an attempt with a scheduled end."""
    start = datetime(2024, 2, 29, 23, 30, 0, 123456, tzinfo=UTC)
    return InterviewAttemptDTO(
        id=str(uuid4()),
        interview_id=interview_id,
        user_id="ann",
        start_datetime=start,
        scheduled_end_datetime=start + timedelta(minutes=45),
    )


def finish(storage: Storage, *jobs: FinishedJobDTO) -> None:
    """Record finished jobs in one transaction."""
    with storage.transaction() as transaction:
        transaction.record_jobs(jobs)


def create_grants(storage: Storage, user_id: str, *interview_ids: str) -> int:
    """Create grants in one transaction. Returns the number of rows added."""
    with storage.transaction() as transaction:
        requested = RequestedGrantsDTO(user_id, interview_ids)
        (created,) = transaction.bulk_create_user_access([requested])
        return created


def lock(storage: Storage, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
    """Lock jobs in a transaction that ends at once. Returns the IDs that were locked."""
    with storage.transaction() as transaction:
        return transaction.lock_jobs(job_ids, wait=wait)


def can_lock(storage: Storage, job_id: str) -> bool:
    """Return whether the job can be locked now."""
    try:
        return lock(storage, [job_id], wait=True) == {job_id}
    except JobBusyError:
        return False


@contextmanager
def failing_transaction(
    kind: type[Exception], storage: Storage, *, sqlstate: str | None = None
) -> Iterator[Transaction]:
    """Run a transaction that must raise an error of this type, and with this code if given."""
    with pytest.raises(kind) as caught, storage.transaction() as transaction:
        yield transaction
    if sqlstate is not None:
        assert isinstance(caught.value, StorageError)
        assert caught.value.sqlstate == sqlstate
