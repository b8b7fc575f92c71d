"""The use case: jobs that services ask for in transactions of their own are put on the queue."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta

from storage.dtos import AccessRequestDTO
from storage.interface import InterviewStorageInterface

SENT_AGAIN_AFTER = timedelta(minutes=10)
"""For how long a message that the queue's server seems to have is trusted to be there, at least.

Later for as long as it was waited for before: a queue that is hours behind has few copies.
"""

PAGE = 10
"""Requests in one go: each may hold 100,000 ids."""


def relay(
    storage: InterviewStorageInterface,
    announced: Callable[[Sequence[str]], Collection[str]],
    send: Callable[[AccessRequestDTO], bool],
) -> int:
    """Put on the queue what is due, and again what the queue has lost, until the ledger has it.

    Every request is sent once at least, also under an id that the ledger knows: it is the worker
    who refuses an id that another request had. What is sent before this fails is sent again.

    Args:
        storage: Where the requests and the ledger are.
        announced: Which of these job ids the queue's server knows.
        send: Puts one on the queue, or says that the queue refuses this one; it comes again later
            than others.

    Returns:
        How many requests were looked at, :data:`PAGE` at most.
    """
    with storage.transaction() as transaction:
        due = transaction.take_due_requests(PAGE)
        once_sent = [request.job_id for request in due if request.sent_at]
        answered = transaction.forget_answered_requests(once_sent)
        standing = frozenset(announced([one for one in once_sent if one not in answered]))
        now = datetime.now(UTC)
        left = [request for request in due if request.job_id not in answered]
        lost = [
            request
            for request in left
            if request.sent_at is None
            or now - request.sent_at > max(SENT_AGAIN_AFTER, request.sent_at - request.requested_at)
            or request.job_id not in standing
        ]
        sent = {request.job_id for request in lost if send(request)}
        transaction.look_again_at_requests(sent, sent=True)
        transaction.look_again_at_requests(
            [request.job_id for request in left if request.job_id not in sent], sent=False
        )
    return len(due)
