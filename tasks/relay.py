"""The use case of enqueueing the jobs that services request in the outbox."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

from interview_access.contracts import unreadable_request_digest
from interview_access.errors import InvalidGrantRequestException

from storage.dtos import AccessRequestDTO, JobDTO
from storage.interface import MAX_REQUEST_BYTES, JobTransaction, Outbox, Transactions
from tasks.audit import audit_of_request
from tasks.ledger import RejectedJob, settle_rejected

RESEND_AFTER = timedelta(minutes=10)
"""Minimum age of a message after which it is sent again although Redis seems to have it.

It grows to the time that the request waited before it was sent, so that a backlog of hours gets few
duplicate messages.
"""

PAGE_SIZE = 500
"""Largest number of requests in one transaction."""

_PAGE_BYTES = 10_000_000  # approximate memory of a page; one request alone may take more


class OutboxTransaction(JobTransaction, Outbox, Protocol):
    """What this use case needs of a transaction."""


def relay(
    storage: Transactions[OutboxTransaction],
    find_announced: Callable[[Sequence[str]], Collection[str]],
    send: Callable[[AccessRequestDTO], bool],
) -> int:
    """Enqueue one page of due requests, and those whose message was lost, until they finish.

    Every request is sent at least once, also if its job ID is in the ledger: the worker refuses a
    job ID that another request has used. A request that cannot be sent delays no other. A request
    that is too large to be read fails; its row is deleted when it is due next.

    Args:
        storage: The storage with the outbox and the ledger.
        find_announced: Returns the given job IDs that have an announcement in Redis.
        send: Enqueues a request. Returns False if only this request cannot be sent; it is due again
            later. Raises if no other can be sent either: the requests sent before are recorded as
            sent, and the remaining ones stay due.

    Returns:
        The number of requests that were due, at most :data:`PAGE_SIZE`.

    Raises:
        StorageError: if the database failed.
        Exception: any exception of ``find_announced`` or ``send``.
    """
    failure: Exception | None = None
    with storage.transaction() as transaction:
        due = transaction.lock_due_requests(PAGE_SIZE, page_bytes=_PAGE_BYTES)
        sent_before = [request.job_id for request in due if request.sent_at]
        too_large = [request.job_id for request in due if request.is_too_large]
        finished = transaction.delete_finished_requests([*sent_before, *too_large])
        announced = frozenset(find_announced([one for one in sent_before if one not in finished]))
        now = datetime.now(UTC)
        transaction.reschedule_requests(too_large, sent=False)
        unfinished = [one for one in due if one.job_id not in finished and not one.is_too_large]
        sent: list[str] = []
        not_sent: list[str] = []
        for request in unfinished:
            try:
                is_sent = _needs_sending(request, now, announced) and send(request)
            except Exception as error:  # noqa: BLE001 - raised again below
                failure = error
                break
            (sent if is_sent else not_sent).append(request.job_id)
        transaction.reschedule_requests(sent, sent=True)
        transaction.reschedule_requests(not_sent, sent=False)
    rejected = [one for one in due if one.is_too_large and one.job_id not in finished]
    if rejected:
        settle_rejected(storage, [_rejected(request) for request in rejected])
    if failure:
        raise failure
    return len(due)


def _rejected(request: AccessRequestDTO) -> RejectedJob:
    problem = ("the request", f"at most {MAX_REQUEST_BYTES:,} bytes in the outbox", "more")
    digest = unreadable_request_digest(request.task, (), {"outbox": request.job_id})
    entry = JobDTO(request.job_id, request.task, None, digest, audit_of_request(request))
    return RejectedJob(entry, InvalidGrantRequestException.of([problem]))


def _needs_sending(request: AccessRequestDTO, now: datetime, announced: Collection[str]) -> bool:
    """Return whether the request has no message, or has waited too long for its job to finish.

    A message with an ETA waits in Redis until then.
    """
    if request.sent_at is None or request.job_id not in announced:
        return True
    waited = request.sent_at - request.requested_at
    could_start_at = max(request.sent_at, request.eta or request.sent_at)
    return now - could_start_at > max(RESEND_AFTER, waited)
