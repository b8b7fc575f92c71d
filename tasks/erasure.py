"""The use case of erasing one person: the user ID is removed, outcomes and counts stay.

Job IDs and request digests stay, on which idempotency rests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from storage.dtos import ACTOR_LENGTH, REASON_LENGTH, FinishedJobDTO, RejectedIdsDTO
from storage.interface import Erasure, Ledger, Outbox, Transactions

ERASED = "(erased)"
"""What a user ID is replaced by."""

_PAGE_SIZE = 2_000  # ledger rows read by one transaction


class EraseTransaction(Erasure, Ledger, Outbox, Protocol):
    """What this use case needs of a transaction."""


@dataclass(frozen=True, slots=True)
class ErasedPage:
    """One transaction of an erasure.

    Attributes:
        job_ids: Jobs whose ledger rows, rejected IDs or counts named the user.
    """

    job_ids: Collection[str]


def find_unfinished_requests(
    storage: Transactions[EraseTransaction], user_id: str
) -> Collection[str]:
    """Return the job IDs of the outbox requests of a user whose jobs have not finished.

    Raises:
        StorageError: if the database failed.
    """
    with storage.transaction() as transaction:
        job_ids = _requests_naming(transaction, user_id)
        found = transaction.find_jobs(job_ids)
    return [one for one in job_ids if one not in found.finished and one not in found.pruned]


def erase_jobs(
    storage: Transactions[EraseTransaction], user_id: str, *, dry_run: bool = False
) -> Iterator[ErasedPage]:
    """Remove a user from the ledger. Each step of the iteration is one transaction.

    A page is committed when the next one is requested. If the caller fails to erase what other
    places have of its jobs, the page stays as it was, and a later run finds the jobs again.

    Args:
        storage: The storage with the ledger.
        user_id: The user.
        dry_run: Find the jobs, and change nothing.

    Raises:
        StorageError: if the database failed; the pages before are erased.
    """
    after: str | None = ""
    while after is not None:
        with storage.transaction() as transaction:
            page = transaction.find_jobs_naming(user_id, _PAGE_SIZE, after=after)
            pairs = [(job, _without(user_id, job)) for job in page.jobs]
            changed = [new for job, new in pairs if _details(new) != _details(job)]
            if changed and not dry_run:
                transaction.replace_details(changed)
            yield ErasedPage([one.job.job_id for one in changed])
        after = page.last


def erase_requests(
    storage: Transactions[EraseTransaction], user_id: str, *, dry_run: bool = False
) -> int:
    """Delete the outbox requests of a user whose jobs have finished, and return their number.

    Args:
        storage: The storage with the outbox.
        user_id: The user.
        dry_run: Count them, and delete nothing.

    Raises:
        StorageError: if the database failed.
    """
    with storage.transaction() as transaction:
        job_ids = _requests_naming(transaction, user_id)
        if dry_run:
            found = transaction.find_jobs(job_ids)
            return len(found.finished.keys() | found.pruned.keys())
        return len(transaction.delete_finished_requests(job_ids))


def names(value: Any, user_id: str) -> bool:
    """Return whether :func:`redacted` changes a JSON value.

    Args:
        value: Any JSON value.
        user_id: The user.
    """
    return bool(redacted(value, user_id) != value)


def redacted(value: Any, user_id: str) -> Any:
    """Replace a user ID in a JSON value, where it is a string, or in quotes or a number within one.

    Args:
        value: Any JSON value.
        user_id: The user.
    """
    match value:
        case str():
            if value == user_id:
                return ERASED
            for quoted in (repr(user_id), f"'{user_id}'", f'"{user_id}"'):  # errors use repr()
                value = value.replace(quoted, repr(ERASED))
            if (number := f"the number {user_id}") in value:  # an error's words for it
                value = re.sub(rf"\b{re.escape(number)}(?!\w|[.+-]\d)", repr(ERASED), value)
            return value
        case list() | tuple():
            return type(value)(redacted(one, user_id) for one in value)
        case Mapping():
            return {redacted(name, user_id): redacted(one, user_id) for name, one in value.items()}
        case _:
            return value


def mentions(text: str | None, user_id: str) -> bool:
    """Return whether free text has a user ID that is no part of a longer word, name or address.

    Args:
        text: An actor or a reason; None if there is none.
        user_id: The user.
    """
    return text is not None and re.search(_word(user_id), text) is not None


def _requests_naming(transaction: EraseTransaction, user_id: str) -> list[str]:
    return [
        one.job_id
        for one in transaction.find_requests_naming(user_id)
        if one.is_for_user or mentions(one.actor, user_id) or mentions(one.reason, user_id)
    ]


def _redacted_words(text: str | None, user_id: str, *, at_most: int) -> str | None:
    return text and re.sub(_word(user_id), ERASED, text)[:at_most]


def _word(user_id: str) -> str:
    return rf"(?<![\w.@-]){re.escape(user_id)}(?![\w@-]|\.\w)"


def _without(user_id: str, job: FinishedJobDTO) -> FinishedJobDTO:
    entry, outcome, audit = job.job, job.outcome, job.job.audit
    is_users = entry.user_id == user_id
    rejected, by_user = outcome.rejected, outcome.created_by_user
    if rejected:
        ids = rejected.unknown, rejected.malformed
        rejected = RejectedIdsDTO(*(redacted(one, user_id) for one in ids))
    if by_user and user_id in by_user:
        counts = Counter({ERASED: 0})
        for name, count in by_user.items():
            counts[ERASED if name == user_id else name] += count
        by_user = dict(counts)
    actor = _redacted_words(audit.actor, user_id, at_most=ACTOR_LENGTH)
    reason = _redacted_words(audit.reason, user_id, at_most=REASON_LENGTH)
    if is_users and reason:
        reason = ERASED  # it is free text about the user
    audit = replace(audit, actor=actor, reason=reason)
    return replace(
        job,
        job=replace(entry, user_id=None if is_users else entry.user_id, audit=audit),
        outcome=replace(
            outcome,
            error=redacted(outcome.error, user_id),
            rejected=rejected,
            created_by_user=by_user,
        ),
    )


def _details(job: FinishedJobDTO) -> tuple[object, ...]:
    outcome = job.outcome
    return job.job, job.job.audit, outcome.error, outcome.rejected, outcome.created_by_user
