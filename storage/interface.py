"""The storage interface, by role: the operations that use cases need.

The docstring of each method states its obligations; each "must" has a conformance test that runs on
PostgreSQL and on the reference model. Every method may raise
:class:`~storage.errors.StorageError`; a transaction that raised it can only be left.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    JobPageDTO,
    NamingRequestDTO,
    PruneCountsDTO,
    PrunedBatchDTO,
    RequestedGrantsDTO,
    UserInterviewAccessDTO,
)
from storage.readers import GrantReader, HasFileno, JobReader, OutboxMonitor

__all__ = [
    "MAX_HEADERS_BYTES",
    "MAX_REQUEST_BYTES",
    "ChunkDone",
    "Erasure",
    "GrantReader",
    "GrantStore",
    "HasFileno",
    "InterviewStore",
    "JobLocks",
    "JobReader",
    "JobStorage",
    "JobTransaction",
    "Ledger",
    "Outbox",
    "OutboxMonitor",
    "Retention",
    "Storage",
    "Transaction",
    "Transactions",
]

ChunkDone = Callable[[int, int], None]
"""Called after each chunk with the number of grants processed so far and the total."""

MAX_REQUEST_BYTES = 32_000_000
"""Approximate memory of the largest request read from the outbox, at 100 bytes an interview ID."""

MAX_HEADERS_BYTES = 10_000
"""Largest size of the headers of an outbox request, as stored and as text in characters."""


class JobLocks(Protocol):
    """Mutual exclusion of transactions that execute the same job."""

    @abstractmethod
    def lock_jobs(self, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
        """Lock these jobs until the transaction ends.

        With ``wait`` the caller must hold no other lock. A holder whose worker has stopped
        responding must be ended; a responding one must never be.

        Args:
            job_ids: Distinct job IDs.
            wait: Whether to block for a moment on locks that another transaction holds.

        Returns:
            The IDs that were locked: without ``wait`` those that were free; with it all of them,
            except that a lock of another database role is ignored.

        Raises:
            JobBusyError: with ``wait``, if a responding transaction keeps holding one of the locks.
        """


class Ledger(Protocol):
    """Finished jobs with their outcomes, and cancellation requests."""

    @abstractmethod
    def find_jobs(self, job_ids: Collection[str]) -> FoundJobsDTO:
        """Find the finished jobs, the pruned ones and the cancellation requests among these IDs.

        Must see what other transactions committed before this call. Lock the jobs first: otherwise
        a transaction that finishes one of them may be about to commit.
        """

    @abstractmethod
    def request_cancellation(self, job_id: str) -> None:
        """Record that a job is to be cancelled. Idempotent."""

    @abstractmethod
    def find_cancelled_jobs(self, job_ids: Collection[str]) -> frozenset[str]:
        """Find the cancellation requests among these job IDs.

        Must see what other transactions committed before this call.
        """

    @abstractmethod
    def record_jobs(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """Insert finished jobs in the ledger, with all IDs that they rejected.

        Must block on a transaction that has recorded one of them and is still open. The primary
        key decides between transactions that execute one job without excluding each other.

        Args:
            jobs: Jobs with distinct job IDs; ``finished_at`` is ignored and set by the storage.

        Raises:
            LedgerConflictError: if the ledger has one of the jobs; nothing is recorded.
            LedgerError: if the database did not insert every row.
        """


class Retention(Protocol):
    """Removal of old jobs, of which a tombstone remains."""

    @abstractmethod
    def lock_pruning(self) -> bool:
        """Exclude other transactions that prune until this one ends.

        Must not block.

        Returns:
            Whether no other transaction prunes.
        """

    @abstractmethod
    def prune_jobs(
        self, older_than: timedelta, limit: int, *, since: datetime | None = None
    ) -> PrunedBatchDTO:
        """Replace the oldest ledger rows by tombstones, and delete what belongs to their jobs.

        Must skip jobs that another transaction has locked, and must never block on them. To others
        a job must be either finished or pruned at any moment.

        Args:
            older_than: Minimum time since the job finished, by the clock of the storage.
            limit: Largest number of jobs.
            since: Jobs that finished before are not considered.
        """

    @abstractmethod
    def prune_cancellations(self, older_than: timedelta, limit: int) -> PruneCountsDTO:
        """Delete the oldest cancellation requests.

        One whose job is not in the ledger must leave a tombstone: a late delivery of its job stays
        cancelled.

        Args:
            older_than: Minimum time since the request, by the clock of the storage.
            limit: Largest number of requests.
        """

    @abstractmethod
    def count_prunable(self, older_than: timedelta) -> PruneCountsDTO:
        """Count what pruning everything of this age would delete."""


class Erasure(Protocol):
    """Removal of one person's ID from jobs and requests."""

    @abstractmethod
    def find_jobs_naming(self, user_id: str, limit: int, *, after: str = "") -> JobPageDTO:
        """Find jobs that name a user, within one page of the ledger.

        Must find each job of the user, and each whose actor, reason, error, rejected IDs or counts
        by user contain the user ID as or within a string. May find others that contain it.

        Args:
            user_id: The user.
            limit: Largest number of jobs of the page, of any user.
            after: The page begins after this job ID.
        """

    @abstractmethod
    def replace_details(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """Replace the user, the actor, the reason, the error and the details of finished jobs.

        Must change nothing else, and ignore jobs that are not in the ledger any more.
        """

    @abstractmethod
    def find_requests_naming(self, user_id: str) -> Sequence[NamingRequestDTO]:
        """Return the outbox requests that may name a user, in the order of their job IDs."""


class GrantStore(Protocol):
    """Grants, and the checks that precede them."""

    @abstractmethod
    def find_unknown_interviews(
        self, interview_ids: Collection[str], *, granted_to: str | None = None
    ) -> frozenset[str]:
        """Find the IDs that no interview has.

        The interviews that exist must not be deleted until this transaction ends: a delete blocks.
        Interviews that the user ``granted_to`` already has access to are exempt, since a grant
        keeps its interview from being deleted.

        Args:
            interview_ids: Distinct canonical interview IDs.
            granted_to: ID of the only user that the grants are for, if there is one.
        """

    @abstractmethod
    def get_existing_user_access(
        self, user_ids: Collection[str]
    ) -> Sequence[UserInterviewAccessDTO]:
        """Return all grants of these users. The order is not specified.

        Only the demo and tests read it.
        """

    @abstractmethod
    def bulk_create_user_access(
        self, requested: Sequence[RequestedGrantsDTO], on_chunk: ChunkDone | None = None
    ) -> Sequence[int]:
        """Create the missing grants, each of which names the job that requested it.

        Must neither change nor count an existing grant, also one that another transaction created
        after this one began. A grant that is requested more than once must be counted for the first
        of its requests only, and must name that request's job.

        Args:
            requested: Grants by user; a user may appear more than once.
            on_chunk: Must be called after each chunk with increasing numbers, the last time with
                the total, and not at all if no grant is requested.

        Returns:
            The number of rows that each element of ``requested`` added, in the same order.

        Raises:
            StorageError: with the code of a foreign key violation if an interview does not exist;
                nothing is created.
        """


class InterviewStore(Protocol):
    """Interviews and interview attempts."""

    @abstractmethod
    def get_interview_details(self, interview_ids: Collection[str]) -> Sequence[InterviewDTO]:
        """Return the interviews that have these IDs. The order is not specified.

        They must not be deleted until this transaction ends: a delete blocks.
        """

    @abstractmethod
    def create_interview_attempt(self, attempts: Sequence[InterviewAttemptDTO]) -> None:
        """Insert interview attempts.

        Raises:
            StorageError: with the code of a foreign key violation if an interview does not exist.
        """


class Outbox(Protocol):
    """Requests that services insert in transactions of their own."""

    @abstractmethod
    def lock_due_requests(
        self, limit: int, *, page_bytes: int = MAX_REQUEST_BYTES
    ) -> Sequence[AccessRequestDTO]:
        """Lock requests that are due and return them: unsent ones first, then the longest due.

        Must skip requests that another open transaction has locked, and must never block on them.
        Must return every row that a service can have written, whatever its values.

        Args:
            limit: Largest number of requests.
            page_bytes: Approximate memory of the IDs of all requests together. A first request may
                exceed it, up to :data:`MAX_REQUEST_BYTES`; a larger request must be returned
                without its IDs. Headers beyond :data:`MAX_HEADERS_BYTES` must be returned empty.
        """

    @abstractmethod
    def delete_finished_requests(self, job_ids: Collection[str]) -> frozenset[str]:
        """Delete the requests among these whose job has finished, and return their job IDs.

        A pruned job has finished.
        """

    @abstractmethod
    def reschedule_requests(self, job_ids: Collection[str], *, sent: bool) -> None:
        """Make requests due again after their present age, but at least 1 s and at most 60 s.

        A request that was ever enqueued and has an ETA must be due again only after half the time
        until its ETA, if that is later: its message waits in Redis.

        Args:
            job_ids: Job IDs of requests that this transaction has locked.
            sent: Whether they have just been enqueued.
        """


class JobTransaction(JobLocks, Ledger, Protocol):
    """What every use case that settles jobs needs."""


class Transaction(JobTransaction, Retention, Erasure, GrantStore, InterviewStore, Outbox, Protocol):
    """An open transaction at isolation level READ COMMITTED or stricter."""


T_co = TypeVar("T_co", covariant=True)


class Transactions(Protocol[T_co]):
    """A source of transactions. Safe in threads."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[T_co]:
        """Return a context manager that runs one transaction.

        At the end of the block everything must be committed durably and become visible at once. If
        the block raises, nothing must be kept.

        Raises:
            StorageError: if the transaction is not known to be committed, as when the connection is
                lost inside COMMIT. The ledger then holds the truth.
        """


class JobStorage(Transactions[JobTransaction], JobReader, Protocol):
    """The storage as the control service needs it."""


class Storage(Transactions[Transaction], JobReader, GrantReader, OutboxMonitor, Protocol):
    """A storage of interviews, grants, attempts, the ledger and the outbox. Safe in threads."""
