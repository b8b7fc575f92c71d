"""The use case of pruning: old jobs are deleted in small transactions, so that no lock is long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from storage.dtos import PruneCountsDTO
from storage.interface import Retention, Transactions

SHORTEST_RETENTION = timedelta(days=1)
"""Far longer than any transaction. A younger job's transaction may be open while it is pruned."""

# Rows of one transaction. Each has an advisory lock in a table of about 6,400 by default. Most of a
# transaction's time does not depend on its size: small ones would prune less than full load adds.
_FIRST_SIZE, _SMALLEST, _LARGEST = 1_000, 500, 2_000
_SECONDS = 0.4  # of one transaction, to which the size is adapted


class PruneTransaction(Retention, Protocol):
    """What this use case needs of a transaction."""


@dataclass(frozen=True, slots=True)
class PrunedBatch:
    """One transaction of a run.

    Attributes:
        counts: What it deleted; None if another process prunes, so that it deleted nothing.
        seconds: Its duration.
    """

    counts: PruneCountsDTO | None
    seconds: float


def prune(storage: Transactions[PruneTransaction], older_than: timedelta) -> Iterator[PrunedBatch]:
    """Prune everything of an age. Each step of the iteration is one transaction.

    Between two steps no lock is held, so that the caller may pause or end. A later run continues.

    Args:
        storage: The storage with the ledger.
        older_than: Minimum age, at least :data:`SHORTEST_RETENTION`.

    Raises:
        ValueError: if the age is too short.
        StorageError: if the database failed; the batches before are pruned.
    """
    if older_than < SHORTEST_RETENTION:
        raise ValueError(f"got {older_than}, expected {SHORTEST_RETENTION} or more")
    size, last, is_finished = _FIRST_SIZE, None, False
    while not is_finished:
        began = time.monotonic()
        counts, last, is_finished = _prune_batch(storage, older_than, size, last)
        seconds = time.monotonic() - began
        yield PrunedBatch(counts, seconds)
        fitting = int(size * _SECONDS / max(seconds, 0.001))
        size = max(min(fitting, size * 2, _LARGEST), _SMALLEST)


def _prune_batch(
    storage: Transactions[PruneTransaction],
    older_than: timedelta,
    size: int,
    last: datetime | None,
) -> tuple[PruneCountsDTO | None, datetime | None, bool]:
    """Return the counts, the time of the last job, and whether nothing is left."""
    with storage.transaction() as transaction:
        if not transaction.lock_pruning():
            return None, last, False
        jobs = transaction.prune_jobs(older_than, size, since=last)
        cancellations = transaction.prune_cancellations(older_than, size)
    is_finished = jobs.last is None and cancellations.cancellations < size
    return jobs.counts + cancellations, jobs.last, is_finished
