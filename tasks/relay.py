"""The use case: jobs that services ask for in transactions of their own are put on the queue."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta

from interview_access.contracts import GRANT_ACCESS, unreadable_request_digest
from interview_access.errors import InvalidGrantRequestException

from storage.dtos import AccessRequestDTO, JobDTO
from storage.interface import MAX_REQUEST_BYTES, InterviewStorageInterface
from tasks.ledger import RejectedJob, settle_rejected

SENT_AGAIN_AFTER = timedelta(minutes=10)
"""For how long a message that the queue's server seems to have is trusted to be there, at least.

Later for as long as it was waited for before: a queue that is hours behind has few copies.
"""

PAGE = 500
"""Requests in one transaction at most."""

_PAGE_BYTES = 10_000_000
"""Memory that they take up at most, about, unless one alone takes up more."""


def relay(
    storage: InterviewStorageInterface,
    announced: Callable[[Sequence[str]], Collection[str]],
    send: Callable[[AccessRequestDTO], bool],
) -> int:
    """Put on the queue what is due, and again what the queue has lost, until the ledger has it.

    Every request is sent at least once, also under an ID that the ledger has: the worker refuses an
    ID that another request had. A request that cannot be sent delays no other; one that is too
    large to be read fails, and its row is deleted at the next look.

    Args:
        storage: Where the requests and the ledger are.
        announced: Which of these job IDs the queue's server knows.
        send: Puts one on the queue. Returns False where the request itself cannot be sent: it is
            due again later. Raises where no other can be sent either: what was sent before that is
            noted as sent, the rest stays due, and the exception is raised again.

    Returns:
        How many requests were due, :data:`PAGE` at most.
    """
    failure: Exception | None = None
    with storage.transaction() as transaction:
        due = transaction.take_due_requests(PAGE, page_bytes=_PAGE_BYTES)
        once_sent = [request.job_id for request in due if request.sent_at]
        too_large = [request.job_id for request in due if request.is_too_large]
        answered = transaction.forget_answered_requests([*once_sent, *too_large])
        on_queue = frozenset(announced([one for one in once_sent if one not in answered]))
        now = datetime.now(UTC)
        transaction.look_again_at_requests(too_large, sent=False)
        left = [one for one in due if one.job_id not in answered and not one.is_too_large]
        sent: list[str] = []
        seen: list[str] = []
        for request in left:
            try:
                is_sent = _is_lost(request, now, on_queue) and send(request)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised again below
                failure = error
                break
            (sent if is_sent else seen).append(request.job_id)
        transaction.look_again_at_requests(sent, sent=True)
        transaction.look_again_at_requests(seen, sent=False)
    if rejected := [_rejected(job_id) for job_id in too_large if job_id not in answered]:
        settle_rejected(storage, rejected)
    if failure:
        raise failure
    return len(due)


def _rejected(job_id: str) -> RejectedJob:
    problem = ("the request", f"at most {MAX_REQUEST_BYTES:,} bytes in the outbox", "more")
    digest = unreadable_request_digest(GRANT_ACCESS, (), {"outbox": job_id})
    entry = JobDTO(job_id, GRANT_ACCESS, None, digest)
    return RejectedJob(entry, InvalidGrantRequestException.of([problem]))


def _is_lost(request: AccessRequestDTO, now: datetime, on_queue: Collection[str]) -> bool:
    """Whether the request has no message on the queue, or has waited for too long for one."""
    if request.sent_at is None or request.job_id not in on_queue:
        return True
    waited = request.sent_at - request.requested_at
    return now - request.sent_at > max(SENT_AGAIN_AFTER, waited)
